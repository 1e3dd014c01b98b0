"""One function per scaling method: its parameters in, exact frequencies and attention factors out.

A method is ``name(dim, rope_theta, *, parameters) -> Tables``. The keyword names are those of
transformers' ``rope_parameters``, so a method's signature is also the list of the keys it accepts
and of their defaults. ``dim`` is the number D of rotated dimensions, and theta_i = rope_theta **
(-2 i / D) the base frequency of pair i.

Frequencies are evaluated in 50-digit decimals and rounded once: they are the correctly rounded
float64 values of the formulas, the same on every machine. Attention factors are plain float64
expressions in the order of the published code, because models are served with those very bits.
"""

from __future__ import annotations

import decimal
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from numbers import Real
from typing import NamedTuple

import torch

from . import legal

_CONTEXT = decimal.Context(prec=50)
_TWO_PI = Decimal("6.283185307179586476925286766559005768394338798750211641949889184615632812572")


class Tables(NamedTuple):
    """What a method means: a row of frequencies per table, and each table's attention factor."""

    inv_freq: tuple[tuple[float, ...], ...]
    """[tables][dim / 2], radians per token."""
    scale: tuple[float | tuple[float, ...], ...] = (1.0,)
    """[tables], each one number or one per pair; multiplies cos and sin of q and of k."""


def _decimal(function):
    """Run a function's decimal arithmetic at 50 digits, whatever the caller's context."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with decimal.localcontext(_CONTEXT):
            return function(*args, **kwargs)

    return wrapped


def _powers(dim: int, theta: float, pairs: int | None = None) -> list[Decimal]:
    """theta ** (-2 i / dim) for i < pairs (dim / 2 unless given)."""
    log = Decimal(theta).ln()
    return [(log * (-2 * i) / dim).exp() for i in range(dim // 2 if pairs is None else pairs)]


def _floats(row: Iterable[Decimal]) -> tuple[float, ...]:
    return tuple(map(float, row))


# ------------------------------------------------------------------------------ one table


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

    vLLM divides the positions instead, which in exact arithmetic is the same function.
    """
    return Tables((_floats(x / Decimal(factor) for x in _powers(dim, rope_theta)),))


