"""The float32 frequencies that transformers computes: its operations in its order, on the CPU.

Facts from transformers 5.23: ``modeling_rope_utils.py``, and ``modeling_hunyuan_v1_dense.py`` for
``ntk``, which it knows only as HunYuan's alpha. Each function takes the canonical parameters of the
method of the same name in ``scaling.py`` and the sequence length, and returns float32 [dim / 2].
"""

from __future__ import annotations

import math

import torch


def _exponents(dim: int, pairs: int | None = None) -> torch.Tensor:
    stop = dim if pairs is None else 2 * pairs
    return torch.arange(0, stop, 2, dtype=torch.int64, device="cpu").float() / dim


def default(dim, rope_theta, seq_len):
    return 1.0 / (rope_theta ** _exponents(dim))


def none(dim, rope_theta, seq_len):
    return torch.zeros(dim // 2, dtype=torch.float32, device="cpu")


def linear(dim, rope_theta, seq_len, *, factor):
    return default(dim, rope_theta, seq_len) / factor


def ntk(dim, rope_theta, seq_len, *, factor, mixed_b):
    if mixed_b is not None:
        raise ValueError(
            f"precision must be 'exact' with mixed_b={mixed_b!r}: transformers has no such method"
        )
    return default(dim, rope_theta * factor ** (dim / (dim - 2)), seq_len)


def dynamic(dim, rope_theta, seq_len, *, factor, max_position_embeddings):
    """A running model passes a tensor and computes in float32, its constructor in float64."""
    if seq_len is None:
        seq_len = max_position_embeddings
    elif isinstance(seq_len, torch.Tensor):
        seq_len = seq_len.clamp(min=max_position_embeddings)
    else:
        seq_len = max(seq_len, max_position_embeddings)
    growth = (factor * seq_len / max_position_embeddings) - (factor - 1)
    base = rope_theta * growth ** (dim / (dim - 2))
    device = base.device if isinstance(base, torch.Tensor) else "cpu"
    return 1.0 / (base ** _exponents(dim).to(device))


def llama3(
    dim,
    rope_theta,
    seq_len,
    *,
    factor,
    original_max_position_embeddings,
    low_freq_factor,
    high_freq_factor,
):
    inv_freq = default(dim, rope_theta, seq_len)
    low_wavelength = original_max_position_embeddings / low_freq_factor
    high_wavelength = original_max_position_embeddings / high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    slow = torch.where(wavelength > low_wavelength, inv_freq / factor, inv_freq)
    # Llama-4's equal factors divide by zero here; torch.where discards that unless a wavelength
    # hits the step.
    smooth = (original_max_position_embeddings / wavelength - low_freq_factor) / (
        high_freq_factor - low_freq_factor
    )
    mixed = (1 - smooth) * slow / factor + smooth * slow
    between = ~(wavelength < high_wavelength) * ~(wavelength > low_wavelength)
    return torch.where(between, mixed, slow)


def yarn(
    dim,
    rope_theta,
    seq_len,
    *,
    factor,
    original_max_position_embeddings,
    beta_fast,
    beta_slow,
    truncate,
    mscale,
    mscale_all_dim,
    attention_factor,
    ramp,
):
    if ramp != "dimension":
        raise ValueError(
            f"precision must be 'exact' with ramp={ramp!r}: transformers has no such method"
        )

    def dimension(rotations):
        turns = original_max_position_embeddings / (rotations * 2 * math.pi)
        if not 0 < turns < math.inf:
            raise ValueError(
                f"precision must be 'exact' here: transformers fails at {rotations!r} turns"
            )
        return (dim * math.log(turns)) / (2 * math.log(rope_theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramps = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    kept = 1 - torch.clamp(ramps, 0, 1)
    powers = rope_theta ** _exponents(dim)
    return (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept


def longrope(
    dim,
    rope_theta,
    seq_len,
    *,
    original_max_position_embeddings,
    short_factor,
    long_factor,
    n_start,
    **_,
):
    if n_start:
        raise ValueError(
            f"precision must be 'exact' with n_start={n_start!r}: transformers has no such method"
        )
    long = seq_len is not None and seq_len > original_max_position_embeddings
    factors = torch.tensor(long_factor if long else short_factor, dtype=torch.float32, device="cpu")
    return 1.0 / (factors * rope_theta ** _exponents(dim))


def proportional(dim, rope_theta, seq_len, *, partial_rotary_factor, factor):
    turning = int(partial_rotary_factor * dim // 2)
    inv_freq = 1.0 / (rope_theta ** _exponents(dim, turning))
    still = torch.zeros(dim // 2 - turning, dtype=torch.float32, device="cpu")
    return torch.cat((inv_freq, still)) / factor


METHODS = {
    method.__name__: method
    for method in (default, none, linear, ntk, dynamic, llama3, yarn, longrope, proportional)
}
