"""What the rotation kernels share: the tokens of a tile, their angles, and rows of heads.

A program works on tiles of BLOCK_T tokens of one sequence of the batch. The angles of those tokens
are computed once, [BLOCK_T, pairs], and reused by all heads of q and k, which pass by in blocks:
a tile of one operand is [BLOCK_T, BLOCK_H, columns]. Blocks are powers of two, so columns are
padded to one and masked. Addresses of rows are 64-bit; columns are compile-time constants apart,
which leaves the compiler free to use 128-bit accesses.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .phase import cos_sin_at, narrow, widen


class Strides(NamedTuple):
    """Strides of a tensor [batch, seqlen, heads, head_dim]."""

    batch: Any
    token: Any
    head: Any
    step: Any


class AngleStrides(NamedTuple):
    """Strides of positions [axis, batch, seqlen] and table_index [batch, seqlen]."""

    axis: Any
    batch: Any
    token: Any
    index_batch: Any
    index_token: Any


class Heads(NamedTuple):
    """A tensor [batch, seqlen, heads, head_dim] by its address."""

    start: Any
    stride: Strides


class Angles(NamedTuple):
    """What says the angles of a token: see csrc/params.h. What is None takes no part."""

    turns: Any = None
    scale: Any = None
    positions: Any = None
    table_index: Any = None
    axis_map: Any = None
    tables: Any = None
    stride: AngleStrides | None = None


class Dims(NamedTuple):
    """Which dimensions of a head are rotated, and what their pairs are; compile-time constants."""

    HEAD_DIM: Any
    PAIRS: Any
    OFFSET: Any
    INTERLEAVED: Any


class Tokens(NamedTuple):
    """The tokens of a tile."""

    batch: Any  # int64: of each, or one for all
    token: Any  # int64 [BLOCK_T]: where in its sequence
    valid: Any  # bool [BLOCK_T]: whether there is one


@triton.jit
def tokens_of(tile, seqlen, BLOCK_T: tl.constexpr):
    """The tokens of a tile, where a sequence has cdiv(seqlen, BLOCK_T) tiles."""
    tiles = tl.cdiv(seqlen, BLOCK_T)
    batch = (tile // tiles).to(tl.int64)
    token = ((tile % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    return Tokens(batch, token, token < seqlen)


@triton.jit
def token_angles(
    angles,
    tokens,
    pair,
    PAIRS: tl.constexpr,
    CONJUGATE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """(cos, sin, factor, position, row) of the pairs `pair`, [1, columns], of the tokens of a tile.

    A pair outside 0 .. PAIRS - 1 is no pair and has angle 0.

    cos and sin are of the bare angle, [BLOCK_T, columns]; factor is the attention factor,
    [BLOCK_T | 1, columns]; position is int, [BLOCK_T, columns | 1]; row, [BLOCK_T], is the row of
    the tables.
    """
    wide: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    batch, token, valid = tokens
    inside = (pair >= 0) & (pair < PAIRS)
    if angles.table_index is None:
        row = tl.zeros_like(token)
        at = pair
        known = inside
    else:
        place = batch * angles.stride.index_batch + token * angles.stride.index_token
        row = tl.load(angles.table_index + place, mask=valid, other=0).to(tl.int64)
        row = tl.minimum(tl.maximum(row, 0), angles.tables - 1)
        at = row[:, None] * PAIRS + pair
        known = inside & valid[:, None]
    turn = tl.load(angles.turns + at, mask=known, other=0)
    factor = tl.load(angles.scale + at, mask=known, other=0.0).to(wide)
    if angles.positions is None:
        position = token[:, None]
    else:
        place = (batch * angles.stride.batch + token * angles.stride.token)[:, None]
        if angles.axis_map is None:
            position = tl.load(angles.positions + place, mask=valid[:, None], other=0)
        else:
            axis = tl.load(angles.axis_map + pair, mask=inside, other=0).to(tl.int64)
            position = tl.load(
                angles.positions + (axis * angles.stride.axis + place),
                mask=inside & valid[:, None],
                other=0,
            )
    cos, sin = cos_sin_at(position, turn, DOUBLE)
    if CONJUGATE:
        sin = -sin
    return cos, sin, factor, position, row


@triton.jit
def token_factor(token_scale, stride, tokens, WIDE: tl.constexpr):
    """token_scale of the tokens of a tile, [BLOCK_T]."""
    at = token_scale + tokens.batch * stride[0] + tokens.token * stride[1]
    return widen(tl.load(at, mask=tokens.valid, other=0.0), WIDE)


@triton.jit
def head_rows(x, tokens, head):
    """Pointers to the first column of each row of a tile, [BLOCK_T, BLOCK_H, 1]."""
    row = tokens.batch * x.stride.batch + tokens.token * x.stride.token
    heads = head.to(tl.int64) * x.stride.head
    return x.start + (row[:, None, None] + heads[None, :, None])


@triton.jit
def weight_rows(weight, head, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ALL: tl.constexpr):
    """(pointers to the norm weights of the heads of a tile, which of them exist), [1, BLOCK_H, 1];
    or [1, 1, 1] where all heads share them."""
    if ALL:
        return weight + (head * HEAD_DIM)[None, :, None], (head < HEADS)[None, :, None]
    else:
        return weight + tl.zeros((1, 1, 1), tl.int32), tl.full((1, 1, 1), True, tl.int1)


@triton.jit
def _pair_columns(dims):
    """(columns, which of them exist) of one load: all of an interleaved slice, or its first
    half."""
    WIDTH: tl.constexpr = 2 if dims.INTERLEAVED else 1
    column = tl.arange(0, triton.next_power_of_2(dims.PAIRS) * WIDTH)[None, None, :]
    return dims.OFFSET + column.to(tl.int64), column < dims.PAIRS * WIDTH


@triton.jit
def load_pairs(rows, valid, step, dims, WIDE: tl.constexpr):
    """The members (a, b) of every pair of the rotated slice, [BLOCK_T, BLOCK_H, columns] each, 0
    outside. `rows` are pointers [BLOCK_T | 1, BLOCK_H | 1, 1], `step` is the stride of columns."""
    column, inside = _pair_columns(dims)
    mask = valid & inside
    if dims.INTERLEAVED:
        both = widen(tl.load(rows + column * step, mask=mask, other=0.0), WIDE)
        a, b = both.reshape(both.shape[0], both.shape[1], both.shape[2] // 2, 2).split()
    else:
        a = widen(tl.load(rows + column * step, mask=mask, other=0.0), WIDE)
        b = widen(tl.load(rows + (column + dims.PAIRS) * step, mask=mask, other=0.0), WIDE)
    return a, b


@triton.jit
def store_pairs(rows, a, b, valid, step, dims):
    """The inverse of load_pairs; rounds to the type of the tensor."""
    DTYPE: tl.constexpr = rows.dtype.element_ty
    column, inside = _pair_columns(dims)
    mask = valid & inside
    a, b = narrow(a, DTYPE), narrow(b, DTYPE)
    if dims.INTERLEAVED:
        both = tl.join(a, b).reshape(a.shape[0], a.shape[1], 2 * a.shape[2])
        tl.store(rows + column * step, both, mask=mask)
    else:
        tl.store(rows + column * step, a, mask=mask)
        tl.store(rows + (column + dims.PAIRS) * step, b, mask=mask)


@triton.jit
def rest_columns(dims):
    """(columns, which of them exist) of the dimensions that are not rotated, before and after the
    slice; there must be some."""
    COUNT: tl.constexpr = dims.HEAD_DIM - 2 * dims.PAIRS
    column = tl.arange(0, triton.next_power_of_2(COUNT))[None, None, :]
    inside = column < COUNT
    if dims.OFFSET == 0:
        column += 2 * dims.PAIRS
    elif dims.OFFSET < COUNT:
        column += tl.where(column >= dims.OFFSET, 2 * dims.PAIRS, 0)
    return column.to(tl.int64), inside


@triton.jit
def reciprocal_rms(mean_square, EPS: tl.constexpr):
    """1 / sqrt(mean(x**2) + eps); in float32 as torch.rsqrt has it on a GPU, within 2 units."""
    if mean_square.dtype == tl.float64:
        return 1.0 / tl.sqrt(mean_square + EPS)
    else:
        return tl.rsqrt(mean_square + EPS)
