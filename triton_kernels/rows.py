"""What the rotation kernels share: the tokens of a tile, their angles, and rows of heads.

A program works on tiles of BLOCK_T tokens of one sequence of the batch. The angles of those tokens
are computed once, [BLOCK_T, pairs], and reused by all heads of q and k, which pass by in blocks:
a tile of one operand is [BLOCK_T, BLOCK_H, columns]. Blocks are powers of two, so columns are
padded to one and masked. Addresses of rows are 64-bit; columns are compile-time constants apart,
which leaves the compiler free to use 128-bit accesses.
"""

import triton
import triton.language as tl

from .phase import cos_sin_at, widen


@triton.jit
def token_angles(
    turns,
    scale,
    positions,
    table_index,
    axis_map,
    batch,
    token,
    valid,
    pair,
    position_stride,
    index_stride,
    tables,
    PAIRS: tl.constexpr,
    CONJUGATE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """(cos, sin, factor, position, row) of the pairs `pair`, [1, columns], of the tokens of a tile.

    token and batch are int64, [BLOCK_T]; batch may be one for all. A pair outside 0 .. PAIRS - 1
    is no pair and has angle 0.

    cos and sin are of the bare angle, [BLOCK_T, columns]; factor is the attention factor,
    [BLOCK_T | 1, columns]; position is int, [BLOCK_T, columns | 1]; row, [BLOCK_T], is the row of
    the tables.
    """
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    inside = (pair >= 0) & (pair < PAIRS)
    if table_index is None:
        row = tl.zeros_like(token)
        at = pair
        known = inside
    else:
        row = tl.load(
            table_index + batch * index_stride[0] + token * index_stride[1], mask=valid, other=0
        ).to(tl.int64)
        row = tl.minimum(tl.maximum(row, 0), tables - 1)
        at = row[:, None] * PAIRS + pair
        known = inside & valid[:, None]
    turn = tl.load(turns + at, mask=known, other=0)
    factor = tl.load(scale + at, mask=known, other=0.0).to(wide)
    if positions is None:
        position = token[:, None]
    else:
        place = (batch * position_stride[1] + token * position_stride[2])[:, None]
        if axis_map is None:
            position = tl.load(positions + place, mask=valid[:, None], other=0)
        else:
            axis = tl.load(axis_map + pair, mask=inside, other=0).to(tl.int64)
            position = tl.load(
                positions + (axis * position_stride[0] + place),
                mask=inside & valid[:, None],
                other=0,
            )
    cos, sin = cos_sin_at(position, turn, DOUBLE)
    if CONJUGATE:
        sin = -sin
    return cos, sin, factor, position, row


@triton.jit
def head_rows(x, batch, token, head, stride):
    """Pointers to the first column of each row of a tile, [BLOCK_T, BLOCK_H, 1]."""
    tokens = batch * stride[0] + token * stride[1]
    heads = head.to(tl.int64) * stride[2]
    return x + (tokens[:, None, None] + heads[None, :, None])


@triton.jit
def weight_rows(weight, head, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ALL: tl.constexpr):
    """(pointers to the norm weights of the heads of a tile, which of them exist), [1, BLOCK_H, 1];
    or [1, 1, 1] where all heads share them."""
    if ALL:
        return weight + (head * HEAD_DIM)[None, :, None], (head < HEADS)[None, :, None]
    else:
        return weight + tl.zeros((1, 1, 1), tl.int32), tl.full((1, 1, 1), True, tl.int1)


@triton.jit
def _pair_columns(PAIRS: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(columns, which of them exist) of one load: all of an interleaved slice, or its first
    half."""
    COUNT: tl.constexpr = 2 * PAIRS if INTERLEAVED else PAIRS
    PADDED: tl.constexpr = triton.next_power_of_2(PAIRS) * (2 if INTERLEAVED else 1)
    column = tl.arange(0, PADDED)[None, None, :]
    return OFFSET + column.to(tl.int64), column < COUNT


@triton.jit
def load_pairs(
    rows,
    valid,
    step,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The members (a, b) of every pair of the rotated slice, [BLOCK_T, BLOCK_H, columns] each, 0
    outside. `rows` are pointers [BLOCK_T | 1, BLOCK_H | 1, 1], `step` is the stride of columns."""
    column, inside = _pair_columns(PAIRS, OFFSET, INTERLEAVED)
    mask = valid & inside
    if INTERLEAVED:
        both = widen(tl.load(rows + column * step, mask=mask, other=0.0), WIDE)
        a, b = both.reshape(both.shape[0], both.shape[1], both.shape[2] // 2, 2).split()
    else:
        a = widen(tl.load(rows + column * step, mask=mask, other=0.0), WIDE)
        b = widen(tl.load(rows + (column + PAIRS) * step, mask=mask, other=0.0), WIDE)
    return a, b


@triton.jit
def store_pairs(
    rows,
    a,
    b,
    valid,
    step,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The inverse of load_pairs; a and b are in the type of the tensor."""
    column, inside = _pair_columns(PAIRS, OFFSET, INTERLEAVED)
    mask = valid & inside
    if INTERLEAVED:
        both = tl.join(a, b).reshape(a.shape[0], a.shape[1], 2 * a.shape[2])
        tl.store(rows + column * step, both, mask=mask)
    else:
        tl.store(rows + column * step, a, mask=mask)
        tl.store(rows + (column + PAIRS) * step, b, mask=mask)


@triton.jit
def rest_columns(HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, OFFSET: tl.constexpr):
    """(columns, which of them exist) of the dimensions that are not rotated, before and after the
    slice; there must be some."""
    COUNT: tl.constexpr = HEAD_DIM - 2 * PAIRS
    column = tl.arange(0, triton.next_power_of_2(COUNT))[None, None, :]
    inside = column < COUNT
    if OFFSET == 0:
        column += 2 * PAIRS
    elif OFFSET < COUNT:
        column += tl.where(column >= OFFSET, 2 * PAIRS, 0)
    return column.to(tl.int64), inside


@triton.jit
def reciprocal_rms(mean_square, EPS: tl.constexpr):
    """1 / sqrt(mean(x**2) + eps), each step rounded to nearest."""
    if mean_square.dtype == tl.float64:
        return 1.0 / tl.sqrt(mean_square + EPS)
    else:
        return tl.div_rn(tl.full(mean_square.shape, 1.0, tl.float32), tl.sqrt_rn(mean_square + EPS))
