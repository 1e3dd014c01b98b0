"""What the public functions refuse: each check names the argument, what it needs and what it
got."""

from __future__ import annotations

import numbers

import torch
from torch._C._functorch import is_functorch_wrapped_tensor as _is_wrapped

from . import function
from .composite import bshd
from .spec import RopeSpec

LAYOUTS = {"bshd": 4, "bhsd": 4, "thd": 3}
_LARGEST = torch.finfo(torch.float64).max
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refusal(name: str, what: str, got, error: type[Exception] = ValueError) -> Exception:
    """The error for argument `name`: what it must be, and what it is."""
    return error(f"{name} must be {what}, got {kind(got)}")


def kind(value) -> str:
    """A value as an error shows it: a tensor by its dtype, shape and device."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    if isinstance(value, torch.Size):
        return str(list(value))
    if isinstance(value, tuple | list) and any(isinstance(v, torch.Tensor) for v in value):
        return f"{type(value).__name__} ({', '.join(map(kind, value))})"
    return f"{type(value).__name__} {value!r}"


def one_of(name: str, value, choices) -> None:
    """Raise ValueError unless `value` is among the strings `choices`."""
    legal = isinstance(value, str) and value in choices
    if not legal:
        raise refusal(name, f"one of {', '.join(map(repr, choices))}", value)


def is_dense(x) -> bool:
    """Whether a tensor lies in memory at strides: neither sparse nor nested nor packed."""
    return x.layout == torch.strided and not x.is_nested


def _dense(name: str, what: str, value) -> None:
    """A tensor, and a dense one; `what` it must be."""
    if not isinstance(value, torch.Tensor):
        raise refusal(name, what, value, TypeError)
    if not is_dense(value):
        got = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be dense (torch.strided), got {got}")


def flag(name: str, value) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise refusal(name, "True or False", value, TypeError)


def floats(name: str, value, like=None, device=None) -> None:
    """A floating tensor; of the dtype of `like` and on its device, or on `device`, if given."""
    _dense(name, "a tensor", value)
    words = "float32, float64, bfloat16 or float16"
    if value.dtype not in _FLOATS:
        raise refusal(name, words, value.dtype, TypeError)
    if like is not None:
        if value.dtype != like.dtype:
            raise refusal(name, f"{like.dtype} like its input", value, TypeError)
        device = like.device
    if device is not None and value.device != device:
        raise refusal(name, f"on {device}", value)


def ints(name: str, value, device) -> None:
    """An int32 or int64 tensor on `device`."""
    _dense(name, "an int32 or int64 tensor", value)
    if value.dtype not in (torch.int32, torch.int64):
        raise refusal(name, "int32 or int64", value.dtype, TypeError)
    if value.device != device:
        raise refusal(name, f"on {device}", value)


def finite(name: str, value) -> None:
    """Raise ValueError for NaN and infinity in a tensor whose values can be looked at: on the CPU,
    outside of a trace."""
    if value is None or value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or _is_wrapped(value):
        return
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite, got {value[~value.isfinite()][0].item()}")


def heads(q, k, spec, layout, names=("q", "spec")) -> torch.Size:
    """Check q and k against layout and spec; (batch, seqlen). `names`: of q and spec in errors."""
    one_of("layout", layout, LAYOUTS)
    if not isinstance(spec, RopeSpec):
        raise refusal(names[1], "a RopeSpec", spec, TypeError)
    floats(names[0], q)
    given = {names[0]: q}
    if k is not None:
        floats("k", k, like=q)
        given["k"] = k
    for name, x in given.items():
        if x.dim() != LAYOUTS[layout]:
            raise refusal(name, f"of {LAYOUTS[layout]} dimensions for layout {layout!r}", x)
        if x.shape[-1] != spec.head_dim:
            raise refusal(name, f"of the spec's head_dim {spec.head_dim} in its last dimension", x)
    shape = bshd(q, layout).shape[:2]
    if k is not None and bshd(k, layout).shape[:2] != shape:
        raise refusal("k", f"of q's batch and seqlen {tuple(shape)}", k)
    return shape


def same_pairs(from_spec, to_spec) -> None:
    """Check that two specs rotate the same pairs of the same head, by the same position axes."""
    if not isinstance(to_spec, RopeSpec):
        raise refusal("to_spec", "a RopeSpec", to_spec, TypeError)
    for name in ("head_dim", "rotary_dim", "rotary_offset", "interleaved", "axis_map"):
        need, got = getattr(from_spec, name), getattr(to_spec, name)
        if need != got:
            raise ValueError(f"to_spec must have from_spec's {name} {need!r}, got {got!r}")


def projection(x, weights, biases, spec) -> None:
    """Check hidden states, weights and biases against each other and the spec."""
    if not isinstance(spec, RopeSpec):
        raise refusal("spec", "a RopeSpec", spec, TypeError)
    floats("x", x)
    if x.dim() not in (2, 3):
        raise refusal("x", "[batch, seqlen, d_model] or [tokens, d_model]", x)
    for letter, weight, bias in zip("qkv", weights, biases, strict=True):
        if weight is None and letter == "v":
            if bias is not None:
                raise refusal("v_bias", "None without v_weight", bias)
            continue
        name = f"{letter}_weight"
        floats(name, weight, like=x)
        fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1]
        if not fits:
            raise refusal(name, f"[heads * head_dim, {x.shape[-1]}]", weight)
        fits = weight.shape[0] > 0 and weight.shape[0] % spec.head_dim == 0
        if not fits:
            raise refusal(name, f"of a multiple of head_dim {spec.head_dim} rows", weight)
        if bias is not None:
            floats(f"{letter}_bias", bias, like=x)
            if bias.shape != weight.shape[:1]:
                raise refusal(f"{letter}_bias", f"[{weight.shape[0]}]", bias)


def norms(q_norm, k_norm, weights, eps, scope, precision, spec) -> None:
    """Check the RMSNorm weights beside the projection's weights."""
    one_of("norm_scope", scope, ("head", "all"))
    number = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
    if not number or not 0 <= eps <= _LARGEST:
        raise refusal("norm_eps", "a finite number >= 0", eps)
    given = zip(("q_norm_weight", "k_norm_weight"), (q_norm, k_norm), weights[:2], strict=True)
    for name, norm, weight in given:
        if norm is None:
            continue
        if precision == "hf":
            what = "None with precision='hf', where the norm is the model's own module"
            raise refusal(name, what, norm)
        floats(name, norm, device=weight.device)
        size = weight.shape[0] if scope == "all" else spec.head_dim
        if tuple(norm.shape) != (size,):
            raise refusal(name, f"[{size}]", norm)


