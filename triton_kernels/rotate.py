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
    head_rows,
    load_pairs,
    reciprocal_rms,
    rest_columns,
    store_pairs,
    token_angles,
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
    seqlen,
    tables,
    q_batch,
    q_token,
    q_head,
    q_step,
    k_batch,
    k_token,
    k_head,
    k_step,
    q_out_batch,
    q_out_token,
    q_out_head,
    q_out_step,
    k_out_batch,
    k_out_token,
    k_out_head,
    k_out_step,
    position_axis,
    position_batch,
    position_token,
    index_batch,
    index_token,
    scale_batch,
    scale_token,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_ALL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """y = token_scale * scale * R(position * inv_freq) * norm(x) for q, and without token_scale for
    k; see csrc/params.h for the operands. Tensors that are None take no part."""
    DOUBLE: tl.constexpr = q.dtype.element_ty == tl.float64
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    tiles = tl.cdiv(seqlen, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = ((tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    valid = token < seqlen
    cos, sin, factor, _, _ = token_angles(
        turns,
        scale,
        positions,
        table_index,
        axis_map,
        batch,
        token,
        valid,
        tl.arange(0, triton.next_power_of_2(PAIRS))[None, :],
        (position_axis, position_batch, position_token),
        (index_batch, index_token),
        tables,
        PAIRS,
        CONJUGATE,
        DOUBLE,
    )
    cos, sin = (cos * factor)[:, None, :], (sin * factor)[:, None, :]
    if k is not None:
        _rotate_operand(
            k,
            k_out,
            k_norm,
            cos,
            sin,
            None,
            batch,
            token,
            valid,
            (k_batch, k_token, k_head, k_step),
            (k_out_batch, k_out_token, k_out_head, k_out_step),
            KV_HEADS,
            HEAD_DIM,
            PAIRS,
            OFFSET,
            INTERLEAVED,
            NORM_EPS,
            NORM_ALL,
            IN_PLACE,
            BLOCK_KV,
            WIDE,
        )
    multiplier = None
    if token_scale is not None:
        multiplier = tl.load(
            token_scale + batch * scale_batch + token * scale_token, mask=valid, other=0.0
        )
        multiplier = widen(multiplier, WIDE)[:, None, None]
        cos *= multiplier
        sin *= multiplier
    _rotate_operand(
        q,
        q_out,
        q_norm,
        cos,
        sin,
        multiplier,
        batch,
        token,
        valid,
        (q_batch, q_token, q_head, q_step),
        (q_out_batch, q_out_token, q_out_head, q_out_step),
        HEADS,
        HEAD_DIM,
        PAIRS,
        OFFSET,
        INTERLEAVED,
        NORM_EPS,
        NORM_ALL,
        IN_PLACE,
        BLOCK_H,
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
    batch,
    token,
    valid,
    x_stride,
    y_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_ALL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rotate all heads of one tensor by the angles of the tile. cos and sin hold all factors;
    `multiplier` is the one that the dimensions outside the slice share, or None."""
    DTYPE: tl.constexpr = y.dtype.element_ty
    REST: tl.constexpr = HEAD_DIM - 2 * PAIRS
    COPIED: tl.constexpr = weight is None and multiplier is None
    if weight is not None and NORM_ALL:
        total = tl.zeros((valid.shape[0],), WIDE)
        for first in range(0, HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            mask = valid[:, None, None] & (head < HEADS)[None, :, None]
            rows = head_rows(x, batch, token, head, x_stride)
            a, b = load_pairs(rows, mask, x_stride[3], PAIRS, OFFSET, INTERLEAVED, WIDE)
            squares = tl.sum(a * a + b * b, axis=2)
            if REST > 0:
                column, inside = rest_columns(HEAD_DIM, PAIRS, OFFSET)
                rest = tl.load(rows + column * x_stride[3], mask=mask & inside, other=0.0)
                rest = widen(rest, WIDE)
                squares += tl.sum(rest * rest, axis=2)
            total += tl.sum(squares, axis=1)
        rstd = reciprocal_rms(total / (HEADS * HEAD_DIM), NORM_EPS)[:, None, None]
    for first in range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask = valid[:, None, None] & (head < HEADS)[None, :, None]
        x_rows = head_rows(x, batch, token, head, x_stride)
        y_rows = head_rows(y, batch, token, head, y_stride)
        a, b = load_pairs(x_rows, mask, x_stride[3], PAIRS, OFFSET, INTERLEAVED, WIDE)
        if REST > 0 and not (COPIED and IN_PLACE):
            column, inside = rest_columns(HEAD_DIM, PAIRS, OFFSET)
            rest = tl.load(x_rows + column * x_stride[3], mask=mask & inside, other=0.0)
        if weight is not None:
            if not NORM_ALL:
                squares = tl.sum(a * a + b * b, axis=2)
                if REST > 0:
                    wide = widen(rest, WIDE)
                    squares += tl.sum(wide * wide, axis=2)
                rstd = reciprocal_rms(squares / HEAD_DIM, NORM_EPS)[:, :, None]
            weights, known = weight_rows(weight, head, HEADS, HEAD_DIM, NORM_ALL)
            wa, wb = load_pairs(weights, known, 1, PAIRS, OFFSET, INTERLEAVED, WIDE)
            a = a * rstd * wa
            b = b * rstd * wb
        a, b = rotate(a, b, cos, sin)
        store_pairs(
            y_rows,
            narrow(a, DTYPE),
            narrow(b, DTYPE),
            mask,
            y_stride[3],
            PAIRS,
            OFFSET,
            INTERLEAVED,
        )
        if REST > 0 and not (COPIED and IN_PLACE):
            if not COPIED:
                rest = widen(rest, WIDE)
                if weight is not None:
                    rest = (
                        rest
                        * rstd
                        * widen(tl.load(weights + column, mask=known & inside, other=0.0), WIDE)
                    )
                if multiplier is not None:
                    rest = rest * multiplier
                rest = narrow(rest, DTYPE)
            tl.store(y_rows + column * y_stride[3], rest, mask=mask & inside)


@triton.jit(do_not_specialize=["seqlen"])
def tables_kernel(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    seqlen,
    q_batch,
    q_token,
    q_head,
    q_step,
    k_batch,
    k_token,
    k_head,
    k_step,
    q_out_batch,
    q_out_token,
    q_out_head,
    q_out_step,
    k_out_batch,
    k_out_token,
    k_out_head,
    k_out_step,
    cos_batch,
    cos_token,
    cos_step,
    sin_batch,
    sin_token,
    sin_step,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """transformers' formula on given tables, x * cos + rotate_half(x) * sin, with its roundings:
    compile without contraction to fused multiply-adds. TRANSPOSE applies the adjoint."""
    WIDE: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    tiles = tl.cdiv(seqlen, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = ((tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    valid = token < seqlen
    table_mask = valid[:, None, None]
    cos_rows = cos + (batch * cos_batch + token * cos_token)[:, None, None]
    sin_rows = sin + (batch * sin_batch + token * sin_token)[:, None, None]
    cos_a, cos_b = load_pairs(cos_rows, table_mask, cos_step, PAIRS, 0, INTERLEAVED, WIDE)
    sin_a, sin_b = load_pairs(sin_rows, table_mask, sin_step, PAIRS, 0, INTERLEAVED, WIDE)
    table = (cos_a, cos_b, sin_a, sin_b)
    if k is not None:
        _table_operand(
            k,
            k_out,
            table,
            batch,
            token,
            valid,
            (k_batch, k_token, k_head, k_step),
            (k_out_batch, k_out_token, k_out_head, k_out_step),
            KV_HEADS,
            HEAD_DIM,
            PAIRS,
            OFFSET,
            INTERLEAVED,
            TRANSPOSE,
            IN_PLACE,
            BLOCK_KV,
            WIDE,
        )
    _table_operand(
        q,
        q_out,
        table,
        batch,
        token,
        valid,
        (q_batch, q_token, q_head, q_step),
        (q_out_batch, q_out_token, q_out_head, q_out_step),
        HEADS,
        HEAD_DIM,
        PAIRS,
        OFFSET,
        INTERLEAVED,
        TRANSPOSE,
        IN_PLACE,
        BLOCK_H,
        WIDE,
    )


@triton.jit
def _table_operand(
    x,
    y,
    table,
    batch,
    token,
    valid,
    x_stride,
    y_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDE: tl.constexpr,
):
    DTYPE: tl.constexpr = y.dtype.element_ty
    cos_a, cos_b, sin_a, sin_b = table
    for first in range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask = valid[:, None, None] & (head < HEADS)[None, :, None]
        x_rows = head_rows(x, batch, token, head, x_stride)
        y_rows = head_rows(y, batch, token, head, y_stride)
        a, b = load_pairs(x_rows, mask, x_stride[3], PAIRS, OFFSET, INTERLEAVED, WIDE)
        # rotate_half gives -b to a and a to b; its adjoint gives b's product to a, -a's to b.
        if TRANSPOSE:
            ya = _rounded(a * cos_a, DTYPE, WIDE) + _rounded(b * sin_b, DTYPE, WIDE)
            yb = _rounded(b * cos_b, DTYPE, WIDE) - _rounded(a * sin_a, DTYPE, WIDE)
        else:
            ya = _rounded(a * cos_a, DTYPE, WIDE) - _rounded(b * sin_a, DTYPE, WIDE)
            yb = _rounded(b * cos_b, DTYPE, WIDE) + _rounded(a * sin_b, DTYPE, WIDE)
        store_pairs(
            y_rows,
            narrow(ya, DTYPE),
            narrow(yb, DTYPE),
            mask,
            y_stride[3],
            PAIRS,
            OFFSET,
            INTERLEAVED,
        )
        if HEAD_DIM > 2 * PAIRS and not IN_PLACE:
            column, inside = rest_columns(HEAD_DIM, PAIRS, OFFSET)
            rest = tl.load(x_rows + column * x_stride[3], mask=mask & inside)
            tl.store(y_rows + column * y_stride[3], rest, mask=mask & inside)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    return widen(narrow(x, DTYPE), WIDE)
