"""One function per scaling method: its parameters in, exact frequencies and attention factors out.

A method is ``name(dim, rope_theta, *, its parameters) -> Tables``. The keyword names are those of transformers'
``rope_parameters``, so a method's signature is also the list of keys it accepts and their defaults. ``dim`` is the
number of rotated dimensions ``D``; ``theta_i = rope_theta ** (-2 i / D)`` is the base frequency of pair ``i``.

Frequencies are evaluated in 50-digit decimals and rounded once, so they are the correctly rounded float64 values of
the formulas, the same on every machine. Attention factors are plain float64 expressions, evaluated in the order the
published code uses, because models are served with those very bits.
"""

from __future__ import annotations

import decimal
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import NamedTuple

import torch

_CONTEXT = decimal.Context(prec=50)
_PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899863"
)
_ZERO, _ONE, _TWO = Decimal(0), Decimal(1), Decimal(2)


class Tables(NamedTuple):
    """What a method means: one row of frequencies per table, and each table's attention factor."""

    inv_freq: tuple[tuple[float, ...], ...]
    """[tables][dim / 2], radians per token."""
    scale: tuple[float | tuple[float, ...], ...] = (1.0,)
    """[tables], each one number or one per pair; multiplies cos and sin of q and of k."""


# What a parameter must be, whatever the method: (condition, the words for it).
_POSITIVE = (lambda x: x > 0, "a finite number > 0")
_LENGTH = (lambda x: x > 1, "a finite number > 1")
_LEGAL: dict[str, tuple[Callable[[float], bool], str]] = {
    "rope_theta": (lambda x: x > 1, "a finite number > 1"),
    "factor": (lambda x: x >= 1, "a finite number >= 1"),
    "alpha": (lambda x: x >= 1, "a finite number >= 1"),
    "original_max_position_embeddings": _LENGTH,
    "max_position_embeddings": _LENGTH,
    "partial_rotary_factor": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "mscale": (lambda x: x >= 0, "a finite number >= 0"),
    "mscale_all_dim": (lambda x: x >= 0, "a finite number >= 0"),
    "mixed_b": _POSITIVE,
    "attention_factor": _POSITIVE,
    "short_mscale": _POSITIVE,
    "long_mscale": _POSITIVE,
    "short_factor": _POSITIVE,
    "long_factor": _POSITIVE,
    "n_start": (lambda x: x >= 0 and x == int(x), "an integer >= 0"),
}
_ARRAYS = ("short_factor", "long_factor")  # one number per pair; attention_factor may be either


def number(name: str, value: object) -> float | int:
    """``value`` as a plain int or float inside the legal range of parameter ``name``; ValueError otherwise."""
    legal, words = _LEGAL[name]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be {words}, got {value!r}")
    value = int(value) if isinstance(value, Integral) else float(value)
    if not math.isfinite(value) or not legal(value):
        raise ValueError(f"{name} must be {words}, got {value!r}")
    return value


def numbers(name: str, values: object, length: int) -> tuple[float, ...]:
    """``values`` as a tuple of ``length`` floats, each inside the legal range of parameter ``name``."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of {length} numbers, got {values!r}")
    values = list(values)
    if len(values) != length:
        raise ValueError(
            f"{name} must have {length} values (rotary_dim / 2), one per pair, got {len(values)}"
        )
    return tuple(float(number(f"{name}", value)) for value in values)


def _decimal(method):
    """Run a method's decimal arithmetic at 50 digits."""

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        with decimal.localcontext(_CONTEXT):
            return method(*args, **kwargs)

    return wrapped


