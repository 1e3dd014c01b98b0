"""What a number in a rotary configuration may be, and the error that says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real

import torch

_POSITIVE = (lambda x: x > 0, "a finite number > 0")
_ABOVE_ONE = (lambda x: x > 1, "a finite number > 1")
_NOT_BELOW_ONE = (lambda x: x >= 1, "a finite number >= 1")
_NOT_NEGATIVE = (lambda x: x >= 0, "a finite number >= 0")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "alpha": _NOT_BELOW_ONE,
    "attention_factor": _POSITIVE,
    "attn_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "factor": _NOT_BELOW_ONE,
    "high_freq_factor": _POSITIVE,
    "long_factor": _POSITIVE,
    "long_mscale": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "magnitude_scaling_policy": _POSITIVE,
    "max_position_embeddings": _ABOVE_ONE,
    "mixed_b": _POSITIVE,
    "mscale": _NOT_NEGATIVE,
    "mscale_all_dim": _NOT_NEGATIVE,
    "n_start": (lambda x: x >= 0 and x == int(x), "an integer >= 0"),
    "original_max_position_embeddings": _ABOVE_ONE,
    "partial_rotary_factor": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "rope_theta": _ABOVE_ONE,
    "short_factor": _POSITIVE,
    "short_mscale": _POSITIVE,
    "softmax_multiplier": _POSITIVE,
}


def number(name: str, value: object) -> float | int:
    """``value`` as a plain int or float; ValueError outside the range of parameter ``name``."""
    legal, words = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be {words}, got {value!r}")
    value = int(value) if isinstance(value, Integral) else float(value)
    if not math.isfinite(value) or not legal(value):
        raise ValueError(f"{name} must be {words}, got {value!r}")
    return value


def numbers(name: str, values: object, length: int) -> tuple[float, ...]:
    """``values`` as a tuple of ``length`` floats, each in the range of parameter ``name``."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of {length} numbers, got {values!r}")
    values = tuple(values)
    if len(values) != length:
        raise ValueError(
            f"{name} must have rotary_dim / 2 = {length} values, one per pair, got {len(values)}"
        )
    return tuple(float(number(name, value)) for value in values)


def integer(name: str, value: object, least: int) -> int:
    """``value`` as an int >= ``least``; an int tensor of one element will do."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def flag(name: str, value: object) -> bool:
    """``value``, which must be a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value
