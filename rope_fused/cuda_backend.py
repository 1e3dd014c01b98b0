"""From tensors to launches: runs the CUDA kernels of rope_fused._cuda.

The counterpart of native.py, with the same entries. Nothing here reads a tensor's values, so
nothing waits for the device. A tensor that is freed while a kernel still reads it stays intact
until its stream gets there: what takes its memory next is work of the same stream."""

from __future__ import annotations

import torch

from . import _cuda
from .linear import linear_into
from .parameters import compute_type, make_rotation, make_rows

MAX_PAIRS = _cuda.max_pairs
ARCHITECTURES = _cuda.architectures


def rotate(q, k, rotation, out=None):
    """Kernel of ops.rotate. `out`: the tensors to write, which may be q and k themselves."""
    _check_head(q)
    outs = out or (torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k))
    norms = compute_type(rotation.q_norm, q), compute_type(rotation.k_norm, q)
    rows = [make_rows(_cuda, q, outs[0], norms[0], rotation.layout, token_scaled=True)]
    if k is not None:
        rows.append(make_rows(_cuda, k, outs[1], norms[1], rotation.layout, token_scaled=False))
    if q.numel() or (k is not None and k.numel()):
        shared, held = make_rotation(_cuda, q, rotation)
        _launch(q, _cuda.rotate, shared, rows)
        del held
    return outs


def project(x, weights, biases, head_dim, rotation, keep, out=None):
    """Kernel of ops.project: (q, k, v, zq, zk), z being the projections before norm and rotation
    when `keep`. One product for each weight into the final output, which is rotated there."""
    shapes = [
        None if w is None else (*x.shape[:-1], w.shape[0] // head_dim, head_dim) for w in weights
    ]
    q, k, v = out or (x.new_empty(0 if s is None else s) for s in shapes)
    zq, zk = (torch.empty_like(q), torch.empty_like(k)) if keep else (q, k)
    linear_into(x, weights, biases, (zq, zk, v))
    rotate(zq, zk, rotation, out=(q, k))
    return (q, k, v, zq, zk) if keep else (q, k, v, x.new_empty(0), x.new_empty(0))


def _check_head(q):
    if q.shape[-1] > _cuda.max_head_dim:
        raise ValueError(
            f"backend 'cuda' takes heads of at most {_cuda.max_head_dim} dimensions, got "
            f"{q.shape[-1]}; use 'auto' or 'reference'"
        )


def _launch(q, kernel, *operands, **options):
    """Launch on q's device and its current stream, the device being torch's current one: the
    kernels' own copy of the CUDA runtime follows torch's and restores nothing."""
    device = q.device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch(q, kernel, *operands, **options)
    stream = torch.cuda.current_stream(device).cuda_stream
    kernel(*operands, device=device.index, stream=stream, **options)
