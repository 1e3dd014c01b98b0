"""Model configurations of every dialect, read into a RopeSpec; and what they leave unsaid, said."""

from __future__ import annotations

import math
from collections.abc import Mapping

from . import models, scaling
from .positions import axis_map
from .spec import RopeSpec

# Other names of the methods. "original" is Grok's; "mrope" only changes which position a pair reads.
_TYPES = {
    "su": "longrope",
    "mrope": "default",
    "original": "yarn",
    "deepseek_yarn": "yarn",
    "telechat3-yarn": "yarn",
    "dynamic-yarn": "dynamic_yarn",
    "ntk-by-parts": "ntk_by_parts",
}
# Keys some implementation reads for some method. Where ours does not read one it is noted; any other key is refused.
_VOCABULARY = frozenset(
    """type rope_type rope_theta factor alpha partial_rotary_factor original_max_position_embeddings
    max_position_embeddings beta_fast beta_slow truncate mscale mscale_all_dim attention_factor attn_factor
    extrapolation_factor finetuned short_factor long_factor short_mscale long_mscale low_freq_factor high_freq_factor
    mrope_section mrope_interleaved interleaved xdrope_section llama_4_scaling_beta mixed_b n_start
    magnitude_scaling_policy mscale_factors ramp""".split()
)
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_THETA_KEYS = ("rope_theta", "rotary_emb_base")
_PARTIAL_KEYS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")


def from_config(config, layer_type=None, *, interleaved=None, rotary_offset=None, axes=None) -> RopeSpec:
    """The rotary embedding a model configuration means.

    Args:
        config: a config.json as a dict, a transformers configuration object, or a Mistral params.json. Of a
            composite configuration the text model counts.
        layer_type: which layers, where the model's layers rotate differently ("full_attention", ...).
        interleaved: pairs (2 j, 2 j + 1); None: as the model_type does.
        rotary_offset: first rotated dimension of the head; None: as the model_type does.
        axes: position axes; None: as the model_type does. 1 reads a multi-axis model as text only.

    Returns:
        A spec whose ``notes`` list the keys without effect and the disagreements it found.

    Raises:
        TypeError: ``config`` is neither a mapping nor has ``to_dict()``.
        ValueError: an unknown model_type (unless ``interleaved`` is given), no ``layer_type`` where layers differ,
            a rope key that is unknown, missing, out of range, or contradicts another.
    """
    c = _text_model(_as_dict(config))
    known = models.find(c.get("model_type"))
    if known is None and interleaved is None:
        raise ValueError(
            f"model_type {c.get('model_type')!r} is not known: pass interleaved= (and rotary_offset=, axes=) to say how "
            f"it rotates"
        )
    read = _Reader(c, *(known or (None, _stranger(c))))
    specs = {
        kind: read.spec(kind, interleaved, rotary_offset, axes) for kind in read.layer_types(layer_type)
    }
    first = next(iter(specs.values()))
    if any(spec != first for spec in specs.values()):
        raise ValueError(f"layer_type must be one of {', '.join(map(repr, specs))}: they rotate differently, got None")
    return first


def _as_dict(config) -> dict:
    if not isinstance(config, Mapping):
        if not hasattr(config, "to_dict"):
            raise TypeError(f"config must be a dict or have to_dict(), got {type(config).__name__}")
        config = config.to_dict()
    if "model_type" not in config and "n_heads" in config and "dim" in config:
        return _from_mistral(config)
    return dict(config)


def _text_model(c: dict) -> dict:
    """Of a composite configuration, the text half; its keys win over those around it."""
    if c.get("rope_parameters") or c.get("rope_scaling"):
        return c
    for key in _TEXT_CONFIGS:
        inner = c.get(key)
        if inner is not None:
            inner = _as_dict(inner)
            return _text_model({"model_type": c.get("model_type"), **inner})
    return c


