"""A torchtitan override: its RoPE modules with exact angles, by this package's operators.

::

    torchtitan_train ... --override.imports rope_fused.compat.torchtitan.complex_rope
    torchtitan_train ... --override.imports rope_fused.compat.torchtitan.cos_sin_rope
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.config import derive, override
from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

from ..api import apply_rope
from ..spec import RopeSpec


def spec_of(config, *, interleaved) -> RopeSpec:
    """The RopeSpec of a ``RoPE.Config``: torchtitan puts YaRN's temperature into the softmax."""
    common = {"head_dim": config.dim, "rope_theta": config.theta, "interleaved": interleaved}
    if config.scaling == "llama":
        return RopeSpec.llama3(
            factor=config.scaling_factor,
            low_freq_factor=config.low_freq_factor,
            high_freq_factor=config.high_freq_factor,
            original_max_position_embeddings=config.original_max_position_embeddings,
            **common,
        )
    if config.scaling == "yarn" and config.rope_factor > 1.0:
        return RopeSpec.yarn(
            factor=config.rope_factor,
            beta_fast=config.beta_fast,
            beta_slow=config.beta_slow,
            original_max_position_embeddings=config.original_seq_len,
            truncate=config.truncate,
            attention_factor=1.0,
            **common,
        )
    return RopeSpec.default(**common)


class _Exact:
    """Rotates by the spec of the configuration; the cache of torchtitan is made but not read."""

    interleaved: bool

    def __init__(self, config):
        super().__init__(config)
        self.spec = spec_of(config, interleaved=self.interleaved)

    def forward(self, query, key, positions=None):
        if positions is None:
            positions = torch.arange(query.shape[1], device=query.device)
        return apply_rope(query, key, self.spec, positions)


class FusedComplexRoPE(_Exact, ComplexRoPE):
    """Adjacent pairs (Llama, DeepSeek)."""

    interleaved = True

    @dataclass(kw_only=True, slots=True)
    class Config(ComplexRoPE.Config):
        pass


class FusedCosSinRoPE(_Exact, CosSinRoPE):
    """Half-split pairs (Qwen3, gpt-oss)."""

    interleaved = False

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        pass


@override(target=ComplexRoPE.Config, exact=True, description="rope_fused: exact RoPE")
def complex_rope(config):
    return derive(config, FusedComplexRoPE.Config)


@override(target=CosSinRoPE.Config, exact=True, description="rope_fused: exact RoPE")
def cos_sin_rope(config):
    return derive(config, FusedCosSinRoPE.Config)