def tables(q, k, cos, sin, unsqueeze_dim) -> str:
    """Check the arguments of apply_rotary_pos_emb; the layout of q and k."""
    legal = isinstance(unsqueeze_dim, int) and not isinstance(unsqueeze_dim, bool)
    if not legal or unsqueeze_dim not in (1, 2):
        raise refusal("unsqueeze_dim", "1 (heads before tokens) or 2", unsqueeze_dim)
    layout = "bhsd" if unsqueeze_dim == 1 else "bshd"
    floats("q", q)
    if q.dim() != 4:
        raise refusal("q", "of 4 dimensions", q)
    batch, seqlen, _, head_dim = bshd(q, layout).shape
    if k is not None:
        floats("k", k, like=q)
        if k.dim() != 4:
            raise refusal("k", "of 4 dimensions", k)
        fits = (*bshd(k, layout).shape[:2], k.shape[-1]) == (batch, seqlen, head_dim)
        if not fits:
            raise refusal("k", f"of q's batch, seqlen and head_dim {(batch, seqlen, head_dim)}", k)
    for name, table in (("cos", cos), ("sin", sin)):
        floats(name, table, device=q.device)
        fits = table.dim() == 3 and table.shape[0] in (1, batch) and table.shape[1] == seqlen
        if not fits:
            raise refusal(name, f"[1 or {batch}, {seqlen}, rotary_dim]", table)
        width = table.shape[2]
        fits = width % 2 == 0 and 0 < width <= head_dim
        if not fits:
            raise refusal(name, f"of even rotary_dim, at most head_dim {head_dim}", table)
    fits = sin.shape[1:] == cos.shape[1:] and sin.dtype == cos.dtype
    if not fits:
        raise refusal("sin", f"like cos, {kind(cos)}", sin)
    return layout


def outputs(out, inputs, names, shapes, *, in_place: bool) -> tuple | None:
    """`out` as a tuple, after checking that the results fit and that nothing is to be derived.

    inputs: every argument, of which the first stand in the place of the results.
    in_place: whether an output may be the input of the same rank (each pair is read before it is
    written); any other shared memory is refused.
    """
    if out is None:
        return None
    given = [t for t in inputs if isinstance(t, torch.Tensor)]
    if not isinstance(out, tuple | list) or len(out) != len(names):
        raise refusal("out", f"a tuple ({', '.join(names)})", out)
    tensors = [*given, *(t for t in out if isinstance(t, torch.Tensor))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise refusal("out", "None unless gradients are disabled (torch.no_grad)", out)
    if function.forward_mode():
        raise refusal("out", "None in torch.func transforms and in forward mode", out)
    for i, (name, target, shape) in enumerate(zip(names, out, shapes, strict=True)):
        if shape is None:
            if target is not None:
                raise refusal(f"out: {name}", "None", target)
            continue
        floats(f"out: {name}", target, like=given[0])
        if tuple(target.shape) != tuple(shape):
            raise refusal(f"out: {name}", str(list(shape)), target)
        if torch.compiler.is_compiling() or target.device.type == "meta":
            continue
        if _overlaps_itself(target):
            raise refusal(f"out: {name}", "of elements that share no memory", target)
        replaced = in_place and _same_memory(target, inputs[i])
        others = [t for t in given if not (replaced and t is inputs[i])]
        others += [t for t in out[:i] if t is not None]
        if any(_overlap(target, t) for t in others):
            raise refusal(f"out: {name}", "memory of its own, or the input it replaces", target)
    return tuple(out)


def _same_memory(a, b) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _overlap(a, b) -> bool:
    """Whether two tensors may share an element: their spans of memory meet, and they are not
    different columns of the same rows (slices of one packed projection)."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    size = a.element_size()
    distance = b.data_ptr() - a.data_ptr()
    if distance >= _extent(a) * size or -distance >= _extent(b) * b.element_size():
        return False
    if b.element_size() != size:
        return True
    distance //= size
    for row in set(a.stride()) & set(b.stride()):
        if row > 1 and all(s < row or s % row == 0 for s in (*a.stride(), *b.stride())):
            column = distance % row
            if _extent(a, row) <= column and column + _extent(b, row) <= row:
                return False
    return True


def _extent(x, below=float("inf")) -> int:
    """Elements from the first to the last, along the dimensions with a stride less than `below`."""
    steps = zip(x.shape, x.stride(), strict=True)
    return 1 + sum((n - 1) * s for n, s in steps if s < below)


def _overlaps_itself(x) -> bool:
    """Whether two elements may be in one place: some dimension's steps are shorter than a row."""
    steps = sorted((s, n) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1)
    extent = 1
    for step, n in steps:
        if step < extent:
            return x.numel() > 0
        extent += (n - 1) * step
    return False
