"""What a spec does to positions: score decay with distance, turns of each pair, coverage."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..spec import RopeSpec


def decay_curve(spec: RopeSpec, distances) -> torch.Tensor:
    """The score q · k of equal unit q and k against their distance: the mean over pairs.

    ``attention_factor² / pairs · Σ_j cos(distance · inv_freq_j)``: 1 at distance 0 without a
    temperature. How fast it falls is how strongly a model favours near tokens.

    Args:
        spec: static or LongRoPE; the table is that of a sequence which holds the longest distance.
        distances: int tensor or sequence of int [n].

    Returns:
        float64 [n].
    """
    cos, _, factor = _tables(spec, distances)
    return (cos * factor**2).mean(-1)


def decay_bound(spec: RopeSpec, distances) -> torch.Tensor:
    """The relative upper bound of q · k against distance: RoFormer (arXiv 2104.09864) §3.4.3.

    ``attention_factor² · mean_j |S_j|`` with ``S_j = Σ_{i < j} exp(i · distance · inv_freq_i)``,
    j = 1 … pairs.
    """
    cos, sin, factor = _tables(spec, distances)
    partial = torch.complex(cos * factor**2, sin * factor**2).cumsum(-1)
    return partial.abs().mean(-1)


def turns(spec: RopeSpec, length: int) -> torch.Tensor:
    """How often each pair turns round in ``length`` tokens: float64 [pairs].

    A pair below one turn never saw all its angles in a window of that length.
    """
    return spec.inv_freq(seq_len=length) * length / (2 * math.pi)


def coverage(spec: RopeSpec, length: int, trained: RopeSpec, trained_length: int) -> dict:
    """What a window shows each pair that the training did not.

    Args:
        spec, length: the rotary embedding in use, and the window.
        trained, trained_length: those of the training.

    Returns:
        {"seen": share of the circle that training covered, "used": share that the window covers,
        "unseen": what of the latter training did not}: float64 [pairs] each, 0 to 1. Angles start
        from 0, so that shares are of one arc.
    """
    seen = turns(trained, trained_length).clamp(max=1.0)
    used = turns(spec, length).clamp(max=1.0)
    return {"seen": seen, "used": used, "unseen": (used - seen).clamp(min=0.0)}


def unscaled(spec: RopeSpec) -> RopeSpec:
    """The plain rotary embedding of the same base and shape: what the weights were trained with."""
    return dataclasses.replace(
        spec, rope_type="default", parameters=(), hf_parameters=(), hf_refusal="", notes=()
    )


def as_text(spec: RopeSpec) -> RopeSpec:
    """``spec`` for tokens of text, whose positions on all axes (mRoPE) are the same."""
    return spec if spec.axes == 1 else dataclasses.replace(spec, axis_map=None)


def critical_pair(spec: RopeSpec, length: int) -> int:
    """The first pair that does not turn round once in ``length`` tokens; pairs if all do.

    LongRoPE2's (arXiv 2502.20082) theoretical critical dimension, counted in pairs.
    """
    slow = (turns(spec, length) < 1).nonzero()
    return int(slow[0]) if slow.numel() else spec.rotary_dim // 2


def _tables(spec, distances):
    distances = torch.as_tensor(distances)
    if distances.is_floating_point() or distances.dim() != 1 or not distances.numel():
        raise ValueError(f"distances must be int [n], got {distances.dtype} {[*distances.shape]}")
    spec = as_text(spec)
    length = int(distances.max()) + 1
    cos, sin = spec.cos_sin(distances, torch.float64, seq_len=length)
    factor = torch.as_tensor(spec.attention_factor_at(length), dtype=torch.float64)
    return cos, sin, factor
