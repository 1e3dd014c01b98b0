"""How other software reads the same rotary configuration, and the rule that makes it differ.

Facts from the sources of the versions named in :data:`READERS`, most of them confirmed by running
those sources. A difference is one of meaning: each of them also rounds in its own order, in float32
(llama.cpp, which multiplies its way from pair to pair, by up to 2e-6).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

from . import models, scaling
from .dialects import ABSENT, SU
from .spec import RopeSpec

_ORIGINAL = "original_max_position_embeddings"
_FAR = 1 << 40  # tokens; beyond it no two readers are compared
_NOT_CONCERNED = object()
# Families that came after transformers 4.53, and those that came after 4.48.
_SINCE_453 = ("deepseek_v4", "gpt_oss", "ministral3", "mistral4", "olmo3")
_SINCE_448 = ("qwen3", "qwen3_moe", *_SINCE_453)


class Reading(NamedTuple):
    """What one reader makes of a configuration."""

    reader: str
    """Its name and version."""
    verdict: str
    """ "same" (every table and factor of the specification), "differs" or "cannot"."""
    rules: tuple[str, ...]
    """What it does in its own way; some of it changes no table."""
    spec: RopeSpec | None = None
    """What it computes, as ``precision="exact"`` of this spec; None: it cannot."""
    inv_freq_difference: float | None = None
    """The largest relative difference of a frequency; None: it cannot, or turns other pairs."""


def readings(
    spec: RopeSpec, model_type: str | None = None, *, mistral: bool = False
) -> list[Reading]:
    """How each reader that knows the method reads the configuration that ``spec`` came from.

    Args:
        spec: of :meth:`RopeSpec.from_config`.
        model_type: of the configuration; some readers decide by it.
        mistral: it is a params.json of Mistral's, which only some readers take.
    """
    found = models.find(model_type)
    family, mla = (found[0], found[1].mla) if found else ("", False)
    done = []
    for name, read in READERS.items():
        if mistral and read not in (_vllm, _llama_cpp):
            continue
        view = _View(spec, family, mla)
        if read(view) is not _NOT_CONCERNED:
            done.append(view.reading(name))
    return done


class _View:
    """One reader's view of a spec: it changes ``parameters`` and ``fields``, and says why."""

    def __init__(self, spec: RopeSpec, family: str, mla: bool):
        self.spec, self.family, self.mla = spec, family, mla
        self.rope_type = spec.rope_type
        self.parameters = dict(spec.parameters)
        self.fields: dict[str, object] = {}
        self.rules: list[str] = []
        self.able = True

    def cannot(self, why: str) -> None:
        self.able = False
        self.rules.append(why)

    def takes(self, rule: str, **parameters) -> None:
        """Read parameters otherwise; the rule is told if that makes a difference."""
        if any(self.parameters[key] != value for key, value in parameters.items()):
            self.parameters |= parameters
            self.rules.append(rule)

    def becomes(self, rope_type: str, rule: str, **parameters) -> None:
        self.rope_type, self.parameters = rope_type, parameters
        self.rules.append(rule)

    def scales_by(self, rule: str, attention_factor: float) -> None:
        """Have another attention factor, if it is another one."""
        if any(self.spec.attention_factor_at(n) != attention_factor for n in probes(self.spec)):
            mscales = {"short_mscale", "long_mscale"} & self.parameters.keys()
            self.takes(rule, attention_factor=attention_factor, **dict.fromkeys(mscales))

    def reading(self, name: str) -> Reading:
        spec, rules = self.spec, tuple(self.rules)
        if not self.able:
            return Reading(name, "cannot", rules)
        theirs = dataclasses.replace(
            spec,
            rope_type=self.rope_type,
            parameters=tuple(self.parameters.items()),
            hf_parameters=(),
            notes=(),
            **self.fields,
        )
        if theirs.rotary_dim != spec.rotary_dim:
            return Reading(name, "differs", rules, theirs)
        difference = max(_difference(theirs, spec, length) for length in probes(spec))
        same = difference == 0 and all(
            theirs.attention_factor_at(n) == spec.attention_factor_at(n) for n in probes(spec)
        )
        return Reading(name, "same" if same else "differs", rules, theirs, difference)


