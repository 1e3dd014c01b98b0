"""The projections to q, k and v as one GEMM, whose epilogue norms, rotates and scales q and k.

Three weights as nn.Linear holds them, no copy of which is made; three outputs; one launch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .epilogue import batch_and_token, feature_of, finish
from .phase import INTERPRETED, widen


# A size of 1 would become a constant, without .to(); and no number of heads is worth compiling anew.
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


# -------------------------------------------------------------------------------------------- host


class Device(NamedTuple):
    """What a plan depends on."""

    name: str
    arch: int  # of configs.default_tile
    processors: int


@functools.cache
def device_of(device: torch.device) -> Device:
    if INTERPRETED:
        return Device("interpreter", 90, 3)
    properties = torch.cuda.get_device_properties(device)
    capability = None if torch.version.hip else (properties.major, properties.minor)
    arch = configs.architecture(capability)
    return Device(properties.name, arch, properties.multi_processor_count)


class Plan(NamedTuple):
    """One launch: the kernel's operands but for norms, tables and what belongs to them."""

    programs: int
    tensors: tuple
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    constants: dict


def plan(x, weights, biases, outputs, head_dim, rotation, tile=None) -> Plan | None:
    """How to run the fused kernel; None where something else is faster, or where it cannot: with
    float64, a norm over all heads, a head or slice that makes no tile, strided d_model.

    outputs: (q, k, v, z_q, z_k), of which v and both z may be None. tile: the configs.Tile to use,
    whatever was measured.
    """
    problem = problem_of(x, weights, head_dim, rotation)
    head = configs.head_view(
        head_dim, 2 * rotation.pairs, rotation.rotary_offset, rotation.interleaved
    )
    given = [w for w in weights if w is not None]
    if (
        problem is None
        or head is None
        or rotation.norm_all
        or any(t.stride(-1) != 1 for t in (x, *given))
    ):
        return None
    device = device_of(x.device)
    if tile is None and INTERPRETED:  # there is nothing faster to choose: the largest, in one go
        tile = configs.Tile(128, max(1, 256 // head.columns), 128, 4, 2, parts=1)
    elif tile is None:
        tile = configs.choose(device.name, device.arch, problem, head)
    if tile is None:
        return None

    seqlen = x.shape[-2]
    tensors = (x, *weights, *outputs)
    if tile.descriptors and device.arch >= 90:
        described = _described(x, weights, outputs, head_dim, head, tile)
        tensors = described or tensors
        tile = tile._replace(descriptors=described is not None)
    tiles = -(-problem.tokens // tile.rows) * sum(-(-n // tile.heads) for n in problem.heads)
    return Plan(
        programs=min(tiles, device.processors * tile.programs),
        tensors=(*tensors, *(None if b is None else b.contiguous() for b in biases)),
        sizes=(problem.tokens, seqlen, problem.d_model, *problem.heads),
        strides=(
            *_row_steps(x, 1),
            *(0 if w is None else w.stride(0) for w in weights),
            *(step for y in outputs[:3] for step in _row_steps(y, 2)),
        ),
        constants={
            "HEAD_DIM": head_dim,
            "PAIRS": rotation.pairs,
            "OFFSET": rotation.rotary_offset,
            "INTERLEAVED": rotation.interleaved,
            "CONJUGATE": rotation.conjugate,
            "NORM_EPS": rotation.norm_eps,
            "HEADS": tile.heads,
            "SLABS": head.slabs,
            "WIDTH": head.width,
            "PADDED": head.padded,
            "BLOCK_M": tile.rows,
            "BLOCK_K": tile.depth,
            "STAGES": tile.stages,
            "PARTS": tile.parts,
            "GROUP_M": tile.band,
            "PRECISION": "tf32" if problem.dtype == "tf32" else "ieee",
            "DESCRIPTORS": tile.descriptors,
            "num_warps": tile.warps,
        },
    )


_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def problem_of(x, weights, head_dim, rotation) -> configs.Problem | None:
    """The shape of a projection, or None if there is nothing to do or the dtype is float64."""
    dtype = _DTYPES.get(x.dtype)
    if dtype is None or x.numel() == 0:
        return None
    if dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        dtype = "tf32"
    return configs.Problem(
        dtype,
        x.numel() // x.shape[-1],
        x.shape[-1],
        tuple(0 if w is None else w.shape[0] // head_dim for w in weights),
        head_dim,
        2 * rotation.pairs,
        rotation.interleaved,
        rotation.q_norm is not None or rotation.k_norm is not None,
        rotation.table_index is not None or rotation.axis_map is not None,
    )


def _row_steps(t, inner):
    """Strides of batch and token, before `inner` further dimensions."""
    if t is None:
        return 0, 0
    return (0 if t.dim() == inner + 1 else t.stride(0)), t.stride(-1 - inner)


def _described(x, weights, outputs, head_dim, head, tile):
    """The tensors as tensor descriptors, or None if one cannot be: rows must lie at equal distances
    (a batch of sequences too), and everything at multiples of 16 bytes."""
    unit = 16 // x.element_size()
    columns = head.padded // tile.parts
    if head.width % unit or columns % unit or x.shape[-1] < unit:
        return None
    done = []
    for t, inner in ((x, 1), *((w, 1) for w in weights), *((y, 2) for y in outputs)):
        if t is None:
            done.append(None)
            continue
        row = _one_row_step(t, inner)
        if row is None or row % unit or t.data_ptr() % 16:
            return None
        slabs, width, d_model = head.slabs, head.width, x.shape[-1]
        if inner == 2:
            heads = t.shape[-2]
            shape = [t.numel() // (heads * head_dim), heads, slabs, width]
            stride = [row, head_dim, width, 1]
            block = [tile.rows, tile.heads, slabs, columns]
        elif t is x:
            shape, stride = [x.numel() // d_model, d_model], [row, 1]
            block = [tile.rows, tile.depth]
        else:
            shape = [t.shape[0] // head_dim, slabs, width, d_model]
            stride = [head_dim * row, width * row, row, 1]
            block = [tile.heads, slabs, head.padded, tile.depth]
        done.append(TensorDescriptor(t.detach(), shape, stride, block))
    return tuple(done)


def _one_row_step(t, inner):
    """The distance of consecutive rows, tokens after tokens, or None if they have no common one, or
    overlap."""
    batch, token = _row_steps(t, inner)
    seqlen = t.shape[-1 - inner]
    if t.dim() == inner + 2 and t.shape[0] > 1:
        if seqlen == 1:
            token = batch
        elif batch != seqlen * token:
            return None
    length = t.shape[-1] if inner == 1 else t.shape[-1] * t.shape[-2]
    return token if token >= length else None
