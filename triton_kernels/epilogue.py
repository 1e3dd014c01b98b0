"""What the projection does to a tile of the product before it is stored: norm, rotation, factors.

A tile is a whole number of heads wide. The features of a head are seen as [SLABS, WIDTH]:
half-split pairs (j, j + rotary_dim / 2) are the same column of two slabs that lie behind each
other, and a head with partial rotary has more than two slabs. Interleaved pairs need one slab.
Widths that are no power of two are padded, slab by slab, to PADDED columns, which hold zeros and
are never stored. So both members of every pair are in the registers of one thread, and all that a
norm sums over in those of one warp: nothing is exchanged through memory.
"""

import triton
import triton.language as tl

from .phase import join_pairs, narrow, rotate, split_pairs
from .rows import token_angles


@triton.jit
def finish(
    acc,
    y,
    y_stride,
    z,
    norm,
    token_scale,
    token_scale_stride,
    turns,
    scale,
    positions,
    table_index,
    axis_map,
    tables,
    position_stride,
    index_stride,
    first_row,
    tokens,
    seqlen,
    head,
    heads,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    HEADS: tl.constexpr,
    SLABS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """y = token_scale * scale * R(position * inv_freq) * norm(acc), rounded once.

    acc: float32 [rows, HEADS * SLABS * PADDED], of the heads from `head` on. y, and z, which gets
    acc, are tensor descriptors or (DESCRIPTORS False) pointers. Operands that are None take no
    part; without turns nothing is rotated. PARTS = 2 or 4 takes the pairs in as many
    goes, with fewer registers for their angles.
    """
    ROWS: tl.constexpr = acc.shape[0]
    GROUPS: tl.constexpr = HEADS if INTERLEAVED else HEADS * SLABS // 2  # rows of pairs in a tile
    PER_HEAD: tl.constexpr = GROUPS // HEADS
    SLOTS: tl.constexpr = PADDED // 2 if INTERLEAVED else PADDED
    SIZE: tl.constexpr = SLOTS // PARTS
    COLUMNS: tl.constexpr = PADDED // PARTS
    row = first_row + tl.arange(0, ROWS)
    valid = row < tokens
    batch, token = batch_and_token(row, seqlen)
    group = tl.arange(0, GROUPS)

    a, b = split_pairs(acc, ROWS, GROUPS, SLOTS, INTERLEAVED)
    a, b = _parts(a, ROWS, GROUPS, SLOTS, PARTS), _parts(b, ROWS, GROUPS, SLOTS, PARTS)
    if norm is not None:
        squares = tl.zeros((ROWS, GROUPS), tl.float32)
        for part in tl.static_range(PARTS):
            squares += tl.sum(a[part] * a[part] + b[part] * b[part], 2)
        # A reshape costs registers, so only where a head is several of several rows of pairs.
        if HEADS == 1:
            squares = tl.sum(squares, 1)[:, None]
        elif PER_HEAD > 1:
            squares = tl.sum(squares.reshape(ROWS, HEADS, PER_HEAD), 2)
        rstd = tl.math.rsqrt(squares * (1.0 / HEAD_DIM) + NORM_EPS)[:, :, None]
        if HEADS > 1 and PER_HEAD > 1:
            rstd = tl.broadcast_to(rstd, (ROWS, HEADS, PER_HEAD)).reshape(ROWS, GROUPS, 1)
    if token_scale is not None:
        at = batch * token_scale_stride[0] + token * token_scale_stride[1]
        row_scale = tl.load(token_scale + at, mask=valid, other=0).to(tl.float32)[:, None, None]

    for part in tl.static_range(PARTS):
        ya, yb = a[part], b[part]
        if z is not None:
            z_stride = (seqlen.to(tl.int64) * heads * HEAD_DIM, heads.to(tl.int64) * HEAD_DIM)
            _store(
                z,
                z_stride,
                join_pairs(ya, yb, ROWS, GROUPS, SIZE, INTERLEAVED),
                (first_row, valid, batch, token, head, heads),
                part * COLUMNS,
                HEAD_DIM,
                HEADS,
                SLABS,
                WIDTH,
                COLUMNS,
                DESCRIPTORS,
            )
        if norm is not None:
            feature, partner, real = _features(
                part * SIZE, HEAD_DIM, GROUPS, SIZE, WIDTH, INTERLEAVED
            )
            at = norm + feature % HEAD_DIM
            ya *= rstd * tl.load(at, mask=real, other=0).to(tl.float32)[None]
            yb *= rstd * tl.load(at + partner, mask=real, other=0).to(tl.float32)[None]
        if turns is not None:
            pair = part * SIZE + tl.arange(0, SIZE)
            if INTERLEAVED:
                pair -= OFFSET // 2
            cos, sin, factor, _, _ = token_angles(
                turns,
                scale,
                positions,
                table_index,
                axis_map,
                batch,
                token,
                valid,
                pair[None, :],
                position_stride,
                index_stride,
                tables,
                PAIRS,
                CONJUGATE,
                False,
            )
            cos, sin = (cos * factor)[:, None, :], (sin * factor)[:, None, :]
            turned_a, turned_b = rotate(ya, yb, cos, sin)
            if 2 * PAIRS == HEAD_DIM:
                ya, yb = turned_a, turned_b
            else:
                if INTERLEAVED:
                    inside = ((pair >= 0) & (pair < PAIRS))[None, None, :]
                else:
                    inside = (group % PER_HEAD == OFFSET // (2 * PAIRS))[None, :, None]
                ya, yb = tl.where(inside, turned_a, ya), tl.where(inside, turned_b, yb)
        if token_scale is not None:
            ya *= row_scale
            yb *= row_scale
        _store(
            y,
            y_stride,
            join_pairs(ya, yb, ROWS, GROUPS, SIZE, INTERLEAVED),
            (first_row, valid, batch, token, head, heads),
            part * COLUMNS,
            HEAD_DIM,
            HEADS,
            SLABS,
            WIDTH,
            COLUMNS,
            DESCRIPTORS,
        )


@triton.jit
def batch_and_token(row, seqlen):
    """int64 both. Unsigned inside: the compiler then knows the upper half of a position to be 0."""
    row, seqlen = row.to(tl.uint32), seqlen.to(tl.uint32)
    return (row // seqlen).to(tl.int64), (row % seqlen).to(tl.int64)


@triton.jit
def feature_of(
    column,
    head,
    heads,
    HEAD_DIM: tl.constexpr,
    SLABS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """(feature, whether there is one) of a column of a tile that holds COLUMNS, from FIRST on, of
    every slab. Features are counted from the first head of all."""
    head += column // (SLABS * COLUMNS)
    within = FIRST + column % COLUMNS
    feature = head * HEAD_DIM + column // COLUMNS % SLABS * WIDTH + within
    return feature, (head < heads) & (within < WIDTH)


@triton.jit
def _features(
    first_slot,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """First members of the pairs in SIZE slots: (feature [GROUPS, SIZE] counted from the tile's
    first head, distance of the second member, whether the slot is none of the padding)."""
    slot = first_slot + tl.arange(0, SIZE)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    if INTERLEAVED:
        return group * HEAD_DIM + 2 * slot, 1, (2 * slot < WIDTH) & (group >= 0)
    else:
        return group * (2 * WIDTH) + slot, WIDTH, (slot < WIDTH) & (group >= 0)


@triton.jit
def _parts(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr):
    """[rows, groups, slots] as a tuple of PARTS (1, 2 or 4) equal slices of the slots."""
    if PARTS == 1:
        return (x,)
    else:
        lower, upper = x.reshape(ROWS, GROUPS, 2, SLOTS // 2).permute(0, 1, 3, 2).split()
        lower = _parts(lower, ROWS, GROUPS, SLOTS // 2, PARTS // 2)
        return lower + _parts(upper, ROWS, GROUPS, SLOTS // 2, PARTS // 2)


@triton.jit
def _store(
    target,
    stride,
    y,
    place,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    SLABS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Round y and store it as COLUMNS, from FIRST on, of every slab, leaving out what is padding,
    and rows and heads that do not exist."""
    first_row, valid, batch, token, head, heads = place
    if DESCRIPTORS:
        y = narrow(y, target.dtype).reshape(y.shape[0], HEADS, SLABS, COLUMNS)
        target.store([first_row, head, 0, FIRST], y)
    else:
        column = tl.arange(0, HEADS * SLABS * COLUMNS)
        feature, real = feature_of(column, head, heads, HEAD_DIM, SLABS, WIDTH, COLUMNS, FIRST)
        row = batch * stride[0] + token * stride[1]
        y = narrow(y, target.dtype.element_ty)
        at = row[:, None] + feature[None, :]
        tl.store(target + at, y, mask=valid[:, None] & real[None, :])