def _difference(theirs: RopeSpec, ours: RopeSpec, length) -> float:
    a, b = (spec.inv_freq(seq_len=length) for spec in (theirs, ours))
    relative = ((a - b).abs() / b).nan_to_num(nan=0.0, posinf=math.inf)  # 0 / 0: both stand still
    return relative.max().item()


def probes(spec: RopeSpec) -> list[int | None]:
    """Lengths between them showing every table of a spec (of a dynamic one, a short and a long)."""
    if spec.cache_class == "static":
        return [None]
    if spec.cache_class == "switch":
        return [spec.switch_length, spec.switch_length + 1]
    parameters = dict(spec.parameters)
    least = min(parameters.get(_ORIGINAL) or parameters["max_position_embeddings"], _FAR)
    return [int(least), int(min(least * parameters.get("factor", 4), _FAR)) + 1]


def _mscale_ratio(view: _View) -> float:
    """The attention factor of DeepSeek's code, where an absent mscale is 1 and mscale_all_dim 0."""
    p, g = view.parameters, scaling.yarn_mscale
    mscale = 1 if p["mscale"] is None else p["mscale"]
    return g(p["factor"], mscale) / g(p["factor"], p["mscale_all_dim"] or 0)


def _research(view: _View) -> bool:
    """What none of them has; whether that was all there is to say."""
    spec, p = view.spec, view.parameters
    if spec.rope_type in ("ntk_by_parts", "dynamic_yarn"):
        view.cannot(f"has no {spec.rope_type}")
    elif isinstance(spec.attention_factor, tuple):
        view.cannot("has no attention factor per pair")
    if spec.rope_type == "yarn":
        view.takes("has the released ramp, linear in the index", ramp="dimension")
    if p.get("n_start"):
        view.takes("interpolates the first tokens like all others", n_start=0)
    return not view.able


# ------------------------------------------------------------------------------------- the readers


def _transformers(view: _View):
    spec = view.spec
    if SU in spec.notes:
        return view.cannot("fails to load longrope by the name 'su'")
    try:
        spec.rows("hf")
    except ValueError as error:
        return view.cannot(str(error).split("here: ", 1)[-1])
    for key, value in spec.hf_parameters:
        meant = view.parameters[key]
        if key == "attention_factor" and value is None:
            rule = f"does not know the attention factor {meant!r} of this model, derives its own"
        elif key == "long_factor":
            rule = "never passes the length on, so long_factor is never used"
        elif key == "truncate":
            rule = "looks for truncate at the top of rope_parameters, not inside the layer type"
        else:
            rule = f"takes {key}={value!r} where {meant!r} is meant"
        view.takes(rule, **{key: value})
    if spec.rope_type == "longrope":
        view.rules.append(
            "chooses short or long for the whole batch, anew at every call, by its longest "
            "sequence; keys cached before keep the other table"
        )
    if spec.rope_type == "dynamic":
        view.rules.append(
            "keeps the longest table it has made until a short sequence comes: the result depends "
            "on earlier calls; cached keys keep theirs"
        )


def _transformers_453(view: _View):
    spec, p = view.spec, view.parameters
    if spec.rope_type != "yarn" or view.family in _SINCE_453:
        return _NOT_CONCERNED
    length, given = spec.max_position_embeddings, not any(ABSENT in n for n in spec.notes)
    if given and length is not None:
        ratio = length / p[_ORIGINAL]
        rule = f"takes max_position_embeddings / {_ORIGINAL} = {ratio:g} for the factor (to 4.55)"
        if ratio < 1:
            return view.cannot(f"{rule}, which is below 1")
        view.takes(f"{rule}: YaRN is off" if ratio == 1 else rule, factor=ratio)
    view.takes("does not know truncate", truncate=True)


def _transformers_448(view: _View):
    spec, length = view.spec, view.spec.max_position_embeddings
    if spec.rope_type != "yarn" or view.mla or view.family in _SINCE_448 or length is None:
        return _NOT_CONCERNED
    rule = f"does not know {_ORIGINAL}: max_position_embeddings stands in (to 4.50)"
    view.takes(rule, **{_ORIGINAL: length})
    view.takes("does not know truncate", truncate=True)
    view.takes("does not know mscale", mscale=None, mscale_all_dim=None)


