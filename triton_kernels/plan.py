"""From the tensors of a projection to one launch of the fused kernel, or to none.

Looks at shapes, strides and alignment alone, so nothing waits for the device."""

from __future__ import annotations

import functools
import math
import operator
from typing import NamedTuple

import torch
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, launch
from .epilogue import View
from .launch import INTERPRETED, Launch
from .projection import project_kernel
from .rows import Dims


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
    """One launch."""

    launch: Launch
    tile: configs.Tile
    precision: str  # of products: "ieee" or "tf32"
    # What makes a descriptor of x, of each weight and output, but for its address; none: pointers.
    descriptors: tuple[dict | None, ...]

    def run(self, tensors, rest):
        """Launch on (x, the weights, the outputs) and the other tensors of the kernel."""
        device, descriptors = tensors[0].device, ()
        if self.descriptors:
            pairs = zip(tensors, self.descriptors, strict=True)
            descriptors = [t if t is None else _descriptor(t, made) for t, made in pairs]
            tensors = ()
        self.launch(device, (*tensors, *rest), descriptors)


def plan_projection(x, weights, biases, outputs, head_dim, rotation, tile=None) -> Plan | None:
    """How to run the fused kernel; None where something else is faster, or where it cannot: with
    float64, a norm over all heads, a head or slice that makes no tile, strided d_model.

    outputs: (q, k, v, z_q, z_k), of which v and both z may be None. tile: the configs.Tile to use,
    whatever was measured.
    """
    problem = configs.problem_of(x, weights, head_dim, rotation)
    options = launch.options_of(rotation)
    head = configs.head_view(
        head_dim, 2 * rotation.pairs, rotation.rotary_offset, rotation.interleaved
    )
    if problem is None or head is None or rotation.norm_all:
        return None
    device = device_of(x.device)
    measured = tile is None and not INTERPRETED
    if measured:
        tile = configs.choose(device.name, device.arch, problem, head)
    elif tile is None:  # nothing is faster in an interpreter: the largest tile, in one go
        tile = configs.Tile(128, max(1, 256 // head.columns), 128, 4, 2, parts=1)
    if tile is None:
        return None
    tensors = (x, *weights, *outputs)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    aligned = functools.reduce(operator.or_, addresses) % 16 == 0
    forms = launch.forms((*tensors, *biases, *launch.shared_tensors(rotation)))
    return _plan(problem, head, device, tile, measured, aligned, forms, options)


@functools.lru_cache(maxsize=4096)
def _plan(problem, head, device, tile, measured, aligned, forms, options) -> Plan | None:
    x, *weights = inputs = [launch.form(f) for f in forms[:4]]
    outputs, shared = ([launch.form(f) for f in part] for part in (forms[4:9], forms[12:]))
    options = launch.Options(*options)
    if any(t.stride[-1] != 1 for t in inputs if t is not None):
        return None
    descriptors, wanted = (), tile.descriptors and device.arch >= 90
    if wanted and aligned:
        descriptors = _descriptors(x, weights, outputs, problem.head_dim, head, tile)
    if measured and wanted and not descriptors:
        return None  # it was chosen for what these tensors cannot have
    tile = tile._replace(descriptors=bool(descriptors))
    tiles = -(-problem.tokens // tile.rows) * sum(-(-n // tile.heads) for n in problem.heads)
    view = (tile.heads, *head, head.padded, tile.parts, tile.descriptors)
    dims = (problem.head_dim, problem.rotary_dim // 2, options.rotary_offset, options.interleaved)
    precision = "tf32" if problem.dtype == "tf32" else "ieee"
    made = Launch(
        project_kernel,
        min(tiles, device.processors * tile.programs),
        _row_steps(x, 1),
        tuple(0 if w is None else w.stride[0] for w in weights),
        *(_row_steps(y, 2) for y in outputs[:3]),
        *launch.shared_strides(shared),
        problem.tokens,
        x.shape[-2],
        shared[2].shape[0],
        problem.d_model,
        *problem.heads,
        Dims(*map(constexpr, dims)),
        View(*map(constexpr, view)),
        tile.rows,
        tile.depth,
        tile.stages,
        tile.band,
        precision,
        options.conjugate,
        options.norm_eps,
        enable_fp_fusion=True,
        num_warps=tile.warps,
    )
    return Plan(made, tile, precision, descriptors)


def _row_steps(form, inner):
    """Strides of batch and token, before `inner` further dimensions."""
    if form is None:
        return 0, 0
    stride = form.stride
    return (0 if len(stride) == inner + 1 else stride[0]), stride[-1 - inner]


def _descriptors(x, weights, outputs, head_dim, head, tile):
    """Plan.descriptors; none if one cannot be: rows must lie at equal distances (a batch of
    sequences too), and everything at multiples of 16 bytes."""
    unit = 16 // x.dtype.itemsize
    d_model, slabs, width = x.shape[-1], head.slabs, head.width
    columns = head.padded // tile.parts
    if width % unit or columns % unit or d_model < unit:
        return ()
    done = []
    for t, inner in ((x, 1), *((w, 1) for w in weights), *((y, 2) for y in outputs)):
        if t is None:
            done.append(None)
            continue
        row = _one_row_step(t, inner)
        if row is None or row % unit:
            return ()
        if inner == 2:
            heads = t.shape[-2]
            shape = [math.prod(t.shape[:-2]), heads, slabs, width]
            stride = [row, head_dim, width, 1]
            block = [tile.rows, tile.heads, slabs, columns]
        elif t is x:
            shape, stride = [math.prod(x.shape[:-1]), d_model], [row, 1]
            block = [tile.rows, tile.depth]
        else:
            shape = [t.shape[0] // head_dim, slabs, width, d_model]
            stride = [head_dim * row, width * row, row, 1]
            block = [tile.heads, slabs, head.padded, tile.depth]
        like = torch.empty(0, dtype=x.dtype)
        done.append(vars(TensorDescriptor(like, shape, stride, block)))
    return tuple(done)


def _descriptor(tensor, fields) -> TensorDescriptor:
    """A descriptor from what Plan.descriptors has of it, which was checked when that was made."""
    made = object.__new__(TensorDescriptor)
    vars(made).update(fields, base=tensor.detach())
    return made


def _one_row_step(form, inner):
    """The distance of consecutive rows, tokens after tokens, or None if they have no common one, or
    overlap."""
    batch, token = _row_steps(form, inner)
    shape = form.shape
    if len(shape) == inner + 2 and shape[0] > 1:
        if shape[-1 - inner] == 1:
            token = batch
        elif batch != shape[-1 - inner] * token:
            return None
    return token if token >= math.prod(shape[-inner:]) else None