def _from_mistral(p: Mapping) -> dict:
    """A Mistral params.json in transformers' words.

    Its weights are for interleaved pairs; the checkpoints on the Hub were permuted for half-split ones.
    """
    c = {
        "model_type": "mistral",
        "hidden_size": p["dim"],
        "num_attention_heads": p["n_heads"],
        "head_dim": p.get("head_dim"),
        "rope_theta": p.get("rope_theta"),
        "rope_interleave": True,
        "max_position_embeddings": p.get("max_position_embeddings") or p.get("max_seq_len"),
        "llama_4_scaling": p.get("llama_4_scaling"),
    }
    if p.get("qk_rope_head_dim") is not None:
        c |= {"model_type": "mistral4", "qk_rope_head_dim": p["qk_rope_head_dim"]}
    yarn = p.get("yarn")
    if yarn is not None:
        yarn = dict(_mapping("yarn", yarn))
        names = {"alpha": "beta_slow", "beta": "beta_fast"}
        apply_scale = yarn.pop("apply_scale", True)
        c["rope_parameters"] = {"rope_type": "yarn", **{names.get(k, k): v for k, v in yarn.items()}}
        if "qk_rope_head_dim" in c:
            c["rope_parameters"] |= {"mscale": 1.0, "mscale_all_dim": 1.0 if apply_scale else 0.0}
        if not apply_scale:
            c["rope_parameters"]["attention_factor"] = 1.0
    return c


def _stranger(c: Mapping) -> models.Model:
    """An unknown family: only what the configuration itself says."""
    return models.Model(False, math.nan, 0, False, 1.0, 0)


def _mapping(name, value) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict, got {value!r}")
    return value


