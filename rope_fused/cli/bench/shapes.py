"""Model shapes by name: heads, widths and rotary embedding of the layers that are measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ... import RopeSpec
from ...report import UserError

# A window stretched fourfold, and one stretched with factors that grow along the pairs.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096}


@dataclass(frozen=True)
class Model:
    """One layer's attention. ``d_model`` is None where only the rotation is of interest."""

    name: str
    d_model: int | None
    heads: int
    kv_heads: int
    head_dim: int
    rope: dict = field(hash=False, compare=False)
    norm: bool = False  # RMSNorm of each head of q and k
    lengths: tuple[int, ...] | None = None  # the only sequence lengths that make sense

    def spec(self, rope=None, **changes) -> RopeSpec:
        """Its RopeSpec, or that of another ``rope`` with the same base."""
        rope = {"rope_theta": self.rope["rope_theta"], **rope} if rope else self.rope
        options = {"rope_type": "default", "head_dim": self.head_dim, **rope, **changes}
        if options["rope_type"] == "longrope":
            pairs = int(self.head_dim * options.get("partial_rotary_factor", 1.0)) // 2
            options["short_factor"] = [1.0] * pairs
            options["long_factor"] = [1.0 + 31.0 * i / max(1, pairs - 1) for i in range(pairs)]
        return RopeSpec.of(options.pop("rope_type"), **options)

    @property
    def rows(self) -> list[int]:
        """Output features of the projections of q, k and v."""
        return [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]

    def __str__(self):
        width = "" if self.d_model is None else f", d_model {self.d_model}"
        return f"{self.name} ({self.heads}+{self.kv_heads}x{self.head_dim}{width})"


def _llama3(factor):
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_PLAIN = {"rope_theta": 500000.0}
_QWEN3 = {"rope_theta": 1e6}
_GEMMA3 = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
_GPT_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
# 64 dimensions of every head turn, in adjacent pairs; the one key is shared by all heads. The
# attention factor is 1: mscale and mscale_all_dim are equal and go into the softmax.
_DEEPSEEK = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "interleaved": True,
}

MODELS = {
    model.name: model
    for model in (
        Model("Llama-3.2-1B", 2048, 32, 8, 64, _llama3(32.0)),
        Model("Llama-3-8B", 4096, 32, 8, 128, _PLAIN),
        Model("Llama-3-70B", 8192, 64, 8, 128, _PLAIN),
        Model("Qwen3-0.6B", 1024, 16, 8, 128, _QWEN3, norm=True),
        Model("Qwen3-8B", 4096, 32, 8, 128, _QWEN3, norm=True),
        Model("Gemma-3-4B", 2560, 8, 4, 256, _GEMMA3, norm=True),
        Model("gpt-oss-20b", 2880, 64, 8, 64, _GPT_OSS),
        Model("DeepSeek-V3-rope", None, 128, 1, 64, _DEEPSEEK),
        Model("decode", 4096, 32, 8, 128, _PLAIN, lengths=(1,)),  # one token of Llama-3-8B
    )
}

_OWN = re.compile(r"(\d+)\+(\d+)x(\d+)(?:@(\d+))?")


def select(names) -> list[Model]:
    """Models by name, in any case, or as HEADS+KV_HEADSxHEAD_DIM[@D_MODEL]; commas separate too."""
    by_name = {name.lower(): model for name, model in MODELS.items()}
    chosen = []
    for name in (part for text in names for part in text.split(",") if part):
        if name.lower() in by_name:
            chosen.append(by_name[name.lower()])
        elif own := _OWN.fullmatch(name):
            heads, kv_heads, head_dim, d_model = (int(n) if n else None for n in own.groups())
            if not heads or not kv_heads or heads % kv_heads or not head_dim or head_dim % 2:
                raise UserError(
                    f"--shapes: {name}: needs heads that are a multiple of kv_heads, "
                    "and an even head_dim"
                )
            chosen.append(Model(name, d_model, heads, kv_heads, head_dim, _PLAIN))
        else:
            raise UserError(
                f"--shapes: {name!r} is none of {', '.join(MODELS)}, "
                "nor HEADS+KV_HEADSxHEAD_DIM[@D_MODEL]"
            )
    return chosen
