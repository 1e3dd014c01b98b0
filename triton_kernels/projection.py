"""The projections to q, k and v as one GEMM, whose epilogue norms, rotates and scales q and k.

Three weights as nn.Linear holds them, no copy of which is made; three outputs; one launch."""

import triton
import triton.language as tl

from .epilogue import Place, feature_of, finish, rows_of
from .phase import INTERPRETED, widen
from .rows import Angles


# A size of 1 would become a constant, without .to(), and no size here is worth compiling anew for.
@triton.jit(do_not_specialize=("rows", "seqlen", "tables", "heads_q", "heads_k", "heads_v"))
def project_kernel(
    x,
    w_q,
    w_k,
    w_v,
    q,
    k,
    v,
    z_q,
    z_k,
    bias_q,
    bias_k,
    bias_v,
    norm_q,
    norm_k,
    turns,
    scale,
    positions,
    table_index,
    axis_map,
    token_scale,
    x_stride,
    w_rows,
    q_stride,
    k_stride,
    v_stride,
    angle_stride,
    scale_stride,
    rows,
    seqlen,
    tables,
    d_model,
    heads_q,
    heads_k,
    heads_v,
    dims,
    view,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    CONJUGATE: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """q, k = token_scale (q only) * scale * R(position * inv_freq) * norm(x w^T + bias), and v = x
    w^T + bias; z_q and z_k get x w^T + bias of q and k.

    x, the weights, q, k, v, z_q and z_k are tensor descriptors or (DESCRIPTORS False) pointers to
    rows of d_model resp. heads * HEAD_DIM consecutive numbers. Tensors that are None take no part.
    Strides are of (batch, token), and of the weights' rows.

    Persistent: a program takes every num_programs-th tile, in bands of GROUP_M rows of tiles, so
    that its neighbours find the same weights in the L2 cache.
    """
    BLOCK_N: tl.constexpr = view.HEADS * view.SLABS * view.PADDED
    q_tiles, k_tiles = tl.cdiv(heads_q, view.HEADS), tl.cdiv(heads_k, view.HEADS)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), q_tiles + k_tiles
    if w_v is not None:
        tiles_n += tl.cdiv(heads_v, view.HEADS)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        band, at = tile // (GROUP_M * tiles_n), tile % (GROUP_M * tiles_n)
        height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
        first_row, n = (band * GROUP_M + at % height) * BLOCK_M, at // height
        # One loop over d_model serves all three weights: they are chosen between before it, by a
        # branch that all threads take alike.
        column = tl.arange(0, BLOCK_N)
        w, w_row, head, heads = w_q, w_rows[0], n * view.HEADS, heads_q
        if n >= q_tiles:
            w, w_row, head, heads = w_k, w_rows[1], (n - q_tiles) * view.HEADS, heads_k
        if w_v is not None:  # noqa: SIM102 (known when compiling, unlike the next)
            if n >= q_tiles + k_tiles:
                w, w_row, heads = w_v, w_rows[2], heads_v
                head = (n - q_tiles - k_tiles) * view.HEADS

        feature, real = feature_of(column, head, heads, dims, view, 0, view.PADDED)
        bias = tl.zeros((BLOCK_N,), tl.float32)
        if n < q_tiles:
            bias = _load_bias(bias, bias_q, feature, real)
        elif n < q_tiles + k_tiles:
            bias = _load_bias(bias, bias_k, feature, real)
        else:
            bias = _load_bias(bias, bias_v, feature, real)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias[None, :]
        if view.DESCRIPTORS:
            for start in tl.range(0, d_model, BLOCK_K, num_stages=STAGES):
                x_tile = x.load([first_row, start])
                w_tile = w.load([head, 0, 0, start]).reshape(BLOCK_N, BLOCK_K).T
                acc = _multiply(x_tile, w_tile, acc, PRECISION)
        else:
            batch, token, valid = rows_of(first_row, rows, seqlen, BLOCK_M)
            deep = tl.arange(0, BLOCK_K)
            x_at = x + ((batch * x_stride[0] + token * x_stride[1])[:, None] + deep[None, :])
            w_at = w + ((feature.to(tl.int64) * w_row)[None, :] + deep[:, None])
            x_mask, w_mask = valid[:, None], real[None, :]
            for start in tl.range(0, d_model, BLOCK_K, num_stages=STAGES):
                inside = deep < d_model - start
                x_tile = tl.load(x_at + start, mask=x_mask & inside[None, :], other=0)
                w_tile = tl.load(w_at + start, mask=w_mask & inside[:, None], other=0)
                acc = _multiply(x_tile, w_tile, acc, PRECISION)

        place = Place(first_row, head, rows, heads, seqlen)
        if n < q_tiles:
            finish(
                acc,
                q,
                q_stride,
                z_q,
                norm_q,
                token_scale,
                scale_stride,
                Angles(turns, scale, positions, table_index, axis_map, tables, angle_stride),
                place,
                dims,
                view,
                CONJUGATE,
                NORM_EPS,
            )
        elif n < q_tiles + k_tiles:
            finish(
                acc,
                k,
                k_stride,
                z_k,
                norm_k,
                None,
                None,
                Angles(turns, scale, positions, table_index, axis_map, tables, angle_stride),
                place,
                dims,
                view,
                CONJUGATE,
                NORM_EPS,
            )
        elif w_v is not None:
            finish(
                acc,
                v,
                v_stride,
                None,
                None,
                None,
                None,
                Angles(),
                place,
                dims,
                view,
                CONJUGATE,
                NORM_EPS,
            )


@triton.jit
def _load_bias(none, bias, feature, real):
    if bias is None:
        return none
    else:
        return tl.load(bias + feature, mask=real, other=0).to(tl.float32)


@triton.jit
def _multiply(x_tile, w_tile, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # whose bfloat16 products are wrong; what it adds in which order is no GPU's
        exact = tl.dot(widen(x_tile, tl.float64), widen(w_tile, tl.float64), out_dtype=tl.float64)
        return acc + exact.to(tl.float32)
    else:
        return tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
