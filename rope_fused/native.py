"""From tensors to addresses: calls the compiled kernels of rope_fused._cpu.

Every tensor is allocated here and held until the call returns; the kernels only see addresses,
sizes and strides. Outputs have the strides of `torch.empty_like` of their input."""

from __future__ import annotations

import contextlib
import math
import os

import torch

from . import _cpu
from .composite import bshd, gradient_memory
from .linear import product_into
from .parameters import (
    compute_type,
    make_rotation,
    make_rows,
    make_rows_backward,
    make_table_rotation,
)

MAX_PAIRS = _cpu.max_pairs
WITHOUT_CUDA = _cpu.without_cuda  # why rope_fused._cuda was left out, or nothing
_OutputBuffer = getattr(_cpu, "OutputBuffer", None)  # on Linux

# An OpenMP team of the parent does not exist in a forked child, and waiting for it would never end.
_forked = False
if hasattr(os, "register_at_fork"):

    def _after_fork():
        global _forked
        _forked = True

    os.register_at_fork(after_in_child=_after_fork)

_BLOCK_ROWS = 512
# Bytes from which outputs are written past the caches, into memory that is used again: glibc would
# map it anew for every output.
_LARGE = 1 << 25
_SERIAL = 1 << 14  # elements below which a second thread costs more than it brings


def rotate(q, k, rotation, out=None):
    """Kernel of ops.rotate. `out`: the tensors to write, which may be q and k themselves."""
    outs = out or (_empty_like(q), q.new_empty(0) if k is None else _empty_like(k))
    norms = compute_type(rotation.q_norm, q), compute_type(rotation.k_norm, q)
    rows = [make_rows(_cpu, q, outs[0], norms[0], rotation.layout, token_scaled=True)]
    if k is not None:
        rows.append(make_rows(_cpu, k, outs[1], norms[1], rotation.layout, token_scaled=False))
    shared, held = make_rotation(_cpu, q, rotation, _threads(q.numel()))
    _cpu.rotate(shared, rows, sum([t.nbytes for t in outs if t is not None]) >= _LARGE)
    del held
    return outs


