"""Operands as the parameters of the C++ and CUDA kernels (csrc/params.h): addresses and strides.

`kernels` is the module that takes them: rope_fused._cpu or rope_fused._cuda. Tensors made on the
way are returned beside the parameters that point into them, to be held until the call returns."""

from __future__ import annotations

import torch

from .composite import bshd

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def compute_type(weight, like):
    if weight is None:
        return None
    return weight.to(torch.float64 if like.dtype == torch.float64 else torch.float32).contiguous()


def make_rows(kernels, x, y, norm, layout, *, token_scaled):
    """q or k, and where it goes; `norm` is a weight of the compute type or None."""
    x_view, y_view = bshd(x, layout), bshd(y, layout)
    return kernels.Rows(
        x=x.data_ptr(),
        x_stride=x_view.stride(),
        y=y.data_ptr(),
        y_stride=y_view.stride(),
        heads=x_view.shape[2],
        norm=0 if norm is None else norm.data_ptr(),
        token_scaled=token_scaled,
    )


def make_rows_backward(kernels, grad, x, to, norm, layout, *, token_scaled, norm_grad=0):
    """The gradient of q or k and where it goes, x having been the input of the forward."""
    return kernels.RowsBackward(
        grad=make_rows(kernels, grad, to, norm, layout, token_scaled=token_scaled),
        x=x.data_ptr(),
        x_stride=bshd(x, layout).stride(),
        norm_grad=norm_grad,
    )


def make_rotation(kernels, q, rotation, threads=1):
    """What q and k share, and the tensors its addresses point into."""
    batch, seqlen, _, head_dim = bshd(q, rotation.layout).shape
    inv_freq, turns, scale = (
        rotation.inv_freq.contiguous(),
        rotation.turns.contiguous(),
        rotation.scale.contiguous(),
    )
    positions, index, axis_map = rotation.positions, rotation.table_index, rotation.axis_map
    if positions is not None:
        if positions.dtype not in (torch.int32, torch.int64):
            positions = positions.to(torch.int64)
        positions = (
            positions.expand(-1, batch, -1)
            if positions.dim() == 3
            else positions.expand(1, batch, -1)
        )
    index = None if index is None else index.to(torch.int32).expand(batch, -1)
    axis_map = None if axis_map is None else axis_map.to(torch.int32).contiguous()
    token_scale = compute_type(rotation.token_scale, q)
    token_scale = None if token_scale is None else token_scale.expand(batch, -1)
    held = (inv_freq, turns, scale, positions, index, axis_map, token_scale)
    shared = kernels.Rotation(
        dtype=DTYPES[q.dtype],
        shape=(batch, seqlen, head_dim),
        offset=rotation.rotary_offset,
        interleaved=rotation.interleaved,
        conjugate=rotation.conjugate,
        tables=tuple(turns.shape),
        inv_freq=inv_freq.data_ptr(),
        turns=turns.data_ptr(),
        scale=scale.data_ptr(),
        table_index=0 if index is None else index.data_ptr(),
        table_index_stride=(0, 0) if index is None else index.stride(),
        positions=0 if positions is None else positions.data_ptr(),
        positions_int64=positions is not None and positions.dtype == torch.int64,
        position_stride=(0, 0, 0) if positions is None else positions.stride(),
        axis_map=0 if axis_map is None else axis_map.data_ptr(),
        token_scale=0 if token_scale is None else token_scale.data_ptr(),
        token_scale_stride=(0, 0) if token_scale is None else token_scale.stride(),
        norm_eps=rotation.norm_eps,
        norm_all=rotation.norm_all,
        threads=threads,
    )
    return shared, held


def make_table_rotation(
    kernels, q, cos, sin, interleaved, rotary_offset, transpose, layout, threads=1
):
    """The shared operands of a rotation by given tables, which stay as they are."""
    batch, seqlen, _, head_dim = bshd(q, layout).shape
    cos, sin = (t.expand(batch, -1, -1) for t in (cos, sin))
    return kernels.TableRotation(
        dtype=DTYPES[q.dtype],
        shape=(batch, seqlen, head_dim),
        pairs=cos.shape[-1] // 2,
        offset=rotary_offset,
        interleaved=interleaved,
        transpose=transpose,
        cos=cos.data_ptr(),
        cos_stride=cos.stride(),
        sin=sin.data_ptr(),
        sin_stride=sin.stride(),
        threads=threads,
    )