def ntk(dim, rope_theta, *, factor, mixed_b=None) -> Tables:
    """NTK-aware scaling (YaRN paper, definition 1): base rope_theta * factor ** (D / (D - 2)).

    So inv_freq_i = theta_i * factor ** (-2 i / (D - 2)): the fastest pair is kept, the slowest
    divided by ``factor``. HunYuan's ``alpha`` is ``factor`` under another name. ``mixed_b`` is Su
    Jianlin's mixed-radix variant (vLLM's ``ntk``): inv_freq_i = theta_i * exp(-a (i + 1) **
    mixed_b) with a = ln(factor) / (D / 2) ** mixed_b.
    """
    log = Decimal(factor).ln()
    if mixed_b is None:
        exponents = _ntk_exponents(dim)
    else:
        shares = (Decimal(2 * i + 2) / dim for i in range(dim // 2))
        exponents = (-(share.ln() * Decimal(mixed_b)).exp() for share in shares)
    bases = zip(_powers(dim, rope_theta), exponents, strict=True)
    return Tables((_floats(x * (log * exponent).exp() for x, exponent in bases),))


def _ntk_exponents(dim) -> list[Decimal]:
    """-2 i / (D - 2), the power of the growth of the context that divides each pair."""
    if dim < 4:
        raise ValueError(f"rotary_dim must be >= 4 for NTK-aware methods, got {dim}")
    return [Decimal(-2 * i) / (dim - 2) for i in range(dim // 2)]


def llama3(
    dim, rope_theta, *, factor, original_max_position_embeddings, low_freq_factor, high_freq_factor
) -> Tables:
    """NTK-by-parts (YaRN paper, definition 2), which Meta ships as ``llama3``.

    With r_i = L theta_i / 2 pi turns inside the original length L, and gamma(r) the ramp from 0 at
    ``low_freq_factor`` to 1 at ``high_freq_factor``: inv_freq_i = (1 - gamma) theta_i / factor +
    gamma theta_i. Equal factors make a step of it (Llama-4); a pair on the step is kept.
    """
    if low_freq_factor > high_freq_factor:
        raise ValueError(
            f"high_freq_factor must be >= low_freq_factor, got {high_freq_factor!r} and "
            f"{low_freq_factor!r}"
        )
    low, high, s = Decimal(low_freq_factor), Decimal(high_freq_factor), Decimal(factor)

    def scaled(x: Decimal) -> Decimal:
        turns = Decimal(original_max_position_embeddings) * x / _TWO_PI
        if turns >= high:
            return x
        if turns <= low:
            return x / s
        gamma = (turns - low) / (high - low)
        return (1 - gamma) * x / s + gamma * x

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
    """:func:`llama3` under the paper's name, with the paper's alpha = 1 and beta = 32."""
    return llama3(
        dim,
        rope_theta,
        factor=factor,
        original_max_position_embeddings=original_max_position_embeddings,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
    )


def yarn_mscale(factor: float, mscale: float = 1) -> float:
    """g(s, m) = 0.1 m ln(s) + 1, and 1 for s <= 1, in float64 (YaRN paper, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_ramp(
    dim, rope_theta, length, beta_fast, beta_slow, truncate, ramp="dimension"
) -> list[Decimal]:
    """How far each pair is interpolated, from 0 (kept) to 1 (divided by the factor)."""
    if beta_fast < beta_slow:
        raise ValueError(
            f"beta_fast must be >= beta_slow, got {beta_fast!r} and {beta_slow!r}: swapped?"
        )
    fast, slow, length = Decimal(beta_fast), Decimal(beta_slow), Decimal(length)
    if ramp == "rotations":
        if fast == slow:
            raise ValueError(
                f"beta_fast must be > beta_slow for this ramp, got {beta_fast!r} twice"
            )
        turns = (length * x / _TWO_PI for x in _powers(dim, rope_theta))
        shares = [(fast - turn) / (fast - slow) for turn in turns]
    elif ramp == "dimension":
        low, high = (
            dim * (length / (turns * _TWO_PI)).ln() / (2 * Decimal(rope_theta).ln())
            for turns in (fast, slow)
        )
        if truncate:
            low = low.to_integral_value(decimal.ROUND_FLOOR)
            high = high.to_integral_value(decimal.ROUND_CEILING)
        low, high = max(low, Decimal(0)), min(high, Decimal(dim - 1))
        if low == high:
            high += Decimal("0.001")
        shares = [(i - low) / (high - low) for i in range(dim // 2)]
    else:
        raise ValueError(
            f"ramp must be 'dimension' (released code) or 'rotations' (the paper), got {ramp!r}"
        )
    return [min(max(share, Decimal(0)), Decimal(1)) for share in shares]


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
    """YaRN (Peng et al. 2023): slow pairs interpolated, fast ones kept, and a temperature.

    inv_freq_i = m_i theta_i / factor + (1 - m_i) theta_i. In all released code (jquesnelle/yarn,
    transformers, vLLM, Megatron) m_i rises linearly with the index i, from 0 at d(beta_fast) to 1
    at d(beta_slow): d(n) = D ln(L / 2 pi n) / (2 ln rope_theta) is the dimension that turns n times
    in the original length L; both are rounded outwards unless ``truncate`` is false, and kept
    inside [0, D - 1]. The paper's eq. 18 is linear in the number of turns instead:
    ``ramp="rotations"``, which no released model uses.

    Attention factor: ``attention_factor`` if given; else g(mscale) / g(mscale_all_dim) if both are
    non-zero; else g(1); with g of :func:`yarn_mscale`.
    """
    s = Decimal(factor)
    ramps = _yarn_ramp(
        dim, rope_theta, original_max_position_embeddings, beta_fast, beta_slow, truncate, ramp
    )
    row = (m * x / s + (1 - m) * x for x, m in zip(_powers(dim, rope_theta), ramps, strict=True))
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = yarn_mscale(factor)
    return Tables((_floats(row),), (attention_factor,))


def proportional(dim, rope_theta, *, partial_rotary_factor=1.0, factor=1.0) -> Tables:
    """p-RoPE (Gemma-4): int(partial_rotary_factor * D // 2) pairs turn, the others stand still.

    inv_freq_i = theta_i / factor with the exponent over the whole head, unlike partial rotary,
    which shortens D.
    """
    turning = int(partial_rotary_factor * dim // 2)
    row = [x / Decimal(factor) for x in _powers(dim, rope_theta, turning)]
    return Tables((_floats(row) + (0.0,) * (dim // 2 - turning),))


# ------------------------------------------------------------------------------ two tables


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

    lambda is ``long_factor`` for a sequence longer than the original length L, else
    ``short_factor``. Tokens at positions below ``n_start`` (the paper's n-hat) turn with theta_i.

    Attention factor of both tables: ``attention_factor`` if given (one number, or one per pair:
    LongRoPE2's mscale_factors); else by ``magnitude_scaling_policy`` from s = ``factor`` or
    max_position_embeddings / L: "su" sqrt(1 + ln(s) / ln(L)) as released, "yarn" 0.1 ln(s) + 1, or
    a number; 1 for s <= 1. ``short_mscale`` and ``long_mscale`` (Phi-3.5-MoE) give each its own.
    """
    length = original_max_position_embeddings
    if factor is None and max_position_embeddings is not None:
        factor = max_position_embeddings / length
    if attention_factor is None and (short_mscale is None or long_mscale is None):
        attention_factor = magnitude(magnitude_scaling_policy, factor, length)
    powers = _powers(dim, rope_theta)
    rows = [
        _floats(x / Decimal(f) for x, f in zip(powers, factors, strict=True))
        for factors in (short_factor, long_factor)
    ]
    scales = [attention_factor if m is None else m for m in (short_mscale, long_mscale)]
    if n_start:
        if scales[0] != scales[1]:
            raise ValueError(
                "n_start must be 0 where short_mscale and long_mscale differ, since the first "
                f"tokens belong to both tables, got {n_start!r}"
            )
        rows.append(_floats(powers))
        scales.append(scales[0])
    return Tables(tuple(rows), tuple(scales))


def magnitude(policy, factor, length) -> float:
    """LongRoPE's attention factor for a context ``factor`` times ``length``."""
    if isinstance(policy, Real):
        return legal.number("magnitude_scaling_policy", policy)
    if policy not in ("su", "yarn"):
        raise ValueError(
            f"magnitude_scaling_policy must be 'su', 'yarn' or a number > 0, got {policy!r}"
        )
    if factor is None:
        raise ValueError(
            "factor is required where neither attention_factor nor max_position_embeddings is "
            "given, got None"
        )
    if factor <= 1:
        return 1.0
    if policy == "yarn":
        return yarn_mscale(factor)
    return math.sqrt(1 + math.log(factor) / math.log(length))


# ------------------------------------------------------------------------------ one per length


def dynamic(dim, rope_theta, *, factor, max_position_embeddings) -> Tables:
    """Dynamic NTK (bloc97, emozilla 2023) at its rest length M = max_position_embeddings.

    For a sequence of length l >= M the base is rope_theta * (factor l / M - (factor - 1)) **
    (D / (D - 2)), so inv_freq_i(l) = theta_i * g ** (-2 i / (D - 2)) with g = 1 + factor (l - M) /
    M. A pure function of the length: transformers' version depends on those it has seen before.
    """
    parameters = {"factor": factor, "max_position_embeddings": max_position_embeddings}
    return _at_rest("dynamic", dim, rope_theta, max_position_embeddings, parameters)


def _dynamic_constants(dim, rope_theta, **_) -> tuple[tuple[float, ...], ...]:
    return _floats(_powers(dim, rope_theta)), _floats(_ntk_exponents(dim))


def _dynamic_law(constants, seq_lens, *, factor, max_position_embeddings):
    rest = max_position_embeddings
    growth = 1.0 + factor * (seq_lens.to(torch.float64)[:, None].clamp(min=rest) - rest) / rest
    return constants[0] * growth ** constants[1], torch.ones_like(growth)


def dynamic_yarn(
    dim,
    rope_theta,
    *,
    original_max_position_embeddings,
    max_position_embeddings=None,
    beta_fast=32,
    beta_slow=1,
    truncate=True,
    finetuned=False,
) -> Tables:
    """Dynamic YaRN (YaRN paper, section 3.3) at max_position_embeddings, or the original length L.

    :func:`yarn` made anew for every length l, with factor s = max(1, l / L): inv_freq_i = m_i
    theta_i / s + (1 - m_i) theta_i, attention factor 0.1 ln(s) + 1. ``finetuned`` (jquesnelle): s
    is never below max_position_embeddings / L.
    """
    parameters = {
        "original_max_position_embeddings": original_max_position_embeddings,
        "max_position_embeddings": max_position_embeddings,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "truncate": truncate,
        "finetuned": finetuned,
    }
    length = max_position_embeddings or original_max_position_embeddings
    return _at_rest("dynamic_yarn", dim, rope_theta, length, parameters)


def _dynamic_yarn_constants(
    dim, rope_theta, *, original_max_position_embeddings, beta_fast, beta_slow, truncate, **_
) -> tuple[tuple[float, ...], ...]:
    length = original_max_position_embeddings
    shares = _yarn_ramp(dim, rope_theta, length, beta_fast, beta_slow, truncate)
    both = list(zip(_powers(dim, rope_theta), shares, strict=True))
    return _floats(m * x for x, m in both), _floats((1 - m) * x for x, m in both)


def _dynamic_yarn_law(
    constants,
    seq_lens,
    *,
    original_max_position_embeddings,
    max_position_embeddings,
    finetuned,
    **_,
):
    least = original_max_position_embeddings
    if finetuned and max_position_embeddings is not None:
        least = max(least, max_position_embeddings)
    s = seq_lens.to(torch.float64)[:, None].clamp(min=least) / original_max_position_embeddings
    return constants[0] / s + constants[1], 0.1 * s.log() + 1.0


def _at_rest(name, dim, rope_theta, length, parameters) -> Tables:
    """The table of a per-length method for one length, by the very law that makes all of them."""
    constants = CONSTANTS[name](dim, rope_theta, **parameters)
    constants = torch.tensor(constants, dtype=torch.float64, device="cpu")
    rows, scales = LAWS[name](constants, torch.tensor([length], device="cpu"), **parameters)
    return Tables((tuple(rows[0].tolist()),), (scales.item(),))


# Of the per-length methods: the constants [2, D / 2], and the law that makes of them and of lengths
# [n] the frequencies [n, D / 2] and attention factors [n, 1], float64, on the lengths' device.
CONSTANTS = {
    "dynamic": _decimal(_dynamic_constants),
    "dynamic_yarn": _decimal(_dynamic_yarn_constants),
}
LAWS = {"dynamic": _dynamic_law, "dynamic_yarn": _dynamic_yarn_law}

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


# ------------------------------------------------------------------------------ parameters


@functools.cache
def accepts(rope_type: str) -> Mapping[str, inspect.Parameter]:
    """The parameters a method takes, by key; ValueError for an unknown ``rope_type``."""
    if rope_type not in METHODS:
        raise ValueError(f"rope_type must be one of {', '.join(METHODS)}, got {rope_type!r}")
    return dict(list(inspect.signature(METHODS[rope_type]).parameters.items())[2:])


def parameters(rope_type: str, given: Mapping, dim: int) -> tuple[tuple[str, object], ...]:
    """All parameters of a method in canonical form: checked, defaults filled in, arrays as tuples.

    Raises:
        ValueError: an unknown ``rope_type``, a key the method does not take or lacks, a value
            outside its legal range.
    """
    accepted = accepts(rope_type)
    for key in given:
        if key not in accepted:
            takes = ", ".join(accepted) or "none"
            raise ValueError(f"{key} is not a parameter of {rope_type!r}, which takes: {takes}")
    canonical = []
    for name, parameter in accepted.items():
        value = given.get(name, parameter.default)
        if value is parameter.empty or (value is None and parameter.default is not None):
            raise ValueError(f"{name} is required by {rope_type!r}, got {given.get(name)!r}")
        canonical.append((name, _checked(name, value, dim)))
    return tuple(canonical)


def _checked(name: str, value, dim: int):
    if value is None or name in ("ramp", "magnitude_scaling_policy"):
        return value  # the method checks these
    if name in ("truncate", "finetuned"):
        return legal.flag(name, value)
    if name in ("short_factor", "long_factor"):
        return legal.numbers(name, value, dim // 2)
    if name == "attention_factor" and not isinstance(value, Real):
        return legal.numbers(name, value, dim // 2)
    return legal.number(name, value)
