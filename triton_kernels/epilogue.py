"""What the projection does to a tile of the product before it is stored: norm, rotation, factors.

A tile is a whole number of heads wide. The features of a head are seen as [SLABS, WIDTH]:
half-split pairs (j, j + rotary_dim / 2) are the same column of two slabs that lie behind each
other, and a head with partial rotary has more than two slabs. Interleaved pairs need one slab.
Widths that are no power of two are padded, slab by slab, to PADDED columns, which hold zeros and
are never stored. So both members of every pair are in the registers of one thread, and all that a
norm sums over in those of one warp: nothing is exchanged through memory.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .phase import join_pairs, narrow, rotate, split_pairs
from .rows import Tokens, token_angles, token_factor


class View(NamedTuple):
    """How a tile holds its heads; compile-time constants."""

    HEADS: Any  # side by side
    SLABS: Any
    WIDTH: Any
    PADDED: Any
    PARTS: Any  # 1, 2 or 4 goes in which to take the pairs, each with fewer registers for angles
    DESCRIPTORS: Any  # whether outputs are tensor descriptors, else pointers


class Place(NamedTuple):
    """Where in an output a tile begins, and the output's size."""

    row: Any
    head: Any
    rows: Any
    heads: Any
    seqlen: Any  # rows of a sequence


