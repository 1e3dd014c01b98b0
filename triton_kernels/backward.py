"""Backward kernel with reductions: RMSNorm before the rotation, gradients of the factors.

A backward that needs neither is the forward kernel with the conjugate angle. csrc/cpu/backward.h
has the formulas. A program owns one chunk of tiles and adds to sums of its own in memory, which
nobody else does: no atomics, and the same bits on every run. Sums over the heads of a token are
float32, as the products are; sums over tokens, whose factor is the position, are float64.

The gradient is turned back in a pass of its own, before the two products that read it, and not as
the first step of the product for x: that one reads every tile of the gradient d_model / 128 times,
and would turn it as often, with about as many cycles of the scalar units as the tensor cores take
for the tile on an H200; and the product for the weights needs it turned as well.
"""

import triton
import triton.language as tl

from .phase import narrow, rotate, widen
from .rows import (
    Angles,
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
    dq_stride,
    dk_stride,
    q_stride,
    k_stride,
    dq_out_stride,
    dk_out_stride,
    angle_stride,
    scale_stride,
    seqlen,
    tables,
    tiles,
    chunk_size,
    sums_step,
    dims,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    CONJUGATE: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_ALL: tl.constexpr,
):
    """dq, dk -> dq_out, dk_out, and the sums of a chunk: norm weights [chunks, size], inv_freq and
    scale [chunks, tables, pairs], rows of sums_step numbers, which start as zeros; token_scale
    [batch * seqlen]."""
    DOUBLE: tl.constexpr = dq.dtype.element_ty == tl.float64
    WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    chunk = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, triton.next_power_of_2(dims.PAIRS))
    begin = chunk * chunk_size
    for tile in range(begin, tl.minimum(begin + chunk_size, tiles)):
        tokens = tokens_of(tile, seqlen, BLOCK_T)
        cos, sin, factor, position, row = token_angles(
            Angles(turns, scale, positions, table_index, axis_map, tables, angle_stride),
            tokens,
            tl.arange(0, triton.next_power_of_2(dims.PAIRS))[None, :],
            dims.PAIRS,
            CONJUGATE,
            DOUBLE,
        )
        multiplier = tl.full((BLOCK_T,), 1.0, WIDE)
        if token_scale is not None:
            multiplier = token_factor(token_scale, scale_stride, tokens, WIDE)
        dot, cross, carried = _operand(
            Heads(dq, dq_stride),
            Heads(q, q_stride),
            Heads(dq_out, dq_out_stride),
            q_norm,
            q_norm_sums + chunk * sums_step,
            cos,
            sin,
            factor,
            multiplier,
            tokens,
            dims,
            HEADS,
            BLOCK_H,
            NORM_EPS,
            NORM_ALL,
            WIDE,
        )
        of_token = tl.sum((factor * dot).to(tl.float64), axis=1) + carried
        at = token_sums + tokens.batch * seqlen + tokens.token
        tl.store(at, of_token, mask=tokens.valid)
        dot *= multiplier[:, None]
        cross *= multiplier[:, None]
        if dk is not None:
            k_dot, k_cross, _ = _operand(
                Heads(dk, dk_stride),
                Heads(k, k_stride),
                Heads(dk_out, dk_out_stride),
                k_norm,
                k_norm_sums + chunk * sums_step,
                cos,
                sin,
                factor,
                tl.full((BLOCK_T,), 1.0, WIDE),
                tokens,
                dims,
                KV_HEADS,
                BLOCK_KV,
                NORM_EPS,
                NORM_ALL,
                WIDE,
            )
            dot += k_dot
            cross += k_cross
        turned = position.to(tl.float64) * (factor * cross)
        if CONJUGATE:
            turned = -turned
        dot = dot.to(tl.float64)
        at = chunk * sums_step + pair
        known = pair < dims.PAIRS
        if table_index is None:
            _add(inv_freq_sums + at, tl.sum(turned, axis=0), known)
            _add(scale_sums + at, tl.sum(dot, axis=0), known)
        else:
            last = tl.max(tl.where(tokens.valid, row, 0), axis=0)
            for one in range(tl.min(tl.where(tokens.valid, row, tables - 1), axis=0), last + 1):
                used = (row == one)[:, None]
                place = at + one * dims.PAIRS
                _add(inv_freq_sums + place, tl.sum(tl.where(used, turned, 0.0), 0), known)
                _add(scale_sums + place, tl.sum(tl.where(used, dot, 0.0), 0), known)
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
    tokens,
    dims,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_ALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All heads of one gradient turned back through rotation and norm.

    Returns the sums over heads of g . r and g x r per pair, [BLOCK_T, columns], and of g . h over
    the dimensions that are not rotated, [BLOCK_T], without scale and token_scale.
    """
    BLOCK_T: tl.constexpr = cos.shape[0]
    COLUMNS: tl.constexpr = cos.shape[1]
    REST: tl.constexpr = dims.HEAD_DIM - 2 * dims.PAIRS
    cos, sin, factor = cos[:, None, :], sin[:, None, :], factor[:, None, :]
    back = factor * multiplier[:, None, None]
    NORMED: tl.constexpr = weight is not None
    if NORMED and NORM_ALL:
        squares = tl.zeros((BLOCK_T,), WIDE)
        products = tl.zeros((BLOCK_T,), WIDE)
        for first in range(0, HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            mask = tokens.valid[:, None, None] & (head < HEADS)[None, :, None]
            g_rows = head_rows(g, tokens, head)
            x_rows = head_rows(x, tokens, head)
            w_rows, known = weight_rows(weight, head, HEADS, dims.HEAD_DIM, NORM_ALL)
            ga, gb = load_pairs(g_rows, mask, g.stride.step, dims, WIDE)
            a, b = load_pairs(x_rows, mask, x.stride.step, dims, WIDE)
            wa, wb = load_pairs(w_rows, known, 1, dims, WIDE)
            ra, rb = rotate(a * wa, b * wb, cos, sin)
            square = tl.sum(a * a + b * b, axis=2)
            product = tl.sum(back * (ga * ra + gb * rb), axis=2)
            if REST > 0:
                column, inside = rest_columns(dims)
                rest_g = _load(g_rows + column * g.stride.step, mask & inside, WIDE)
                rest = _load(x_rows + column * x.stride.step, mask & inside, WIDE)
                rest_w = _load(w_rows + column, known & inside, WIDE)
                square += tl.sum(rest * rest, axis=2)
                product += tl.sum(rest_g * rest * rest_w, axis=2) * multiplier[:, None]
            squares += tl.sum(square, axis=1)
            products += tl.sum(product, axis=1)
        rstd = reciprocal_rms(squares / (HEADS * dims.HEAD_DIM), NORM_EPS)
        mean = (products * rstd / (HEADS * dims.HEAD_DIM))[:, None, None]
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
        mask = tokens.valid[:, None, None] & (head < HEADS)[None, :, None]
        g_rows = head_rows(g, tokens, head)
        x_rows = head_rows(x, tokens, head)
        dx_rows = head_rows(dx, tokens, head)
        ga, gb = load_pairs(g_rows, mask, g.stride.step, dims, WIDE)
        a, b = load_pairs(x_rows, mask, x.stride.step, dims, WIDE)
        if REST > 0:
            column, inside = rest_columns(dims)
            rest_g = _load(g_rows + column * g.stride.step, mask & inside, WIDE)
            rest = _load(x_rows + column * x.stride.step, mask & inside, WIDE)
        if NORMED:
            w_rows, known = weight_rows(weight, head, HEADS, dims.HEAD_DIM, NORM_ALL)
            wa, wb = load_pairs(w_rows, known, 1, dims, WIDE)
            if not NORM_ALL:
                square = tl.sum(a * a + b * b, axis=2)
                if REST > 0:
                    square += tl.sum(rest * rest, axis=2)
                rstd = reciprocal_rms(square / dims.HEAD_DIM, NORM_EPS)[:, :, None]
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
                mean = (mean / dims.HEAD_DIM)[:, :, None]
                dwa += da * a
                dwb += db * b
            else:
                # This program alone adds to these sums, each tile after a barrier.
                at, _ = weight_rows(weight_sums, head, HEADS, dims.HEAD_DIM, NORM_ALL)
                _add_pairs(at, da * a, db * b, known, dims)
                if REST > 0:
                    one = tl.sum((rest_d * rest).to(tl.float64), axis=0)[None, :, :]
                    _add(at + column, one, known & inside)
            da = rstd * (da * wa - a * mean)
            db = rstd * (db * wb - b * mean)
        store_pairs(dx_rows, da, db, mask, dx.stride.step, dims)
        if REST > 0:
            if NORMED:
                if not NORM_ALL:
                    rest_dw += rest_d * rest
                rest_d = rstd * (rest_d * rest_w - rest * mean)
            at = dx_rows + column * dx.stride.step
            tl.store(at, narrow(rest_d, dx.start.dtype.element_ty), mask=mask & inside)
    if NORMED and not NORM_ALL:
        first = tl.arange(0, BLOCK_H)
        at, known = weight_rows(weight_sums, first, HEADS, dims.HEAD_DIM, NORM_ALL)
        dwa = tl.sum(dwa, axis=1)[:, None, :]
        dwb = tl.sum(dwb, axis=1)[:, None, :]
        _add_pairs(at, dwa, dwb, known, dims)
        if REST > 0:
            column, inside = rest_columns(dims)
            one = tl.sum(tl.sum(rest_dw, axis=1).to(tl.float64), axis=0)[None, None, :]
            _add(at + column, one, inside)
    return tl.sum(dot, axis=1), tl.sum(cross, axis=1), tl.sum(carried, axis=1).to(tl.float64)


@triton.jit
def _load(at, mask, WIDE: tl.constexpr):
    return widen(tl.load(at, mask=mask, other=0.0), WIDE)


@triton.jit
def _add_pairs(rows, a, b, valid, dims):
    """Add (a, b), summed over tokens, to a row of sums [1, BLOCK_H | 1, 1]."""
    a = tl.sum(a.to(tl.float64), axis=0)[None, :, :]
    b = tl.sum(b.to(tl.float64), axis=0)[None, :, :]
    old_a, old_b = load_pairs(rows, valid, 1, dims, tl.float64)
    store_pairs(rows, old_a + a, old_b + b, valid, 1, dims)
