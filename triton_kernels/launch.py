"""Launches that are prepared once: all of a kernel's operands but the tensors'."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from typing import NamedTuple

import torch
import triton
from triton.runtime import driver

from .rows import AngleStrides

# The interpreter keeps its state in global variables.
INTERPRETED = triton.knobs.runtime.interpret
_turn = threading.Lock() if INTERPRETED else contextlib.nullcontext()


class Launch:
    """A kernel on `programs` programs, with all operands that follow from the shapes, strides and
    dtypes of its tensors; `rest` are those operands, in the order of the kernel's parameters.

    Called with the tensors, which come before the rest: descriptors, then addresses or None. Triton
    looks at every operand of every launch to find what it has compiled for their kinds. Here only
    addresses change from call to call, so it looks once, and then the compiled kernel is launched
    as it is. It is compiled for addresses that are multiples of 16 bytes; a launch with others, or
    one that a profiler wants to see, goes through Triton.
    """

    def __init__(self, kernel, programs, *rest, **options):
        self.kernel, self.programs, self.rest, self.options = kernel, programs, rest, options
        self._compiled = {}  # by device

    def __call__(self, device, tensors, descriptors=()):
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(device, tensors, descriptors)
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        unaligned = functools.reduce(operator.or_, filter(None, addresses), 0) % 16
        compiled = self._compiled.get(device.index)
        if compiled is None or unaligned or _hooked():
            compiled = self.start(*descriptors, *tensors)
            if not (unaligned or INTERPRETED):
                self._compiled[device.index] = compiled
            return
        stream = driver.active.get_current_stream(device.index)
        compiled.run(
            self.programs,
            1,
            1,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *descriptors,
            *addresses,
            *self.rest,
        )

    def start(self, *tensors):
        """Launch through Triton, which compiles what it has not compiled yet."""
        with _turn:
            return self.kernel[(self.programs,)](*tensors, *self.rest, **self.options)


def _hooked():
    runtime = triton.knobs.runtime
    return runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls


# ------------------------------------------------------------------------- what a launch depends on


class Form(NamedTuple):
    """Of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def forms(tensors):
    """Forms as plain tuples: they are made for every launch, and most often only looked up."""
    return tuple([None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors])


def form(made):
    """The Form of what `forms` made."""
    return None if made is None else Form(*made)


def form_like(like):
    """The Form of torch.empty_like."""
    if like is None:
        return None
    x = torch.empty_strided(like.shape, like.stride, device="meta")
    return like._replace(stride=torch.empty_like(x).stride())


class Options(NamedTuple):
    """Of a rotation (ops.Rotation), beside its tensors."""

    norm_eps: float
    norm_all: bool
    rotary_offset: int
    interleaved: bool
    conjugate: bool
    layout: str


def options_of(rotation):
    """Options as a plain tuple."""
    return (
        rotation.norm_eps,
        rotation.norm_all,
        rotation.rotary_offset,
        rotation.interleaved,
        rotation.conjugate,
        rotation.layout,
    )


def shared_tensors(rotation):
    """The tensors of a rotation as the kernels take them: q_norm, k_norm, turns, scale, positions,
    table_index, axis_map, token_scale."""
    q_norm, k_norm, positions = rotation.q_norm, rotation.k_norm, rotation.positions
    axis_map = rotation.axis_map
    if positions is not None and positions.dtype not in (torch.int32, torch.int64):
        positions = positions.to(torch.int64)
    return (
        None if q_norm is None else q_norm.contiguous(),
        None if k_norm is None else k_norm.contiguous(),
        rotation.turns.contiguous(),
        rotation.scale.contiguous(),
        positions,
        rotation.table_index,
        None if axis_map is None else axis_map.contiguous(),
        rotation.token_scale,
    )


def shared_strides(shared):
    """(AngleStrides, strides of token_scale [batch, seqlen]) from the Forms of shared_tensors."""
    positions, table_index, _, token_scale = shared[4:]
    axis = positions.stride[0] if positions is not None and len(positions.shape) == 3 else 0
    of_positions, of_index, of_scale = map(_per_token, (positions, table_index, token_scale))
    return AngleStrides(axis, *of_positions, *of_index), of_scale


def _per_token(form):
    if form is None:
        return 0, 0
    return form.stride[-2] if form.shape[-2] > 1 else 0, form.stride[-1]
