"""What else a token's position decides: which pairs each axis turns, and the factor on q."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch


def axis_map(layout: str, pairs: int, section: Sequence[int]) -> tuple[int, ...]:
    """Which position axis drives each pair of a multi-axis model (mRoPE).

    Args:
        layout: "blocks" (Qwen2-VL): section[0] pairs of axis 0 (temporal), then section[1] of axis
            1 (height), and so on. "alternating" (Qwen3-VL): pair i belongs to axis a = i % axes
            while i < axes * section[a], else to axis 0. "ernie" (ERNIE-4.5-VL): height and width
            alternate for section[0] + section[1] pairs, then temporal.
        pairs: rotary_dim / 2, the sum of ``section``.
        section: pairs per axis.

    Returns:
        The axis number of every pair.
    """
    section = tuple(section)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in section)
    if not whole or not section or sum(section) != pairs:
        raise ValueError(
            f"mrope_section must be counts with the sum rotary_dim / 2 = {pairs}, got {section}"
        )
    axes = len(section)
    if layout == "blocks":
        return tuple(axis for axis, n in enumerate(section) for _ in range(n))
    if layout == "alternating":
        return tuple(i % axes if i < axes * section[i % axes] else 0 for i in range(pairs))
    if layout == "ernie":
        if axes != 3 or section[0] != section[1]:
            raise ValueError(f"mrope_section must be (n, n, temporal) in ERNIE, got {section}")
        return (1, 2) * section[0] + (0,) * section[2]
    raise ValueError(f"layout must be 'blocks', 'alternating' or 'ernie', got {layout!r}")


def check(positions: torch.Tensor):
    """TypeError unless ``positions`` is a tensor of integers."""
    if not isinstance(positions, torch.Tensor):
        raise TypeError(f"positions must be an integer tensor, got {type(positions).__name__}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"positions must be an integer tensor, got {positions.dtype}")


def lengths(positions: torch.Tensor) -> torch.Tensor:
    """The length of each sequence, as far as its positions tell: the largest plus 1, at least 1.

    Sequences run along the last dimension, which is kept, with one element. int64; a length that
    does not fit is one less.
    """
    if not positions.shape[-1]:
        return positions.new_ones((*positions.shape[:-1], 1), dtype=torch.int64)
    longest = positions.amax(-1, keepdim=True).to(torch.int64)
    return longest.clamp(0, torch.iinfo(torch.int64).max - 1) + 1


def temperature(values: Sequence[float]) -> tuple[float, float, float]:
    """(beta, length, offset) of :func:`q_scale`, checked."""
    real = all(isinstance(x, Real) and abs(x) < math.inf for x in values)
    beta, length, offset = map(float, values) if real and len(values) == 3 else (-1.0, 0.0, 0.0)
    if not (beta >= 0 and length > 0 and offset in (0.0, 1.0)):
        raise ValueError(
            "q_temperature must be (beta >= 0, length > 0, offset 0 or 1), all finite, "
            f"got {tuple(values)!r}"
        )
    return beta, length, offset


def q_scale(
    positions: torch.Tensor, beta: float, length: float, offset: float, precision: str = "exact"
) -> torch.Tensor:
    """1 + beta ln(1 + floor((position + offset) / length)), float32, like ``positions``.

    Llama-4's NoPE layers (attn_scale, floor_scale, offset 1) and Ministral-3 (llama_4_scaling_beta,
    original_max_position_embeddings, offset 0). Negative positions give 1. "exact" computes in
    float64, "hf" with transformers' float32 operations.
    """
    if precision == "hf":
        steps = torch.floor((positions.float() + offset) / length)
        # Llama-4 (offset 1) has log1p, Ministral the logarithm of a sum.
        return (torch.log1p(steps) if offset else torch.log(1 + steps)) * beta + 1.0
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    steps = torch.floor((positions.to(torch.int64) + int(offset)).to(wide) / length).clamp(min=0)
    return (1.0 + beta * torch.log1p(steps)).float()
