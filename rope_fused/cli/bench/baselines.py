"""What the benchmarks compare with: other people's rotary embeddings behind one interface.

Tables of cos and sin are made before anything is timed, as a model makes them once for all layers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ... import RopeSpec
from .harness import Missing

# Roundings of the eager formula to the dtype of q: the table, the products, the sum.
ROTARY_ROUNDINGS = 3


@dataclass(frozen=True)
class Problem:
    """What is to be rotated: q and k of this layout and dtype, on the device of ``positions``
    [1 | batch, seqlen]. ``packed``: the tokens belong to several sequences. ``derivative``: the
    gradients are wanted."""

    spec: RopeSpec
    positions: torch.Tensor
    dtype: torch.dtype
    layout: str = "bhsd"
    packed: bool = False
    derivative: bool = False

    @property
    def device(self) -> str:
        return self.positions.device.type

    @property
    def heads_dim(self) -> int:
        return 1 if self.layout == "bhsd" else 2

    def cos_sin(self, dtype=None):
        """(cos, sin) [1 | batch, seqlen, rotary_dim / 2] with transformers' float32 angles and the
        attention factor; LongRoPE's table is chosen for each sequence, to its favour."""
        parts = []
        for row in self.positions:
            factor = self.spec.attention_factor_at(int(row.max()) + 1)
            cos_sin = self.spec.cos_sin(row[None], torch.float32, "hf")
            parts.append([(t * factor).to(dtype or self.dtype) for t in cos_sin])
        return tuple(torch.cat(tables) for tables in zip(*parts, strict=True))

    def wide(self):
        """The tables with an entry per dimension, [1 | batch, seqlen, rotary_dim]."""
        if self.spec.interleaved:
            return tuple(t.repeat_interleave(2, -1) for t in self.cos_sin())
        return tuple(torch.cat((t, t), -1) for t in self.cos_sin())

    def table_error(self, at) -> float:
        """How far transformers' float32 tables are from exact ones at the tokens ``at``: float32
        angles lose digits with growing positions."""
        some = Problem(self.spec, self.positions[:, at], torch.float32)
        factor = self.spec.attention_factor
        exact = self.spec.cos_sin(some.positions, torch.float64)
        off = (t.double() / factor - e for t, e in zip(some.cos_sin(), exact, strict=True))
        return torch.hypot(*off).max().item()


class Rotary(NamedTuple):
    """One implementation.

    name      as results call it
    obstacle  why it cannot do a Problem here, or ""
    bind      Problem -> ((q, k) -> (q2, k2)), in the problem's layout
    in_place  whether q and k are overwritten
    """

    name: str
    obstacle: Callable[[Problem], str]
    bind: Callable[[Problem], Callable]
    in_place: bool = False


def quiet() -> None:
    """No advice and no progress bars from transformers, where it is installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported
    if importlib.util.find_spec("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def _lacks(package: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def missing(package: str) -> Missing | None:
    """The Missing of a package that is not installed."""
    return Missing(_lacks(package)) if _lacks(package) else None


def _first(*reasons) -> str:
    """The first reason that holds: (whether, text) pairs, or texts that may be empty."""
    for reason in reasons:
        if isinstance(reason, str) and reason:
            return reason
        if isinstance(reason, tuple) and reason[0]:
            return reason[1]
    return ""


def _only_plain(problem) -> tuple:
    """What kernels for a whole, unscaled, half-split head ask for."""
    spec = problem.spec
    return (
        (problem.device != "cuda", "runs on a GPU only"),
        (spec.interleaved, "knows half-split pairs only"),
        (spec.rotary_dim != spec.head_dim, "rotates whole heads only"),
        (problem.packed, "takes no packed sequences"),
    )


def _overwrites(problem) -> tuple[bool, str]:
    scaled = problem.spec.attention_factor != 1
    return scaled, "rotates in place: every repetition would apply the attention factor again"


# -- transformers ------------------------------------------------------------------------------


def transformers_rotary(spec, heads_dim: int):
    """transformers' function of (q, k, cos, sin) for the pairing and the width of the spec."""
    if spec.interleaved:
        from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb
    else:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    width = spec.rotary_dim

    def rotate(q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=heads_dim)

    def rotate_part(q, k, cos, sin):
        # As the attention of Phi, GPT-NeoX and others has it.
        q2, k2 = rotate(q[..., :width], k[..., :width], cos, sin)
        return torch.cat((q2, q[..., width:]), -1), torch.cat((k2, k[..., width:]), -1)

    return rotate if width == spec.head_dim else rotate_part


