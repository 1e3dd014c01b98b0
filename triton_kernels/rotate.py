"""Forward kernels: norm and rotate q and k in one launch; rotate by given tables.

A program takes one tile of tokens of one sequence of the batch and goes through all heads of q and
of k. The grid is linear in tiles, so it has none of the limits of a second dimension. Arithmetic is
float32 (float64 for float64 tensors) with one rounding at the store. Inputs may be outputs: a
thread reads both members of a pair before it writes them.
"""

import triton
import triton.language as tl

from .phase import narrow, rotate, widen
from .rows import (
    Angles,
    Dims,
    Heads,
    head_rows,
    load_pairs,
    reciprocal_rms,
    rest_columns,
    store_pairs,
    token_angles,
    token_factor,
    tokens_of,
    weight_rows,
)


@triton.jit(do_not_specialize=["seqlen", "tables"])
def rotate_kernel(
    q,
    k,
    q_out,
    k_out,
    q_norm,
    k_norm,
    turns,
    scale,
    positions,
    table_index,
    axis_map,
    token_scale,
    q_stride,
    k_stride,
    q_out_stride,
    k_out_stride,
    angle_stride,
    scale_stride,
    seqlen,
    tables,
    dims,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CONJUGATE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_ALL: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """y = token_scale * scale * R(position * inv_freq) * norm(x) for q, and without token_scale for
    k; see csrc/params.h for the operands. Tensors that are None take no part; strides and dims are
    the tuples of rows.py."""
    DOUBLE: tl.constexpr = q.dtype.element_ty == tl.float64
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    tokens = tokens_of(tl.program_id(0), seqlen, BLOCK_T)
    cos, sin, factor, _, _ = token_angles(
        Angles(turns, scale, positions, table_index, axis_map, tables, angle_stride),
        tokens,
        tl.arange(0, triton.next_power_of_2(dims.PAIRS))[None, :],
        dims.PAIRS,
        CONJUGATE,
        DOUBLE,
    )
    cos, sin = (cos * factor)[:, None, :], (sin * factor)[:, None, :]
    if k is not None:
        _rotate_operand(
            Heads(k, k_stride),
            Heads(k_out, k_out_stride),
            k_norm,
            cos,
            sin,
            None,
            tokens,
            dims,
            KV_HEADS,
            BLOCK_KV,
            NORM_EPS,
            NORM_ALL,
            IN_PLACE,
            WIDE,
        )
    multiplier = None
    if token_scale is not None:
        multiplier = token_factor(token_scale, scale_stride, tokens, WIDE)[:, None, None]
        cos *= multiplier
        sin *= multiplier
    _rotate_operand(
        Heads(q, q_stride),
        Heads(q_out, q_out_stride),
        q_norm,
        cos,
        sin,
        multiplier,
        tokens,
        dims,
        HEADS,
        BLOCK_H,
        NORM_EPS,
        NORM_ALL,
        IN_PLACE,
        WIDE,
    )


@triton.jit
def _rotate_operand(
    x,
    y,
    weight,
    cos,
    sin,
    multiplier,
    tokens,
    dims,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_ALL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rotate all heads of one tensor by the angles of the tile. cos and sin hold all factors;
    `multiplier` is the one that the dimensions outside the slice share, or None."""
    DTYPE: tl.constexpr = y.start.dtype.element_ty
    REST: tl.constexpr = dims.HEAD_DIM - 2 * dims.PAIRS
    COPIED: tl.constexpr = weight is None and multiplier is None
    if weight is not None and NORM_ALL:
        total = tl.zeros((cos.shape[0],), WIDE)
        for first in range(0, HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            mask = tokens.valid[:, None, None] & (head < HEADS)[None, :, None]
            rows = head_rows(x, tokens, head)
            a, b = load_pairs(rows, mask, x.stride.step, dims, WIDE)
            squares = tl.sum(a * a + b * b, axis=2)
            if REST > 0:
                column, inside = rest_columns(dims)
                rest = tl.load(rows + column * x.stride.step, mask=mask & inside, other=0.0)
                rest = widen(rest, WIDE)
                squares += tl.sum(rest * rest, axis=2)
            total += tl.sum(squares, axis=1)
        rstd = reciprocal_rms(total / (HEADS * dims.HEAD_DIM), NORM_EPS)[:, None, None]
    for first in range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask = tokens.valid[:, None, None] & (head < HEADS)[None, :, None]
        x_rows, y_rows = head_rows(x, tokens, head), head_rows(y, tokens, head)
        a, b = load_pairs(x_rows, mask, x.stride.step, dims, WIDE)
        if REST > 0 and not (COPIED and IN_PLACE):
            column, inside = rest_columns(dims)
            rest = tl.load(x_rows + column * x.stride.step, mask=mask & inside, other=0.0)
        if weight is not None:
            if not NORM_ALL:
                squares = tl.sum(a * a + b * b, axis=2)
                if REST > 0:
                    wide = widen(rest, WIDE)
                    squares += tl.sum(wide * wide, axis=2)
                rstd = reciprocal_rms(squares / dims.HEAD_DIM, NORM_EPS)[:, :, None]
            weights, known = weight_rows(weight, head, HEADS, dims.HEAD_DIM, NORM_ALL)
            wa, wb = load_pairs(weights, known, 1, dims, WIDE)
            a = a * rstd * wa
            b = b * rstd * wb
        a, b = rotate(a, b, cos, sin)
        store_pairs(y_rows, a, b, mask, y.stride.step, dims)
        if REST > 0 and not (COPIED and IN_PLACE):
            if not COPIED:
                rest = widen(rest, WIDE)
                if weight is not None:
                    rest_weights = tl.load(weights + column, mask=known & inside, other=0.0)
                    rest = rest * rstd * widen(rest_weights, WIDE)
                if multiplier is not None:
                    rest = rest * multiplier
                rest = narrow(rest, DTYPE)
            tl.store(y_rows + column * y.stride.step, rest, mask=mask & inside)


@triton.jit(do_not_specialize=["seqlen"])
def tables_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    q_stride,
    k_stride,
    q_out_stride,
    k_out_stride,
    cos_stride,
    sin_stride,
    seqlen,
    dims,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """transformers' formula on given tables, x * cos + rotate_half(x) * sin, with its roundings:
    compile without contraction to fused multiply-adds. TRANSPOSE applies the adjoint."""
    WIDE: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    tokens = tokens_of(tl.program_id(0), seqlen, BLOCK_T)
    cos_a, cos_b = _table_rows(cos, cos_stride, tokens, dims.PAIRS, dims.INTERLEAVED, WIDE)
    sin_a, sin_b = _table_rows(sin, sin_stride, tokens, dims.PAIRS, dims.INTERLEAVED, WIDE)
    table = (cos_a, cos_b, sin_a, sin_b)
    if k is not None:
        _table_operand(
            Heads(k, k_stride),
            Heads(k_out, k_out_stride),
            table,
            tokens,
            dims,
            KV_HEADS,
            BLOCK_KV,
            TRANSPOSE,
            IN_PLACE,
            WIDE,
        )
    _table_operand(
        Heads(q, q_stride),
        Heads(q_out, q_out_stride),
        table,
        tokens,
        dims,
        HEADS,
        BLOCK_H,
        TRANSPOSE,
        IN_PLACE,
        WIDE,
    )


@triton.jit
def _table_rows(
    table, stride, tokens, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr
):
    """Both members of the pairs of a table, as a head of 2 PAIRS dimensions: [BLOCK_T, 1, PAIRS]
    each."""
    rows = table + (tokens.batch * stride[0] + tokens.token * stride[1])[:, None, None]
    valid = tokens.valid[:, None, None]
    return load_pairs(rows, valid, stride[2], Dims(2 * PAIRS, PAIRS, 0, INTERLEAVED), WIDE)


@triton.jit
def _table_operand(
    x,
    y,
    table,
    tokens,
    dims,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WIDE: tl.constexpr,
):
    DTYPE: tl.constexpr = y.start.dtype.element_ty
    cos_a, cos_b, sin_a, sin_b = table
    for first in range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask = tokens.valid[:, None, None] & (head < HEADS)[None, :, None]
        x_rows, y_rows = head_rows(x, tokens, head), head_rows(y, tokens, head)
        a, b = load_pairs(x_rows, mask, x.stride.step, dims, WIDE)
        # rotate_half gives -b to a and a to b; its adjoint gives b's product to a, -a's to b.
        if TRANSPOSE:
            ya = _rounded(a * cos_a, DTYPE, WIDE) + _rounded(b * sin_b, DTYPE, WIDE)
            yb = _rounded(b * cos_b, DTYPE, WIDE) - _rounded(a * sin_a, DTYPE, WIDE)
        else:
            ya = _rounded(a * cos_a, DTYPE, WIDE) - _rounded(b * sin_a, DTYPE, WIDE)
            yb = _rounded(b * cos_b, DTYPE, WIDE) + _rounded(a * sin_b, DTYPE, WIDE)
        store_pairs(y_rows, ya, yb, mask, y.stride.step, dims)
        if dims.HEAD_DIM > 2 * dims.PAIRS and not IN_PLACE:
            column, inside = rest_columns(dims)
            rest = tl.load(x_rows + column * x.stride.step, mask=mask & inside)
            tl.store(y_rows + column * y.stride.step, rest, mask=mask & inside)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    return widen(narrow(x, DTYPE), WIDE)
