"""What a number in a rotary configuration may be, and the error that says so."""

from __future__ import annotations

import sys
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


LARGEST = sys.float_info.max
MOST_DIMS = 1 << 14
"""Of a head: tables of more would take seconds, of millions all memory."""


def _is_count(x) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and 0 <= x < 1 << 62


def _is_length(x) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and abs(x) <= LARGEST


def _is_tokens(x) -> bool:
    return _is_length(x) and x > 1 and x == int(x)


def _is_names(x) -> bool:
    return isinstance(x, list | tuple) and all(isinstance(name, str) for name in x)


_COUNT = (_is_count, "an integer from 0 to 2**62")
_LENGTH = (_is_length, "a finite number")
_NAMES = (_is_names, "a list of strings")
# Keys of a configuration beside its rope block.
_OUTER = {
    "global_head_dim": _COUNT,
    "head_dim": _COUNT,
    "layer_types": _NAMES,
    "max_position_embeddings": (_is_tokens, "an integer > 1"),
    "model_type": (lambda x: isinstance(x, str), "a string"),
    "original_max_position_embeddings": _LENGTH,
    "qk_rope_head_dim": _COUNT,
    "rope_interleave": (lambda x: isinstance(x, bool), "true or false"),
    "rotary_dim": _COUNT,
    "yarn_only_types": _NAMES,
}


def outer(config: Mapping) -> None:
    """ValueError unless the keys beside a rope block hold what they are read as, or null."""
    for name, (legal, words) in _OUTER.items():
        value = config.get(name)
        if value is not None and not legal(value):
            raise ValueError(f"{name} must be {words}, got {value!r}")


def number(name: str, value: object) -> float | int:
    """``value`` as a plain int or float; ValueError outside the range of parameter ``name``."""
    legal, words = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be {words}, got {value!r}")
    value = int(value) if isinstance(value, Integral) else float(value)
    if not abs(value) <= LARGEST or not legal(value):
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


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``; an int tensor of one element will do."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be an integer <= {most}, got {value!r}")
    return int(value)


def count(name: str, value: object) -> int:
    """``value`` of a configuration as a number of things; else ValueError."""
    if not _is_count(value):
        raise ValueError(f"{name} must be {_COUNT[1]}, got {value!r}")
    return int(value)


def dims(name: str, value: object) -> int:
    """``value`` of a configuration as a number of dimensions of a head; else ValueError."""
    try:
        return integer(name, value, 2, MOST_DIMS)
    except TypeError as error:
        raise ValueError(str(error)) from None


def flag(name: str, value: object) -> bool:
    """``value``, which must be a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value