@triton.jit
def finish(
    acc,
    y,
    y_stride,
    z,
    norm,
    token_scale,
    scale_stride,
    angles,
    place,
    dims,
    view,
    CONJUGATE: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """y = token_scale * scale * R(position * inv_freq) * norm(acc), rounded once.

    acc: float32 [rows, HEADS * SLABS * PADDED], of the tile at `place`. z gets acc itself. Operands
    that are None take no part; with no turns nothing is rotated.
    """
    ROWS: tl.constexpr = acc.shape[0]
    # Rows of pairs in a tile, and in a head of it.
    PER_HEAD: tl.constexpr = 1 if dims.INTERLEAVED else view.SLABS // 2
    GROUPS: tl.constexpr = view.HEADS * PER_HEAD
    SLOTS: tl.constexpr = view.PADDED // 2 if dims.INTERLEAVED else view.PADDED
    SIZE: tl.constexpr = SLOTS // view.PARTS
    COUNT: tl.constexpr = view.PADDED // view.PARTS  # columns of a slab in each part
    rows = rows_of(place.row, place.rows, place.seqlen, ROWS)
    group = tl.arange(0, GROUPS)

    a, b = split_pairs(acc, ROWS, GROUPS, SLOTS, dims.INTERLEAVED)
    a, b = _parts(a, ROWS, GROUPS, SLOTS, view.PARTS), _parts(b, ROWS, GROUPS, SLOTS, view.PARTS)
    if norm is not None:
        squares = tl.zeros((ROWS, GROUPS), tl.float32)
        for part in tl.static_range(view.PARTS):
            squares += tl.sum(a[part] * a[part] + b[part] * b[part], 2)
        # A reshape costs registers, so only where a head is several of several rows of pairs.
        if view.HEADS == 1:
            squares = tl.sum(squares, 1)[:, None]
        elif PER_HEAD > 1:
            squares = tl.sum(squares.reshape(ROWS, view.HEADS, PER_HEAD), 2)
        rstd = tl.math.rsqrt(squares * (1.0 / dims.HEAD_DIM) + NORM_EPS)[:, :, None]
        if view.HEADS > 1 and PER_HEAD > 1:
            rstd = tl.broadcast_to(rstd, (ROWS, view.HEADS, PER_HEAD)).reshape(ROWS, GROUPS, 1)
    if token_scale is not None:
        row_scale = token_factor(token_scale, scale_stride, rows, tl.float32)[:, None, None]

    for part in tl.static_range(view.PARTS):
        ya, yb = a[part], b[part]
        if z is not None:
            z_stride = place.heads.to(tl.int64) * dims.HEAD_DIM
            kept = join_pairs(ya, yb, ROWS, GROUPS, SIZE, dims.INTERLEAVED)
            z_strides = (place.seqlen * z_stride, z_stride)
            _store(z, z_strides, kept, place, rows, dims, view, part * COUNT, COUNT)
        if norm is not None:
            feature, partner, real = _features(part * SIZE, GROUPS, SIZE, dims, view)
            at = norm + feature % dims.HEAD_DIM
            ya *= rstd * tl.load(at, mask=real, other=0).to(tl.float32)[None]
            yb *= rstd * tl.load(at + partner, mask=real, other=0).to(tl.float32)[None]
        if angles.turns is not None:
            pair = part * SIZE + tl.arange(0, SIZE)
            if dims.INTERLEAVED:
                pair -= dims.OFFSET // 2
            cos, sin, factor, _, _ = token_angles(
                angles, rows, pair[None, :], dims.PAIRS, CONJUGATE, False
            )
            cos, sin = (cos * factor)[:, None, :], (sin * factor)[:, None, :]
            turned_a, turned_b = rotate(ya, yb, cos, sin)
            if 2 * dims.PAIRS == dims.HEAD_DIM:
                ya, yb = turned_a, turned_b
            else:
                if dims.INTERLEAVED:
                    inside = ((pair >= 0) & (pair < dims.PAIRS))[None, None, :]
                else:
                    inside = (group % PER_HEAD == dims.OFFSET // (2 * dims.PAIRS))[None, :, None]
                ya, yb = tl.where(inside, turned_a, ya), tl.where(inside, turned_b, yb)
        if token_scale is not None:
            ya *= row_scale
            yb *= row_scale
        done = join_pairs(ya, yb, ROWS, GROUPS, SIZE, dims.INTERLEAVED)
        _store(y, y_stride, done, place, rows, dims, view, part * COUNT, COUNT)


@triton.jit
def rows_of(first, rows, seqlen, COUNT: tl.constexpr):
    """COUNT consecutive rows as Tokens. Unsigned inside: the compiler then knows the upper half of
    a position to be 0."""
    row = first + tl.arange(0, COUNT)
    valid = row < rows
    row, seqlen = row.to(tl.uint32), seqlen.to(tl.uint32)
    return Tokens((row // seqlen).to(tl.int64), (row % seqlen).to(tl.int64), valid)


@triton.jit
def feature_of(column, head, heads, dims, view, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """(feature, whether there is one) of a column of a tile that holds COUNT columns, from FIRST
    on, of every slab. Features are counted from the first head of all."""
    head += column // (view.SLABS * COUNT)
    within = FIRST + column % COUNT
    feature = head * dims.HEAD_DIM + column // COUNT % view.SLABS * view.WIDTH + within
    return feature, (head < heads) & (within < view.WIDTH)


@triton.jit
def _features(first_slot, GROUPS: tl.constexpr, SIZE: tl.constexpr, dims, view):
    """First members of the pairs in SIZE slots: (feature [GROUPS, SIZE] counted from the tile's
    first head, distance of the second member, whether the slot is none of the padding)."""
    slot = first_slot + tl.arange(0, SIZE)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    if dims.INTERLEAVED:
        return group * dims.HEAD_DIM + 2 * slot, 1, (2 * slot < view.WIDTH) & (group >= 0)
    else:
        return group * (2 * view.WIDTH) + slot, view.WIDTH, (slot < view.WIDTH) & (group >= 0)


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
def _store(target, stride, y, place, rows, dims, view, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Round y and store it as COUNT columns, from FIRST on, of every slab, leaving out what is
    padding, and rows and heads that do not exist."""
    if view.DESCRIPTORS:
        y = narrow(y, target.dtype).reshape(y.shape[0], view.HEADS, view.SLABS, COUNT)
        target.store([place.row, place.head, 0, FIRST], y)
    else:
        column = tl.arange(0, view.HEADS * view.SLABS * COUNT)
        feature, real = feature_of(column, place.head, place.heads, dims, view, FIRST, COUNT)
        row = rows.batch * stride[0] + rows.token * stride[1]
        y = narrow(y, target.dtype.element_ty)
        at = row[:, None] + feature[None, :]
        tl.store(target + at, y, mask=rows.valid[:, None] & real[None, :])
