"""The projections to q, k and v as one GEMM, whose epilogue norms, rotates and scales q and k.

Three weights as nn.Linear holds them, no copy of which is made; three outputs; one launch."""

import triton
import triton.language as tl

from .epilogue import batch_and_token, feature_of, finish
from .phase import INTERPRETED, widen


# A size of 1 would become a constant, without .to(), and no size here is worth compiling anew for.
@triton.jit(do_not_specialize=("tokens", "seqlen", "heads_q", "heads_k", "heads_v"))
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
    tokens,
    seqlen,
    d_model,
    heads_q,
    heads_k,
    heads_v,
    tables,
    x_batch,
    x_token,
    w_q_row,
    w_k_row,
    w_v_row,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    position_axis,
    position_batch,
    position_token,
    index_batch,
    index_token,
    scale_batch,
    scale_token,
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
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """q, k = token_scale (q only) * scale * R(position * inv_freq) * norm(x w^T + bias), and v = x
    w^T + bias; z_q and z_k get x w^T + bias of q and k.

    x, the weights, q, k, v, z_q and z_k are tensor descriptors or (DESCRIPTORS False) pointers to
    rows of d_model resp. heads * HEAD_DIM consecutive numbers. Tensors that are None take no part.

    Persistent: a program takes every num_programs-th tile, in bands of GROUP_M rows of tiles, so
    that its neighbours find the same weights in the L2 cache.
    """
    BLOCK_N: tl.constexpr = HEADS * SLABS * PADDED
    q_tiles, k_tiles = tl.cdiv(heads_q, HEADS), tl.cdiv(heads_k, HEADS)
    tiles_m, tiles_n = tl.cdiv(tokens, BLOCK_M), q_tiles + k_tiles
    if w_v is not None:
        tiles_n += tl.cdiv(heads_v, HEADS)
    position_stride = (position_axis, position_batch, position_token)
    index_stride, scale_stride = (index_batch, index_token), (scale_batch, scale_token)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        band, place = tile // (GROUP_M * tiles_n), tile % (GROUP_M * tiles_n)
        height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
        first_row, n = (band * GROUP_M + place % height) * BLOCK_M, place // height
        # One loop over d_model serves all three weights: they are chosen between before it, by a
        # branch that all threads take alike.
        column = tl.arange(0, BLOCK_N)
        w, w_row, head, heads = w_q, w_q_row, n * HEADS, heads_q
        if n >= q_tiles:
            w, w_row, head, heads = w_k, w_k_row, (n - q_tiles) * HEADS, heads_k
        if w_v is not None:  # noqa: SIM102 (known when compiling, unlike the next)
            if n >= q_tiles + k_tiles:
                w, w_row, heads = w_v, w_v_row, heads_v
                head = (n - q_tiles - k_tiles) * HEADS

        feature, real = feature_of(column, head, heads, HEAD_DIM, SLABS, WIDTH, PADDED, 0)
        bias = tl.zeros((BLOCK_N,), tl.float32)
        if n < q_tiles:
            bias = _load_bias(bias, bias_q, feature, real)
        elif n < q_tiles + k_tiles:
            bias = _load_bias(bias, bias_k, feature, real)
        else:
            bias = _load_bias(bias, bias_v, feature, real)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias[None, :]
        if DESCRIPTORS:
            for start in tl.range(0, d_model, BLOCK_K, num_stages=STAGES):
                x_tile = x.load([first_row, start])
                w_tile = w.load([head, 0, 0, start]).reshape(BLOCK_N, BLOCK_K).T
                acc = _multiply(x_tile, w_tile, acc, PRECISION)
        else:
            row, deep = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
            batch, token = batch_and_token(row, seqlen)
            x_at = x + ((batch * x_batch + token * x_token)[:, None] + deep[None, :])
            w_at = w + ((feature.to(tl.int64) * w_row)[None, :] + deep[:, None])
            x_mask, w_mask = (row < tokens)[:, None], real[None, :]
            for start in tl.range(0, d_model, BLOCK_K, num_stages=STAGES):
                inside = deep < d_model - start
                x_tile = tl.load(x_at + start, mask=x_mask & inside[None, :], other=0)
                w_tile = tl.load(w_at + start, mask=w_mask & inside[:, None], other=0)
                acc = _multiply(x_tile, w_tile, acc, PRECISION)

        if n < q_tiles:
            finish(
                acc,
                q,
                (q_batch, q_token),
                z_q,
                norm_q,
                token_scale,
                scale_stride,
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
                HEAD_DIM,
                PAIRS,
                OFFSET,
                INTERLEAVED,
                CONJUGATE,
                NORM_EPS,
                HEADS,
                SLABS,
                WIDTH,
                PADDED,
                PARTS,
                DESCRIPTORS,
            )
        elif n < q_tiles + k_tiles:
            finish(
                acc,
                k,
                (k_batch, k_token),
                z_k,
                norm_k,
                None,
                scale_stride,
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
                HEAD_DIM,
                PAIRS,
                OFFSET,
                INTERLEAVED,
                CONJUGATE,
                NORM_EPS,
                HEADS,
                SLABS,
                WIDTH,
                PADDED,
                PARTS,
                DESCRIPTORS,
            )
        elif w_v is not None:
            finish(
                acc,
                v,
                (v_batch, v_token),
                None,
                None,
                None,
                scale_stride,
                None,
                None,
                None,
                None,
                None,
                tables,
                position_stride,
                index_stride,
                first_row,
                tokens,
                seqlen,
                head,
                heads,
                HEAD_DIM,
                PAIRS,
                OFFSET,
                INTERLEAVED,
                CONJUGATE,
                NORM_EPS,
                HEADS,
                SLABS,
                WIDTH,
                PADDED,
                PARTS,
                DESCRIPTORS,
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
