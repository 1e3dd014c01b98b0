"""Angles in fixed point: turns = inv_freq / 2 pi as 64-bit fractions, and cos / sin from them.

A frequency is stored as ``T = round(inv_freq / 2 pi * 2**64) mod 2**64``, the fraction of a full
turn that one token advances. ``position * T`` in wrapping 64-bit arithmetic is then the phase of a
token: multiplication drops whole turns by itself, so there is no range reduction to get wrong, and
the error grows only as ``|position| * 2**-65`` turns (6e-11 turns at 2**31).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

# 2 pi to 80 digits: the rounded turn is right unless inv_freq / 2 pi lies within 1e-60 of a
# rounding boundary.
TWO_PI = Fraction(
    "6.2831853071795864769252867665590057683943387987502116419498891846156328125724179972"
)
_ONE_TURN = 1 << 64

# 1 / 2 pi as a sum of two float64 numbers (107 bits), and Veltkamp's splitting constant 2**27 + 1.
_INV_HI = float(1 / TWO_PI)
_INV_LO = float(1 / TWO_PI - Fraction(_INV_HI))
_SPLIT = 134217729.0


def exact_turns(inv_freq: torch.Tensor) -> torch.Tensor:
    """``round(inv_freq / 2 pi * 2**64)`` by exact rational arithmetic.

    Args:
        inv_freq: CPU tensor of any shape and floating dtype, in radians per token.

    Returns:
        int64 CPU tensor of the same shape: the value modulo 2**64, as the bits of a signed integer.
        An element that is not finite gives 0.
    """

    def one(value: float) -> int:
        if not math.isfinite(value):
            return 0
        turns = round(Fraction(value) / TWO_PI * _ONE_TURN) % _ONE_TURN
        return turns - _ONE_TURN if turns >= _ONE_TURN // 2 else turns

    flat = [one(value) for value in inv_freq.detach().double().flatten().tolist()]
    return torch.tensor(flat, dtype=torch.int64, device="cpu").reshape(inv_freq.shape)


def _two_product(a: torch.Tensor, b: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Dekker's product without fused multiply-add: ``hi + lo == a * b`` exactly."""

    def split(x):
        shifted = _SPLIT * x
        high = shifted - (shifted - x)
        return high, x - high

    a_hi, a_lo = split(a)
    b_hi, b_lo = split(b)
    product = a * b
    return product, ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo


def turns_on_device(inv_freq: torch.Tensor) -> torch.Tensor:
    """:func:`exact_turns` in torch operations on the tensor's own device, without a host sync.

    Agrees with :func:`exact_turns` to one unit of 2**-64 turns for every ``|inv_freq| < 2**40``:
    the product with 1 / 2 pi is formed as a double-double, its whole turns are removed exactly, and
    what is left below the first 64 bits is rounded once.

    Args:
        inv_freq: float64 tensor of any shape.

    Returns:
        int64 tensor of the same shape and device; 0 where inv_freq is not finite.
    """
    if inv_freq.dtype != torch.float64:
        raise TypeError(f"inv_freq must be float64, got {inv_freq.dtype}")
    finite = torch.isfinite(inv_freq)
    x = torch.where(finite, inv_freq.detach(), 0.0)
    product, error = _two_product(x, _INV_HI)
    fraction = product - torch.round(product)  # exact; in [-1/2, 1/2]
    # In two steps of 32 bits: fraction * 2**64 itself may be 2**63, which int64 does not hold.
    scaled = fraction * 2.0**32
    high = torch.floor(scaled)
    rest = (scaled - high) * 2.0**32
    low = torch.floor(rest)
    tail = torch.round((rest - low) + (error + x * _INV_LO) * 2.0**64)
    turns = high.to(torch.int64) * (1 << 32) + low.to(torch.int64) + tail.to(torch.int64)
    return torch.where(finite, turns, 0)


def phase_cos_sin(
    positions: torch.Tensor, turns: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of ``2 pi * positions * turns / 2**64``.

    Args:
        positions: integer tensor that broadcasts with ``turns``; every int64 value is legal.
        turns: int64 tensor from :func:`exact_turns` or :func:`turns_on_device`.
        dtype: of the result. The arithmetic is float64 (on a device without it: float32).

    Returns:
        (cos, sin), of the broadcast shape.
    """
    phase = positions.to(torch.int64) * turns  # wraps modulo one turn
    wide = torch.float32 if phase.device.type == "mps" else torch.float64
    angle = phase.to(wide) * (2.0 * math.pi / _ONE_TURN)
    return angle.cos().to(dtype), angle.sin().to(dtype)
