"""One examination of a model: its tables, layers, softmax, configuration, perplexity."""

from __future__ import annotations

import dataclasses
import math

import torch

from .. import configs
from ..dialects import rope_type_of
from ..spec import RopeSpec
from . import measure
from .diagnose import METHOD_NAMES, Expected, Finding, frequencies, temperature
from .transformers import Patched

_ORIGINAL = "original_max_position_embeddings"
_CACHES = {
    "static": "keys stay valid at every length",
    "switch": "past {} tokens the other table counts, and keys cached before do not fit it",
    "dynamic": "every length has its own frequencies, and keys cached at another do not fit it",
}
# Findings that say the tables are good ones of another configuration.
_OF_ANOTHER = ("wrong factor", f"wrong {_ORIGINAL}", "truncate differs", "another method")


@dataclasses.dataclass(frozen=True)
class Tables:
    """One set of frequencies, of a rotary module for one kind of layer, measured and expected.

    inv_freq, expected_inv_freq                    float64 [rotary_dim / 2], radians per token
    attention_factor, expected_attention_factor    what multiplies cos and sin
    """

    where: str
    spec: RopeSpec
    inv_freq: torch.Tensor
    expected_inv_freq: torch.Tensor
    attention_factor: float
    expected_attention_factor: float


class Checkup:
    """What was measured of a model so far, and found."""

    def __init__(self, model, config):
        self.model, self.config = model, config
        attentions = [m for m in model.modules() if "Attention" in type(m).__name__]
        self.patched = sum(isinstance(module, Patched) for module in attentions)
        text = getattr(model.config, "get_text_config", lambda: model.config)()
        self.live = text
        self.tables, self.layers, self.findings, self.notes = [], {}, [], []
        self.specs, self.known = {}, {}

    def run(self):
        self._rotary_modules()
        if self.specs:
            self._cached_keys()
            self._unknown()
            self._softmax()
            self._configuration()

    def spec(self, kind) -> RopeSpec:
        """What the configuration means for one kind of layer."""
        if kind not in self.specs:
            self.specs[kind] = RopeSpec.from_config(self.config, kind)
        return self.specs[kind]

    def spec_of_layer(self, layer) -> RopeSpec:
        """What the configuration means for one layer, which may not rotate at all."""
        kinds = getattr(self.live, "layer_types", None)
        kind = kinds[layer] if kinds and layer < len(kinds) else None
        if ("layer", kind) not in self.known:
            try:
                spec = RopeSpec.from_config(self.config, kind)
            except ValueError:  # a kind of layer that says nothing about positions
                spec = self.spec(None)
            self.known["layer", kind] = spec
        spec = self.known["layer", kind]
        rotates = getattr(self.live, "no_rope_layers", None)  # 1 for layers that do (SmolLM3)
        if rotates and not rotates[layer]:
            spec = dataclasses.replace(spec, rope_type="none", parameters=(), hf_parameters=())
        return spec

    def expected(self, spec, kind=None):
        """(positions, Expected) on each side of the length where tables switch."""
        parameters = dict(spec.parameters)
        original, length = parameters.get(_ORIGINAL), spec.max_position_embeddings
        factor = parameters.get("factor") or 1
        known = [length, getattr(self.live, "max_position_embeddings", None)]
        known += [getattr(self.live, _ORIGINAL, None), self._live_block(kind).get(_ORIGINAL)]
        known = [n for n in (*known, original) if n]
        known += [n / factor for n in known] + [n * factor for n in known]
        known += [2.0**power for power in range(5, 25)]
        lengths = tuple(dict.fromkeys(float(n) for n in known if n > 1))
        if spec.cache_class == "switch":
            end = spec.switch_length
            yield measure.ladder(0, end), Expected(spec, end, lengths)
            yield measure.ladder(end, 2**31), Expected(spec, end + 1, lengths)
        else:
            # A per-length method at rest: up to the length where its law begins.
            end = length if spec.cache_class == "dynamic" and length else 2**31
            yield measure.ladder(0, end), Expected(spec, None, lengths)

    # ------------------------------------------------------------------------ rotary modules

    def _rotary_modules(self):
        modules = {
            name: module
            for name, module in self.model.named_modules()
            if "Rotary" in type(module).__name__
            and getattr(getattr(module, "config", None), "model_type", None) == self.live.model_type
        }
        for name, module in modules.items():
            built = getattr(module, "rope_type", None)
            kinds = [*built] if isinstance(built, dict) else [self._kind(name)]
            for kind in kinds:
                where = f"{name}, {kind}" if kind else name
                try:
                    sides = [*self.expected(self.spec(kind), kind)]
                except (TypeError, ValueError) as error:
                    self._refused(where, error)
                    continue
                self._buffers(module, kind if isinstance(built, dict) else None, where)
                for positions, expected in sides:
                    argument = kind if isinstance(built, dict) else None
                    self._table(module, argument, kind, where, positions, expected)
        if not modules:
            self.notes.append("it has no rotary module that this function knows")
            kinds = dict.fromkeys(getattr(self.live, "layer_types", None) or [None])
            for kind in kinds:
                try:
                    self.spec(kind)
                except (TypeError, ValueError) as error:
                    self._refused("configuration", error)

    def _refused(self, where, error):
        if str(error).startswith("model_type"):
            self._find("unknown model_type", where, f"nothing can be said: {error}", "warning")
        else:
            self._find("configuration refused", where, str(error))

    def _kind(self, name):
        """The kind of layer that a module with one set of tables is for."""
        try:
            self.spec(None)
        except (TypeError, ValueError):
            local = name.endswith("_local")
            return "sliding_attention" if local else "full_attention"
        return None

    def _table(self, module, argument, kind, where, positions, expected):
        if len(positions) < 2:
            return
        if expected.seq_len is not None and expected.spec.cache_class == "switch":
            where += ", long" if expected.seq_len > expected.spec.switch_length else ", short"
        try:
            measured = measure.tables(module, positions, expected.spec, argument)
        except Exception as error:  # other people's code, called as transformers calls it
            self.notes.append(f"{where} cannot be measured: {error}")
            return
        table = Tables(
            where,
            expected.spec,
            measured.inv_freq,
            expected.inv_freq,
            measured.factor,
            expected.factor,
        )
        self.tables.append(table)
        found = frequencies(expected, measured, where)
        self.findings += [found] if found else []
        if math.isfinite(measured.factor):
            hot = temperature(expected, measured.factor, measured.factor_error, where)
            self.findings += [hot] if hot else []
        if text := self._edited(module, argument, kind, found):
            self._find("scaling edited after load", where, text)

    def _buffers(self, module, argument, where):
        prefix = f"{argument}_" if argument else ""
        for name, buffer in module.named_buffers(recurse=False):
            if not name.startswith(prefix) or "inv_freq" not in name:
                continue
            if buffer.dtype in (torch.bfloat16, torch.float16):
                short = "bf16" if buffer.dtype == torch.bfloat16 else "fp16"
                text = f"{name} is {buffer.dtype}: the model was cast as a whole"
                self._find(f"{short} inv_freq", where, text)

    def _live_block(self, kind):
        block = getattr(self.live, "rope_parameters", None)
        block = block or getattr(self.live, "rope_scaling", None) or {}
        inner = block.get(kind) if kind else None
        return inner if isinstance(inner, dict) else block

    def _edited(self, module, argument, kind, found):
        """How the configuration of the live model differs from the one it was built with."""
        built = getattr(module, "rope_type", None)
        built = built.get(argument) if isinstance(built, dict) else built
        now = self._live_block(kind)
        now = now.get("rope_type", now.get("type", "default"))
        advice = "a loaded model does not follow its configuration: load it with the new one"
        if built is not None and built != now:
            return (
                f"the model was built with {built!r}, its configuration now says {now!r}; {advice}"
            )
        if found is None or found.name not in _OF_ANOTHER:
            return ""
        name = f"{argument}_original_inv_freq" if argument else "original_inv_freq"
        try:
            with torch.device("cpu"):
                fresh = getattr(type(module)(module.config), name)
            same = torch.equal(fresh.float(), getattr(module, name).float().cpu())
        except Exception:  # a rotary module of another kind
            return ""
        return "" if same else f"the tables are not those its configuration now makes; {advice}"

    # ------------------------------------------------------------------------ layers

    def _cached_keys(self):
        try:
            specs = {self.spec_of_layer(i) for i in range(self.live.num_hidden_layers)}
        except (TypeError, ValueError) as error:
            self.notes.append(f"the layers cannot be measured: {error}")
            return
        sides = {spec: [*self.expected(spec)] for spec in specs}
        wrong = {}
        for side in range(max(map(len, sides.values()))):
            chosen = {spec: each[min(side, len(each) - 1)] for spec, each in sides.items()}
            start = max(positions[0].item() for positions, _ in chosen.values())
            last = min(
                positions[-1].item() - positions[0].item() for positions, _ in chosen.values()
            )
            places = measure.ladder(start, start + last + 1)
            if len(places) < 2:
                continue
            try:
                layers = measure.layers(self.model, places, self.spec_of_layer)
            except Exception as error:  # other people's models, called as transformers calls them
                self.notes.append(f"the layers cannot be measured: {error}")
                return
            for i, measured in layers.items():
                self.layers.setdefault(i, measured)
                if isinstance(measured, str):
                    continue
                expected = chosen[self.spec_of_layer(i)][1]
                found = [frequencies(expected, measured, "")]
                if measured.factor is not None:
                    factor, error = measured.factor, measured.factor_error
                    found.append(temperature(expected, factor, error, ""))
                for finding in filter(None, found):
                    wrong.setdefault(finding.name, (finding, []))[1].append(i)
        self._weigh(wrong)

    def _unknown(self):
        """A model of which nothing could be measured is not known to be sound."""
        if self.tables or not all(isinstance(layer, str) for layer in self.layers.values()):
            return
        text = "neither its rotary modules nor its layers could be measured"
        if any(parameter.is_meta for parameter in self.model.parameters()):
            text += ": it is on the meta device and has no weights"
        self._find("nothing measured", type(self.model).__name__, text)

    def _weigh(self, wrong):
        """Put the findings of layers beside those of the tables, and say which count."""
        told = [layer for layer in self.layers.values() if not isinstance(layer, str)]
        if told and not wrong and self.patched >= len(told):
            remark = "; the layers are patched, do not read these tables, and turn as they should"
            seen = all(layer.factor is not None for layer in told)
            self.findings = [
                f._replace(severity="warning", text=f.text + remark)
                if seen or "temperature" not in f.name
                else f
                for f in self.findings
            ]
        known = {finding.name for finding in self.findings}
        for name, (finding, layers) in wrong.items():
            # Tables are measured more finely, and say better how they are wrong.
            if name in known or (known and name == "frequencies differ"):
                continue
            first, last = min(layers), max(layers)
            names = f"layers {first} .. {last}" if last > first else f"layer {first}"
            self._find(name, f"{names}, by their keys", finding.text)

    def _softmax(self):
        """A temperature that sits in the scale of the softmax."""
        odd = {}
        for name, module in self.model.named_modules():
            scale = getattr(module, "scaling", None)
            if "Attention" not in type(module).__name__ or not isinstance(scale, float):
                continue
            layer = getattr(module, "layer_idx", None)
            if not isinstance(layer, int) or layer >= self.live.num_hidden_layers:
                continue
            spec, base = self.spec_of_layer(layer), self._scale(module)
            for factor in (spec.attention_factor, math.sqrt(spec.softmax_multiplier)):
                if base is None or not isinstance(factor, float) or factor == 1:
                    continue
                ratio = scale / base / spec.softmax_multiplier
                if math.isclose(ratio, factor**2, rel_tol=1e-5):
                    text = f"{factor:.6g} multiplies q and k already, and its square the softmax"
                    odd.setdefault(("temperature applied twice", text), []).append(name)
                elif math.isclose(ratio, factor**-2, rel_tol=1e-5):
                    text = f"the scale of the softmax lacks, or takes back, {factor**2:.6g}"
                    odd.setdefault(("temperature missing", text), []).append(name)
        for (name, text), modules in odd.items():
            self._find(name, f"{modules[0]}.scaling, {len(modules)} in all", text)

    def _scale(self, module):
        for name, power in (("query_pre_attn_scalar", -0.5), ("attention_multiplier", 1.0)):
            if (value := getattr(self.live, name, None)) is not None:
                return value**power
        width = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
        return None if width is None else width**-0.5

    # ------------------------------------------------------------------------ configuration

    def _configuration(self):
        self._lost_keys()
        for kind, spec in self.specs.items():
            where = f"configuration, {kind}" if kind else "configuration"
            parameters = dict(spec.parameters)
            original, factor = parameters.get(_ORIGINAL), parameters.get("factor")
            length = spec.max_position_embeddings
            extends = spec.rope_type in ("yarn", "longrope") and original and factor and length
            if extends and factor > 1 and not math.isclose(length / original, factor, rel_tol=0.01):
                text = (
                    f"factor is {factor:g}, but max_position_embeddings / {_ORIGINAL} is "
                    f"{length} / {original:g} = {length / original:g}: if the model was trained "
                    f"at {length / factor:g}, {_ORIGINAL} has to say so"
                )
                self._find(f"wrong {_ORIGINAL}", where, text, "warning")
            self.notes += [f"{where}: {note}" for note in spec.notes]
            words = _CACHES[spec.cache_class].format(spec.switch_length)
            cache = f"key-value cache{f' ({kind})' if kind else ''}: {spec.cache_class}, {words}"
            self.notes.append(cache)

    def _lost_keys(self):
        lost = configs.lost_keys(self.config)
        if not lost:
            return
        method, _ = rope_type_of(lost)
        keys = ", ".join(f"{key}={value!r}" for key, value in lost.items())
        text = f"the model passes over {keys}: its kinds of layers have rope blocks of their own"
        if method == "default":
            self._find("rope keys without effect", "configuration", text, "warning")
        else:
            self._find(f"{METHOD_NAMES.get(method, method)} silently off", "configuration", text)

    def _find(self, name, where, text, severity="error"):
        finding = Finding(name, where, text, severity)
        if not any(f[:2] == finding[:2] for f in self.findings):
            self.findings.append(finding)

    # ------------------------------------------------------------------------ perplexity

    def probe(self, ids, lengths):
        """{context length: perplexity} of the same last tokens."""
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
            raise TypeError(f"input_ids must be an integer tensor, got {type(ids).__name__}")
        ids = ids.flatten()
        if lengths is None:
            spec = next(iter(self.specs.values()), None)
            parameters = {} if spec is None else dict(spec.parameters)
            longest = (spec and spec.max_position_embeddings) or len(ids)
            long = min(longest, len(ids))
            short = parameters.get(_ORIGINAL) or longest / parameters.get("factor", 4)
            short = min(round(short), long // 2)
        else:
            short, long = lengths
        if not 2 <= short < long <= len(ids):
            raise ValueError(
                f"lengths must be 2 <= short < long <= {len(ids)} tokens, got {(short, long)}"
            )
        ids = ids[:long].to(next(self.model.parameters()).device)
        scored = max(1, short // 2)
        found = {}
        with measure.evaluating(self.model):
            for length in (short, long):
                logits = self.model(input_ids=ids[None, long - length :], use_cache=False).logits
                logs = logits[0, -scored - 1 : -1].double().log_softmax(-1)
                found[length] = (-logs.gather(-1, ids[-scored:, None]).mean()).exp().item()
        if found[long] > 1.1 * found[short]:
            text = (
                f"{found[short]:.4g} with a context of {short} tokens, {found[long]:.4g} with "
                f"{long}: the model cannot use the longer one"
            )
            self._find("long context hurts", "perplexity of the same tokens", text, "warning")
        return found
