"""The numerical self-test of a patch: the rewritten head of an attention against its own.

Both run on one twin and stop right after the last rotation, so that neither cache nor attention
kernel is needed; what is compared is every local variable that the rest of the forward reads.
"""

import torch

from .handler import PROJECTION
from .recognise import arguments
from .rotary import budget
from .source import rewrite


def self_test(source, twin, handler, names, kinds, x):
    """Why the rewritten forward of ``source`` differs from its own, in words; "" if it does not.

    twin   of the module, see twin.py
    names  which calls are rewritten, as :func:`source.rewrite` takes them
    kinds  the Tables that the attention may be given
    x      hidden states [2, 7, width], float64

    With precision="hf" both sides use the same tables: the rotation alone agrees in every bit, and
    a fused projection sums ``width`` products in another order.
    """
    original = rewrite(source, Plain(), (), probe=True)
    replaced = rewrite(source, handler, names, probe=True)
    for kind in kinds:
        for positions in kind.positions():
            args, kwargs = arguments(source, twin, x, kind, kinds, positions)
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                if handler.projections and handler.level(twin) != PROJECTION:
                    return "its weights cannot be tried in the fused projection"
                expected = original(twin, *args, **kwargs)
                got = replaced(twin, *args, **kwargs)
            if handler.precision == "exact":
                limit = budget(positions).max().item()
            else:
                limit = x.shape[-1] * 2.0**-50 if handler.projections else 0.0
            for name in sorted(source.live & expected.keys() & got.keys()):
                if difference := _difference(name, got[name], expected[name], limit):
                    return difference
    return ""


class Plain:
    """The handler that leaves everything to the model."""

    def begin(self, module, tables, positions):
        return self

    def rotate(self, at, function, *args, **kwargs):
        return function(*args, **kwargs)


def _difference(name, a, b, limit):
    """How far ``a`` is from ``b``, in words, if it is further than ``limit`` of the largest."""
    if isinstance(b, tuple | list) and isinstance(a, tuple | list):
        pairs = enumerate(zip(a, b, strict=True))
        return next(filter(None, (_difference(f"{name}[{i}]", *ab, limit) for i, ab in pairs)), "")
    if not isinstance(b, torch.Tensor):
        return ""
    if not isinstance(a, torch.Tensor):
        return f"{name} is a tensor, rewritten it is a {type(a).__name__}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name} is {b.dtype} {[*b.shape]}, rewritten it is {a.dtype} {[*a.shape]}"
    if a is b or not b.numel() or not b.is_floating_point():
        return ""
    if not bool(((a - b).abs() <= limit * b.abs().max()).all()):
        worst = ((a - b).abs().max() / b.abs().max()).item()
        return f"{name} differs by {worst:.1e} of its largest element"
    return ""
