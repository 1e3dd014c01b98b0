"""From tensors to launches: runs the Triton kernels of rope_fused.triton_kernels.

The counterpart of native.py, with the same entries. Nothing here reads a tensor's values, so
nothing waits for the device. What a launch needs beside addresses follows from shapes and strides
alone and is kept from call to call."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from triton.language import constexpr

from .composite import bshd, gradient_memory
from .linear import linear_into
from .triton_kernels import launch
from .triton_kernels.backward import backward_kernel
from .triton_kernels.plan import plan_projection
from .triton_kernels.rotate import rotate_kernel, tables_kernel
from .triton_kernels.rows import Dims, Strides

INTERPRETED = launch.INTERPRETED
MAX_PAIRS = 1024

_TILE = 2048  # pairs in a tile of one operand: 16 for each thread
_TILE_BACKWARD = 1024  # more numbers live at a time for each pair,
_TILE_BACKWARD_NORM = 512  # and most with a norm of wide heads, or over what is not rotated
_CHUNKS = 512  # most partial sums of a reduction: four programs for each of an H200's processors


def rotate(q, k, rotation, out=None):
    """Kernel of ops.rotate. `out`: the tensors to write, which may be q and k themselves."""
    outs = out or (torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k))
    tensors = (q, k, outs[0], None if k is None else outs[1], *launch.shared_tensors(rotation))
    in_place = out is not None and _in_place(*tensors[:4])
    # New tensors are laid out as their inputs say.
    forms = launch.forms(tensors if out else (q, k, None, None, *tensors[4:]))
    run = _rotate_launch(forms, launch.options_of(rotation), in_place)
    if run is not None:
        run(q.device, tensors)
    return outs


@functools.lru_cache(maxsize=4096)
def _rotate_launch(forms, options, in_place):
    q, k, q_out, k_out, *shared = map(launch.form, forms)
    turns, options = shared[2], launch.Options(*options)
    tiles = _tiles(q, k, options.layout, _TILE)
    if not tiles.programs:
        return None
    q_out, k_out = q_out or launch.form_like(q), k_out or launch.form_like(k)
    return launch.Launch(
        rotate_kernel,
        tiles.programs,
        *(_strides(t, options.layout) for t in (q, k, q_out, k_out)),
        *launch.shared_strides(shared),
        tiles.seqlen,
        turns.shape[0],
        _dims(q, turns.shape[1], options),
        *tiles.blocks,
        options.conjugate,
        options.norm_eps,
        options.norm_all,
        in_place,
        enable_fp_fusion=True,
    )


def rotate_backward(dq, dk, dv, q, k, rotation, packed):
    """Kernel of ops.rotate_backward."""
    first, second, (dq_out, dk_out) = gradient_memory(dq, dk, dv, packed)
    if q is None:
        back = rotation._replace(conjugate=not rotation.conjugate)
        rotate(dq, dk, back, out=(dq_out, dk_out))
        return first, second, *(dq.new_empty(0, dtype=torch.float64) for _ in range(5))

    tensors = (dq, dk, q, k, dq_out, dk_out, *launch.shared_tensors(rotation))
    run, chunks = _backward_launch(launch.forms(tensors), launch.options_of(rotation))
    shapes = [(0,) if w is None else w.shape for w in (rotation.q_norm, rotation.k_norm)]
    shapes += [rotation.scale.shape] * 2
    sizes = [math.prod(shape) for shape in shapes]
    sums = dq.new_zeros((chunks, sum(sizes)), dtype=torch.float64)
    token_sums = dq.new_zeros(bshd(dq, rotation.layout).shape[:2], dtype=torch.float64)
    if run is not None:
        run(dq.device, (*tensors, *sums.split(sizes, dim=1), token_sums))
    sums = torch.split_with_sizes_copy(sums.sum(0), sizes)
    sums = (t.view(shape) for t, shape in zip(sums, shapes, strict=True))
    return first, second, *sums, token_sums


@functools.lru_cache(maxsize=4096)
def _backward_launch(forms, options):
    """(the launch or None, how many partial sums it makes)."""
    dq, dk, q, k, dq_out, dk_out, *shared = map(launch.form, forms)
    q_norm, k_norm, turns, *_ = shared
    options, pairs = launch.Options(*options), turns.shape[1]
    normed, head_dim = q_norm is not None or k_norm is not None, dq.shape[-1]
    laden = normed and (head_dim > 128 or head_dim > 2 * pairs)
    tile = _TILE_BACKWARD_NORM if laden else _TILE_BACKWARD
    tiles = _tiles(dq, dk, options.layout, tile)
    if not tiles.programs:
        return None, 1
    chunk_size = -(-tiles.programs // _CHUNKS)
    chunks = -(-tiles.programs // chunk_size)
    sums = 2 * math.prod(turns.shape)
    sums += sum(math.prod(w.shape) for w in (q_norm, k_norm) if w is not None)
    run = launch.Launch(
        backward_kernel,
        chunks,
        *(_strides(t, options.layout) for t in (dq, dk, q, k, dq_out, dk_out)),
        *launch.shared_strides(shared),
        tiles.seqlen,
        turns.shape[0],
        tiles.programs,
        chunk_size,
        sums,
        _dims(dq, pairs, options),
        *tiles.blocks,
        options.conjugate,
        options.norm_eps,
        options.norm_all,
        enable_fp_fusion=True,
    )
    return run, chunks


def rotate_tables(q, k, cos, sin, interleaved, rotary_offset, transpose, layout, out=None):
    """Kernel of ops.rotate_tables."""
    outs = out or (torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k))
    tensors = (q, k, outs[0], None if k is None else outs[1], cos, sin)
    in_place = out is not None and _in_place(*tensors[:4])
    options = (interleaved, rotary_offset, transpose, layout, in_place)
    forms = launch.forms(tensors if out else (q, k, None, None, cos, sin))
    run = _tables_launch(forms, *options)
    if run is not None:
        run(q.device, tensors)
    return outs


@functools.lru_cache(maxsize=4096)
def _tables_launch(forms, interleaved, rotary_offset, transpose, layout, in_place):
    q, k, q_out, k_out, cos, sin = map(launch.form, forms)
    tiles = _tiles(q, k, layout, _TILE)
    if not tiles.programs:
        return None
    q_out, k_out = q_out or launch.form_like(q), k_out or launch.form_like(k)
    dims = (q.shape[-1], cos.shape[-1] // 2, rotary_offset, interleaved)
    return launch.Launch(
        tables_kernel,
        tiles.programs,
        *(_strides(t, layout) for t in (q, k, q_out, k_out)),
        *((t.stride[0] if t.shape[0] > 1 else 0, *t.stride[1:]) for t in (cos, sin)),
        tiles.seqlen,
        Dims(*map(constexpr, dims)),
        *tiles.blocks,
        transpose,
        in_place,
        enable_fp_fusion=False,  # every product is rounded by itself, as in transformers
    )


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
    biases = (None if b is None else b.contiguous() for b in biases)
    plan.run((x, *weights, *outputs), (*biases, *launch.shared_tensors(rotation)))
    return True


def project_composed(x, weights, biases, outputs, rotation):
    """The same in several launches: one product for each weight into the final output, which is
    rotated there."""
    q, k, v, zq, zk = outputs
    zq, zk = q if zq is None else zq, k if zk is None else zk
    linear_into(x, weights, biases, (zq, zk, v))
    rotate(zq, zk, rotation, out=(q, k))


# ----------------------------------------------------------------------------------------- launches


class _Tiles(NamedTuple):
    """q and k as tiles: how many there are, and of what size."""

    programs: int  # tiles of tokens, all sequences of the batch together
    seqlen: int
    blocks: tuple[int, ...]  # HEADS, KV_HEADS, BLOCK_T, BLOCK_H, BLOCK_KV


def _tiles(q, k, layout, tile) -> _Tiles:
    batch, seqlen, heads, head_dim = _as_bshd(q.shape, layout, 1)
    kv_heads = 0 if k is None else _as_bshd(k.shape, layout, 1)[2]
    columns = triton.next_power_of_2(head_dim) // 2 or 1
    # Eight heads by default, so that an angle is computed once for several of them in each thread;
    # more where there are not enough tokens to fill a tile.
    tokens = max(1, tile // (columns * min(8, triton.next_power_of_2(max(1, heads)))))
    tokens = min(tokens, triton.next_power_of_2(max(1, seqlen)))
    most = max(1, tile // (columns * tokens))
    blocks = (min(triton.next_power_of_2(max(1, n)), most) for n in (heads, kv_heads))
    empty = heads + kv_heads == 0 or head_dim == 0
    programs = 0 if empty else batch * -(-seqlen // tokens)
    return _Tiles(programs, seqlen, (heads, kv_heads, tokens, *blocks))


def _strides(form, layout):
    """Strides as of [batch, seqlen, heads, head_dim]. A dimension of size 1 gets stride 0, which
    every alignment divides."""
    if form is None:
        return Strides(0, 0, 0, 0)
    sizes, steps = _as_bshd(form.shape, layout, 1), _as_bshd(form.stride, layout, 0)
    *rows, step = (0 if n == 1 else s for n, s in zip(sizes, steps, strict=True))
    return Strides(*rows, steps[3])


def _as_bshd(values, layout, batch):
    """Sizes or strides in the order of [batch, seqlen, heads, head_dim]."""
    if layout == "thd":
        return (batch, *values)
    return (values[0], values[2], values[1], values[3]) if layout == "bhsd" else tuple(values)


def _dims(q, pairs, options):
    dims = (q.shape[-1], pairs, options.rotary_offset, options.interleaved)
    return Dims(*map(constexpr, dims))


def _in_place(q, k, q_out, k_out):
    """Whether each output is the memory of its input, so that what is only copied is there."""
    same = q.data_ptr() == q_out.data_ptr()
    return same and (k is None or k.data_ptr() == k_out.data_ptr())
