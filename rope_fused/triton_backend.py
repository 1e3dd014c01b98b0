"""From tensors to launches: runs the Triton kernels of rope_fused.triton_kernels.

The counterpart of native.py, with the same entries. Nothing here reads a tensor's values, so
nothing waits for the device. What a launch needs beside addresses follows from shapes and strides
alone and is kept from call to call."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from typing import NamedTuple

import torch
import triton

from .composite import bshd
from .linear import linear_into
from .triton_kernels.backward import backward_kernel
from .triton_kernels.plan import plan_projection
from .triton_kernels.projection import project_kernel
from .triton_kernels.rotate import rotate_kernel, tables_kernel

INTERPRETED = triton.knobs.runtime.interpret
MAX_PAIRS = 1024

_TILE = 2048  # pairs in a tile of one operand: 16 for each thread
_TILE_BACKWARD = 1024  # more numbers live at a time for each pair,
_TILE_NORM_AND_REST = 512  # and most with a norm over dimensions that are not rotated
_CHUNKS = 512  # most partial sums of a reduction: four programs for each of an H200's processors


def rotate(q, k, rotation, out=None):
    """Kernel of ops.rotate. `out`: the tensors to write, which may be q and k themselves."""
    q_out, k_out = outs = out or (torch.empty_like(q), _empty_like(k, q))
    rows = _rows(q, k, rotation.layout, _TILE)
    if not rows.programs:
        return outs
    _launch(
        rotate_kernel,
        rows.programs,
        q,
        k,
        q_out,
        None if k is None else k_out,
        *_weights(rotation),
        *_tables(rotation),
        rows.seqlen,
        rotation.turns.shape[0],
        *rows.strides,
        *_rows(q_out, None if k is None else k_out, rotation.layout, _TILE).strides,
        *_token_strides(rotation),
        **rows.blocks,
        **_constants(rotation),
        IN_PLACE=_in_place(q, q_out, k, k_out),
        enable_fp_fusion=True,
    )
    return outs


def rotate_backward(dq, dk, dv, q, k, rotation, packed):
    """Kernel of ops.rotate_backward."""
    if packed:
        heads = [0 if t is None else t.shape[-2] for t in (dq, dk, dv)]
        first = dq.new_empty((*dq.shape[:-2], sum(heads), dq.shape[-1]))
        out_q, out_k, out_v = first.split(heads, dim=-2)
        if dv is not None:
            out_v.copy_(dv)
        second = dq.new_empty(0)
    else:
        first, second = torch.empty_like(dq), _empty_like(dk, dq)
        out_q, out_k = first, second
    none = [dq.new_empty(0, dtype=torch.float64) for _ in range(5)]
    if q is None:
        back = rotation._replace(conjugate=not rotation.conjugate)
        rotate(dq, dk, back, out=(out_q, None if dk is None else out_k))
        return first, second, *none

    normed = rotation.q_norm is not None or rotation.k_norm is not None
    rest = 2 * rotation.pairs < dq.shape[-1]
    tile = _TILE_NORM_AND_REST if normed and rest else _TILE_BACKWARD
    rows = _rows(dq, dk, rotation.layout, tile)
    chunk_size = -(-rows.programs // _CHUNKS)
    chunks = -(-rows.programs // chunk_size) if rows.programs else 1
    shapes = [(0,) if w is None else w.shape for w in (rotation.q_norm, rotation.k_norm)]
    shapes += [rotation.scale.shape] * 2
    sizes = [math.prod(shape) for shape in shapes]
    sums = dq.new_zeros((chunks, sum(sizes)), dtype=torch.float64)
    token_sums = dq.new_zeros(bshd(dq, rotation.layout).shape[:2], dtype=torch.float64)
    if rows.programs:
        _launch(
            backward_kernel,
            chunks,
            dq,
            dk,
            q,
            k,
            out_q,
            None if dk is None else out_k,
            *_weights(rotation),
            *_tables(rotation),
            *sums.split(sizes, dim=1),
            token_sums,
            rows.seqlen,
            rotation.scale.shape[0],
            rows.programs,
            chunk_size,
            sums.shape[1],
            *rows.strides,
            *_rows(q, k, rotation.layout, tile).strides,
            *_rows(out_q, None if dk is None else out_k, rotation.layout, tile).strides,
            *_token_strides(rotation),
            **rows.blocks,
            **_constants(rotation),
            enable_fp_fusion=True,
        )
    sums = torch.split_with_sizes_copy(sums.sum(0), sizes)
    sums = (t.view(shape) for t, shape in zip(sums, shapes, strict=True))
    return first, second, *sums, token_sums


def rotate_tables(q, k, cos, sin, interleaved, rotary_offset, transpose, layout, out=None):
    """Kernel of ops.rotate_tables."""
    q_out, k_out = outs = out or (torch.empty_like(q), _empty_like(k, q))
    rows = _rows(q, k, layout, _TILE)
    if not rows.programs:
        return outs
    strides = ((t.stride(0) if t.shape[0] > 1 else 0, *t.stride()[1:]) for t in (cos, sin))
    _launch(
        tables_kernel,
        rows.programs,
        q,
        k,
        q_out,
        None if k is None else k_out,
        cos,
        sin,
        rows.seqlen,
        *rows.strides,
        *_rows(q_out, None if k is None else k_out, layout, _TILE).strides,
        *(step for stride in strides for step in stride),
        **rows.blocks,
        PAIRS=cos.shape[-1] // 2,
        OFFSET=rotary_offset,
        INTERLEAVED=interleaved,
        TRANSPOSE=transpose,
        IN_PLACE=_in_place(q, q_out, k, k_out),
        enable_fp_fusion=False,  # every product is rounded by itself, as in transformers
    )
    return outs


def project(x, weights, biases, head_dim, rotation, keep, out=None):
    """Kernel of ops.project: (q, k, v, zq, zk), z being the projections before norm and rotation
    when `keep`; by whichever way is faster."""
    shapes = [
        None if w is None else (*x.shape[:-1], w.shape[0] // head_dim, head_dim) for w in weights
    ]
    q, k, v = out or (x.new_empty(0 if s is None else s) for s in shapes)
    zq, zk = (torch.empty_like(q), torch.empty_like(k)) if keep else (q, k)
    kept = (zq, zk) if keep else (None, None)
    outputs = (q, k, None if weights[2] is None else v, *kept)
    if not project_fused(x, weights, biases, outputs, head_dim, rotation):
        project_composed(x, weights, biases, outputs, rotation)
    return (q, k, v, zq, zk) if keep else (q, k, v, x.new_empty(0), x.new_empty(0))


def project_fused(x, weights, biases, outputs, head_dim, rotation, tile=None) -> bool:
    """Project, norm and rotate in one launch, into outputs (q, k, v | None, zq | None, zk | None);
    False, with nothing done, where that is impossible or slower. `tile`: a configs.Tile to use
    whether or not it is faster."""
    plan = plan_projection(x, weights, biases, outputs, head_dim, rotation, tile)
    if plan is None:
        return False
    _launch(
        project_kernel,
        plan.programs,
        *plan.tensors,
        *_weights(rotation),
        *_tables(rotation),
        *plan.sizes,
        rotation.turns.shape[0],
        *plan.strides,
        *_token_strides(rotation),
        **plan.constants,
        enable_fp_fusion=True,
    )
    return True


def project_composed(x, weights, biases, outputs, rotation):
    """The same in several launches: one product for each weight into the final output, which is
    rotated there."""
    q, k, v, zq, zk = outputs
    zq, zk = q if zq is None else zq, k if zk is None else zk
    linear_into(x, weights, biases, (zq, zk, v))
    rotate(zq, zk, rotation, out=(q, k))


# ----------------------------------------------------------------------------------------- launches


# The interpreter keeps its state in global variables.
_turn = threading.Lock() if INTERPRETED else contextlib.nullcontext()


def _launch(kernel, programs, *operands, **constants):
    """Run `programs` programs of a kernel on the device of its first operand, a tensor or its
    descriptor."""
    device = getattr(operands[0], "base", operands[0]).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(kernel, programs, *operands, **constants)
    with _turn:
        kernel[(programs,)](*operands, **constants)


class _Rows(NamedTuple):
    """q and k as tiles: how many there are, of what size, and where their elements are."""

    programs: int  # tiles of tokens, all sequences of the batch together
    seqlen: int
    strides: tuple[int, ...]  # batch, token, head, element of q; then of k
    blocks: dict[str, int]  # compile-time sizes


def _rows(q, k, layout, tile) -> _Rows:
    if k is None:
        return _tiled(q.shape, q.stride(), None, None, layout, tile)
    return _tiled(q.shape, q.stride(), k.shape, k.stride(), layout, tile)


@functools.lru_cache(maxsize=4096)
def _tiled(q_shape, q_stride, k_shape, k_stride, layout, tile) -> _Rows:
    (batch, seqlen, heads, head_dim), q_steps = _as_bshd(q_shape, q_stride, layout)
    kv_heads, k_steps = 0, (0, 0, 0, 0)
    if k_shape is not None:
        (_, _, kv_heads, _), k_steps = _as_bshd(k_shape, k_stride, layout)
    columns = triton.next_power_of_2(head_dim) // 2 or 1
    # Eight heads by default, so that an angle is computed once for several of them in each thread;
    # more where there are not enough tokens to fill a tile.
    tokens = max(1, tile // (columns * min(8, triton.next_power_of_2(max(1, heads)))))
    tokens = min(tokens, triton.next_power_of_2(max(1, seqlen)))
    most = max(1, tile // (columns * tokens))
    blocks = [min(triton.next_power_of_2(max(1, n)), most) for n in (heads, kv_heads)]
    names = ("HEADS", "KV_HEADS", "HEAD_DIM", "BLOCK_T", "BLOCK_H", "BLOCK_KV")
    sizes = (heads, kv_heads, head_dim, tokens, *blocks)
    empty = heads + kv_heads == 0 or head_dim == 0
    programs = 0 if empty else batch * -(-seqlen // tokens)
    return _Rows(programs, seqlen, (*q_steps, *k_steps), dict(zip(names, sizes, strict=True)))


def _as_bshd(shape, stride, layout):
    """Sizes and strides as of [batch, seqlen, heads, head_dim]. A dimension of size 1 gets stride
    0, which every alignment divides."""
    if layout == "thd":
        shape, stride = (1, *shape), (0, *stride)
    elif layout == "bhsd":
        shape, stride = ((t[0], t[2], t[1], t[3]) for t in (shape, stride))
    stride = tuple(
        0 if n == 1 and i < 3 else s for i, (n, s) in enumerate(zip(shape, stride, strict=True))
    )
    return tuple(shape), stride


def _weights(rotation):
    return tuple(None if w is None else w.contiguous() for w in (rotation.q_norm, rotation.k_norm))


def _tables(rotation):
    """The tensors that say what a token's angles are."""
    positions, axis_map = rotation.positions, rotation.axis_map
    if positions is not None and positions.dtype not in (torch.int32, torch.int64):
        positions = positions.to(torch.int64)
    return (
        rotation.turns.contiguous(),
        rotation.scale.contiguous(),
        positions,
        rotation.table_index,
        None if axis_map is None else axis_map.contiguous(),
        rotation.token_scale,
    )


def _token_strides(rotation):
    """Strides of positions (axis, batch, token), table_index and token_scale (batch, token)."""
    positions = rotation.positions
    axis = positions.stride(0) if positions is not None and positions.dim() == 3 else 0
    per_token = (positions, rotation.table_index, rotation.token_scale)
    return axis, *(step for t in per_token for step in _steps(t))


def _steps(t):
    if t is None:
        return 0, 0
    return t.stride(-2) if t.shape[-2] > 1 else 0, t.stride(-1)


def _constants(rotation):
    return {
        "PAIRS": rotation.pairs,
        "OFFSET": rotation.rotary_offset,
        "INTERLEAVED": rotation.interleaved,
        "CONJUGATE": rotation.conjugate,
        "NORM_EPS": rotation.norm_eps,
        "NORM_ALL": rotation.norm_all,
    }


def _in_place(q, q_out, k, k_out):
    """Whether each output is the memory of its input, so that what is only copied is there."""
    same = q.data_ptr() == q_out.data_ptr()
    return same and (k is None or k.data_ptr() == k_out.data_ptr())


def _empty_like(x, q):
    return q.new_empty(0) if x is None else torch.empty_like(x)