class _Reader:
    """Reads one configuration. ``notes`` collects what its reader should know, per call of :meth:`spec`."""

    def __init__(self, c: dict, name: str | None, model: models.Model):
        self.c, self.name, self.model = c, name, model
        self.layers = models.LAYERS.get(name, {})
        self.length = c.get("max_position_embeddings") or model.max_position_embeddings or None
        self.block = self._block()
        kinds = [key for key, value in self.block.items() if isinstance(value, Mapping)]
        self.nested = bool(kinds)
        self.kinds = tuple(self.layers) or tuple(kinds)
        if self.nested:
            for key in self.block.keys() - set(kinds):
                if self.block[key] is not None and key not in _VOCABULARY:
                    raise ValueError(f"{key} is not a layer type nor a rope key, got {self.block[key]!r}")

    # -------------------------------------------------------------- which block

    def _block(self) -> dict:
        """The rope block: rope_parameters (transformers 5) or rope_scaling (before), which may not contradict."""
        old, new = (self.c.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
        old, new = dict(_mapping("rope_scaling", old)), dict(_mapping("rope_parameters", new))
        for key in old.keys() & new.keys():
            if _TYPES.get(str(old[key]), old[key]) != _TYPES.get(str(new[key]), new[key]):
                raise ValueError(
                    f"{key} must be the same in rope_scaling and rope_parameters, got {old[key]!r} and {new[key]!r}"
                )
        if not old and not new and "rope_type" in self.c and "scaling_factor" in self.c:
            return self._grok()
        return {**old, **new} or dict(models.BLOCKS.get(self.name, {}))

    def _grok(self) -> dict:
        """Grok spreads its rope block over the top level."""
        names = {"scaling_factor": "factor"}
        keys = ("rope_type", "scaling_factor", "beta_fast", "beta_slow", "attn_factor", "extrapolation_factor")
        return {names.get(key, key): self.c[key] for key in keys if key in self.c}

    def layer_types(self, layer_type):
        """The kinds of layers to read: the one asked for, or all that rotate."""
        listed = self.c.get("layer_types") or ()
        nope = self._nope()
        if self.kinds:
            allowed, default = self.kinds, self.kinds
        elif self.name == "llama4_text":
            allowed = default = ("chunked_attention", "full_attention")
        else:
            allowed, default = {*listed, nope, "full_attention"} - {""}, (None,)
        if layer_type is None:
            return default
        if layer_type not in allowed:
            raise ValueError(f"layer_type must be one of {', '.join(sorted(map(repr, allowed)))}, got {layer_type!r}")
        return (layer_type,)

    def _nope(self) -> str:
        """The kind of layer that does not rotate."""
        if self.name in ("exaone4", "exaone_moe") and not self.c.get("sliding_window", 4096):
            return ""
        return "full_attention" if self.name == "llama4_text" else self.model.nope

    def _block_of(self, kind) -> dict:
        """The block for one kind of layer, with the base frequency that goes with it."""
        layer = self.layers.get(kind)
        if self.nested:
            block = dict(self.block.get(kind) or {})
        elif layer is None or layer.scaled:
            block = dict(self.block)
        else:
            block = {}
        if layer is not None and not self.block:
            block = dict(layer.block)
        return {key: value for key, value in block.items() if value is not None}

    # -------------------------------------------------------------- one spec

    def spec(self, kind, interleaved, rotary_offset, axes) -> RopeSpec:
        self.notes, self.hf, self.hf_refusal = [], {}, ""
        self.softmax_multiplier, self.temperature = 1.0, None
        block = self._block_of(kind)
        rope_type = self._type(block)
        head_dim = self._head_dim(kind)
        if kind is not None and kind == self._nope():
            if self.name == "llama4_text" and self.c.get("attn_temperature_tuning", True):
                scale, floor = self.c.get("attn_scale", 0.1), self.c.get("floor_scale", 8192)
                self.temperature = (scale, floor, 1)
            return self._build("none", {}, kind, head_dim, 1.0, interleaved, rotary_offset, 1)
        if self._nope():
            self.notes.append(f"{self._nope()} layers do not rotate")
        self.theta = self._theta(block, kind)
        partial = self._partial(block, rope_type, head_dim)
        section = self._section(block, axes)
        read = getattr(self, f"_read_{rope_type}", None)
        parameters = {}
        if read is not None:
            rope_type, parameters = read(block)
        self._temperature(block, parameters)
        for key in scaling.accepts(rope_type).keys() & block.keys():
            parameters[key] = block.pop(key)
        for key, value in block.items():
            if key not in _VOCABULARY:
                raise ValueError(f"{key} is not a known key of rope_type {rope_type!r}, got {value!r}")
            self.notes.append(f"{key}={value!r} has no effect with rope_type {rope_type!r}")
        return self._build(rope_type, parameters, kind, head_dim, partial, interleaved, rotary_offset, section)

    def _build(self, rope_type, parameters, kind, head_dim, partial, interleaved, rotary_offset, section):
        if interleaved is None:
            interleaved = self.c.get("rope_interleave")
            interleaved = self.model.interleaved if interleaved is None else bool(interleaved)
        rotary_dim = head_dim if rope_type == "proportional" else int(head_dim * partial)
        if rotary_offset is None:
            rotary_offset = head_dim - rotary_dim if self.model.at_end else 0
        spec = RopeSpec.of(
            rope_type,
            head_dim=head_dim,
            rope_theta=self.theta if rope_type != "none" else self.model.rope_theta,
            interleaved=interleaved,
            partial_rotary_factor=partial,
            rotary_offset=rotary_offset,
            axis_map=None if section == 1 else axis_map(section[1], rotary_dim // 2, section[0]),
            q_temperature=self.temperature,
            softmax_multiplier=self.softmax_multiplier,
            max_position_embeddings=self.length,
            hf_parameters=tuple(self.hf.items()),
            hf_refusal=self.hf_refusal,
            notes=tuple(self.notes),
            **parameters,
        )
        return spec

    def _type(self, block) -> str:
        named = [block.pop(key) for key in ("rope_type", "type") if key in block]
        for value in named:
            if not isinstance(value, str):
                raise ValueError(f"rope_type must be a string, got {value!r}")
        types = {_TYPES.get(value, value) for value in named} or {"default"}
        if len(types) > 1:
            raise ValueError(f"rope_type must agree with type, got {named[0]!r} and {named[1]!r}")
        rope_type = types.pop()
        if rope_type not in scaling.METHODS or rope_type == "none":
            names = ", ".join(name for name in (*scaling.METHODS, *_TYPES) if name != "none")
            raise ValueError(f"rope_type must be one of {names}, got {rope_type!r}")
        if named[0:1] == ["su"] or named[1:] == ["su"]:
            self.notes.append("rope_type 'su' is longrope; transformers 5 fails to load it under this name")
        if "telechat3-yarn" in named:
            self.notes.append("telechat3-yarn: attention factor 0.07 ln(factor) + 1 instead of 0.1")
            self.hf_refusal = "transformers has no rope_type 'telechat3-yarn'"
            self.coefficient = 0.7
        else:
            self.coefficient = 1
        return rope_type

    def _head_dim(self, kind) -> int:
        c, model, layer = self.c, self.model, self.layers.get(kind)
        if model.mla:
            return c.get("qk_rope_head_dim") or model.head_dim
        if layer is not None and layer.head_dim is not None:
            own = _per_layer(c, kind, "head_dim")
            return own or c.get(layer.head_dim_key) or layer.head_dim
        if c.get("head_dim") is not None:
            return c["head_dim"]
        hidden, heads = c.get("hidden_size"), c.get("num_attention_heads")
        if model.own_head_dim or hidden is None and heads is None:
            if not model.head_dim:
                raise ValueError("head_dim is required (or hidden_size and num_attention_heads), got None")
            return model.head_dim
        if hidden is None or heads is None:
            missing = "hidden_size" if hidden is None else "num_attention_heads"
            raise ValueError(f"{missing} is required when there is no head_dim, got None")
        return hidden // heads

    def _theta(self, block, kind):
        layer = self.layers.get(kind)
        keys = (layer.theta_key,) if layer is not None else _THETA_KEYS
        outer = next((self.c[key] for key in keys if self.c.get(key) is not None), None)
        if isinstance(outer, list | tuple):  # Step-3.x: one per layer
            outer = _at_layer(self.c, "rope_theta", outer, kind)
        inner = block.pop("rope_theta", None)
        if inner is not None:
            if outer is not None and outer != inner and not self.nested:
                self.notes.append(f"rope_theta={inner!r} of the rope block wins over the top level's {outer!r}")
            return inner
        if outer is not None:
            return outer
        theta = layer.rope_theta if layer is not None else self.model.rope_theta
        if math.isnan(theta):
            raise ValueError("rope_theta is required for an unknown model_type, got None")
        return theta

    def _partial(self, block, rope_type, head_dim) -> float:
        c, model = self.c, self.model
        partial = block.pop("partial_rotary_factor", None)
        if model.mla:
            return 1.0  # the head that rotates is qk_rope_head_dim, whole
        if partial is None:
            partial = next((c[key] for key in _PARTIAL_KEYS if c.get(key) is not None), None)
        if partial is None and c.get("partial_rotary_factors") is not None:
            partial = _at_layer(c, "partial_rotary_factors", c["partial_rotary_factors"], None)
        slice_key = "qk_rope_head_dim" if model.at_end else "rotary_dim"
        if partial is None and c.get(slice_key) is not None and model.partial is not None:
            partial = c[slice_key] / head_dim
        if partial is None:
            return 1.0 if model.partial is None or rope_type == "proportional" else model.partial
        if model.partial is None and rope_type == "default" and partial != 1:
            self.notes.append(
                f"partial_rotary_factor={partial!r} has no effect: the default rope of {self.name} turns the whole head"
            )
            return 1.0
        return partial

    def _section(self, block, axes):
        """1, or (layout, section) of a multi-axis model."""
        given = block.pop("mrope_section", None)
        alternating = block.pop("mrope_interleaved", block.pop("interleaved", None))
        layout, section = self.model.mrope, self.model.mrope_section if given is None else given
        if self.name is None and given is not None:
            layout = "alternating" if alternating else "blocks"
            if axes is None:
                raise ValueError(f"axes must be given for an unknown model_type with mrope_section={given!r}, got None")
        elif layout and alternating is not None and alternating != (layout == "alternating"):
            self.notes.append(f"mrope_interleaved={alternating!r} has no effect: {self.name} has its own layout")
        elif not layout and given is not None:
            self.notes.append(f"mrope_section={given!r} has no effect: {self.name} has one position axis")
        if not layout or axes == 1:
            if axes not in (None, 1):
                raise ValueError(f"axes must be 1: {self.name or 'the configuration'} names no mrope_section, got {axes}")
            return 1
        if axes is not None and axes != len(section):
            raise ValueError(f"axes must be {len(section)}, one per part of mrope_section {section!r}, got {axes!r}")
        return layout, section

    def _temperature(self, block, parameters):
        """Per-token factor on q: llama_4_scaling_beta in the block, or llama_4_scaling at the top."""
        beta = block.pop("llama_4_scaling_beta", None)
        length = parameters.get("original_max_position_embeddings") or self.length
        scaled = self.c.get("llama_4_scaling")
        if scaled is not None:
            scaled = _mapping("llama_4_scaling", scaled)
            beta, length = scaled.get("beta"), scaled.get("original_max_position_embeddings")
        elif beta is not None and not self.model.temperature:
            self.notes.append(f"llama_4_scaling_beta={beta!r} has no effect in {self.name}")
            return
        if beta is not None:
            self.temperature = (beta, length, 0)

    # -------------------------------------------------------------- methods whose keys need interpreting

    def _original_length(self, block):
        """original_max_position_embeddings, in the block or beside it."""
        key = "original_max_position_embeddings"
        inner, outer = block.pop(key, None), self.c.get(key)
        if inner is not None and outer is not None and inner != outer:
            self.notes.append(
                f"{key} is {inner!r} in the rope block and {outer!r} at the top level: "
                + ("the block counts, as it is nested" if self.nested else "the top level counts, as in transformers")
            )
        value = inner if outer is None or (self.nested and inner is not None) else outer
        if value is None:
            if self.length is None:
                raise ValueError(f"{key} is required when there is no max_position_embeddings, got None")
            self.notes.append(f"{key} is absent: max_position_embeddings={self.length} is taken for it")
            return self.length
        if self.nested and inner is None:
            self.hf[key] = self.length
            self.notes.append(f"transformers takes {self.length} for {key}: it does not look outside a nested block")
        return scaling.number(key, value)

    def _length_ratio(self, block, original):
        """factor, or max_position_embeddings / original_max_position_embeddings; and whether they agree."""
        inner = block.pop("max_position_embeddings", None)
        if inner is not None and self.length is not None and inner != self.length:
            self.notes.append(f"max_position_embeddings={inner!r} in the rope block has no effect beside {self.length}")
        ratio = None if self.length is None else self.length / original
        factor = block.pop("factor", None)
        if factor is not None:
            factor = scaling.number("factor", factor)
            if ratio is not None and ratio != factor:
                self.notes.append(
                    f"factor={factor!r} but max_position_embeddings / original_max_position_embeddings = {ratio:g}: the "
                    f"factor counts (transformers >= 4.56, vLLM); transformers 4.51 to 4.55 and exllamav3 take the ratio"
                )
        return factor, ratio

    def _read_dynamic(self, block):
        alpha = block.pop("alpha", None)
        if not alpha:
            if self.length is None:
                raise ValueError("max_position_embeddings is required by rope_type 'dynamic', got None")
            return "dynamic", {}
        alpha = scaling.number("alpha", alpha)
        self.notes.append(f"alpha={alpha!r} makes 'dynamic' a static NTK-aware base: rope_type is 'ntk'")
        if self.name is None or not self.name.startswith("hunyuan"):
            self.hf_refusal = f"transformers reads alpha only for HunYuan, not for {self.name}"
        block.pop("factor", None)
        return "ntk", {"factor": alpha}

    def _read_ntk(self, block):
        if "mixed_b" not in block:
            self.notes.append("rope_type 'ntk' is the NTK-aware base change; vLLM reads this name as Su's fixed variant")
        self.hf_refusal = "transformers has no rope_type 'ntk'"
        return "ntk", {}

    def _read_llama3(self, block):
        return "llama3", {"original_max_position_embeddings": self._original_length(block)}

    def _read_ntk_by_parts(self, block):
        return "ntk_by_parts", {"original_max_position_embeddings": self._original_length(block)}

    def _read_dynamic_yarn(self, block):
        block.pop("factor", None)
        return "dynamic_yarn", {"original_max_position_embeddings": self._original_length(block)}

    def _read_yarn(self, block):
        if "short_factor" in block and "long_factor" in block and self.name in ("phi3", "phi4_multimodal"):
            self.notes.append("rope_type 'yarn' of this model is longrope with YaRN's attention factor")
            self.hf["magnitude_scaling_policy"] = "su"
            return self._read_longrope(block | {"magnitude_scaling_policy": "yarn"}, block)
        original = self._original_length(block)
        factor, ratio = self._length_ratio(block, original)
        if factor is None:
            if ratio is None or ratio < 1:
                raise ValueError("factor is required by rope_type 'yarn', got None")
            factor = ratio
            self.notes.append(f"factor is null: max_position_embeddings / original_max_position_embeddings = {factor:g}")
        p = {"factor": factor, "original_max_position_embeddings": original}
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
            if key in block:
                value = block.pop(key)
                p[key] = value if key == "attention_factor" else scaling.number(key, value)
        self._yarn_temperature(block, p)
        if self.nested_in_transformers and block.get("truncate", True) is False:
            self.hf["truncate"] = True
            self.notes.append("truncate=False: transformers does not see it in a rope block per layer type")
        extrapolation = block.pop("extrapolation_factor", 1)
        if extrapolation != 1:
            raise ValueError(f"extrapolation_factor must be 1, no released model has another, got {extrapolation!r}")
        return "yarn", p

    @property
    def nested_in_transformers(self) -> bool:
        return self.nested or bool(self.layers)

    def _yarn_temperature(self, block, p):
        """Where YaRN's temperature goes, and how much of it."""
        factor, mscale, all_dim = p["factor"], p.get("mscale"), p.get("mscale_all_dim")
        released = scaling.yarn_mscale(factor)
        if mscale and all_dim:
            released = scaling.yarn_mscale(factor, mscale) / scaling.yarn_mscale(factor, all_dim)
        meant = released
        if self.model.mla:
            if all_dim:
                m = scaling.yarn_mscale(factor, all_dim)
                self.softmax_multiplier = m * m
            meant = scaling.yarn_mscale(factor, 1 if mscale is None else mscale) / scaling.yarn_mscale(
                factor, all_dim or 0
            )
        elif (mscale is None) != (all_dim is None):
            key = "mscale" if all_dim is None else "mscale_all_dim"
            self.notes.append(f"{key}={p[key]!r} has no effect without {'mscale_all_dim' if all_dim is None else 'mscale'}")
        if self.name == "deepseek_v4" and "attention_factor" not in p:
            meant = 1.0
            if not self.nested:
                released = 1.0
            self.notes.append("attention_factor is 1: DeepSeek-V4 does not apply YaRN's temperature")
        meant *= self.coefficient if self.coefficient == 1 else 1
        if self.coefficient != 1:
            meant = scaling.yarn_mscale(factor, self.coefficient)
        attn_factor = block.pop("attn_factor", 1)
        if attn_factor != 1:
            meant *= scaling.number("attention_factor", attn_factor)
            self.notes.append(f"attn_factor={attn_factor!r} multiplies the attention factor; transformers does not read it")
        if "attention_factor" not in p and meant != released:
            p["attention_factor"] = meant
            self.hf["attention_factor"] = None if self.name != "deepseek_v4" else released
