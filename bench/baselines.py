"""What the benchmarks compare with: transformers' rotary embedding, as it is and compiled."""

from __future__ import annotations

import functools
import importlib.util

import torch

from .harness import Missing

# YaRN x4 and its attention factor: as much work as the default, and more to get wrong.
ROPE = {
    "rope_theta": 500000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
}
# Roundings of the eager formula to the dtype of q: the table, the products, the sum.
ROTARY_ROUNDINGS = 3


def missing(package: str) -> Missing | None:
    return None if importlib.util.find_spec(package) else Missing(f"{package} is not installed")


@functools.cache
def _rotary_embedding(rotary_dim: int):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=rotary_dim,
        num_attention_heads=1,
        head_dim=rotary_dim,
        max_position_embeddings=int(ROPE["factor"] * ROPE["original_max_position_embeddings"]),
        rope_parameters={"rope_type": "yarn", **ROPE},
    )
    return LlamaRotaryEmbedding(config)


def tables(spec, positions, dtype):
    """(cos, sin) [1, seqlen, rotary_dim] as transformers makes them once per step: never timed."""
    like = torch.empty(0, dtype=dtype)
    cos, sin = _rotary_embedding(spec.rotary_dim)(like, positions[None])
    if spec.interleaved:
        cos, sin = (t[..., : spec.rotary_dim // 2].repeat_interleave(2, -1) for t in (cos, sin))
    return cos, sin


def table_error(spec, positions) -> float:
    """How far transformers' float32 tables are from exact ones: float32 angles lose digits with
    growing positions."""
    pairs = slice(0, None, 2) if spec.interleaved else slice(0, spec.rotary_dim // 2)
    cos, sin = (t[0, :, pairs].double() for t in tables(spec, positions, torch.float32))
    angle = positions.double()[:, None] * spec.inv_freq()
    cos, sin = cos / spec.attention_factor - angle.cos(), sin / spec.attention_factor - angle.sin()
    return torch.hypot(cos, sin).max().item()


def rotary(spec, unsqueeze_dim: int):
    """transformers' function of (q, k, cos, sin) for the pairing and the width of the spec."""
    if spec.interleaved:
        from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb
    else:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    width = spec.rotary_dim

    def rotate(q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    def rotate_part(q, k, cos, sin):
        # As the attention of Phi, GPT-NeoX and others has it.
        q2, k2 = rotate(q[..., :width], k[..., :width], cos, sin)
        return torch.cat((q2, q[..., width:]), -1), torch.cat((k2, k[..., width:]), -1)

    return rotate if width == spec.head_dim else rotate_part


def rms_norm(weight, eps: float):
    """transformers' RMSNorm of a head, holding `weight`."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = Qwen3RMSNorm(weight.shape[0], eps=eps).to(weight.dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
    return norm


def compiled(function):
    """`function` compiled for the shapes it will be called with, and only for those."""
    # What was compiled for earlier cases must not count against the limit of recompilations.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
