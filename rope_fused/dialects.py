"""One rope block, in whatever dialect, read into a method and its parameters."""

from __future__ import annotations

import dataclasses

from . import legal, models, scaling

# Other names of the methods. "mrope" only changes which position a pair reads; "original" is Grok's
# name of YaRN; the deepseek and telechat3 ones (vLLM's) differ in where the temperature goes.
ALIASES = {
    "su": "longrope",
    "mrope": "default",
    "original": "yarn",
    "deepseek_yarn": "yarn",
    "deepseek_llama_scaling": "yarn",
    "telechat3-yarn": "yarn",
    "dynamic-yarn": "dynamic_yarn",
    "ntk-by-parts": "ntk_by_parts",
}
# Keys that some implementation reads beside the methods' own. Where a method does not read a key of
# either kind that is noted; any other key is refused.
_OTHER_KEYS = {
    "alpha",
    "attn_factor",
    "extrapolation_factor",
    "interleaved",
    "llama_4_scaling_beta",
    "mrope_interleaved",
    "mrope_section",
    "mscale_factors",
    "rope_theta",
    "rope_type",
    "type",
    "xdrope_section",
}
_KNOWN_KEYS = _OTHER_KEYS.union(*map(scaling.accepts, scaling.METHODS))
_ORIGINAL = "original_max_position_embeddings"
ABSENT = f"{_ORIGINAL} is absent"
"""How the note begins that says so."""
SU = "'su' is longrope; transformers 5 fails to load it by this name"
"""The note of a block of this type."""
_PHI3 = ("phi3", "phi4_multimodal")


def rope_type_of(block: dict) -> tuple[str, str]:
    """(our name, the block's own name) of the method of a rope block."""
    keys = [key for key in ("rope_type", "type") if block.get(key) is not None]
    named = [block[key] for key in keys] or ["default"]
    for name in named:
        if not isinstance(name, str):
            raise ValueError(f"{keys[0]} must be a string, got {name!r}")
    if len({ALIASES.get(name, name) for name in named}) > 1:
        raise ValueError(f"rope_type must agree with type, got {named[0]!r} and {named[1]!r}")
    own = next((name for name in named if name in ALIASES), named[0])
    rope_type = ALIASES.get(own, own)
    if rope_type not in scaling.METHODS or rope_type == "none":
        names = sorted({*scaling.METHODS, *ALIASES} - {"none"})
        raise ValueError(f"rope_type must be one of {', '.join(names)}, got {own!r}")
    return rope_type, own


