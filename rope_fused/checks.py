"""What the public functions refuse: each check names the argument, what it needs and what it
got."""

from __future__ import annotations

import numbers

import torch

from .composite import bshd
from .spec import RopeSpec

LAYOUTS = {"bshd": 4, "bhsd": 4, "thd": 3}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def need(legal: bool, name: str, what: str, got, error=ValueError) -> None:
    """Raise `error` unless `legal`."""
    if not legal:
        raise error(f"{name} must be {what}, got {kind(got)}")


def kind(value) -> str:
    """A value as an error shows it: a tensor by its dtype, shape and device."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    if isinstance(value, torch.Size):
        return str(list(value))
    return f"{type(value).__name__} {value!r}"


def one_of(name: str, value, choices) -> None:
    """Raise ValueError unless `value` is among the strings `choices`."""
    legal = isinstance(value, str) and value in choices
    need(legal, name, f"one of {', '.join(map(repr, choices))}", value)


def floats(name: str, value, like=None, device=None) -> None:
    """A floating tensor; of the dtype of `like` and on its device, or on `device`, if given."""
    need(isinstance(value, torch.Tensor), name, "a tensor", value, TypeError)
    words = "float32, float64, bfloat16 or float16"
    need(value.dtype in _FLOATS, name, words, value.dtype, TypeError)
    if like is not None:
        need(value.dtype == like.dtype, name, f"{like.dtype} like its input", value, TypeError)
        device = like.device
    need(device is None or value.device == device, name, f"on {device}", value)


def ints(name: str, value, device) -> None:
    """An int32 or int64 tensor on `device`."""
    need(isinstance(value, torch.Tensor), name, "an int32 or int64 tensor", value, TypeError)
    need(value.dtype in (torch.int32, torch.int64), name, "int32 or int64", value.dtype, TypeError)
    need(value.device == device, name, f"on {device}", value)


def heads(q, k, spec, layout) -> torch.Size:
    """Check q and k against layout and spec; (batch, seqlen)."""
    one_of("layout", layout, LAYOUTS)
    need(isinstance(spec, RopeSpec), "spec", "a RopeSpec", spec, TypeError)
    floats("q", q)
    given = {"q": q}
    if k is not None:
        floats("k", k, like=q)
        given["k"] = k
    for name, x in given.items():
        what = f"of {LAYOUTS[layout]} dimensions for layout {layout!r}"
        need(x.dim() == LAYOUTS[layout], name, what, x)
        what = f"of the spec's head_dim {spec.head_dim} in its last dimension"
        need(x.shape[-1] == spec.head_dim, name, what, x)
    shape = bshd(q, layout).shape[:2]
    if k is not None:
        what = f"of q's batch and seqlen {tuple(shape)}"
        need(bshd(k, layout).shape[:2] == shape, "k", what, k)
    return shape


def projection(x, weights, biases, spec) -> None:
    """Check hidden states, weights and biases against each other and the spec."""
    need(isinstance(spec, RopeSpec), "spec", "a RopeSpec", spec, TypeError)
    floats("x", x)
    need(x.dim() in (2, 3), "x", "[batch, seqlen, d_model] or [tokens, d_model]", x)
    for letter, weight, bias in zip("qkv", weights, biases, strict=True):
        if weight is None and letter == "v":
            need(bias is None, "v_bias", "None without v_weight", bias)
            continue
        name = f"{letter}_weight"
        floats(name, weight, like=x)
        fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1]
        need(fits, name, f"[heads * head_dim, {x.shape[-1]}]", weight)
        fits = weight.shape[0] > 0 and weight.shape[0] % spec.head_dim == 0
        need(fits, name, f"of a multiple of head_dim {spec.head_dim} rows", weight)
        if bias is not None:
            floats(f"{letter}_bias", bias, like=x)
            need(bias.shape == weight.shape[:1], f"{letter}_bias", f"[{weight.shape[0]}]", bias)


def norms(q_norm, k_norm, weights, eps, scope, precision, spec) -> None:
    """Check the RMSNorm weights beside the projection's weights."""
    one_of("norm_scope", scope, ("head", "all"))
    number = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
    need(number and 0 <= eps < float("inf"), "norm_eps", "a finite number >= 0", eps)
    for name, norm, weight in zip(("q_norm_weight", "k_norm_weight"), (q_norm, k_norm), weights):  # noqa: B905
        if norm is None:
            continue
        what = "None with precision='hf', where the norm is the model's own module"
        need(precision != "hf", name, what, norm)
        floats(name, norm, device=weight.device)
        size = weight.shape[0] if scope == "all" else spec.head_dim
        need(tuple(norm.shape) == (size,), name, f"[{size}]", norm)


def tables(q, k, cos, sin, unsqueeze_dim) -> str:
    """Check the arguments of apply_rotary_pos_emb; the layout of q and k."""
    legal = unsqueeze_dim in (1, 2)
    need(legal, "unsqueeze_dim", "1 (heads before tokens) or 2", unsqueeze_dim)
    layout = "bhsd" if unsqueeze_dim == 1 else "bshd"
    floats("q", q)
    need(q.dim() == 4, "q", "of 4 dimensions", q)
    batch, seqlen, _, head_dim = bshd(q, layout).shape
    if k is not None:
        floats("k", k, like=q)
        need(k.dim() == 4, "k", "of 4 dimensions", k)
        fits = (*bshd(k, layout).shape[:2], k.shape[-1]) == (batch, seqlen, head_dim)
        need(fits, "k", f"of q's batch, seqlen and head_dim {(batch, seqlen, head_dim)}", k)
    for name, table in (("cos", cos), ("sin", sin)):
        floats(name, table, device=q.device)
        fits = table.dim() == 3 and table.shape[0] in (1, batch) and table.shape[1] == seqlen
        need(fits, name, f"[1 or {batch}, {seqlen}, rotary_dim]", table)
        width = table.shape[2]
        fits = width % 2 == 0 and 0 < width <= head_dim
        need(fits, name, f"of even rotary_dim, at most head_dim {head_dim}", table)
    fits = sin.shape[1:] == cos.shape[1:] and sin.dtype == cos.dtype
    need(fits, "sin", f"like cos, {kind(cos)}", sin)
    return layout


def outputs(out, inputs, names, shapes) -> tuple | None:
    """`out` as a tuple, after checking that the results fit and that nothing is to be derived."""
    if out is None:
        return None
    given = [t for t in inputs if isinstance(t, torch.Tensor)]
    derived = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    need(not derived, "out", "None unless gradients are disabled (torch.no_grad)", out)
    fits = isinstance(out, tuple | list) and len(out) == len(names)
    need(fits, "out", f"a tuple ({', '.join(names)})", out)
    for name, target, shape in zip(names, out, shapes, strict=True):
        if shape is None:
            need(target is None, f"out: {name}", "None", target)
            continue
        floats(f"out: {name}", target, like=given[0])
        need(tuple(target.shape) == tuple(shape), f"out: {name}", str(list(shape)), target)
        _check_overlap(name, target, given)
    return tuple(out)


def _check_overlap(name, target, given) -> None:
    """A target may be an input itself (each pair is read before it is written), not part of one."""
    for source in given:
        same = (
            target.data_ptr() == source.data_ptr()
            and target.shape == source.shape
            and target.stride() == source.stride()
        )
        what = "an input itself or memory of its own"
        need(same or not _overlap(target, source), f"out: {name}", what, target)


def _overlap(a, b) -> bool:
    if a.device.type == "meta" or torch.compiler.is_compiling():
        return False
    spans = []
    for t in (a, b):
        if t.numel() == 0:
            return False
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]
