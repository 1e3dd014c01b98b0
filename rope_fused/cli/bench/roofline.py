"""The cost model: bytes, flops and launches of each op from its shapes, and the time they take.

A kernel takes as long as its bytes at the memory's speed or its flops at the units' speed,
whichever is longer, and never less than a launch. That bounds what any implementation of the same
kernels can do, so a ratio of two costs bounds what fusing them can win.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...report import columns
from .shapes import MODELS, Model

# What large copies and products of random numbers reach of the figures on the data sheets. On an
# H200: 4.3 of 4.8 TB/s and 790 of 989 Tflop/s.
OF_BANDWIDTH = 0.90
OF_FLOPS = 0.80
LAUNCH_SECONDS = 2e-6  # the shortest kernel in a CUDA graph, an assumption; matters when decoding


class GPU(NamedTuple):
    """Figures of the maker's data sheet: bytes/s, dense flop/s of bfloat16 and of float32."""

    name: str
    bandwidth: float
    bfloat16: float
    float32: float
    source: str

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """How long the kernels of ``cost`` take, one after the other."""
        peak = self.float32 if dtype == torch.float32 else self.bfloat16
        return sum(
            max(
                LAUNCH_SECONDS,
                kernel.bytes / (OF_BANDWIDTH * self.bandwidth),
                kernel.flops / (OF_FLOPS * peak),
            )
            for kernel in cost
        )


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 2.039e12, 312e12, 19.5e12, "A100 80 GB SXM data sheet, nvidia.com/a100"),
        GPU("H100", 3.35e12, 989e12, 67e12, "H100 SXM data sheet, nvidia.com/h100"),
        GPU("H200", 4.8e12, 989e12, 67e12, "H200 SXM data sheet, nvidia.com/h200"),
        GPU("B200", 8.0e12, 2250e12, 80e12, "HGX B200 data sheet, nvidia.com/hgx"),
    )
}


def gpu_named(text: str) -> GPU | None:
    """The GPU whose name a device's name has in it."""
    return next((gpu for name, gpu in GPUS.items() if name in (text or "")), None)


class Kernel(NamedTuple):
    bytes: float
    flops: float = 0.0


Cost = tuple[Kernel, ...]


def total(cost: Cost) -> Kernel:
    """Bytes and flops of all kernels."""
    return Kernel(sum(k.bytes for k in cost), sum(k.flops for k in cost))


def copy(elements, size) -> Kernel:
    return Kernel(2 * elements * size)


def rotate(elements, size) -> Kernel:
    """One pass: every element read and written once; six flops for a pair."""
    return Kernel(2 * elements * size, 3 * elements)


def eager_rotate(elements, size) -> Cost:
    """x * cos, -x2, cat, * sin, +: five kernels, five passes' worth of bytes."""
    passes = (2, 1, 2, 2, 3)
    return tuple(Kernel(n * elements * size, elements) for n in passes)


def eager_norm(elements, size) -> Cost:
    """RMSNorm in float32: cast, square, mean, scale, cast back, times the weight."""
    widths = (size + 4, 8, 4, 8, 4 + size, 2 * size)
    return tuple(Kernel(width * elements, elements) for width in widths)


def product(tokens, inner, outer, size) -> Kernel:
    """[tokens, inner] times [inner, outer]."""
    touched = tokens * inner + inner * outer + tokens * outer
    return Kernel(touched * size, 2 * tokens * inner * outer)


