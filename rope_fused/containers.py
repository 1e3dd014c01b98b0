"""Where a configuration keeps its rope keys: the dict they are in, and the blocks in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from . import models
from .dialects import ALIASES, rope_type_of

TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""The keys under which a composite configuration has its text model."""


def _as_dict(config) -> dict:
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise TypeError(f"config must be a dict or have to_dict(), got {type(config).__name__}")
        config = config.to_dict()
    if "model_type" not in config and "n_heads" in config and "dim" in config:
        return _from_mistral(config)
    return dict(config)


def text_model(config) -> dict:
    """A configuration as a dict; of a composite one the text half, with the rope keys around it if
    it has none."""
    c = _as_dict(config)
    while key := next((key for key in TEXT_CONFIGS if c.get(key) is not None), None):
        if not isinstance(c[key], Mapping) and not hasattr(c[key], "to_dict"):
            raise ValueError(f"{key} must be a dict, got {c[key]!r}")
        text = _as_dict(c[key])
        outer = {"model_type": c.get("model_type")}
        if not text.get("rope_parameters") and not text.get("rope_scaling"):
            outer |= {k: c[k] for k in ("rope_parameters", "rope_scaling", "rope_theta") if k in c}
        inner = {k: value for k, value in text.items() if value is not None or k not in outer}
        c = outer | inner
    return c


def _from_mistral(params: Mapping) -> dict:
    """A Mistral params.json in the words of a config.json.

    Its weights are for interleaved pairs; those in transformers' format were permuted for
    half-split ones. ``alpha`` and ``beta`` are beta_slow and beta_fast; without ``apply_scale``
    there is no temperature.
    """
    c = {
        "model_type": "mistral",
        "hidden_size": params["dim"],
        "num_attention_heads": params["n_heads"],
        "rope_interleave": True,
        "max_position_embeddings": params.get("max_position_embeddings", params.get("max_seq_len")),
    }
    for key in ("head_dim", "rope_theta", "llama_4_scaling"):
        c[key] = params.get(key)
    mla = params.get("qk_rope_head_dim") is not None
    if mla:
        c |= {"model_type": "mistral4", "qk_rope_head_dim": params["qk_rope_head_dim"]}
    yarn = dict(block(params, "yarn"))
    if yarn:
        scaled = yarn.pop("apply_scale", True)
        names = {"alpha": "beta_slow", "beta": "beta_fast"}
        yarn = {names.get(key, key): value for key, value in yarn.items()}
        if not scaled:
            yarn["attention_factor"] = 1.0
        elif mla:
            yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        c["rope_parameters"] = {"rope_type": "yarn", **yarn}
    else:
        c["rope_parameters"] = {"rope_type": "default"}
    return c


def block(c: Mapping, key: str) -> Mapping:
    """``c[key]``, which must be a dict; {} if absent."""
    block = c.get(key)
    if block is None:
        return {}
    if not isinstance(block, Mapping):
        raise ValueError(f"{key} must be a dict, got {block!r}")
    return block


class RopeKeys(NamedTuple):
    """The rope keys of a configuration by what they are for."""

    flat: dict
    """One block, for every kind of layer that takes one."""
    nested: dict[str, dict]
    """A block per kind of layer; {}: there is only the flat one."""
    lost: dict
    """Keys that transformers passes over, as they stand beside or instead of nested blocks."""
    own: bool = False
    """The flat block is the one of the family, as the configuration has none."""


def rope_keys(c: dict, name: str | None) -> RopeKeys:
    """rope_parameters (transformers 5) and rope_scaling (before): they may not contradict."""
    new, old = dict(block(c, "rope_parameters")), dict(block(c, "rope_scaling"))
    for keys in (new, old):
        if "rope_type" in keys or "type" in keys:
            keys["rope_type"] = rope_type_of(keys)[1]
            keys.pop("type", None)
    for key in new.keys() & old.keys():
        both = (new[key], old[key])
        if key == "rope_type":
            both = tuple(ALIASES.get(value, value) for value in both)
        if both[0] != both[1]:
            raise ValueError(
                f"{key} must be the same in rope_parameters and rope_scaling, got {new[key]!r} "
                f"and {old[key]!r}"
            )
    if not new and not old and "rope_type" in c and "scaling_factor" in c:  # Grok: at the top level
        keys = ("rope_type", "beta_fast", "beta_slow", "attn_factor", "extrapolation_factor")
        flat = {"factor": c["scaling_factor"], **{key: c[key] for key in keys if key in c}}
        return RopeKeys(flat, {}, {})
    if not old and c.get("rope_parameters") is None and name in models.BLOCKS:
        return RopeKeys(dict(models.BLOCKS[name]), {}, {}, own=True)
    layers = models.LAYERS.get(name, {})
    kinds = {*layers, *(c.get("layer_types") or ())}
    new, blocks = _apart(new, kinds)
    old, more = _apart(old, kinds)
    blocks |= more
    if not layers:
        flat = {**new, **old}
        return RopeKeys({}, blocks, flat) if blocks else RopeKeys(flat, {}, {})
    scaled = [kind for kind, layer in layers.items() if layer.scaled]
    fate = models.FLAT.get(name)
    homeless = new and not blocks and (fate is None or (fate == "lost" and old))
    if homeless or (old and not scaled):
        raise ValueError(
            f"rope_parameters must hold a block for each of {', '.join(layers)}, got none"
        )
    if blocks:
        blocks |= {kind: blocks.get(kind, {}) | old for kind in scaled if old}
        return RopeKeys({}, blocks, new)
    return RopeKeys(old, {}, new) if fate == "lost" else RopeKeys({**new, **old}, {}, {})


def _apart(keys: dict, kinds) -> tuple[dict, dict[str, dict]]:
    """(flat keys, blocks by kind of layer) of one dict that may hold both."""
    blocks = {key: dict(value) for key, value in keys.items() if isinstance(value, Mapping)}
    flat = {key: value for key, value in keys.items() if key not in blocks and value is not None}
    for kind in flat.keys() & kinds:
        raise ValueError(f"the rope block of {kind} must be a dict, got {flat[kind]!r}")
    return flat, blocks
