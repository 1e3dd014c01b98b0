"""What a specification says, as numbers: the JSON of `rope-fused inspect`."""

from __future__ import annotations

import dataclasses
import math

import torch

from ... import readers
from ...spec import RopeSpec

_ORIGINAL = "original_max_position_embeddings"
_CLOSE = 1e-12  # factors are quotients of float64 numbers
SAMPLE = 1024  # positions that are looked at before the last
_UNSCALED = ("default", "none")


def numbers(spec: RopeSpec, model_type=None, seq_len=None, *, mistral=False) -> dict:
    """Every number of a spec, as data that JSON can hold; README names the keys.

    Args:
        spec: of RopeSpec.from_config.
        model_type: of the configuration, for the readings; ``mistral``: it is a params.json.
        seq_len: the length whose table a dynamic spec is asked for; None: that of inv_freq().
    """
    original, longest = lengths(spec)
    tables = {
        name: _table(spec, length, original, longest)
        for name, length in table_lengths(spec, seq_len).items()
    }
    first = next(iter(tables.values()))
    readings = readers.readings(spec, model_type, mistral=mistral)
    return {
        "rope_type": spec.rope_type,
        "rope_theta": spec.rope_theta,
        "head_dim": spec.head_dim,
        "rotary_dim": spec.rotary_dim,
        "rotary_offset": spec.rotary_offset,
        "interleaved": spec.interleaved,
        "axes": spec.axes,
        "axis_map": spec.axis_map,
        "parameters": dict(spec.parameters),
        "max_position_embeddings": spec.max_position_embeddings,
        "trained_length": original,
        "longest_length": longest,
        "cache_class": spec.cache_class,
        "switch_length": spec.switch_length,
        "n_start": spec.n_start,
        "inv_freq": first["inv_freq"],
        "inv_freq_hf": first["inv_freq_hf"],
        "attention_factor": first["attention_factor"],
        "attention_factor_hf": first["attention_factor_hf"],
        "softmax_multiplier": spec.softmax_multiplier,
        "q_temperature": spec.q_temperature,
        "tables": tables,
        "hf_refusal": _refusal(spec),
        "notes": list(spec.notes),
        "readers": [_reading(r, spec) for r in readings],
    }


def lengths(spec: RopeSpec) -> tuple[int | None, int | None]:
    """(the length before any extension, the longest the model is made for); None if not told."""
    parameters = dict(spec.parameters)
    original, longest = parameters.get(_ORIGINAL), spec.max_position_embeddings
    if original and parameters.get("factor"):
        longest = max(longest or 0, original * parameters["factor"])
    elif spec.rope_type == "dynamic":
        original, longest = longest, longest * parameters["factor"]
    elif "factor" not in parameters or parameters["factor"] == 1:
        original = longest
    return original and int(original), longest and int(longest)


def table_lengths(spec: RopeSpec, seq_len: int | None) -> dict[str, int | None]:
    """{name of a table: the length that chooses it}."""
    if spec.cache_class == "switch":
        return {"short": spec.switch_length, "long": spec.switch_length + 1}
    if spec.cache_class == "dynamic":
        least = spec.max_position_embeddings or lengths(spec)[0]
        return {str(seq_len or least): seq_len or least}
    return {"all": None}


def base(spec: RopeSpec) -> torch.Tensor:
    """The frequencies before any scaling."""
    plain = dataclasses.replace(spec, rope_type="default", parameters=(), hf_parameters=())
    return plain.inv_freq()


def _table(spec, length, original, longest) -> dict:
    row = spec.inv_freq(seq_len=length)
    if length is not None and length == spec.switch_length:
        longest = length  # of the short table's sequences
    hf = None if _refusal(spec) else spec.inv_freq("hf", length)
    factors = (base(spec) / row).tolist() if spec.rope_type != "none" else [math.inf] * len(row)
    wavelengths = (2 * math.pi / row).tolist()
    return {
        "inv_freq": row.tolist(),
        "inv_freq_hf": None if hf is None else hf.double().tolist(),
        "attention_factor": spec.attention_factor_at(length),
        "attention_factor_hf": None if hf is None else spec.attention_factor_at(length, "hf"),
        "wavelength": [_finite(w) for w in wavelengths],
        "turns": None if original is None else [original / w for w in wavelengths],
        "factor": [_finite(f) for f in factors],
        "zone": zones(spec, factors),
        "longest_length": longest,
        "float32_angle_error": angle_errors(row, hf, longest),
    }


def zones(spec: RopeSpec, factors: list[float]) -> list[str]:
    """What became of each pair: "extrapolated" (kept as it was), "interpolated" (slowed by the
    whole factor of the extension, or more), "ramp" (between), "still", or "plain" without any
    extension."""
    parameters = dict(spec.parameters)
    stretch = parameters.get("factor")
    if stretch is None and spec.rope_type == "longrope" and spec.max_position_embeddings:
        stretch = spec.max_position_embeddings / parameters[_ORIGINAL]
    if stretch is None or spec.cache_class == "dynamic":
        stretch = max((f for f in factors if f < math.inf), default=1)

    def zone(factor):
        if factor == math.inf:
            return "still"
        if spec.rope_type in _UNSCALED:
            return "plain"
        if factor <= 1 + _CLOSE:
            return "extrapolated"
        return "interpolated" if factor >= stretch * (1 - _CLOSE) else "ramp"

    return [zone(factor) for factor in factors]


def angle_errors(row, hf, longest: int | None, step: int = 1) -> list[float] | None:
    """Largest error, in radians, of ``float32(position) * float32(inv_freq)`` at the last positions
    before ``longest``, every ``step``-th of them, in each pair. None without a length."""
    if longest is None:
        return None
    positions = torch.arange(max(0, longest - SAMPLE), longest, step, device="cpu")[:, None]
    narrow = row.float() if hf is None else hf
    angles = (positions.float() * narrow).double()
    # Reduced: the error of a product near 2**30 in float64 is below 1e-6, and what is shown is not.
    error = torch.remainder(angles - positions.double() * row + math.pi, 2 * math.pi) - math.pi
    return error.abs().amax(0).tolist()


def _refusal(spec: RopeSpec) -> str:
    try:
        spec.rows("hf")
    except ValueError as error:
        return str(error).split("here: ", 1)[-1]
    return ""


def _reading(reading: readers.Reading, spec: RopeSpec) -> dict:
    theirs, difference = reading.spec, reading.inv_freq_difference
    last = readers.probes(spec)[-1]
    return {
        "reader": reading.reader,
        "verdict": reading.verdict,
        "inv_freq_difference": None if difference is None else _finite(difference),
        "attention_factor": None if theirs is None else theirs.attention_factor_at(last),
        "softmax_multiplier": None if theirs is None else theirs.softmax_multiplier,
        "inv_freq": theirs.inv_freq(seq_len=last).tolist() if difference else None,
        "rules": list(reading.rules),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
