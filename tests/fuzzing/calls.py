"""A call as it is drawn, what it must give, and the budgets that several functions share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fuzzing import draws
from helpers import assert_close_to, half_ulp

LEARNED = ("inv_freq", "attention_factor", "q_scale")
INTERPRETED = ("triton", "cuda")  # backends that take milliseconds for a tile: small calls
AUTOCAST = {"autocast bfloat16": torch.bfloat16, "autocast float16": torch.float16}


class Call(NamedTuple):
    """A call of a public function."""

    family: str  # the function's name
    arguments: dict  # by their names, `out` and `backend` apart
    out: tuple | None = None
    mode: str = "grad"
    learned: tuple = ()  # names of the arguments whose gradients are asked for
    large: bool = False  # its outputs are written as large ones are

    def tensors(self) -> dict:
        return {k: v for k, v in self.arguments.items() if isinstance(v, torch.Tensor)}


class Expected(NamedTuple):
    """What a call must give."""

    values: tuple  # float64, or of `dtype` where the very bits are expected; None where nothing is
    dtype: torch.dtype
    check: object  # (i, result): raises AssertionError where result i is out of budget


def rotary(draw, spec, tokens) -> dict:
    """The arguments that apply_rope and qkv_rope share, positions apart."""
    cu_seqlens, count = draws.sequences(draw, tokens, True)
    call = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
    seq_lens = draws.lengths(draw, spec, count)
    if seq_lens is not None:
        call["seq_lens"] = seq_lens
    return call | draws.factors(draw, spec, tokens, count)


def unit(dtype) -> float:
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def least(arguments, name) -> float:
    """The smallest size of a factor, by which its gradient exceeds what the result shows."""
    if name == "inv_freq" or not arguments[name].numel():
        return 1.0
    return arguments[name].abs().min().item()


def length(tensors) -> float:
    return sum(t.detach().double().square().sum().item() for t in tensors if t is not None) ** 0.5


def largest_position(positions, tokens: int) -> int:
    if positions is None:
        return tokens
    return positions.abs().max().item() if positions.numel() else 0


def assert_factor_gradient(name, got, want, terms, relative, largest_position):
    """A sum over tokens and heads, no term of which is off by more than `relative` of its size.

    terms: no less than the sum of their sizes, by Cauchy and Schwarz: the length of the gradient
    that came in times that of the result.
    """
    if name == "inv_freq":
        terms = terms * largest_position
    assert_within(got, want, torch.full_like(want, relative * terms))


def assert_within(got, want, slack) -> None:
    """|got - want| <= slack and a rounding: of a number that may lie in the next binade by then."""
    want = want.detach()
    carried = half_ulp(want.abs() + slack, got.dtype) - half_ulp(want, got.dtype)
    assert_close_to(got, want, slack + carried)
