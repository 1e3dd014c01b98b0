"""The ways to stretch a window, by name, as rope_parameters blocks of transformers."""

from __future__ import annotations

from collections.abc import Mapping

from ..spec import RopeSpec
from .loading import complete_rope, original_length

NAMES = ("none", "linear", "ntk", "dynamic", "by_parts", "yarn", "llama3")
LABELS = {
    "none": "as trained",
    "linear": "PI",
    "ntk": "NTK-aware",
    "dynamic": "dynamic NTK",
    "by_parts": "NTK-by-parts",
    "yarn": "YaRN",
    "llama3": "Llama 3",
    "longrope": "LongRoPE",
}


def block_of(name: str, config, factor: float, original=None) -> dict:
    """The ``rope_parameters`` that stretch the model of ``config`` to ``factor`` times its window.

    Args:
        name: "none": as the weights were trained. "linear": position interpolation (Chen et al.
            2023, arXiv 2306.15595). "ntk": the base changed to
            rope_theta * factor ** (d / (d - 2)), d = rotary_dim. "dynamic": that, with the factor
            each length needs. "by_parts": YaRN without its temperature. "yarn": Peng et al. 2023
            (arXiv 2309.00071). "llama3": Llama 3.1's, with its wavelength bounds 1 and 4.
        config: of a transformers model with one rotary table for all layers.
        original: the window of the weights; None: the block's original_max_position_embeddings,
            else max_position_embeddings.

    Raises:
        ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"method must be one of {', '.join(NAMES)}, got {name!r}")
    own = config.rope_parameters
    original = original or original_length(config)
    base = {k: own[k] for k in ("rope_theta", "partial_rotary_factor") if own.get(k) is not None}
    if name == "none":
        return base | {"rope_type": "default"}
    if name == "ntk":
        plain = RopeSpec.from_config(_with(config, base | {"rope_type": "default"}))
        spread = plain.rotary_dim / (plain.rotary_dim - 2)
        theta = plain.rope_theta * factor**spread
        return base | {"rope_type": "default", "rope_theta": theta}
    made = base | {"rope_type": "yarn" if name == "by_parts" else name, "factor": float(factor)}
    if name in ("by_parts", "yarn", "llama3"):
        made["original_max_position_embeddings"] = original
    if name == "by_parts":
        made["attention_factor"] = 1.0
    if name == "llama3":
        made |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return made


def spec_of(config, block: Mapping, original=None) -> RopeSpec:
    """What ``block`` means in the model of ``config``: for ``swapped`` and the pictures."""
    return RopeSpec.from_config(_with(config, complete_rope(config, block), original))


def _with(config, block, original=None):
    changed = config.to_dict() | {"rope_parameters": dict(block)}
    # Dynamic NTK counts from the window that the configuration gives.
    return changed | ({} if original is None else {"max_position_embeddings": original})
