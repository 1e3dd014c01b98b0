"""From the tensors of a projection to one launch of the fused kernel, or to none.

Looks at shapes, strides and alignment alone, so nothing waits for the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .epilogue import View
from .launch import INTERPRETED
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
    """One launch: the kernel's operands but for norms, tables and what belongs to them."""

    programs: int
    tile: configs.Tile
    tensors: tuple  # in the kernel's order, as all that follows
    strides: tuple
    sizes: tuple[int, ...]
    dims: Dims
    view: View
    precision: str  # of products: "ieee" or "tf32"


def plan_projection(x, weights, biases, outputs, head_dim, rotation, tile=None) -> Plan | None:
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
    measured = tile is None and not INTERPRETED
    if measured:
        tile = configs.choose(device.name, device.arch, problem, head)
    elif tile is None:  # nothing is faster in an interpreter: the largest tile, in one go
        tile = configs.Tile(128, max(1, 256 // head.columns), 128, 4, 2, parts=1)
    if tile is None:
        return None

    seqlen = x.shape[-2]
    tensors, described = (x, *weights, *outputs), None
    if tile.descriptors and device.arch >= 90:
        described = _described(x, weights, outputs, head_dim, head, tile)
        if described is None and measured:
            return None  # it was chosen for what these tensors cannot have
        tensors = described or tensors
    tile = tile._replace(descriptors=described is not None)
    tiles = -(-problem.tokens // tile.rows) * sum(-(-n // tile.heads) for n in problem.heads)
    view = (tile.heads, *head, head.padded, tile.parts, tile.descriptors)
    dims = (head_dim, rotation.pairs, rotation.rotary_offset, rotation.interleaved)
    return Plan(
        programs=min(tiles, device.processors * tile.programs),
        tile=tile,
        tensors=(*tensors, *(None if b is None else b.contiguous() for b in biases)),
        strides=(
            _row_steps(x, 1),
            tuple(0 if w is None else w.stride(0) for w in weights),
            *(_row_steps(y, 2) for y in outputs[:3]),
        ),
        sizes=(problem.tokens, seqlen, rotation.turns.shape[0], problem.d_model, *problem.heads),
        dims=Dims(*map(constexpr, dims)),
        view=View(*map(constexpr, view)),
        precision="tf32" if problem.dtype == "tf32" else "ieee",
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
