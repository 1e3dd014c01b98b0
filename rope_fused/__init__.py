"""Rotary position embedding for long-context transformers, fused into the QK projection."""

from . import interpreter, interrupt  # noqa: F401  (first: what torch's import must not meet)

# isort: split
import torch  # noqa: F401  (before the rest: it brings the OpenMP runtime that rope_fused._cpu shares)

from .api import apply_rope, apply_rotary_pos_emb, qkv_rope, rerotate
from .dispatch import backends
from .extend import extend_config
from .modules import QKVProjection, RopeAttention, RotaryEmbedding
from .spec import RopeSpec

__version__ = "0.1.0"
__all__ = [
    "QKVProjection",
    "RopeAttention",
    "RopeFusedCallback",
    "RopeSpec",
    "RotaryEmbedding",
    "apply_rope",
    "apply_rotary_pos_emb",
    "backends",
    "doctor",
    "extend_config",
    "patch",
    "qkv_rope",
    "rerotate",
    "unpatch",
]


def __getattr__(name):
    # The patcher needs transformers only when it is used.
    if name in ("patch", "unpatch", "PatchReport"):
        from .integrations import transformers

        return getattr(transformers, name)
    if name == "RopeFusedCallback":
        from .integrations import trainer

        return getattr(trainer, name)
    if name in ("doctor", "DoctorReport"):
        from .integrations import doctor

        return getattr(doctor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
