"""Model configurations of every kind, read into a RopeSpec that says what it had to decide."""

from __future__ import annotations

from collections.abc import Mapping

from . import containers, legal, models, positions
from .dialects import Block, rope_type_of
from .spec import RopeSpec

_THETA_KEYS = ("rope_theta", "rotary_emb_base")
_PARTIAL_KEYS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# A family nobody has told us about: nothing but what its configuration says.
_STRANGER = models.Model(False, 0.0, 0, False, 1.0, 0)


def from_config(
    config, layer_type=None, *, interleaved=None, rotary_offset=None, axes=None
) -> RopeSpec:
    """The rotary embedding that a model configuration means.

    Args:
        config: a config.json as a dict, a transformers configuration object, or a Mistral
            params.json. Of a composite configuration the text model counts.
        layer_type: which kind of layer, where a model's layers rotate differently
            ("full_attention", "sliding_attention", ...).
        interleaved: pairs (2 j, 2 j + 1). None: as the model_type does.
        rotary_offset: first rotated dimension of the head. None: as the model_type does (0 if it is
            unknown).
        axes: position axes. None: as the model_type does (1 if it is unknown). 1 reads a multi-axis
            model as text only.

    Returns:
        A spec whose ``notes`` list the keys without effect, the disagreements inside the
        configuration, and where transformers computes something else.

    Raises:
        TypeError: ``config`` is neither a mapping nor has ``to_dict()``.
        ValueError: an unknown model_type without ``interleaved``; no ``layer_type`` where layers
            differ; a rope key that is unknown, missing, out of range, or contradicts another.
    """
    specs = layer_specs(
        config, layer_type, interleaved=interleaved, rotary_offset=rotary_offset, axes=axes
    )
    first = next(iter(specs.values()))
    if any(spec != first for spec in specs.values()):
        kinds = ", ".join(map(repr, specs))
        raise ValueError(f"layer_type must be one of {kinds}, which rotate differently, got None")
    return first


def layer_specs(
    config, layer_type=None, *, interleaved=None, rotary_offset=None, axes=None
) -> dict[str | None, RopeSpec]:
    """The spec of every kind of layer that :func:`from_config` may be asked for, or of the one
    asked for here: {None: spec} where the configuration makes no difference between layers."""
    c = containers.text_model(config)
    legal.outer(c)
    name, model = models.find(c.get("model_type")) or (None, _STRANGER)
    if name is None and interleaved is None:
        raise ValueError(
            "model_type must be a known one, or interleaved= be passed (and rotary_offset= and "
            f"axes= unless they are 0 and 1), got {c.get('model_type')!r}"
        )
    reader = _Reader(c, name, model, interleaved, rotary_offset, axes)
    return {kind: reader.spec(kind) for kind in reader.kinds(layer_type)}


def lost_keys(config) -> dict:
    """The rope keys of a configuration that have no effect beside or instead of the blocks that its
    kinds of layers have of their own."""
    c = containers.text_model(config)
    name, _ = models.find(c.get("model_type")) or (None, None)
    return containers.rope_keys(c, name).lost


def model_type(config) -> str | None:
    """The model_type whose rotary embedding a configuration describes: the text model's."""
    return containers.text_model(config).get("model_type")


