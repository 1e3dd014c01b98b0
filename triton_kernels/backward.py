"""Backward kernel with reductions: RMSNorm before the rotation, gradients of the factors.

A backward that needs neither is the forward kernel with the conjugate angle. csrc/cpu/backward.h
has the formulas. A program owns one chunk of tiles and adds to sums of its own in memory, which
nobody else does: no atomics, and the same bits on every run. Sums over the heads of a token are
float32, as the products are; sums over tokens, whose factor is the position, are float64.
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


@triton.jit(do_not_specialize=["seqlen", "tables", "tiles", "chunk_size", "sums_step"])
def backward_kernel(
    dq,
    dk,
    q,
    k,
    dq_out,
    dk_out,
    q_norm,
    k_norm,
    turns,
    scale,
    positions,
    table_index,
    axis_map,
    token_scale,
    q_norm_sums,
    k_norm_sums,
    inv_freq_sums,
    scale_sums,
    token_sums,
    seqlen,
    tables,
    tiles,
    chunk_size,
    sums_step,
    dq_batch,
    dq_token,
    dq_head,
    dq_step,
    dk_batch,
    dk_token,
    dk_head,
    dk_step,
    q_batch,
    q_token,
    q_head,
    q_step,
    k_batch,
    k_token,
    k_head,
    k_step,
    dq_out_batch,
    dq_out_token,
    dq_out_head,
    dq_out_step,
    dk_out_batch,
    dk_out_token,
    dk_out_head,
    dk_out_step,
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
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """dq, dk -> dq_out, dk_out, and the sums of a chunk: norm weights [chunks, size], inv_freq and
    scale [chunks, tables, pairs], rows of sums_step numbers, which start as zeros; token_scale
    [batch * seqlen]."""
    DOUBLE: tl.constexpr = dq.dtype.element_ty == tl.float64
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    chunk = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, triton.next_power_of_2(PAIRS))
    begin = chunk * chunk_size
    for tile in range(begin, tl.minimum(begin + chunk_size, tiles)):
        per_row = tl.cdiv(seqlen, BLOCK_T)
        batch = (tile // per_row).to(tl.int64)
        token = (tile % per_row).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = token < seqlen
        cos, sin, factor, position, row = token_angles(
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
        multiplier = tl.full((BLOCK_T,), 1.0, WIDE)
        if token_scale is not None:
            multiplier = widen(
                tl.load(
                    token_scale + batch * scale_batch + token * scale_token, mask=valid, other=0.0
                ),
                WIDE,
            )
        dot, cross, carried = _operand(
            dq,
            q,
            dq_out,
            q_norm,
            q_norm_sums + chunk * sums_step,
            cos,
            sin,
            factor,
            multiplier,
            batch,
            token,
            valid,
            (dq_batch, dq_token, dq_head, dq_step),
            (q_batch, q_token, q_head, q_step),
            (dq_out_batch, dq_out_token, dq_out_head, dq_out_step),
            HEADS,
            HEAD_DIM,
            PAIRS,
            OFFSET,
            INTERLEAVED,
            NORM_EPS,
            NORM_ALL,
            BLOCK_H,
            WIDE,
        )
        of_token = tl.sum((factor * dot).to(tl.float64), axis=1) + carried
        tl.store(token_sums + batch * seqlen + token, of_token, mask=valid)
        dot *= multiplier[:, None]
        cross *= multiplier[:, None]
        if dk is not None:
            k_dot, k_cross, _ = _operand(
                dk,
                k,
                dk_out,
                k_norm,
                k_norm_sums + chunk * sums_step,
                cos,
                sin,
                factor,
                tl.full((BLOCK_T,), 1.0, WIDE),
                batch,
                token,
                valid,
                (dk_batch, dk_token, dk_head, dk_step),
                (k_batch, k_token, k_head, k_step),
                (dk_out_batch, dk_out_token, dk_out_head, dk_out_step),
                KV_HEADS,
                HEAD_DIM,
                PAIRS,
                OFFSET,
                INTERLEAVED,
                NORM_EPS,
                NORM_ALL,
                BLOCK_KV,
                WIDE,
            )
            dot += k_dot
            cross += k_cross
        turned = position.to(tl.float64) * (factor * cross)
        if CONJUGATE:
            turned = -turned
        dot = dot.to(tl.float64)
        at = chunk * sums_step + pair
        if table_index is None:
            _add(inv_freq_sums + at, tl.sum(turned, axis=0), pair < PAIRS)
            _add(scale_sums + at, tl.sum(dot, axis=0), pair < PAIRS)
        else:
            last = tl.max(tl.where(valid, row, 0), axis=0)
            for one in range(tl.min(tl.where(valid, row, tables - 1), axis=0), last + 1):
                used = (row == one)[:, None]
                place = at + one * PAIRS
                _add(inv_freq_sums + place, tl.sum(tl.where(used, turned, 0.0), 0), pair < PAIRS)
                _add(scale_sums + place, tl.sum(tl.where(used, dot, 0.0), 0), pair < PAIRS)
        # The next tile may add to these sums with other threads.
        tl.debug_barrier()


@triton.jit
def _add(at, value, mask):
    tl.store(at, tl.load(at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def _operand(
    g,
    x,
    dx,
    weight,
    weight_sums,
    cos,
    sin,
    factor,
    multiplier,
    batch,
    token,
    valid,
    g_stride,
    x_stride,
    dx_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_ALL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All heads of one gradient turned back through rotation and norm.

    Returns the sums over heads of g . r and g x r per pair, [BLOCK_T, columns], and of g . h over
    the dimensions that are not rotated, [BLOCK_T], without scale and token_scale.
    """
    BLOCK_T: tl.constexpr = valid.shape[0]
    COLUMNS: tl.constexpr = cos.shape[1]
    REST: tl.constexpr = HEAD_DIM - 2 * PAIRS
    DTYPE: tl.constexpr = dx.dtype.element_ty
    cos, sin, factor = cos[:, None, :], sin[:, None, :], factor[:, None, :]
    back = factor * multiplier[:, None, None]
    NORMED: tl.constexpr = weight is not None
    if NORMED and NORM_ALL:
        squares = tl.zeros((BLOCK_T,), WIDE)
        products = tl.zeros((BLOCK_T,), WIDE)
        for first in range(0, HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            mask = valid[:, None, None] & (head < HEADS)[None, :, None]
            g_rows = head_rows(g, batch, token, head, g_stride)
            x_rows = head_rows(x, batch, token, head, x_stride)
            w_rows, known = weight_rows(weight, head, HEADS, HEAD_DIM, NORM_ALL)
            ga, gb = load_pairs(g_rows, mask, g_stride[3], PAIRS, OFFSET, INTERLEAVED, WIDE)
            a, b = load_pairs(x_rows, mask, x_stride[3], PAIRS, OFFSET, INTERLEAVED, WIDE)
            wa, wb = load_pairs(w_rows, known, 1, PAIRS, OFFSET, INTERLEAVED, WIDE)
            ra, rb = rotate(a * wa, b * wb, cos, sin)
            square = tl.sum(a * a + b * b, axis=2)
            product = tl.sum(back * (ga * ra + gb * rb), axis=2)
            if REST > 0:
                column, inside = rest_columns(HEAD_DIM, PAIRS, OFFSET)
                rest_g = _load(g_rows + column * g_stride[3], mask & inside, WIDE)
                rest = _load(x_rows + column * x_stride[3], mask & inside, WIDE)
                rest_w = _load(w_rows + column, known & inside, WIDE)
                square += tl.sum(rest * rest, axis=2)
                product += tl.sum(rest_g * rest * rest_w, axis=2) * multiplier[:, None]
            squares += tl.sum(square, axis=1)
            products += tl.sum(product, axis=1)
        rstd = reciprocal_rms(squares / (HEADS * HEAD_DIM), NORM_EPS)
        mean = (products * rstd / (HEADS * HEAD_DIM))[:, None, None]
        rstd = rstd[:, None, None]
    dot = tl.zeros((BLOCK_T, BLOCK_H, COLUMNS), WIDE)
    cross = tl.zeros((BLOCK_T, BLOCK_H, COLUMNS), WIDE)
    carried = tl.zeros((BLOCK_T, BLOCK_H), WIDE)
    if NORMED and not NORM_ALL:
        dwa = tl.zeros((BLOCK_T, BLOCK_H, COLUMNS), WIDE)
        dwb = tl.zeros((BLOCK_T, BLOCK_H, COLUMNS), WIDE)
        if REST > 0:
            rest_dw = tl.zeros((BLOCK_T, BLOCK_H, triton.next_power_of_2(REST)), WIDE)
    for first in range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        mask = valid[:, None, None] & (head < HEADS)[None, :, None]
        g_rows = head_rows(g, batch, token, head, g_stride)
        x_rows = head_rows(x, batch, token, head, x_stride)
        dx_rows = head_rows(dx, batch, token, head, dx_stride)
        ga, gb = load_pairs(g_rows, mask, g_stride[3], PAIRS, OFFSET, INTERLEAVED, WIDE)
        a, b = load_pairs(x_rows, mask, x_stride[3], PAIRS, OFFSET, INTERLEAVED, WIDE)
        if REST > 0:
            column, inside = rest_columns(HEAD_DIM, PAIRS, OFFSET)
            rest_g = _load(g_rows + column * g_stride[3], mask & inside, WIDE)
            rest = _load(x_rows + column * x_stride[3], mask & inside, WIDE)
        if NORMED:
            w_rows, known = weight_rows(weight, head, HEADS, HEAD_DIM, NORM_ALL)
            wa, wb = load_pairs(w_rows, known, 1, PAIRS, OFFSET, INTERLEAVED, WIDE)
            if not NORM_ALL:
                square = tl.sum(a * a + b * b, axis=2)
                if REST > 0:
                    square += tl.sum(rest * rest, axis=2)
                rstd = reciprocal_rms(square / HEAD_DIM, NORM_EPS)[:, :, None]
            a, b = a * rstd, b * rstd
            ra, rb = rotate(a * wa, b * wb, cos, sin)
        else:
            ra, rb = rotate(a, b, cos, sin)
        inner = ga * ra + gb * rb
        dot += inner
        cross += gb * ra - ga * rb
        da, db = rotate(ga, gb, back * cos, -back * sin)
        if REST > 0:
            rest_d = rest_g * multiplier[:, None, None]
            if NORMED:
                rest = rest * rstd
                rest_w = _load(w_rows + column, known & inside, WIDE)
                rest_total = tl.sum(rest_g * (rest * rest_w), axis=2)
            else:
                rest_total = tl.sum(rest_g * rest, axis=2)
            carried += rest_total
        if NORMED:
            if not NORM_ALL:
                mean = tl.sum(back * inner, axis=2)
                if REST > 0:
                    mean += rest_total * multiplier[:, None]
                mean = (mean / HEAD_DIM)[:, :, None]
                dwa += da * a
                dwb += db * b
            else:
                # This program alone adds to these sums, each tile after a barrier.
                at, _ = weight_rows(weight_sums, head, HEADS, HEAD_DIM, NORM_ALL)
                _add_pairs(at, da * a, db * b, known, PAIRS, OFFSET, INTERLEAVED)
                if REST > 0:
                    one = tl.sum((rest_d * rest).to(tl.float64), axis=0)[None, :, :]
                    _add(at + column, one, known & inside)
            da = rstd * (da * wa - a * mean)
            db = rstd * (db * wb - b * mean)
        store_pairs(
            dx_rows,
            narrow(da, DTYPE),
            narrow(db, DTYPE),
            mask,
            dx_stride[3],
            PAIRS,
            OFFSET,
            INTERLEAVED,
        )
        if REST > 0:
            if NORMED:
                if not NORM_ALL:
                    rest_dw += rest_d * rest
                rest_d = rstd * (rest_d * rest_w - rest * mean)
            tl.store(dx_rows + column * dx_stride[3], narrow(rest_d, DTYPE), mask=mask & inside)
    if NORMED and not NORM_ALL:
        first = tl.arange(0, BLOCK_H)
        at, known = weight_rows(weight_sums, first, HEADS, HEAD_DIM, NORM_ALL)
        dwa = tl.sum(dwa, axis=1)[:, None, :]
        dwb = tl.sum(dwb, axis=1)[:, None, :]
        _add_pairs(at, dwa, dwb, known, PAIRS, OFFSET, INTERLEAVED)
        if REST > 0:
            column, inside = rest_columns(HEAD_DIM, PAIRS, OFFSET)
            one = tl.sum(tl.sum(rest_dw, axis=1).to(tl.float64), axis=0)[None, None, :]
            _add(at + column, one, inside)
    return tl.sum(dot, axis=1), tl.sum(cross, axis=1), tl.sum(carried, axis=1).to(tl.float64)


@triton.jit
def _load(at, mask, WIDE: tl.constexpr):
    return widen(tl.load(at, mask=mask, other=0.0), WIDE)


@triton.jit
def _add_pairs(
    rows, a, b, valid, PAIRS: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Add (a, b), summed over tokens, to a row of sums [1, BLOCK_H | 1, 1]."""
    a = tl.sum(a.to(tl.float64), axis=0)[None, :, :]
    b = tl.sum(b.to(tl.float64), axis=0)[None, :, :]
    old_a, old_b = load_pairs(rows, valid, 1, PAIRS, OFFSET, INTERLEAVED, tl.float64)
    store_pairs(rows, old_a + a, old_b + b, valid, 1, PAIRS, OFFSET, INTERLEAVED)