def rotate_backward(dq, dk, dv, q, k, rotation, packed):
    """Kernel of ops.rotate_backward."""
    first, second, (out_q, out_k) = gradient_memory(dq, dk, dv, packed, _empty, _empty_like)
    if q is None:
        back = rotation._replace(conjugate=not rotation.conjugate)
        rotate(dq, dk, back, out=(out_q, out_k))
        return first, second, *(dq.new_empty(0, dtype=torch.float64) for _ in range(5))

    batch, seqlen = bshd(dq, rotation.layout).shape[:2]
    tables, pairs = rotation.scale.shape
    # Chunks by size alone, so that the sums do not depend on the number of threads.
    chunks = max(1, min(64, -(-batch * seqlen // 64)))

    def partial(*shape):
        return torch.zeros(chunks, *shape, dtype=torch.float64)

    inv_freq, scale = partial(tables, pairs), partial(tables, pairs)
    token_scale = torch.zeros(batch, seqlen, dtype=torch.float64)
    norm_grads, rows, norms = [], [], []
    for grad, x, to, weight in (
        (dq, q, out_q, rotation.q_norm),
        (dk, k, out_k, rotation.k_norm),
    ):
        norm_grads.append(
            dq.new_empty(0, dtype=torch.float64) if weight is None else partial(*weight.shape)
        )
        if grad is None:
            continue
        norms.append(compute_type(weight, grad))
        rows.append(
            make_rows_backward(
                _cpu,
                grad,
                x,
                to,
                norms[-1],
                rotation.layout,
                token_scaled=grad is dq,
                norm_grad=0 if weight is None else norm_grads[-1].data_ptr(),
            )
        )
    shared, held = make_rotation(_cpu, dq, rotation, _threads(dq.numel()))
    _cpu.rotate_backward(
        shared,
        rows,
        chunks=chunks,
        inv_freq=inv_freq.data_ptr(),
        scale=scale.data_ptr(),
        token_scale=token_scale.data_ptr(),
    )
    del held, norms
    sums = (t.sum(0) if t.dim() > 1 else t for t in (*norm_grads, inv_freq, scale))
    return first, second, *sums, token_scale


def rotate_tables(q, k, cos, sin, interleaved, rotary_offset, transpose, layout, out=None):
    """Kernel of ops.rotate_tables."""
    outs = out or (_empty_like(q), q.new_empty(0) if k is None else _empty_like(k))
    rows = [make_rows(_cpu, q, outs[0], None, layout, token_scaled=False)]
    if k is not None:
        rows.append(make_rows(_cpu, k, outs[1], None, layout, token_scaled=False))
    if q.numel() or (k is not None and k.numel()):
        shared = make_table_rotation(
            _cpu, q, cos, sin, interleaved, rotary_offset, transpose, layout, _threads(q.numel())
        )
        _cpu.rotate_tables(shared, rows)
    return outs


def project(x, weights, biases, head_dim, rotation, keep, out=None):
    """Kernel of ops.project: (q, k, v, zq, zk), z being the projections before norm and rotation
    when `keep`. A block of rows is projected into the final output and rotated there."""
    shapes = [
        None if w is None else (*x.shape[:-1], w.shape[0] // head_dim, head_dim) for w in weights
    ]
    q, k, v = out or (_empty(x, (0,) if s is None else s) for s in shapes)
    zq, zk = (_empty_like(q), _empty_like(k)) if keep else (q, k)
    with torch.no_grad():  # an out= product refuses inputs that require a gradient
        for rows, part in _row_blocks(x, rotation):
            for weight, bias, z in zip(weights, biases, (zq, zk, v), strict=True):
                if weight is not None:
                    product_into(x[rows], weight, bias, z[rows].flatten(-2))
            rotate(zq[rows], zk[rows], part, out=(q[rows], k[rows]))
    return (q, k, v, zq, zk) if keep else (q, k, v, x.new_empty(0), x.new_empty(0))


def _row_blocks(x, rotation):
    """(index into x and the outputs, rotation of those rows) for the blocks to project in turn.

    Blocks pay where the product's own time hides the repeated reordering of the weights, and the
    output of a block is still in cache when it is rotated: measured on Zen 4, bfloat16 from d_model
    4096 on (0.94-0.95 of one whole product with 512 rows; 1.05-1.07 at d_model 2048).
    """
    seqlen = x.shape[-2]
    if x.dtype != torch.bfloat16 or x.shape[-1] < 4096 or seqlen < 2 * _BLOCK_ROWS:
        yield ..., rotation
        return
    for row in range(1 if x.dim() == 2 else x.shape[0]):
        for start in range(0, seqlen, _BLOCK_ROWS):
            tokens = slice(start, start + _BLOCK_ROWS)
            rows = tokens if x.dim() == 2 else (row, tokens)
            yield rows, _rows_of(rotation, row, tokens, seqlen)


def _rows_of(rotation, row, tokens, seqlen):
    """The rotation of some tokens of one row of the batch, as packed tokens."""

    def cut(t):
        return None if t is None else t[..., row if t.shape[-2] > 1 else 0, tokens].unsqueeze(-2)

    positions = rotation.positions
    if positions is None:
        positions = torch.arange(seqlen)[None]
    return rotation._replace(
        positions=cut(positions),
        table_index=cut(rotation.table_index),
        token_scale=cut(rotation.token_scale),
        layout="thd",
    )


@contextlib.contextmanager
def torch_allocates():
    """Take every output from torch's allocator, where a profiler of memory sees it."""
    global _OutputBuffer
    kept, _OutputBuffer = _OutputBuffer, None
    try:
        yield
    finally:
        _OutputBuffer = kept


def _empty_like(x):
    """torch.empty_like, large outputs in memory that earlier ones have left."""
    if x.nbytes < _LARGE:
        return torch.empty_like(x)
    return _empty(x, x.shape, torch.empty_like(x, device="meta").stride())


def _empty(like, shape, stride=None):
    """A new tensor of `like`'s dtype, contiguous without a `stride`."""
    size = math.prod(shape) * like.element_size()
    if size < _LARGE or _OutputBuffer is None:
        dtype = like.dtype
        return torch.empty_strided(shape, stride, dtype=dtype) if stride else like.new_empty(shape)
    # A tensor of its own rather than a view: views made without gradients refuse in-place changes.
    flat = torch.frombuffer(_OutputBuffer(size), dtype=like.dtype)
    stride = stride or torch.empty(shape, device="meta").stride()
    return like.new_empty(0).set_(flat, 0, shape, stride)


def _threads(elements: int) -> int:
    return 1 if _forked or elements < _SERIAL else torch.get_num_threads()
