"""What the autograd.Functions of ops.py share: how they are called, outputs that are not used."""

from __future__ import annotations

import functools
import inspect

import torch
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether tangents may ride on the tensors of now: inside a transform of torch.func, or a level
    of forward-mode differentiation. torch.no_grad ends neither."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def derived() -> bool:
    """Whether derivatives may be taken of what is computed now."""
    return torch.is_grad_enabled() or forward_mode()


def parameters(*names: str):
    """Spell out the parameters of a forward written with *rest: Dynamo counts them, and
    Function.apply, which asks for them on every call, finds them made."""

    def spell_out(forward):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])
        return forward

    return spell_out


def applied(function):
    """``function.apply``, for eager calls without what only transforms and traces need: torch binds
    the arguments of a Function that has a setup_context to the names of its forward on every call,
    which takes as long as rotating some hundred tokens."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply
    return _eager(function).apply


@functools.cache
def _eager(function):
    def forward(ctx, *args):
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    # As a Function has it that does not define it.
    setup_context = torch.autograd.Function.setup_context
    members = {"forward": forward, "setup_context": setup_context}
    members = {name: staticmethod(member) for name, member in members.items()}
    return type(function.__name__, (function,), members)


# What follows: of an output that nothing depends on, autograd passes no gradient on; a weight that
# has none is left alone by optimizers, where one with zeros decays.


def tell_unused(ctx, *outputs):
    """Have the backward see None for an output (as large as these) that is not used.

    Compiled graphs, which Dynamo traces without this, are given zeros.
    """
    ctx.like = None
    if not torch.compiler.is_compiling():
        ctx.like = tuple(t is not None and (t.shape, t.dtype, t.device) for t in outputs)
        ctx.set_materialize_grads(False)


def with_unused(ctx, grads):
    """(whether each gradient is there, the gradients with zeros for those that are not)."""
    if ctx.like is None:
        return None, grads
    used = tuple(g is not None for g in grads)
    zeros = (
        torch.zeros(like[0], dtype=like[1], device=like[2]) if g is None and like else g
        for g, like in zip(grads, ctx.like, strict=True)
    )
    return used, tuple(zeros)


def of_used(used, *grads):
    """``grads`` without those of inputs whose outputs are not used."""
    if used is None:
        return grads
    return tuple(g if u else None for g, u in zip(grads, used, strict=False))