def rms_norm(weight, eps: float):
    """transformers' RMSNorm of a head, holding `weight`."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(weight.shape[0], eps=eps).to(weight)
    with torch.no_grad():
        norm.weight.copy_(weight)
    return norm


def keeping_buffers():
    """A context for the first call of a compiled function whose backward will run many times: its
    saved tensors must not become scratch memory."""
    from torch._functorch import config

    return config.patch(donated_buffer=False)


def compiled(function, mode=None):
    """`function` compiled for the shapes it will be called with, and only for those."""
    # What was compiled for earlier cases must not count against the limit of recompilations.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, mode=mode)


def _bind_hf(problem, modify=lambda function: function):
    rotate = modify(transformers_rotary(problem.spec, problem.heads_dim))
    cos, sin = problem.wide()
    return lambda q, k: rotate(q, k, cos, sin)


# -- others ------------------------------------------------------------------------------------


def _bind_liger(problem):
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    cos, sin = problem.wide()
    if problem.layout == "bhsd":
        return lambda q, k: liger_rotary_pos_emb(q, k, cos, sin)

    def call(q, k):
        rotated = liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(t.transpose(1, 2) for t in rotated)

    return call


def _bind_flash(problem):
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = (t[0] for t in problem.cos_sin())
    interleaved = problem.spec.interleaved

    def one(x):
        x = x.transpose(1, 2) if problem.layout == "bhsd" else x
        y = apply_rotary_emb(x, cos, sin, interleaved)
        return y.transpose(1, 2) if problem.layout == "bhsd" else y

    return lambda q, k: (one(q), one(k))


def _bind_torch_onnx(problem):
    from torch.onnx.ops import rotary_embedding

    cos, sin = problem.cos_sin()
    spec = problem.spec
    options = {"interleaved": spec.interleaved}
    if spec.rotary_dim != spec.head_dim:
        options["rotary_embedding_dim"] = spec.rotary_dim

    def one(x):
        x = x if problem.layout == "bhsd" else x.transpose(1, 2)
        rows = (x.shape[0], -1, -1)
        y = rotary_embedding(x, cos.expand(rows), sin.expand(rows), **options)
        return y if problem.layout == "bhsd" else y.transpose(1, 2)

    return lambda q, k: (one(q), one(k))


def _bind_transformer_engine(problem):
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    # It takes angles and makes cos and sin of them in every call.
    frequencies = problem.spec.inv_freq("hf").to(problem.positions.device)
    angles = problem.positions[0].float()[:, None] * frequencies
    interleaved = problem.spec.interleaved
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    angles = angles[:, None, None]
    options = {"tensor_format": "bshd", "interleaved": interleaved, "fused": True}

    def one(x):
        x = x.transpose(1, 2) if problem.layout == "bhsd" else x
        y = apply_rotary_pos_emb(x, angles, **options)
        return y.transpose(1, 2) if problem.layout == "bhsd" else y

    return lambda q, k: (one(q), one(k))


def _bind_unsloth(problem):
    from unsloth.kernels.rope_embedding import fast_rope_embedding

    cos, sin = (t[0] for t in problem.wide())
    if problem.layout == "bhsd":
        return lambda q, k: fast_rope_embedding(q, k, cos, sin)

    def call(q, k):
        rotated = fast_rope_embedding(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(t.transpose(1, 2) for t in rotated)

    return call


def _one_row(problem):
    return problem.positions.shape[0] > 1, "takes one table for the whole batch"


def rotaries(modes, asked=()) -> list[Rotary]:
    """Every implementation there is, installed or not.

    modes: {name: mode of torch.compile}. asked: names the user gave; some run only then.
    """

    def hf(problem):
        return _lacks("transformers")

    def liger(problem):
        return _first(_lacks("liger_kernel"), *_only_plain(problem), _overwrites(problem))

    def flash(problem):
        return _first(
            (problem.device != "cuda", "runs on a GPU only"),
            _lacks("flash_attn"),
            _one_row(problem),
        )

    def torch_onnx(problem):
        return _first(
            "" if hasattr(torch.onnx, "ops") else "torch.onnx.ops is not in this version",
            (problem.derivative, "has no derivative"),
        )

    def transformer_engine(problem):
        return _first(
            (problem.device != "cuda", "runs on a GPU only"),
            _lacks("transformer_engine"),
            (problem.spec.attention_factor != 1, "knows no attention factor"),
            _one_row(problem),
        )

    def unsloth(problem):
        return _first(
            _lacks("unsloth"),
            ("unsloth" not in asked, "changes transformers when imported: ask for it by --impls"),
            *_only_plain(problem),
            _one_row(problem),
            _overwrites(problem),
        )

    return [
        Rotary("hf-eager", hf, _bind_hf),
        *(
            Rotary(name, hf, functools.partial(_bind_hf, modify=lambda f, m=mode: compiled(f, m)))
            for name, mode in modes.items()
        ),
        Rotary("torch-onnx", torch_onnx, _bind_torch_onnx),
        Rotary("liger", liger, _bind_liger, in_place=True),
        Rotary("flash-attn", flash, _bind_flash),
        Rotary("transformer-engine", transformer_engine, _bind_transformer_engine),
        Rotary("unsloth", unsloth, _bind_unsloth, in_place=True),
    ]
