"""The maths of one pair in Triton: position and turns -> phase -> (cos, sin), and the rotation.

The same lines as csrc/rotate.h, which explains them: a frequency is stored as turns =
round(inv_freq / 2pi * 2**64), so that position * turns mod 2**64 is the angle as a fraction of a
full turn, and wrapping integer arithmetic is an exact range reduction. No libdevice call: its sine
and cosine bring a slow path for large arguments, which costs registers and local memory even where
it is never taken."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def phase32(position, turns):
    """position * turns / 2**32 mod 2**32, uint32: all that a float32 angle can use.

    position: int32 or int64 (negative ones too); turns: int64, the bits of the 64-bit frequency.
    The shapes broadcast. Only three 32-bit products: the bits below 2**32 are never formed.
    """
    position = position.to(tl.int64)
    p_lo, p_hi = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    t_lo, t_hi = turns.to(tl.uint32), (turns >> 32).to(tl.uint32)
    p_lo, t_lo = tl.broadcast(p_lo, t_lo)
    return tl.umulhi(p_lo, t_lo) + p_lo * t_hi + p_hi * t_lo


@triton.jit
def phase64(position, turns):
    """position * turns mod 2**64, uint64: the angle in units of 2**-64 turns, for float64."""
    return position.to(tl.int64).to(tl.uint64, bitcast=True) * turns.to(tl.uint64, bitcast=True)


@triton.jit
def cos_sin(phase):
    """(cos, sin) of 2pi * phase / 2**32 in float32, within 8e-8; phase: uint32.

    The nearest quarter turn is split off in integers; the rest is an angle in [-pi/4, pi/4), where
    minimax polynomials (errors 2e-9 and 1e-10) suffice.
    """
    quadrant = (phase + (1 << 29)) >> 30
    angle = (phase << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.6572951981678992e-10
    square = angle * angle
    sine = angle + angle * square * (
        -0.166666506693 + square * (0.00833197866388 + square * -0.000194956163174)
    )
    cosine = (
        1.0
        - 0.5 * square
        + square
        * square
        * (0.0416666468665 + square * (-0.00138873675164 + square * 2.44384516551e-5))
    )
    # Odd quadrants swap the two; the sign bits follow from the quadrant.
    s, c = sine.to(tl.uint32, bitcast=True), cosine.to(tl.uint32, bitcast=True)
    differ = (s ^ c) & (0 - (quadrant & 1))
    cosine = (c ^ differ) ^ (((quadrant + 1) & 2) << 30)
    sine = (s ^ differ) ^ ((quadrant & 2) << 30)
    return cosine.to(tl.float32, bitcast=True), sine.to(tl.float32, bitcast=True)


@triton.jit
def cos_sin_double(phase):
    """(cos, sin) of 2pi * phase / 2**64 in float64, within two units in the last place; phase:
    uint64. Taylor series: on [-pi/4, pi/4) their remainders are 2e-18 and less."""
    quadrant = (phase + (1 << 61)) >> 62
    angle = (phase << 2).to(tl.int64, bitcast=True).to(tl.float64) * 8.5153039502163865e-20
    square = angle * angle
    s = 2.8114572543455206e-15 - square * 8.2206352466243295e-18  # 1/17!, 1/19!
    s = -7.6471637318198164e-13 + square * s
    s = 1.6059043836821613e-10 + square * s
    s = -2.5052108385441720e-08 + square * s
    s = 2.7557319223985893e-06 + square * s
    s = -1.9841269841269841e-04 + square * s
    s = 8.3333333333333332e-03 + square * s
    s = -1.6666666666666666e-01 + square * s
    c = 4.7794773323873853e-14 - square * 1.5619206968586225e-16  # 1/16!, 1/18!
    c = -1.1470745597729725e-11 + square * c
    c = 2.0876756987868100e-09 + square * c
    c = -2.7557319223985888e-07 + square * c
    c = 2.4801587301587302e-05 + square * c
    c = -1.3888888888888889e-03 + square * c
    c = 4.1666666666666664e-02 + square * c
    sine = angle + angle * (square * s)
    cosine = 1.0 - (square * 0.5 - square * square * c)
    odd = (quadrant & 1) != 0
    swapped_c, swapped_s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return (
        tl.where(((quadrant + 1) & 2) != 0, -swapped_c, swapped_c),
        tl.where((quadrant & 2) != 0, -swapped_s, swapped_s),
    )


@triton.jit
def cos_sin_at(position, turns, DOUBLE: tl.constexpr):
    """(cos, sin) of position * inv_freq, in float32 or (DOUBLE) float64."""
    if DOUBLE:
        return cos_sin_double(phase64(position, turns))
    else:
        return cos_sin(phase32(position, turns))


@triton.jit
def rotate(a, b, cos, sin):
    """(a, b) turned by the angle: (a cos - b sin, b cos + a sin)."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def split_pairs(
    x, ROWS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """[ROWS, HEADS * 2 * PAIRS] -> the members (a, b) of every pair, [ROWS, HEADS, PAIRS] each.

    Pairs are (2j, 2j + 1) or, half-split, (j, j + PAIRS) of a head. On an accumulator of wgmma or
    mma both members are in the registers of one thread.
    """
    if INTERLEAVED:
        a, b = x.reshape(ROWS, HEADS, PAIRS, 2).split()
    else:
        a, b = x.reshape(ROWS, HEADS, 2, PAIRS).permute(0, 1, 3, 2).split()
    return a, b


@triton.jit
def join_pairs(
    a, b, ROWS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The inverse of split_pairs."""
    x = tl.join(a, b)
    if not INTERLEAVED:
        x = x.permute(0, 1, 3, 2)
    return x.reshape(ROWS, HEADS * 2 * PAIRS)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """x in the type of the arithmetic; exact.

    Triton's interpreter loses subnormal bfloat16 numbers on the way to float32 and truncates on the
    way back, so both conversions are spelled out in integers there (`narrow` likewise).
    """
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to the nearest number of the type of a tensor, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, nearest, bits | 0x400000)  # NaN stays NaN
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
