"""The numerical self-test of a patch: the rewritten head of an attention against its own.

It runs on a twin, which has the class and the weights of the module in float64 and nothing else of
it: no hooks, no gradients, no shared memory. Both functions stop right after the rotation, so that
neither mask, cache nor attention kernel is needed, and what is compared is what was replaced.
"""

import dataclasses

import torch
from torch import nn

from .handler import is_plain_linear, is_plain_tensor
from .rewrite import rewrite

_ULP = 2.0**-24  # half a unit in the last place of a float32 in [1, 2)


def self_test(module, anatomy, handler, rotary, *, fuse):
    """Why the rewritten forward of ``module`` differs from its own, in words; "" if it does not.

    rotary   transformers' rotary module, fresh from the configuration, on the CPU
    fuse     test the fused projection, or the rotation alone

    The budget: rounding puts transformers' float32 frequencies and angles off by no more than
    8 units of 2**-24 of a position in radians, its functions and its norms (float32, whatever comes
    in) by no more than 8 units. A rotation keeps the length of a pair, which is below 2 max|q|.
    With precision="hf" both sides use the same tables: the rotation alone agrees in every bit, and
    a fused projection sums ``width`` products in another order.
    """
    generator = torch.Generator().manual_seed(0)
    device = _device(module)
    # A method of the module may read more of its children than the statements of forward do.
    methods = any(hasattr(type(module), name) for name in anatomy.children)
    twin = _twin(module, device, generator, None if methods else anatomy.children)
    for name in handler.projections:
        if not is_plain_linear(twin._modules[name]):
            twin._modules[name] = _linear_like(module._modules[name], device, generator)
    first = twin._modules.get(handler.projections[0]) if handler.projections else None
    width = first.in_features if first is not None else module.config.hidden_size
    x = _random((2, 7, width), device, generator)
    # Which backend runs on which device is not the question here; "auto" runs on all of them.
    handler = dataclasses.replace(handler, backend="auto")
    original = rewrite(anatomy, None, fuse=False, probe=True)
    replaced = rewrite(anatomy, handler, fuse=fuse, probe=True)
    for positions in _positions(handler.spec):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if fuse and not handler.fuses(twin, positions):
                return "its weights cannot be tried in the fused projection"
            tables = tuple(t.to(device) for t in rotary(x.cpu(), positions))
            args, kwargs = _arguments(anatomy, x, tables, positions.to(device))
            expected = original(twin, *args, **kwargs)
            got = replaced(twin, *args, **kwargs)
        if handler.precision == "exact":
            budget = 2 * _ULP * (8 * positions.double() + 8)
        else:
            budget = torch.full_like(positions, width * 2.0**-50 if fuse else 0.0, dtype=x.dtype)
        for name, a, b in zip(anatomy.results, got, expected, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name} is {b.dtype} {[*b.shape]}, rewritten it is {a.dtype} {[*a.shape]}"
            limit = budget.to(device)[:, None, :, None] * b.abs().max()
            if not bool(((a - b).abs() <= limit).all()):
                worst = ((a - b).abs().max() / b.abs().max()).item()
                return f"{name} differs by {worst:.1e} of its largest element"
    return ""


def _positions(spec):
    """Two rows that differ and start again, on both sides of the length where tables switch."""
    switch = None if spec is None else spec.switch_length
    for top in (1000,) if switch is None else (switch - 1, switch):
        # Both rows end up equally long: transformers chooses its tables by the batch, we by row.
        rows = [[0, 1, 2, 0, 1, top, 3], [top, 5, 6, 7, 8, 0, 1]]
        yield torch.tensor(rows, device="cpu").clamp(max=top)


def _arguments(anatomy, x, tables, positions):
    """The arguments, after self, that ``anatomy``'s forward takes: by its parameters' names."""
    known = {"position_embeddings": tables, "position_ids": positions}
    arguments = anatomy.tree.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][1:]
    given = {name: known.get(name) for name in [*names[1:], *(a.arg for a in arguments.kwonlyargs)]}
    if arguments.kwarg:
        given["position_ids"] = positions
    return (x,), given


def _device(module):
    """Where the parameters of ``module`` are, or the CPU if float64 cannot be computed there."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type in ("meta", "mps") else device


def _linear_like(module, device, generator):
    """A plain Linear with the features of ``module``, which may be any kind of linear layer."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    weight = _random(linear.weight.shape, device, generator, linear.in_features**-0.5)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _twin(module, device, generator, children=None):
    """A copy of ``module`` and its ``children`` (names; None: all), in float64, without hooks."""
    if module is None:
        return None
    # Not by __init__, which draws random numbers, nor by deepcopy, which would copy the hooks.
    twin = object.__new__(type(module))
    state = dict(module.__dict__)
    for name in ("forward", "_hf_hook", "_old_forward"):
        state.pop(name, None)
    state |= {k: type(v)() for k, v in state.items() if "_hooks" in k and isinstance(v, dict)}
    for kind in ("_parameters", "_buffers"):
        state[kind] = {n: _copy(t, device, generator) for n, t in state[kind].items()}
    state["_modules"] = {
        name: _twin(child, device, generator)
        for name, child in module._modules.items()
        if children is None or name in children
    }
    twin.__dict__.update(state)
    return twin


def _copy(t, device, generator):
    """``t`` in float64, or random numbers of its shape where it has no values to compute with."""
    if t is None:
        return None
    if is_plain_tensor(t, t.dim()) and t.device.type != "meta":
        copy = t.detach().to(device, torch.float64, copy=True)
        if bool(copy.isfinite().all()):
            return copy
    return _random(t.shape, device, generator, max([1, *t.shape[-1:]]) ** -0.5)


def _random(shape, device, generator, scale=1.0):
    """Numbers of float64 that are the same on every device, and no step of the global generator."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (scale * x).to(device)