@dataclasses.dataclass
class Block:
    """A rope block being read: give it its surroundings, call :meth:`read`, take the results.

    Each ``_method`` below moves the keys it understands from ``keys`` to ``parameters``, and says
    in ``hf``, ``hf_refusal`` and ``notes`` where transformers differs from the model's authors.
    """

    keys: dict
    family: str | None = None
    """The model_type; None if unknown."""
    mla: bool = False
    """Multi-head latent attention: mscale_all_dim is meant for the softmax."""
    length: int | None = None
    """The model's max_position_embeddings."""
    outer_original: float | None = None
    """original_max_position_embeddings at the top level of the configuration."""
    nested: bool = False
    """The block is one of several, one per layer type."""
    split: bool = False
    """transformers makes it one of several even if the configuration does not."""

    rope_type: str = "default"
    parameters: dict = dataclasses.field(default_factory=dict)
    hf: dict = dataclasses.field(default_factory=dict)
    hf_refusal: str = ""
    softmax_multiplier: float = 1.0
    notes: list[str] = dataclasses.field(default_factory=list)

    def read(self) -> None:
        """Interpret the whole block; ValueError for a key that is unknown or out of its range."""
        self.keys = {key: value for key, value in self.keys.items() if value is not None}
        self.rope_type, self.own_type = rope_type_of(self.keys)
        for key in ("rope_type", "type"):
            self.keys.pop(key, None)
        getattr(self, f"_{self.rope_type}", lambda: None)()
        loaded = models.LOADED.get(self.family, (self.rope_type,))
        if self.rope_type not in loaded and not self.hf_refusal:
            names = " and ".join(map(repr, loaded))
            self.hf_refusal = (
                f"transformers loads {self.family} with {names} alone, not {self.rope_type!r}"
            )
        self._take(*scaling.accepts(self.rope_type))
        for key, value in self.keys.items():
            if key not in _KNOWN_KEYS:
                known = ", ".join(scaling.accepts(self.rope_type)) or "none of its own"
                raise ValueError(
                    f"{key} is not a rope key: {self.own_type!r} takes {known}, got {value!r}"
                )
            self.notes.append(f"{key}={_brief(value)} has no effect with {self.own_type!r}")

    def _take(self, *names: str) -> None:
        for name in names:
            if name in self.keys:
                self.parameters[name] = self.keys.pop(name)

    def _original(self) -> float:
        """original_max_position_embeddings: of the block, beside it, or the model's length."""
        inner, outer = self.keys.pop(_ORIGINAL, None), self.outer_original
        value = inner if outer is None or (self.nested and inner is not None) else outer
        if value is None:
            value = self.length
            if value is None:
                raise ValueError(f"{_ORIGINAL} or max_position_embeddings is required, got None")
            self.notes.append(f"{ABSENT}: max_position_embeddings={value} stands in")
        elif inner is not None and outer not in (None, inner):
            self.notes.append(
                f"{_ORIGINAL} is {inner!r} in the rope block and {outer!r} at the top level, "
                f"{value!r} counts"
            )
        elif inner is None and self.nested and self.length not in (None, value):
            self.hf[_ORIGINAL] = self.length
            self.notes.append(f"{_ORIGINAL}={value!r} is outside the block: transformers misses it")
        self.parameters[_ORIGINAL] = legal.number(_ORIGINAL, value)
        return self.parameters[_ORIGINAL]

    def _factor(self, original: float) -> float | None:
        """factor, noting where the lengths say something else; None if absent."""
        self._inner_length()
        factor = self.keys.pop("factor", None)
        if factor is None:
            return None
        factor = legal.number("factor", factor)
        if self.length is not None and factor != self.length / original:
            self.notes.append(
                f"factor={factor!r} but max_position_embeddings / {_ORIGINAL} = {self.length} / "
                f"{original} = {self.length / original:g}: the factor counts, as in transformers "
                "since 4.56 and in vLLM; transformers 4.51 to 4.55 and exllamav3 take the ratio"
            )
        return factor

    def _inner_length(self) -> None:
        inner = self.keys.pop("max_position_embeddings", None)
        if inner is not None and inner != self.length:
            self.notes.append(
                f"max_position_embeddings={inner!r} in the rope block has no effect, "
                f"{self.length} counts"
            )

    # ----------------------------------------------- one per method that needs more than its keys

    def _dynamic(self) -> None:
        self._inner_length()
        alpha = self.keys.pop("alpha", None)
        if not alpha:
            return
        self.rope_type = "ntk"
        self.parameters["factor"] = legal.number("alpha", alpha)
        self.notes.append(f"alpha={alpha!r} makes 'dynamic' a static change of the base ('ntk')")
        if (factor := self.keys.pop("factor", None)) is not None:
            self.notes.append(f"factor={factor!r} has no effect beside alpha")
        if not (self.family or "").startswith("hunyuan"):
            self.hf_refusal = f"transformers reads alpha only in HunYuan, not in {self.family}"

    def _ntk(self) -> None:
        self.hf_refusal = "transformers has no rope_type 'ntk'"
        if "mixed_b" not in self.keys:
            self.notes.append("'ntk' is the NTK-aware change of the base; vLLM means another law")

    def _llama3(self) -> None:
        self._original()

    def _ntk_by_parts(self) -> None:
        self._original()

    def _dynamic_yarn(self) -> None:
        self._original()
        self._inner_length()

    def _yarn(self) -> None:
        if self.family in _PHI3:
            if "short_factor" in self.keys:
                self.rope_type = "longrope"
                self.parameters["magnitude_scaling_policy"] = "yarn"
                self.hf["magnitude_scaling_policy"] = "su"
                self.notes.append("'yarn' of this model is longrope with YaRN's attention factor")
                return self._longrope()
            self.hf_refusal = f"transformers takes 'yarn' of {self.family} for longrope"
        original = self._original()
        factor = self._factor(original)
        if factor is None:
            if self.length is None:
                raise ValueError("factor is required where max_position_embeddings is not given")
            factor = legal.number("factor", self.length / original)
            self.notes.append(f"factor is absent: max_position_embeddings / {_ORIGINAL} stands in")
        self.parameters["factor"] = factor
        self._take("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")
        if self.parameters.get("truncate") is False and (self.nested or self.split):
            self.hf["truncate"] = True
            self.notes.append("truncate=False is in a block per layer type: transformers misses it")
        extrapolation = self.keys.pop("extrapolation_factor", 1)
        if extrapolation != 1:
            raise ValueError(f"extrapolation_factor must be 1, got {extrapolation!r}")
        self._yarn_temperature(factor)

    def _yarn_temperature(self, factor: float) -> None:
        """The attention factor and softmax multiplier, where authors and transformers part ways."""
        mscale, all_dim = (
            legal.number(name, self.parameters.get(name, 0))
            for name in ("mscale", "mscale_all_dim")
        )
        g = scaling.yarn_mscale
        if self.mla and all_dim and self.own_type != "deepseek_llama_scaling":
            m = g(factor, all_dim)
            self.softmax_multiplier = m * m
        attn_factor = legal.number("attn_factor", self.keys.pop("attn_factor", 1))
        if "attention_factor" in self.keys:
            if attn_factor != 1:
                self.notes.append(f"attn_factor={attn_factor!r} has no effect here")
            return
        derived = g(factor, mscale) / g(factor, all_dim) if mscale and all_dim else g(factor)
        meant = computed = derived
        if self.own_type == "telechat3-yarn":
            meant = g(factor, 0.7)
            self.hf_refusal = "transformers has no rope_type 'telechat3-yarn'"
        elif self.family == "deepseek_v4":  # its reference code does not apply the temperature
            meant, computed = 1.0, derived if self.nested else 1.0
        elif self.mla:  # absent keys are 1 and 0 in DeepSeek's code, and zero is a number like any
            mscale = self.parameters.get("mscale", 1)
            meant = g(factor, mscale) / g(factor, all_dim)
        elif bool(mscale) != bool(all_dim):
            self.notes.append("mscale and mscale_all_dim have no effect without each other")
        meant *= attn_factor
        if meant != derived:
            self.parameters["attention_factor"] = meant
        if computed != meant:
            self.hf["attention_factor"] = None
            self.notes.append(f"the attention factor is {meant!r}; transformers gets {computed!r}")

    def _longrope(self) -> None:
        if self.own_type == "su":
            self.notes.append(SU)
        factor = self._factor(self._original())
        if factor is not None:
            self.parameters["factor"] = factor
        self._take("short_factor", "long_factor")
        if "mscale_factors" in self.keys:
            self.parameters["attention_factor"] = self.keys.pop("mscale_factors")
        if self.family == "phimoe":
            self._take("short_mscale", "long_mscale")
            self.hf["long_factor"] = self.parameters.get("short_factor")
            self.notes.append("transformers 5 never uses the long_factor of this model")
        for key in ("short_mscale", "long_mscale"):
            if key in self.keys:
                value = self.keys.pop(key)
                self.notes.append(f"{key}={value!r} has no effect in {self.family}; vLLM reads it")


def _brief(value) -> str:
    many = isinstance(value, list | tuple) and len(value) > 6
    return f"<{len(value)} values>" if many else repr(value)
