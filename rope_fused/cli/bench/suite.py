"""Which cases a run has: the curated ones, quick or all, or a grid of what the user names."""

from __future__ import annotations

import os

import torch

from ...report import UserError
from . import projection, rotation
from .harness import Case
from .model import TRAINED, Block, TrainingStep
from .projection import Projection
from .rotation import Rotation
from .shapes import MODELS

OPS = (*rotation.OPS, *projection.OPS, "block", "training-step")
# Every variant of some case: which there are is known only once its inputs are made.
IMPLS = (
    *("rope_fused", "rope_fused-autograd", "rope_fused-packed", "rope_fused-hf"),
    *("rope_fused-triton", "rope_fused-cuda", "rope_fused-compile"),
    *("rope_fused-compile-max-autotune", "clone", "copy", "linear", "linear-three"),
    *("linear+rotate", "hf-eager", "hf-compile", "hf-compile-max-autotune", "torch-onnx", "liger"),
    *("flash-attn", "transformer-engine", "unsloth"),
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SWEEP = tuple(512 << i for i in range(12))  # 512 to 1 048 576

_LLAMA, _SMALL, _TINY = (MODELS[n] for n in ("Llama-3-8B", "Llama-3.2-1B", "Qwen3-0.6B"))
_LARGE, _NORMED, _DECODE = (MODELS[n] for n in ("Llama-3-70B", "Qwen3-8B", "decode"))
_OTHERS = [MODELS[n] for n in ("Gemma-3-4B", "gpt-oss-20b", "DeepSeek-V3-rope")]
_VARIANTS = (
    {"layout": "bshd"},
    {"packed": True},
    {"partial": 0.5},
    {"interleaved": True},
    {"rope": "yarn"},
    {"rope": "longrope"},
    {"sequences": 8},
)


def quick(device) -> list[Case]:
    """What matters most: under three minutes on two cores."""
    if device == "cuda":
        return [case for case in everything(device) if case.seqlen in (1, 4096, 16384)][:16]
    return [
        *(Rotation(model=_LLAMA, seqlen=n) for n in (512, 4096, 16384)),
        Rotation(model=_LLAMA, op="unrotate"),
        Rotation(model=_LLAMA, interleaved=True),
        Rotation(model=_LLAMA, rope="longrope", seqlen=1024),
        Rotation(model=_NORMED, op="norm-rotate"),
        Rotation(model=_DECODE, seqlen=1),
        Projection(model=_SMALL, seqlen=512),
        Projection(model=_SMALL, seqlen=2048),
        Projection(model=_DECODE, seqlen=1),
        Block(model=_SMALL, seqlen=512),
    ]


def everything(device) -> list[Case]:
    """All cases for one kind of device, what matters most first."""
    cases = _on_gpu() if device == "cuda" else _on_cpu()
    return list(dict.fromkeys(cases))


def _on_cpu():
    bf16, fp32 = torch.bfloat16, torch.float32
    for op in ("rotate", "unrotate"):
        yield from (Rotation(model=_LLAMA, op=op, seqlen=n) for n in SWEEP)
    lengths = (512, 1024, 2048, 4096, 8192)
    yield from (Projection(model=_SMALL, seqlen=n) for n in lengths)
    yield TrainingStep()
    for model in (_LLAMA, _TINY):
        yield from (Projection(model=model, seqlen=n) for n in lengths)
    yield from (Block(model=model, seqlen=n) for model in (_SMALL, _TINY) for n in (512, 2048))
    for n in (512, 1024, 2048):
        yield Rotation(model=_LLAMA, seqlen=n, warm=True)
    yield from (Rotation(model=_LLAMA, **variant) for variant in _VARIANTS)
    for n in (512, 4096, 16384):
        yield Rotation(model=_LLAMA, op="rotate-forward-backward", seqlen=n)
        yield Rotation(model=_NORMED, op="norm-rotate", seqlen=n)
    for model in (_SMALL, _LARGE, _TINY, *_OTHERS):
        yield Rotation(model=model)
    yield Rotation(model=_DECODE, seqlen=1)
    yield Projection(model=_DECODE, seqlen=1)
    for model in (_SMALL, _LLAMA):
        yield Projection(model=model, seqlen=2048, norm=True)
        yield Projection(model=model, seqlen=2048, op="projection-backward")
        yield Projection(model=model, seqlen=2048, op="projection-forward-backward")
    yield Projection(model=_LARGE, seqlen=1024)
    for op in ("rotate", "unrotate"):
        yield from (Rotation(model=_LLAMA, op=op, seqlen=n, dtype=fp32) for n in SWEEP[:6])
    for model in (_SMALL, _LLAMA):
        yield Projection(model=model, seqlen=2048, dtype=fp32)
    yield Rotation(model=_LLAMA, interleaved=True, dtype=fp32)
    yield TrainingStep(dtype=bf16)


def _on_gpu():
    fp32, given = torch.float32, {"device": "cuda"}
    yield Rotation(model=_LLAMA, seqlen=16384, autotune=True, **given)
    yield Rotation(model=_LLAMA, op="unrotate", seqlen=16384, **given)
    for model in (_LLAMA, _SMALL):
        yield Projection(model=model, seqlen=16384, autotune=model is _LLAMA, **given)
    yield Projection(model=_TINY, seqlen=16384, norm=False, **given)
    yield from (Rotation(model=_LLAMA, seqlen=n, **given) for n in SWEEP if n != 16384)
    yield from (Projection(model=_LLAMA, seqlen=n, **given) for n in (1024, 4096, 65536))
    yield Projection(model=_LARGE, seqlen=16384, **given)
    yield Projection(model=_NORMED, seqlen=16384, **given)
    yield Projection(model=_TINY, seqlen=16384, **given)
    yield Projection(model=_DECODE, seqlen=1, **given)
    yield Rotation(model=_DECODE, seqlen=1, **given)
    yield Projection(model=_LLAMA, op="projection-forward-backward", seqlen=16384, **given)
    yield Projection(model=_LLAMA, op="projection-backward", seqlen=16384, **given)
    yield Rotation(model=_LLAMA, op="rotate-forward-backward", seqlen=16384, **given)
    yield Rotation(model=_NORMED, op="norm-rotate", seqlen=16384, **given)
    yield Block(model=_LLAMA, seqlen=4096, **given)
    yield TrainingStep(dtype=torch.bfloat16, seqlen=2048, batch=4, **given)
    yield from (Rotation(model=_LLAMA, op="unrotate", seqlen=n, **given) for n in (4096, 131072))
    yield from (Rotation(model=_LLAMA, seqlen=16384, **v, **given) for v in _VARIANTS)
    yield from (Rotation(model=m, seqlen=16384, **given) for m in (_SMALL, _LARGE, *_OTHERS))
    yield Rotation(model=_LLAMA, seqlen=16384, dtype=fp32, **given)
    yield Rotation(model=_LLAMA, op="unrotate", seqlen=16384, dtype=fp32, **given)


def grid(device, models, ops, dtypes, seqlens) -> list[Case]:
    """Every combination that has a meaning."""
    cases = []
    for op in ops:
        for model in [TRAINED] if op == "training-step" else models:
            for dtype in dtypes:
                for seqlen in model.lengths or seqlens:
                    given = {"model": model, "dtype": dtype, "seqlen": seqlen, "device": device}
                    if op in rotation.OPS:
                        cases.append(Rotation(op=op, **given))
                    elif op in projection.OPS and model.d_model is not None:
                        cases.append(Projection(op=op, **given))
                    elif op == "block" and model.d_model is not None and seqlen > 1:
                        cases.append(Block(**given))
                    elif op == "training-step":
                        cases.append(TrainingStep(**given))
    if not cases:
        raise UserError("--shapes, --ops and --seqlens leave nothing to measure")
    return cases


def memory(device) -> int:
    """The bytes that are free for measuring."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            kilobytes = dict(line.split(":") for line in file)["MemAvailable"]
        return int(kilobytes.split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
