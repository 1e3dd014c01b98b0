"""extend_config: the configuration of a model whose context window another method extends."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

from . import configs, legal, models, scaling
from .containers import TEXT_CONFIGS
from .spec import RopeSpec

_ORIGINAL, _LENGTH = "original_max_position_embeddings", "max_position_embeddings"
# The parameters of each method that transformers reads, besides factor and the lengths.
_BANDS = ("low_freq_factor", "high_freq_factor")
_PARAMETERS = {
    "default": (),
    "linear": (),
    "ntk": (),
    "dynamic": (),
    "ntk_by_parts": _BANDS,
    "llama3": _BANDS,
    "yarn": ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
    "proportional": ("partial_rotary_factor",),
}
_HAVE_ORIGINAL = ("ntk_by_parts", "llama3", "yarn", "longrope")
# What a block says besides its method, and goes on saying.
_KEPT = (
    "rope_theta",
    "partial_rotary_factor",
    "mrope_section",
    "mrope_interleaved",
    "interleaved",
    "llama_4_scaling_beta",
)


def extend_config(
    config,
    method,
    *,
    factor=None,
    original_max_position_embeddings=None,
    max_position_embeddings=None,
    layer_type=None,
    **parameters,
):
    """A copy of a model configuration, with its rotary embedding extended by ``method``.

    Give the copy to ``from_pretrained(..., config=...)`` or ``AutoModelForCausalLM.from_config``:
    the scaling of a model that is already loaded does not change with its configuration. A copy
    speaks the dialect of the original: ``rope_parameters`` (transformers 5), or ``rope_scaling``
    beside a top-level ``rope_theta`` (before), which transformers 5 reads too. It is read back, and
    says as much as it takes to mean what was asked: an explicit plain block where the family would
    scale by itself, a block per kind of layer where transformers reads no other.

    Lengths: ``original_max_position_embeddings`` is what the model was trained at, written into the
    block wherever transformers reads it (also beside it, as Phi-3 has it).
    ``max_position_embeddings`` becomes ``round(factor * original)``, the length the extended model
    is made for; only ``dynamic`` keeps it at the original length, where its law begins.

    ``ntk`` is written as a larger ``rope_theta``, and ``ntk_by_parts`` as ``llama3`` with its bands
    (1, 32): transformers has the same functions by these names.

    Args:
        config: a config.json as a dict, or a transformers configuration; never changed. Of a
            composite configuration the text model counts.
        method: "default" (takes the scaling away), "linear", "ntk", "dynamic", "ntk_by_parts",
            "llama3", "yarn", "longrope" or "proportional".
        factor: length wanted over original length, >= 1. None: what max_position_embeddings makes
            of it.
        original_max_position_embeddings: None: the length of an unscaled configuration. Of one that
            is scaled already it must be given: the old scaling is replaced, not multiplied.
        max_position_embeddings: None: from the factor. With a factor, another length than their
            product (a power of two above it, say).
        layer_type: which of several blocks, where a model's layers rotate differently. None: that
            of its global attention; sliding windows need no extension.
        **parameters: the method's own, by transformers' names: ``beta_fast``, ``beta_slow``,
            ``truncate``, ``mscale``, ``mscale_all_dim``, ``attention_factor`` (yarn);
            ``short_factor``, ``long_factor``, ``attention_factor`` (longrope); ``low_freq_factor``
            = 1, ``high_freq_factor`` = 4 (llama3) or 32 (ntk_by_parts); ``partial_rotary_factor``
            (proportional).

    Returns:
        A configuration of the type of ``config``, which ``RopeSpec.from_config`` has read, and of
        which transformers computes what was asked for.

    Raises:
        TypeError: config is neither a mapping nor a configuration object, method no string, a list
            of factors no list.
        ValueError: a method that transformers does not have, a parameter the method does not have
            or that is out of its range, a configuration that is scaled already (see above), or one
            of which transformers would compute something else.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be a string, got {method!r}")
    if method not in _PARAMETERS:
        nearest = ": transformers has no such method" if method in scaling.METHODS else ""
        names = ", ".join(_PARAMETERS)
        raise ValueError(f"method must be one of {names}, got {method!r}{nearest}")
    for name in parameters.keys() - set(_PARAMETERS[method]):
        known = ", ".join(_PARAMETERS[method]) or "no parameters of its own"
        raise ValueError(f"{name} is not a parameter: {method!r} has {known}")
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise TypeError(f"config must be a dict or have to_dict(), got {type(config).__name__}")
    node = _Node(config)
    kind = node.kind(layer_type)
    old = RopeSpec.from_config(config, kind)
    original = _original(old, node, method, original_max_position_embeddings)
    factor, length = _lengths(method, factor, original, max_position_embeddings)
    block = node.kept(kind) | {"rope_type": method}
    if factor is not None and method != "ntk":
        block["factor"] = factor
    if method in _HAVE_ORIGINAL:
        block[_ORIGINAL] = original
    elif "llama_4_scaling_beta" in block and old.q_temperature is not None:
        block[_ORIGINAL] = round(old.q_temperature[1])  # of that temperature alone
    theta = old.rope_theta
    if method in ("llama3", "ntk_by_parts"):
        block["rope_type"] = "llama3"
        block |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0 if method == "llama3" else 32.0}
    elif method == "ntk":
        if old.rotary_dim < 4:
            raise ValueError(f"method must not be 'ntk' with a rotary_dim of {old.rotary_dim}")
        block["rope_type"] = "default"
        theta *= factor ** (old.rotary_dim / (old.rotary_dim - 2))
    block |= {name: _plain(name, value) for name, value in parameters.items() if value is not None}
    others = {k: spec for k, spec in configs.layer_specs(config).items() if k != kind}
    wanted = _Wanted(kind, block, theta, length, old, others)
    errors = []
    for write in (_Node.write_as_it_is, _Node.write_in_full, _Node.write_per_layer):
        extended = copy.deepcopy(config)
        if write(_Node(extended), wanted):
            _Node(extended).write_lengths(length, original)
            _Node(extended).write_head_dim(method, old.head_dim)
            try:
                wanted.check(extended, method)
                return extended
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _original(old, node, method, given):
    """The length before extension; refuses what would be scaled a second time."""
    if given is not None:
        return legal.number(_ORIGINAL, given)
    if old.rope_type == "none":
        raise ValueError("config must have rotary layers of this kind, and these do not rotate")
    same_law = old.rope_type == method == "proportional"
    if (old.rope_type != "default" and not same_law) or dict(old.parameters).get("factor", 1) != 1:
        told = dict(old.parameters).get(_ORIGINAL)
        hint = "" if told is None else f" (it says {told})"
        raise ValueError(
            f"{_ORIGINAL} is required: the configuration is scaled already, by {old.rope_type!r}, "
            f"which is to be replaced; pass the length the model had before it{hint}"
        )
    original = node.get(_ORIGINAL) or old.max_position_embeddings
    if original is None:
        raise ValueError(f"{_ORIGINAL} is required where the configuration has no length, got None")
    return original