def rotation_costs(
    model: Model, tokens: int, size: int, *, norm=False, passes=1
) -> dict[str, Cost]:
    """{variant: Cost} of rotating q and k; ``passes=2``: forward and backward."""
    q, k = (tokens * heads * model.head_dim for heads in (model.heads, model.kv_heads))
    one, two = (rotate(q + k, size),), (rotate(q, size), rotate(k, size))
    costs = {
        "rope_fused": one,
        "rope_fused-autograd": one,
        "rope_fused-hf": one,
        "rope_fused-triton": one,
        "rope_fused-cuda": one,
        "clone": (copy(q, size), copy(k, size)),
        "copy": (copy(q, size), copy(k, size)),
        "hf-compile": two,
        "hf-compile-max-autotune": two,
        "liger": one,
        "flash-attn": two,
        "transformer-engine": two,
    }
    costs = {name: cost * passes for name, cost in costs.items()}
    if passes == 1:
        norms = eager_norm(q, size) + eager_norm(k, size) if norm else ()
        costs["hf-eager"] = norms + eager_rotate(q, size) + eager_rotate(k, size)
    return costs


def projection_costs(model: Model, tokens: int, size: int, *, norm=None) -> dict[str, Cost]:
    """{variant: Cost} of projecting to q, k and v and rotating q and k, forward."""
    width, rows = model.d_model, model.rows
    linear = (product(tokens, width, sum(rows), size),)
    three = tuple(product(tokens, width, r, size) for r in rows)
    q, k = (tokens * r for r in rows[:2])
    norm = model.norm if norm is None else norm
    norms = eager_norm(q, size) + eager_norm(k, size) if norm else ()
    return {
        "linear": linear,
        "linear-three": three,
        "rope_fused": linear,
        "rope_fused-packed": linear,
        "linear+rotate": (*linear, rotate(q + k, size)),
        "hf-eager": (*three, *norms, *eager_rotate(q, size), *eager_rotate(k, size)),
    }


def projection_step_costs(model: Model, tokens: int, size: int, *, forward=True) -> dict[str, Cost]:
    """{variant: Cost} of the backward of the projection, with the forward unless told otherwise."""
    width, rows = model.d_model, sum(model.rows)
    gradients = (product(tokens, rows, width, size), product(rows, tokens, width, size))
    turned = rotate(tokens * sum(model.rows[:2]), size)
    before = projection_costs(model, tokens, size)["linear"] if forward else ()
    return {
        "linear": before + gradients,
        "rope_fused": (*before, turned, *gradients),
        "rope_fused-packed": (*before, turned, *gradients),
    }


def table(gpus=tuple(GPUS), models=None, tokens=(1, 16384)) -> str:
    """Where fusing the rotation into the projection can win on each GPU, and how much at most."""
    models = [m for m in (models or MODELS.values()) if m.d_model is not None and not m.lengths]
    parts = []
    for gpu in (GPUS[name] for name in gpus):
        heading = (
            "tokens",
            "product",
            "+ rotation",
            "launches",
            "fused wins",
            "eager / fused",
            "break-even",
        )
        rows = [("model", *heading)]
        for count in tokens:
            for model in models:
                rows.append(_row(gpu, model, count))
        parts.append(
            f"{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.bfloat16 / 1e12:.0f} Tflop/s "
            f"bfloat16 ({gpu.source})\n{columns(rows, '<>')}"
        )
    note = (
        f"Predicted, not measured: {OF_BANDWIDTH:.0%} of the bandwidth and {OF_FLOPS:.0%} of the "
        f"flop/s, at least {LAUNCH_SECONDS * 1e6:.0f} us per kernel.\n"
        "fused wins: over the product and the best separate pass in place, at most. eager / fused: "
        "over transformers' eager code, at most.\n"
        "break-even: what share of cuBLAS's speed the fused product has to reach to win at all."
    )
    return "\n\n".join([*parts, note])


def _row(gpu, model, tokens):
    costs = projection_costs(model, tokens, 2)
    names = ("linear", "linear+rotate", "hf-eager")
    product, separate, eager = (gpu.seconds(costs[name], torch.bfloat16) for name in names)
    launches = "/".join(str(len(costs[name])) for name in names)
    return (
        str(model),
        f"{tokens:,}",
        f"{product * 1e6:.1f} us",
        f"{(separate - product) * 1e6:.1f} us",
        launches,
        f"{separate / product - 1:.1%}",
        f"{eager / product:.2f} x",
        f"{product / separate:.1%}",
    )
