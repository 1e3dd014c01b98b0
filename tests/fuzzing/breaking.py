"""A legal call with one thing broken, and what breaking it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fuzzing.calls import Call

KEPT = object()


class Broken(NamedTuple):
    """A legal call with one argument replaced."""

    call: Call
    how: str
    names: tuple  # the arguments that a message may name
    backend: object = KEPT


def with_change(call, how, names, **change) -> Broken:
    """`change` made to the arguments; what was replaced has no gradient to ask for."""
    learned = tuple(name for name in call.learned if name not in change)
    changed = call._replace(arguments=call.arguments | change, learned=learned)
    names = (names,) if isinstance(names, str) else tuple(names)
    return Broken(changed, how, names)


def given(draw, call, *names):
    """(name, value) of one of the tensors among `names` (None: any) that the call has."""
    tensors = call.tensors()
    found = [n for n in (names or tensors) if n in tensors]
    return (name := draw.one(*found), tensors[name]) if found else (None, None)


def leading(call) -> str:
    """The argument that says what all others must be like."""
    return next(name for name in ("q", "x", "k") if name in call.arguments)


def longer(value, dim):
    shape = list(value.shape)
    shape[dim] += 1
    return torch.ones(shape, dtype=value.dtype)