def _lengths(method, factor, original, length):
    """(factor | None, max_position_embeddings) of the extended configuration."""
    if length is not None:
        length = legal.integer(_LENGTH, length, 2)
    if method == "default":
        if factor is not None:
            raise ValueError(f"factor must be None with 'default', got {factor!r}")
        return None, length or round(original)
    if method == "dynamic" and length is not None:
        raise ValueError(
            f"{_LENGTH} must be None with 'dynamic', whose law begins at the original length, "
            f"got {length}"
        )
    if factor is None:
        if length is None:
            raise ValueError(f"factor or {_LENGTH} is required, got None for both")
        factor = length / original
    factor = float(legal.number("factor", factor))
    if method == "dynamic":
        return factor, round(original)
    return factor, length or round(factor * original)


def _plain(name, value):
    """A parameter as JSON has it."""
    if name in ("short_factor", "long_factor"):
        values = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(values, list | tuple):
            raise TypeError(f"{name} must be a list of numbers, one per pair, got {value!r}")
        return [float(legal.number(name, number)) for number in values]
    return float(legal.number(name, value)) if name == "attention_factor" else value


class _Wanted(NamedTuple):
    """What an extended configuration has to say, however it says it."""

    kind: str | None
    block: dict
    theta: float
    length: int
    old: RopeSpec
    others: dict
    """The spec of every other kind of layer before the extension."""

    def check(self, config, method):
        """ValueError unless a configuration means it, and transformers computes it."""
        spec = RopeSpec.from_config(config, self.kind)
        if missed := self._missed(spec) or self._changed(config):
            raise ValueError(f"method must not be {method!r} here: {missed}")
        spec.inv_freq("hf")  # raises where transformers computes NaN

    def _missed(self, spec) -> str:
        """What is lost of the kind of layer that is extended; "" if nothing."""
        if spec.hf_refusal:
            return spec.hf_refusal
        lost = [name for name, _ in spec.hf_parameters]
        if lost:
            notes = [note for note in spec.notes if "transformers" in note]
            return "; ".join(notes) or f"transformers reads {', '.join(lost)} wrong"
        told = dict(spec.parameters) | {
            "rope_type": spec.rope_type,
            "rope_theta": spec.rope_theta,
            _LENGTH: spec.max_position_embeddings,
        }
        wanted = {name: value for name, value in self.block.items() if name not in _KEPT}
        wanted |= {"rope_theta": self.theta, _LENGTH: self.length}
        if self.block["rope_type"] not in _HAVE_ORIGINAL:
            wanted.pop(_ORIGINAL, None)
        told["a temperature of q"] = spec.q_temperature is not None
        wanted["a temperature of q"] = self.old.q_temperature is not None
        if spec.rope_type != "proportional" and self.old.rope_type != "proportional":
            wanted["rotary_dim"], told["rotary_dim"] = self.old.rotary_dim, spec.rotary_dim
        for name, value in wanted.items():
            value = tuple(value) if isinstance(value, list) else value
            if told.get(name) != value:
                return f"{name} would be read as {told.get(name)!r} instead of {value!r}"
        return ""

    def _changed(self, config) -> str:
        """Which other layers change that have no part in the extended block; "" if none."""
        node, specs = _Node(config), configs.layer_specs(config)
        for kind, before in self.others.items():
            if not node.shares(kind) and kind in specs and not _same(before, specs[kind]):
                return f"the layers of type {kind} would change too"
        return ""


