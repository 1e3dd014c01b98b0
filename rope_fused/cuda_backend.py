"""From tensors to launches: runs the CUDA kernels of rope_fused._cuda.

The counterpart of native.py, with the same entries. Nothing here reads a tensor's values, so
nothing waits for the device. A tensor that is freed while a kernel still reads it stays intact
until its stream gets there: what takes its memory next is work of the same stream."""

from __future__ import annotations

import functools
import math

import torch

from . import _cuda
from .composite import bshd, gradient_memory
from .linear import linear_into
from .parameters import (
    compute_type,
    make_rotation,
    make_rows,
    make_rows_backward,
    make_table_rotation,
)

MAX_PAIRS = _cuda.max_pairs
ARCHITECTURES = _cuda.architectures

# Of a backward with reductions. The sums of a tile of tokens stay in the L2 cache.
_WORKSPACE = 1 << 22  # numbers: 16 MiB in float32
_TILE = 2048  # tokens, at least: enough to fill the device
_CHUNKS = 128  # most partial sums
_CHUNK = 32  # tokens in one of them, at least


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


def rotate_backward(dq, dk, dv, q, k, rotation, packed):
    """Kernel of ops.rotate_backward."""
    _check_head(dq)
    first, second, (out_q, out_k) = gradient_memory(dq, dk, dv, packed)
    if q is None:
        back = rotation._replace(conjugate=not rotation.conjugate)
        rotate(dq, dk, back, out=(out_q, out_k))
        return first, second, *(dq.new_empty(0, dtype=torch.float64) for _ in range(5))

    rows, norms = [], []
    for g, x, to, weight in (
        (dq, q, out_q, rotation.q_norm),
        (dk, k, out_k, rotation.k_norm),
    ):
        if g is not None:
            norms.append(compute_type(weight, g))
            rows.append(
                make_rows_backward(
                    _cuda, g, x, to, norms[-1], rotation.layout, token_scaled=g is dq
                )
            )
    # Chunks by size alone, so that the sums have the same bits on every device.
    tokens = math.prod(bshd(dq, rotation.layout).shape[:2])
    shapes = [rotation.scale.shape] * 2
    shapes += [(0,) if w is None else w.shape for w in (rotation.q_norm, rotation.k_norm)]
    sizes = [math.prod(shape) for shape in shapes]
    width = 2 * rotation.pairs + sizes[2] + sizes[3]
    tile = max(1, min(tokens, max(_TILE, _WORKSPACE // width)))
    chunks = max(1, min(_CHUNKS, tile // _CHUNK))
    wide = torch.float64 if dq.dtype == torch.float64 else torch.float32
    per_token = dq.new_empty((tile, width), dtype=wide)
    partial = dq.new_zeros((chunks, sum(sizes)), dtype=torch.float64)
    token_sums = dq.new_zeros(bshd(dq, rotation.layout).shape[:2], dtype=torch.float64)
    if dq.numel():
        shared, held = make_rotation(_cuda, dq, rotation)
        _launch(
            dq,
            _cuda.rotate_backward,
            shared,
            rows,
            per_token=per_token.data_ptr(),
            tile=tile,
            partial=partial.data_ptr(),
            chunks=chunks,
            token_scale=token_sums.data_ptr(),
        )
        del held
    sums = torch.split_with_sizes_copy(partial.sum(0), sizes)
    inv_freq, scale, *norm_grads = (t.view(n) for t, n in zip(sums, shapes, strict=True))
    return first, second, *norm_grads, inv_freq, scale, token_sums


def rotate_tables(q, k, cos, sin, interleaved, rotary_offset, transpose, layout, out=None):
    """Kernel of ops.rotate_tables."""
    _check_head(q)
    outs = out or (torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k))
    rows = [make_rows(_cuda, q, outs[0], None, layout, token_scaled=False)]
    if k is not None:
        rows.append(make_rows(_cuda, k, outs[1], None, layout, token_scaled=False))
    if q.numel() or (k is not None and k.numel()):
        shared = make_table_rotation(
            _cuda, q, cos, sin, interleaved, rotary_offset, transpose, layout
        )
        _launch(q, _cuda.rotate_tables, shared, rows)
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
        linear_into(x, weights, biases, (zq, zk, v))
        rotate(zq, zk, rotation, out=(q, k))
    return (q, k, v, zq, zk) if keep else (q, k, v, x.new_empty(0), x.new_empty(0))


def project_fused(x, weights, biases, outputs, head_dim, rotation, always=False) -> bool:
    """Project, norm and rotate in one launch on sm_90, into outputs (q, k, v | None, zq | None,
    zk | None).

    False, with nothing done, where that is slower (unless `always`) or impossible: other dtypes
    than bfloat16 and float16, other head dims than _cuda.projected_head_dims, a norm over all
    heads, a rotated slice that leaves dimensions on both sides or not in eights, and tensors whose
    rows are not at equal distances of a multiple of 16 bytes.
    """
    possible = takes(x.dtype, head_dim, rotation) and 0 < x.numel() < 2**31 * x.shape[-1]
    if not possible or _gpu(x.device) is None:
        return False
    if not always and not _pays(x, weights, head_dim, rotation):
        return False
    kept = (*outputs[3:], None)
    steps = [_row_step(t, 1) for t in (x, *weights)]
    steps += [_row_step(t, 2) for t in (*outputs[:3], *kept)]
    if None in steps:
        return False
    shared, held = make_rotation(_cuda, outputs[0], rotation)
    biases = [None if b is None else b.contiguous() for b in biases]
    norms = [compute_type(rotation.q_norm, x), compute_type(rotation.k_norm, x), None]
    rows = [
        _cuda.ProjectedRows(
            weight=_address(weights[n]),
            weight_step=steps[1 + n],
            bias=_address(biases[n]),
            norm=_address(norms[n]),
            y=_address(outputs[n]),
            y_step=steps[4 + n],
            kept=_address(kept[n]),
            kept_step=steps[7 + n],
            heads=0 if weights[n] is None else weights[n].shape[0] // head_dim,
        )
        for n in range(3)
    ]
    tokens, d_model = x.numel() // x.shape[-1], x.shape[-1]
    _launch(
        x, _cuda.project, shared, rows,
        x=x.data_ptr(), x_step=steps[0], tokens=tokens, d_model=d_model,
    )  # fmt: skip
    del held
    return True


def takes(dtype, head_dim, rotation) -> bool:
    """Whether the fused kernel is made for these, whatever the tensors."""
    pairs, offset = rotation.pairs, rotation.rotary_offset
    return (
        dtype in (torch.bfloat16, torch.float16)
        and head_dim in _cuda.projected_head_dims
        and not rotation.norm_all
        and (2 * pairs == head_dim or pairs % 4 == 0)
        and offset in (0, head_dim - 2 * pairs)
    )


def _pays(x, weights, head_dim, rotation) -> bool:
    from .triton_kernels import configs  # where the measurements are; it needs no Triton

    problem = configs.problem_of(x, weights, head_dim, rotation)
    return configs.hopper_pays(_gpu(x.device), problem)


@functools.cache
def _gpu(device) -> str | None:
    """The name of a GPU that the fused projection runs on."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name if (properties.major, properties.minor) == (9, 0) else None


def _row_step(t, inner) -> int | None:
    """How far apart the rows of a tensor are, its last `inner` dimensions being one of them, in
    elements; None if not equally far, or not as the TMA unit needs them."""
    if t is None:
        return 0
    length = math.prod(t.shape[-inner:])
    try:
        rows = t.detach().view(-1, length)
    except RuntimeError:
        return None
    step = rows.stride(0) if rows.shape[0] > 1 else -(-length // 8) * 8
    good = step >= length and step % 8 == 0 and t.data_ptr() % 16 == 0
    return step if good and (length == 1 or rows.stride(1) == 1) else None


def _address(t):
    return 0 if t is None else t.data_ptr()


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