class _Reader:
    """One configuration, and the spec of each kind of its layers."""

    def __init__(self, c: dict, name, model: models.Model, interleaved, rotary_offset, axes):
        self.c, self.name, self.model = c, name, model
        self.interleaved, self.rotary_offset, self.axes = interleaved, rotary_offset, axes
        if axes is not None:
            legal.integer("axes", axes, 1)
        self.layers = models.LAYERS.get(name, {})
        self.length = c.get("max_position_embeddings")
        if self.length is None:
            self.length = model.max_position_embeddings or None
        self.rope = containers.rope_keys(c, name)
        self.blocks = self.rope.nested
        self.nope = model.nope
        if name in ("exaone4", "exaone_moe") and c.get("sliding_window", 4096) is None:
            self.nope = ""

    def kinds(self, layer_type) -> tuple[str | None, ...]:
        """The kind of layer asked for, or every kind that the model has."""
        listed = tuple(dict.fromkeys(self.c.get("layer_types") or ()))
        kinds = tuple(dict.fromkeys((*self.layers, *self.blocks)))
        if self.name == "llama4_text":
            kinds = ("chunked_attention", "full_attention")
        kinds = tuple(kind for kind in kinds if kind in listed) or kinds
        if not isinstance(layer_type, str | None):
            raise TypeError(f"layer_type must be a string or None, got {layer_type!r}")
        layer_type = models.LAYER_ALIASES.get(self.name, {}).get(layer_type, layer_type)
        if layer_type is None:
            return kinds or (None,)
        allowed = kinds or listed or _LAYER_TYPES
        if layer_type not in allowed:
            names = ", ".join(map(repr, allowed))
            raise ValueError(f"layer_type must be one of {names}, got {layer_type!r}")
        return (layer_type,)

    def spec(self, kind: str | None) -> RopeSpec:
        layer, notes = self.layers.get(kind), []
        head_dim = self._head_dim(kind, layer)
        if kind is not None and kind == self.nope:
            return self._still(head_dim)
        if self.nope:
            notes.append(f"layers of type {self.nope} do not rotate")
        if self.rope.lost:
            lost = ", ".join(self.rope.lost)
            kinds = ", ".join(dict.fromkeys((*self.layers, *self.blocks)))
            notes.append(
                f"{lost} of the rope block without effect: {kinds} have blocks of their own"
            )
        keys = self._keys(kind, layer, notes)
        theta = self._theta(keys, kind, layer, notes)
        partial = self._partial(keys, kind, head_dim, notes)
        legal.number("partial_rotary_factor", partial)
        layout, section = self._axes(keys, notes)
        beta = keys.pop("llama_4_scaling_beta", None)
        beside = keys.get("original_max_position_embeddings")
        block = Block(
            keys,
            family=self.name,
            mla=self.model.mla,
            length=self.length,
            outer_original=self.c.get("original_max_position_embeddings"),
            nested=bool(self.blocks),
            split=bool(self.layers),
        )
        block.read()
        pairs = head_dim // 2 if block.rope_type == "proportional" else int(head_dim * partial) // 2
        offset = self.rotary_offset
        if offset is None:
            offset = head_dim - 2 * pairs if self.model.at_end else 0
        flat_olmo3 = (self.name, kind) == ("olmo3", "sliding_attention") and not self.blocks
        if flat_olmo3 and theta != layer.rope_theta:  # its rope_theta reaches the other layers only
            block.hf_refusal = f"transformers misses rope_theta={theta!r} for {kind}"
        return RopeSpec.of(
            block.rope_type,
            head_dim=head_dim,
            rope_theta=theta,
            interleaved=self._interleaved(),
            partial_rotary_factor=partial,
            rotary_offset=offset,
            max_position_embeddings=self.length,
            axis_map=positions.axis_map(layout, pairs, section) if layout else None,
            q_temperature=self._temperature(beta, beside, block, notes),
            softmax_multiplier=block.softmax_multiplier,
            hf_parameters=tuple(block.hf.items()),
            hf_refusal=block.hf_refusal,
            notes=(*notes, *block.notes),
            **block.parameters,
        )

    def _keys(self, kind, layer, notes) -> dict:
        """The rope block of one kind of layer."""
        if self.blocks:
            return dict(self.blocks.get(kind) or {})
        if layer is None:
            return dict(self.rope.flat)
        if not self.rope.flat:
            return dict(layer.block)
        only = self.c.get("yarn_only_types")
        if not (layer.scaled if only is None else kind in only):
            return {}
        keys = dict(self.rope.flat)
        if models.FLAT.get(self.name) == "read":  # of such a block only the method counts
            for key in ("rope_theta", "partial_rotary_factor"):
                if key in keys:
                    value = keys.pop(key)
                    notes.append(f"{key}={value!r} of the rope block has no effect in {self.name}")
        return keys

    def _still(self, head_dim) -> RopeSpec:
        """A layer that does not rotate; in Llama-4 its q has a temperature."""
        temperature = None
        if self.name == "llama4_text" and self.c.get("attn_temperature_tuning", True):
            temperature = (self.c.get("attn_scale", 0.1), self.c.get("floor_scale", 8192), 1)
        return RopeSpec.of(
            "none",
            head_dim=head_dim,
            rope_theta=self.model.rope_theta,
            interleaved=self._interleaved(),
            q_temperature=temperature,
            max_position_embeddings=self.length,
        )

    def _interleaved(self) -> bool:
        if self.interleaved is not None:
            return self.interleaved
        told = self.c.get("rope_interleave")
        return self.model.interleaved if told is None else bool(told)

    def _head_dim(self, kind, layer) -> int:
        c, model = self.c, self.model
        if model.mla:
            return self._dims(("qk_rope_head_dim", c), default=model.head_dim)
        if layer is not None and layer.head_dim is not None:
            own = self._of_a_layer("per_layer_config", kind)
            own = {} if own is None else own
            if not isinstance(own, Mapping):
                raise ValueError(f"per_layer_config must be a dict of dicts, got {own!r}")
            return self._dims(("head_dim", own), (layer.head_dim_key, c), default=layer.head_dim)
        if c.get("head_dim") is not None:
            return self._dims(("head_dim", c))
        hidden, heads = c.get("hidden_size"), c.get("num_attention_heads")
        if model.head_dim and (model.own_head_dim or (hidden is None and heads is None)):
            return model.head_dim
        if not hidden or not heads:
            raise ValueError(
                "head_dim is required, or hidden_size and num_attention_heads, got "
                f"{hidden!r} and {heads!r}"
            )
        head_dim = legal.count("hidden_size", hidden) // legal.count("num_attention_heads", heads)
        return legal.dims("head_dim", head_dim)

    @staticmethod
    def _dims(*places, default=None) -> int:
        """The first of these (key, dict) that is given, as a number of dimensions."""
        for key, keys in places:
            if keys.get(key) is not None:
                return legal.dims(key, keys[key])
        return default

    def _of_a_layer(self, key, kind):
        """The entry of a per-layer list or dict for the first layer of a kind; others as is."""
        value = self.c.get(key)
        kinds = list(self.c.get("layer_types") or ())
        if isinstance(value, Mapping):
            at = (int(index) for index in value if int(index) < len(kinds))
            found = [i for i in at if kinds[i] == kind]
            return next((v for i, v in value.items() if int(i) in found), None)
        if not isinstance(value, list | tuple):
            return value
        if value and all(one == value[0] for one in value):
            return value[0]
        if kind not in kinds or len(value) < len(kinds):
            raise ValueError(
                f"{key} has a value per layer and needs as many layer_types, got {kinds}"
            )
        return value[kinds.index(kind)]

    def _outer(self, names, mine, kind, notes):
        """The value of a top-level key that goes by several names: by ``mine``, of a family that we
        know, by any of an unknown one."""
        if self.name is None:
            given = (self._of_a_layer(name, kind) for name in (mine, *names))
            return next((value for value in given if value is not None), None)
        theirs = {layer.theta_key for layer in self.layers.values()}
        for name in names:
            if name != mine and name not in theirs and self.c.get(name) is not None:
                value = self.c[name]
                notes.append(f"{name}={value!r} has no effect: {self.name} reads {mine}")
        return self._of_a_layer(mine, kind)

    def _theta(self, keys, kind, layer, notes):
        key = self.model.theta_key if layer is None else layer.theta_key
        outer = self._outer(_THETA_KEYS, key, kind, notes)
        inner = keys.pop("rope_theta", None)
        if inner is not None:
            if outer not in (None, inner) and not self.blocks:
                given = self.rope.flat and not self.rope.own
                where = "the rope block" if given else f"the default rope block of {self.name}"
                notes.append(
                    f"{key} is {inner!r} in {where} and {outer!r} at the top level, "
                    f"{inner!r} counts"
                )
            return inner
        if outer is None and self.name is None:
            raise ValueError("rope_theta is required for an unknown model_type, got None")
        return outer if outer is not None else (layer or self.model).rope_theta

    def _partial(self, keys, kind, head_dim, notes) -> float:
        c, model = self.c, self.model
        partial = keys.pop("partial_rotary_factor", None)
        if model.mla:
            return 1.0  # qk_rope_head_dim, which is all that rotates, is the head here
        outer = self._outer(_PARTIAL_KEYS, model.partial_key, kind, notes)
        if partial is None:
            partial = outer
        if partial is None:
            partial = self._of_a_layer("partial_rotary_factors", kind)
        width = c.get("qk_rope_head_dim" if model.at_end else "rotary_dim")
        if partial is None and width is not None and model.partial is not None:
            partial = width / head_dim
        rope_type, _ = rope_type_of(keys)
        if partial is None:
            return 1.0 if model.partial is None else model.partial
        if model.partial is None and rope_type == "default" and partial != 1:
            notes.append(
                f"partial_rotary_factor={partial!r} has no effect: the default rope of {self.name} "
                "turns the whole head"
            )
            return 1.0
        return partial

    def _axes(self, keys, notes) -> tuple[str, tuple[int, ...]]:
        """(layout, section) of a multi-axis model, ("", ()) of any other."""
        given = keys.pop("mrope_section", None)
        xdrope = keys.pop("xdrope_section", None)
        if xdrope is not None and self.axes != 1:
            raise ValueError(
                f"xdrope_section must be absent, got {xdrope!r}: its axes are not supported; "
                "axes=1 reads the model as text only"
            )
        told = keys.pop("interleaved", None)
        told = keys.pop("mrope_interleaved", told)
        layout = self.model.mrope
        if not isinstance(given, list | tuple | None):
            raise ValueError(f"mrope_section must be a list, got {given!r}")
        section = tuple(self.model.mrope_section if given is None else given)
        if layout and told is not None and told != (layout == "alternating"):
            notes.append(f"mrope_interleaved={told!r} has no effect in {self.name}")
        if not layout and given is not None:
            if self.name is None and self.axes is None:
                raise ValueError("axes is required for an unknown model_type with mrope_section")
            if self.axes in (None, 1):
                notes.append(f"mrope_section={given!r} has no effect with one position axis")
                section = ()
            else:
                layout = "alternating" if told else "blocks"
        if self.axes == 1:
            return "", ()
        if self.axes is not None and self.axes != len(section):
            raise ValueError(
                f"axes must be {len(section) or 1}, as mrope_section is {list(section)}, "
                f"got {self.axes!r}"
            )
        return layout, section

    def _temperature(self, beta, original, block: Block, notes):
        """llama_4_scaling_beta in the block (Ministral-3), llama_4_scaling beside it (Mistral)."""
        beside = containers.block(self.c, "llama_4_scaling")
        if beside:
            length = beside.get("original_max_position_embeddings")
            if beside.get("beta") is None or length is None:
                raise ValueError(
                    "llama_4_scaling must have beta and original_max_position_embeddings, got "
                    f"{dict(beside)!r}"
                )
            return beside["beta"], length, 0
        if beta is not None and not self.model.temperature:
            notes.append(f"llama_4_scaling_beta={beta!r} has no effect in {self.name}")
        if beta is None or not self.model.temperature:
            return None
        if original is None:
            original = self.length
        return beta, block.parameters.get("original_max_position_embeddings", original), 0