def _same(spec: RopeSpec, other: RopeSpec) -> bool:
    names = ("rope_type", "rope_theta", "parameters", "rotary_dim", "rotary_offset")
    return all(getattr(spec, name) == getattr(other, name) for name in names)


class _Node:
    """The text model's part of a configuration: a dict or an object, either dialect."""

    def __init__(self, config):
        self.config = config
        for key in TEXT_CONFIGS:
            inner = self.get(key)
            if inner is not None:
                owner = _Node(inner)
                if (
                    owner.get("rope_parameters")
                    or owner.get("rope_scaling")
                    or not (self.get("rope_parameters") or self.get("rope_scaling"))
                ):
                    self.config = owner.config
                break
        is_dict = isinstance(self.config, Mapping)
        version = str(self.get("transformers_version") or "")
        if is_dict and self.get("rope_parameters") is None:
            self.old = any(self.get(k) is not None for k in ("rope_scaling", "rope_theta")) or (
                version[:1].isdigit() and int(version.split(".")[0]) < 5
            )
        else:
            self.old = not is_dict and not hasattr(self.config, "rope_parameters")
        self.key = "rope_scaling" if self.old else "rope_parameters"

    def get(self, key):
        if isinstance(self.config, Mapping):
            return self.config.get(key)
        return getattr(self.config, key, None)

    def set(self, key, value):
        if isinstance(self.config, Mapping):
            self.config[key] = value
        else:
            setattr(self.config, key, value)

    @property
    def block(self) -> dict:
        return dict(self.get(self.key) or {})

    @property
    def nested(self) -> bool:
        return any(isinstance(value, Mapping) for value in self.block.values())

    @property
    def family(self) -> str | None:
        found = models.find(self.get("model_type"))
        return found and found[0]

    def kind(self, layer_type):
        """The layer type to extend: as asked, or the one with global attention."""
        layers = models.LAYERS.get(self.family, {})
        if not layers and not self.nested:
            return layer_type
        if layer_type is not None:
            if not self.nested and not getattr(layers.get(layer_type), "scaled", True):
                raise ValueError(
                    f"layer_type must be a kind whose scaling this configuration can say, got "
                    f"{layer_type!r}"
                )
            return layer_type
        kinds = [kind for kind, layer in layers.items() if layer.scaled] or ["full_attention"]
        if self.nested and kinds[0] not in self.block:
            names = ", ".join(map(repr, self.block))
            raise ValueError(f"layer_type must be one of {names}, got None")
        return kinds[0]

    def kept(self, kind) -> dict:
        """What stays of the block."""
        block = self.block
        if self.nested:
            block = block.get(kind) or {}
        elif not block and self.get("rope_parameters") is None:
            block = models.BLOCKS.get(self.family, {})
        return {key: block[key] for key in _KEPT if block.get(key) is not None}

    def shares(self, kind) -> bool:
        """Whether layers of this kind turn by the one block that there is."""
        layer = models.LAYERS.get(self.family, {}).get(kind)
        return self.old and not self.nested and layer is not None and layer.scaled

    # Ways to say it, the shortest first. True: this one can be tried.

    def write_as_it_is(self, wanted: _Wanted) -> bool:
        """In the words of the original: no block for a plain embedding of the old dialect."""
        block = dict(wanted.block)
        if self.nested:
            block["rope_theta"] = wanted.theta
            blocks = {k: v for k, v in self.block.items() if isinstance(v, Mapping)}
            self.set(self.key, blocks | {wanted.kind: block})
        elif self.old:
            block.pop("rope_theta", None)
            self._set_theta(wanted)
            plain = block["rope_type"] == "default" and len(block) == 1
            self.set(self.key, None if plain else block)
        else:
            self.set(self.key, block | {"rope_theta": wanted.theta})
        return True

    def write_in_full(self, wanted: _Wanted) -> bool:
        """A block even if it is plain, for families that have another one of their own."""
        if self.nested or not self.old:
            return False
        self._set_theta(wanted)
        self.set(self.key, {k: v for k, v in wanted.block.items() if k != "rope_theta"})
        return True

    def write_per_layer(self, wanted: _Wanted) -> bool:
        """A block for each kind of layer, for families that do not read another."""
        layers = models.LAYERS.get(self.family, {})
        if self.nested or not layers or (self.old and any(one.scaled for one in layers.values())):
            return False
        blocks = {}
        for kind, spec in wanted.others.items():
            if spec.rope_type != "default":
                return False
            blocks[kind] = {"rope_type": "default", "rope_theta": spec.rope_theta}
            if spec.rotary_dim != spec.head_dim:
                blocks[kind]["partial_rotary_factor"] = spec.rotary_dim / spec.head_dim
        blocks[wanted.kind] = wanted.block | {"rope_theta": wanted.theta}
        self.set("rope_parameters", blocks)
        return True

    def _set_theta(self, wanted: _Wanted):
        """The base at the top level, under the key that the family reads."""
        model = models.MODELS.get(self.family)
        key = "rope_theta" if model is None else model.theta_key
        layer = models.LAYERS.get(self.family, {}).get(wanted.kind)
        key = key if layer is None else layer.theta_key
        if self.get(key) is not None or wanted.block.get("rope_theta") != wanted.theta:
            self.set(key, wanted.theta)

    def write_lengths(self, length, original):
        self.set(_LENGTH, length)
        if self.get(_ORIGINAL) is not None:
            self.set(_ORIGINAL, round(original))

    def write_head_dim(self, method, head_dim):
        needed = method == "longrope" and self.family in models.NO_HEAD_DIM
        if needed and self.get("head_dim") is None:
            self.set("head_dim", head_dim)