def _powers(dim: int, theta: float, pairs: int | None = None) -> list[Decimal]:
    """theta ** (-2 i / dim) for i < pairs (dim / 2 unless given)."""
    log = Decimal(theta).ln()
    return [(log * (-2 * i) / dim).exp() for i in range(dim // 2 if pairs is None else pairs)]


def _floats(row: Iterable[Decimal]) -> tuple[float, ...]:
    return tuple(map(float, row))


def default(dim, rope_theta) -> Tables:
    """Plain RoPE (Su et al. 2021, eq. 15): inv_freq_i = rope_theta ** (-2 i / D).

    Raising ``rope_theta`` alone (adjusted base frequency, Xiong et al. 2023) is this method too.
    """
    return Tables((_floats(_powers(dim, rope_theta)),))


def none(dim, rope_theta) -> Tables:
    """No rotation (a NoPE layer): every frequency is zero."""
    return Tables(((0.0,) * (dim // 2),))


def linear(dim, rope_theta, *, factor) -> Tables:
    """Position interpolation (Chen et al. 2023): inv_freq_i = theta_i / factor.

    vLLM divides the positions instead; in exact arithmetic that is the same function.
    """
    return Tables((_floats(x / Decimal(factor) for x in _powers(dim, rope_theta)),))


def ntk(dim, rope_theta, *, factor, mixed_b=None) -> Tables:
    """NTK-aware scaling (YaRN paper, definition 1): the base becomes rope_theta * factor ** (D / (D - 2)).

    So inv_freq_i = theta_i * factor ** (-2 i / (D - 2)): the fastest pair is kept, the slowest is divided by
    ``factor``. HunYuan's ``alpha`` is ``factor`` under another name. With ``mixed_b``, Su Jianlin's mixed-radix
    variant (vLLM's type ``ntk``): inv_freq_i = theta_i * exp(-a (i + 1) ** mixed_b), a = ln factor / (D / 2) ** mixed_b.
    """
    log = Decimal(factor).ln()
    powers = _powers(dim, rope_theta)
    if mixed_b is None:
        if dim < 4:
            raise ValueError(
                f"rotary_dim must be at least 4 for ntk (it divides by rotary_dim - 2), got {dim}"
            )
        return Tables(
            (_floats(x * (log * (-2 * i) / (dim - 2)).exp() for i, x in enumerate(powers)),)
        )
    b, pairs = Decimal(mixed_b), len(powers)
    exponents = ((Decimal(i + 1) / pairs).ln() * b for i in range(pairs))
    return Tables(
        (_floats(x * (-log * e.exp()).exp() for x, e in zip(powers, exponents, strict=True)),)
    )


def dynamic(dim, rope_theta, *, factor, max_position_embeddings) -> Tables:
    """Dynamic NTK at its rest length: plain RoPE. :func:`dynamic_rows` has the law for longer sequences."""
    if dim < 4:
        raise ValueError(
            f"rotary_dim must be at least 4 for dynamic (it divides by rotary_dim - 2), got {dim}"
        )
    return default(dim, rope_theta)


def llama3(
    dim, rope_theta, *, factor, original_max_position_embeddings, low_freq_factor, high_freq_factor
) -> Tables:
    """NTK-by-parts (YaRN paper, definition 2), which Meta ships as ``llama3``.

    With r_i = L theta_i / 2 pi rotations inside the original length L, and gamma(r) the ramp that rises from 0 at
    ``low_freq_factor`` to 1 at ``high_freq_factor``: inv_freq_i = (1 - gamma) theta_i / factor + gamma theta_i.
    Equal factors make it a step (Llama-4); the pair at the step, if any, is kept.
    """
    if low_freq_factor > high_freq_factor:
        raise ValueError(
            f"high_freq_factor must be >= low_freq_factor ({low_freq_factor!r}), got {high_freq_factor!r}"
        )
    low, high, s = Decimal(low_freq_factor), Decimal(high_freq_factor), Decimal(factor)
    turns_per_unit = Decimal(original_max_position_embeddings) / (_TWO * _PI)

    def scaled(x: Decimal) -> Decimal:
        rotations = turns_per_unit * x
        if rotations >= high:
            return x
        if rotations <= low:
            return x / s
        gamma = (rotations - low) / (high - low)
        return (_ONE - gamma) * x / s + gamma * x

    return Tables((_floats(map(scaled, _powers(dim, rope_theta))),))


def ntk_by_parts(
    dim,
    rope_theta,
    *,
    factor,
    original_max_position_embeddings,
    low_freq_factor=1,
    high_freq_factor=32,
) -> Tables:
    """NTK-by-parts under its own name, with the paper's alpha = 1 and beta = 32 for Llama; see :func:`llama3`."""
    return llama3(
        dim,
        rope_theta,
        factor=factor,
        original_max_position_embeddings=original_max_position_embeddings,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
    )


def yarn_mscale(factor: float, mscale: float = 1) -> float:
    """g(s, m) = 0.1 m ln s + 1, and 1 for s <= 1, in float64 (YaRN paper, eq. 22: sqrt(1 / t))."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_ramp(dim, rope_theta, length, beta_fast, beta_slow, truncate, ramp) -> list[Decimal]:
    """The share of interpolation of each pair, 0 (kept) to 1 (divided by the factor)."""
    if beta_fast < beta_slow:
        raise ValueError(
            f"beta_fast must be >= beta_slow: beta_fast={beta_fast!r}, beta_slow={beta_slow!r} are swapped"
        )
    length = Decimal(length)
    if ramp == "rotations":
        if beta_fast == beta_slow:
            raise ValueError(
                f"beta_fast must be > beta_slow for ramp='rotations', got {beta_fast!r} for both"
            )
        fast, slow = Decimal(beta_fast), Decimal(beta_slow)
        shares = [
            (fast - length * x / (_TWO * _PI)) / (fast - slow) for x in _powers(dim, rope_theta)
        ]
    elif ramp == "dimension":

        def dimension(rotations) -> Decimal:
            turns = length / (Decimal(rotations) * _TWO * _PI)
            return dim * turns.ln() / (_TWO * Decimal(rope_theta).ln())

        low, high = dimension(beta_fast), dimension(beta_slow)
        if truncate:
            low = low.to_integral_value(decimal.ROUND_FLOOR)
            high = high.to_integral_value(decimal.ROUND_CEILING)
        low, high = max(low, _ZERO), min(high, Decimal(dim - 1))
        if low == high:
            high += Decimal("0.001")
        shares = [(i - low) / (high - low) for i in range(dim // 2)]
    else:
        raise ValueError(
            f"ramp must be 'dimension' (the released code) or 'rotations' (the paper), got {ramp!r}"
        )
    return [min(max(share, _ZERO), _ONE) for share in shares]


def yarn(
    dim,
    rope_theta,
    *,
    factor,
    original_max_position_embeddings,
    beta_fast=32,
    beta_slow=1,
    truncate=True,
    mscale=None,
    mscale_all_dim=None,
    attention_factor=None,
    ramp="dimension",
) -> Tables:
    """YaRN (Peng et al. 2023): interpolate slow pairs, keep fast ones, ramp between, and raise the temperature.

    inv_freq_i = theta_i / factor * m_i + theta_i * (1 - m_i). All released code (jquesnelle/yarn, transformers,
    vLLM, Megatron) lets m_i rise linearly in the index i between d(beta_fast) and d(beta_slow), the dimensions that
    turn that often in the original length, d(n) = D ln(L / 2 pi n) / (2 ln rope_theta), floor'ed and ceil'ed unless
    ``truncate`` is false and clamped to [0, D - 1]. The paper's eq. 18 is linear in the number of rotations instead:
    ``ramp="rotations"``, which no released model uses.

    Attention factor: ``attention_factor`` if given; else g(mscale) / g(mscale_all_dim) if both are non-zero; else
    g(1), with g(m) = 0.1 m ln factor + 1 (:func:`yarn_mscale`).
    """
    s = Decimal(factor)
    ramps = _yarn_ramp(
        dim, rope_theta, original_max_position_embeddings, beta_fast, beta_slow, truncate, ramp
    )
    row = (x / s * m + x * (_ONE - m) for x, m in zip(_powers(dim, rope_theta), ramps, strict=True))
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = yarn_mscale(factor)
    return Tables((_floats(row),), (attention_factor,))


def dynamic_yarn(
    dim,
    rope_theta,
    *,
    original_max_position_embeddings,
    max_position_embeddings=None,
    beta_fast=32,
    beta_slow=1,
    truncate=True,
) -> Tables:
    """Dynamic YaRN (YaRN paper, section 3.3) at ``max_position_embeddings`` (the original length unless given).

    YaRN with factor = max(1, length / original length), made anew for every length: :func:`dynamic_yarn_rows`.
    """
    length = max_position_embeddings or original_max_position_embeddings
    return yarn(
        dim,
        rope_theta,
        factor=max(1.0, length / original_max_position_embeddings),
        original_max_position_embeddings=original_max_position_embeddings,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=truncate,
    )


def longrope(
    dim,
    rope_theta,
    *,
    short_factor,
    long_factor,
    original_max_position_embeddings,
    max_position_embeddings=None,
    factor=None,
    attention_factor=None,
    short_mscale=None,
    long_mscale=None,
    magnitude_scaling_policy="su",
    n_start=0,
) -> Tables:
    """LongRoPE (Ding et al. 2024) and LongRoPE2: searched factors, inv_freq_i = theta_i / lambda_i.

    lambda is ``long_factor`` for a sequence longer than the original length L, else ``short_factor``; tokens at
    positions below ``n_start`` (the paper's n-hat) are not interpolated at all.

    Attention factor, of both tables: ``attention_factor`` if given (one number, or one per pair: LongRoPE2's
    mscale_factors); else by ``magnitude_scaling_policy`` from s = ``factor``, or max_position_embeddings / L:
    "su" sqrt(1 + ln s / ln L) as released, "yarn" 0.1 ln s + 1, or a number; 1 for s <= 1. ``short_mscale`` and
    ``long_mscale`` (Phi-3.5-MoE) give each table its own instead.
    """
    length = original_max_position_embeddings
    if factor is None and max_position_embeddings is not None:
        factor = max_position_embeddings / length
    if attention_factor is None and None in (short_mscale, long_mscale):
        attention_factor = _magnitude(magnitude_scaling_policy, factor, length)
    powers = _powers(dim, rope_theta)
    rows = [
        _floats(x / Decimal(f) for x, f in zip(powers, factors, strict=True))
        for factors in (short_factor, long_factor)
    ]
    scales = [attention_factor if m is None else m for m in (short_mscale, long_mscale)]
    if n_start:
        if scales[0] != scales[1]:
            raise ValueError(
                f"n_start must be 0 when short_mscale={short_mscale!r} and long_mscale={long_mscale!r} differ: "
                f"the first tokens belong to both tables, got {n_start!r}"
            )
        rows.append(_floats(powers))
        scales.append(scales[0])
    return Tables(tuple(rows), tuple(scales))


def _magnitude(policy, factor, length) -> float:
    """LongRoPE's attention factor from the length ratio, by policy."""
    if isinstance(policy, Real):
        return number("attention_factor", policy)
    if policy not in ("su", "yarn"):
        raise ValueError(
            f"magnitude_scaling_policy must be 'su', 'yarn' or a number > 0, got {policy!r}"
        )
    if factor is None:
        raise ValueError(
            "factor must be given when there is no attention_factor and no max_position_embeddings to derive it from, "
            "got None"
        )
    if factor <= 1:
        return 1.0
    return (
        yarn_mscale(factor)
        if policy == "yarn"
        else math.sqrt(1 + math.log(factor) / math.log(length))
    )


def proportional(dim, rope_theta, *, partial_rotary_factor=1.0, factor=1.0) -> Tables:
    """p-RoPE (Gemma-4): the first int(partial_rotary_factor * D // 2) pairs turn, the others stand still.

    inv_freq_i = theta_i / factor with the exponent over the whole head, unlike partial rotary, which shortens D.
    """
    turning = int(partial_rotary_factor * dim // 2)
    row = [x / Decimal(factor) for x in _powers(dim, rope_theta, turning)]
    return Tables((_floats(row) + (0.0,) * (dim // 2 - turning),))


METHODS: dict[str, Callable[..., Tables]] = {
    method.__name__: _decimal(method)
    for method in (
        default,
        none,
        linear,
        ntk,
        dynamic,
        ntk_by_parts,
        llama3,
        yarn,
        dynamic_yarn,
        longrope,
        proportional,
    )
}


def dynamic_rows(dim, rope_theta, seq_lens, *, factor, max_position_embeddings):
    """Dynamic NTK (bloc97, emozilla 2023): the base grows with the length l of the sequence.

    base(l) = rope_theta * (factor l / M - (factor - 1)) ** (D / (D - 2)) for l >= M = max_position_embeddings, so
    inv_freq_i(l) = theta_i * g ** (-2 i / (D - 2)) with g = 1 + factor (l - M) / M. A pure function of ``seq_lens``:
    transformers' version depends on the lengths seen before.

    Args:
        seq_lens: int tensor [n].

    Returns:
        float64 [n, dim / 2] frequencies and [n, 1] attention factors (1), on the device of ``seq_lens``.
    """
    lengths = seq_lens.to(torch.float64)[:, None].clamp(min=max_position_embeddings)
    growth = 1.0 + factor * (lengths - max_position_embeddings) / max_position_embeddings
    base = _constant(METHODS["default"](dim, rope_theta).inv_freq[0], seq_lens.device)
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=seq_lens.device) * (
        -2.0 / (dim - 2)
    )
    return base * growth**exponent, torch.ones_like(growth)


def dynamic_yarn_rows(
    dim,
    rope_theta,
    seq_lens,
    *,
    original_max_position_embeddings,
    max_position_embeddings,
    beta_fast,
    beta_slow,
    truncate,
):
    """Dynamic YaRN: :func:`yarn` with factor s = max(1, l / L) for a sequence of length l.

    inv_freq_i = theta_i * (m_i / s + 1 - m_i) and attention factor 0.1 ln s + 1. Arguments and result as in
    :func:`dynamic_rows`.
    """
    device = seq_lens.device
    s = (seq_lens.to(torch.float64)[:, None] / original_max_position_embeddings).clamp(min=1.0)
    with decimal.localcontext(_CONTEXT):
        shares = _yarn_ramp(
            dim,
            rope_theta,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            truncate,
            "dimension",
        )
        interpolated, kept = _floats(shares), _floats(_ONE - share for share in shares)
    base = _constant(METHODS["default"](dim, rope_theta).inv_freq[0], device)
    return base * (
        _constant(interpolated, device) / s + _constant(kept, device)
    ), 0.1 * s.log() + 1.0


DYNAMIC_ROWS = {"dynamic": dynamic_rows, "dynamic_yarn": dynamic_yarn_rows}


def _constant(row, device) -> torch.Tensor:
    return torch.tensor(row, dtype=torch.float64, device=device)


def accepts(rope_type: str) -> dict[str, inspect.Parameter]:
    """The parameters a method takes, by key; ValueError for an unknown ``rope_type``."""
    if rope_type not in METHODS:
        raise ValueError(f"rope_type must be one of {', '.join(METHODS)}, got {rope_type!r}")
    return dict(list(inspect.signature(METHODS[rope_type]).parameters.items())[2:])


def parameters(
    rope_type: str, given: Mapping[str, object], dim: int
) -> tuple[tuple[str, object], ...]:
    """A method's complete parameters in canonical form: checked, defaults filled in, arrays as tuples.

    Raises:
        ValueError: ``rope_type`` unknown, a key the method does not take or lacks, a value outside its legal range.
    """
    accepted = accepts(rope_type)
    for key in given:
        if key not in accepted:
            takes = ", ".join(accepted) or "no parameters"
            raise ValueError(
                f"{key} is not a parameter of rope_type {rope_type!r}, which takes {takes}"
            )
    canonical = []
    for p in accepted.values():
        value = given.get(p.name, p.default)
        if value is inspect.Parameter.empty or (value is None and p.default is not None):
            raise ValueError(
                f"{p.name} is required by rope_type {rope_type!r}, got {given.get(p.name)!r}"
            )
        canonical.append((p.name, _checked(p.name, value, dim)))
    return tuple(canonical)


def _checked(name: str, value: object, dim: int):
    if value is None or name in ("ramp", "magnitude_scaling_policy"):
        return value
    if name == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"truncate must be true or false, got {value!r}")
        return value
    if name in _ARRAYS or (name == "attention_factor" and not isinstance(value, Real)):
        return numbers(name, value, dim // 2)
    return number(name, value)