def _vllm(view: _View):
    spec, p = view.spec, view.parameters
    if _research(view):
        return
    if spec.rope_type == "linear" and not isinstance(p["factor"], float):
        view.cannot("stops at a factor that is not a float")
    elif spec.rope_type == "dynamic":
        view.becomes("default", "scales only if max_trained_positions is given: not at all here")
    elif spec.rope_type == "ntk" and p["mixed_b"] is None and not _hunyuan(view):
        view.takes("'ntk' is the mixed-radix law with mixed_b = 1", mixed_b=1)
    elif spec.rope_type == "proportional":
        view.takes("does not read factor", factor=1.0)
    elif spec.rope_type == "yarn" and view.mla:
        view.takes("does not read truncate in DeepSeek's rope", truncate=True)
    elif spec.rope_type == "longrope":
        if spec.interleaved:
            return view.cannot("has longrope for half-split pairs only")
        if spec.max_position_embeddings is not None and p["short_mscale"] is None:
            rule = "derives the attention factor from the lengths alone"
            view.scales_by(rule, _by_lengths(view, "su"))
        view.rules.append(
            "chooses once per server: long for every sequence if max_model_len is more than "
            f"{_ORIGINAL}, short otherwise"
        )


def _llama_cpp(view: _View):
    spec, p = view.spec, view.parameters
    if _research(view):
        return
    if spec.rope_type == "proportional":
        return _NOT_CONCERNED
    if spec.rope_type == "dynamic" or (spec.rope_type == "ntk" and not _hunyuan(view)):
        view.cannot(f"has no {spec.rope_type}")
    elif spec.rope_type == "yarn":
        view.takes("does not know truncate: always rounds the ends of the ramp", truncate=True)
        if view.family not in ("grok", "ministral3"):
            rule = "beta_fast and beta_slow of the file are not read for this architecture: 32, 1"
            view.takes(rule, beta_fast=32, beta_slow=1)
        if p["attention_factor"] is not None and not view.mla and "mistral" not in view.family:
            rule = "derives the attention factor from the factor"
            view.scales_by(rule, scaling.yarn_mscale(p["factor"]))
        if view.reading("").spec.attention_factor != 1:
            rule = "shifting the cache (K-shift) multiplies the keys by the attention factor again"
            view.rules.append(rule)
    elif spec.rope_type == "longrope":
        if spec.max_position_embeddings is not None:
            policy = p["magnitude_scaling_policy"]
            rule = "derives the attention factor from the lengths alone"
            view.scales_by(rule, _by_lengths(view, "yarn" if policy == "yarn" else "su"))
        view.rules.append(
            "chooses once per context: long for every sequence if its size is more than "
            f"{_ORIGINAL}"
        )


def _megatron(view: _View):
    spec = view.spec
    if view.family == "deepseek_v4":
        return _NOT_CONCERNED
    if _research(view):
        return
    if spec.rope_type in ("dynamic", "ntk", "longrope", "proportional"):
        view.cannot(f"has no {spec.rope_type}")
    elif spec.rope_type == "llama3":
        rule = "low_freq_factor 1, high_freq_factor 4 and the length 8192 are fixed in its code"
        constants = {"low_freq_factor": 1, "high_freq_factor": 4, _ORIGINAL: 8192}
        view.takes(rule, **constants)
    elif spec.rope_type == "yarn" and not view.mla:
        if spec.interleaved:
            return view.cannot("has YaRN for half-split pairs only")
        if spec.rotary_dim != spec.head_dim:
            view.fields |= {"rotary_dim": spec.head_dim, "rotary_offset": 0, "axis_map": None}
            view.rules.append("ignores rotary_percent: YaRN turns the whole head")
        rule = "does not read attention_factor, and reads mscale without mscale_all_dim"
        view.scales_by(rule, _mscale_ratio(view))
        if _mscale_ratio(view) != 1:
            view.rules.append("with an attention factor other than 1 its fused kernel is not used")


def _hunyuan(view: _View) -> bool:
    return view.family.startswith("hunyuan")


def _by_lengths(view: _View, policy: str) -> float:
    original = view.parameters[_ORIGINAL]
    return scaling.magnitude(policy, view.spec.max_position_embeddings / original, original)


READERS: dict[str, Callable[[_View], object]] = {
    "transformers 5.23": _transformers,
    "transformers 4.53": _transformers_453,
    "transformers 4.48": _transformers_448,
    "vLLM 0.33": _vllm,
    "llama.cpp (llama_cpp_python 0.3.36)": _llama_cpp,
    "Megatron-LM (d98e8a64)": _megatron,
}
