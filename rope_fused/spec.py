"""RopeSpec: what a model's rotary embedding means, as frozen, hashable data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from . import legal, phase, scaling, scaling_hf
from . import positions as tokens

# Fields of a spec that RopeSpec.of() takes among the parameters and hands through.
_FIELDS = frozenset(
    ("axis_map", "q_temperature", "softmax_multiplier", "hf_parameters", "hf_refusal", "notes")
)


@dataclasses.dataclass(frozen=True, repr=False)
class RopeSpec:
    """The rotary embedding of one attention layer: frequencies, factors, and which dims they turn.

    Pure data: build it with :meth:`from_config` or a constructor named after the method; compare
    it, hash it, pickle it. Tensors are made on demand, on the CPU.

    The frequency of a pair *is* the float64 number that :meth:`inv_freq` returns, and the angle of
    a token is ``position * inv_freq`` in real arithmetic. ``precision="exact"`` is what the model's
    authors meant, ``precision="hf"`` what transformers computes in float32, bit for bit and faults
    included; it raises ValueError where transformers computes NaN or has no such method.
    """

    rope_type: str
    head_dim: int
    rotary_dim: int
    rope_theta: float
    parameters: tuple[tuple[str, object], ...] = ()
    """The method's parameters by transformers' names, complete, in the order of its signature."""
    interleaved: bool = False
    """False: pairs (j, j + rotary_dim / 2), half-split. True: pairs (2 j, 2 j + 1)."""
    rotary_offset: int = 0
    """Where in the head the rotated slice starts."""
    axis_map: tuple[int, ...] | None = None
    """Which position axis drives each pair (mRoPE); None with one axis."""
    q_temperature: tuple[float, float, float] | None = None
    """(beta, length, offset) of :meth:`q_scale`."""
    softmax_multiplier: float = 1.0
    """Multiplies the softmax scale (DeepSeek); the rotation does not apply it."""
    hf_parameters: tuple[tuple[str, object], ...] = ()
    """Parameters that transformers reads differently from the authors, as it reads them."""
    hf_refusal: str = ""
    """Why ``precision="hf"`` is refused, if it is."""
    max_position_embeddings: int | None = dataclasses.field(default=None, compare=False)
    """The length the model is made for: information, except where it is a parameter."""
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Keys without effect, and disagreements: in the configuration, and with transformers."""

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)
        for name, least in (("head_dim", 2), ("rotary_dim", 2), ("rotary_offset", 0)):
            put(name, legal.integer(name, getattr(self, name), least, legal.MOST_DIMS))
        if self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {self.rotary_dim}")
        if self.rotary_offset + self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_offset must leave room for rotary_dim in head_dim {self.head_dim}, "
                f"got {self.rotary_offset} + {self.rotary_dim}"
            )
        if not isinstance(self.interleaved, bool):
            raise ValueError(f"interleaved must be True or False, got {self.interleaved!r}")
        put("rope_theta", float(legal.number("rope_theta", self.rope_theta)))
        given = dict(self.parameters)
        put("parameters", scaling.parameters(self.rope_type, given, self.rotary_dim))
        hf = scaling.parameters(self.rope_type, given | dict(self.hf_parameters), self.rotary_dim)
        put("hf_parameters", tuple(item for item in hf if item not in self.parameters))
        if self.axis_map is not None:
            put("axis_map", tuple(legal.integer("axis_map", axis, 0) for axis in self.axis_map))
            if len(self.axis_map) != self.rotary_dim // 2:
                raise ValueError(
                    f"axis_map must have one axis for each of {self.rotary_dim // 2} pairs, "
                    f"got {len(self.axis_map)}"
                )
        if self.q_temperature is not None:
            put("q_temperature", tokens.temperature(self.q_temperature))
        multiplier = legal.number("softmax_multiplier", self.softmax_multiplier)
        put("softmax_multiplier", float(multiplier))
        put("notes", tuple(self.notes))
        self._tables()  # a spec that exists can be evaluated

    def __hash__(self):
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        values = (getattr(self, field.name) for field in dataclasses.fields(self) if field.compare)
        return hash(tuple(values))

    # What is cached stays behind: strings, and so specs, hash differently in every process.
    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __deepcopy__(self, memo):
        return self  # nothing of it can change; compiled code is guarded by its identity

    def __repr__(self):
        usual = scaling.accepts(self.rope_type)
        shown = [repr(self.rope_type)]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name == "parameters":
                shown += [f"{k}={_brief(v)}" for k, v in value if v != usual[k].default]
            elif field.name == "max_position_embeddings" and field.name in usual:
                continue
            elif value != field.default and (field.name, value) != ("rotary_dim", self.head_dim):
                shown.append(f"{field.name}={_brief(value)}")
        return f"RopeSpec({', '.join(shown)})"

    # -------------------------------------------------------------------------- constructors

    @classmethod
    def of(
        cls,
        rope_type: str,
        *,
        head_dim: int,
        rope_theta: float,
        interleaved: bool = False,
        partial_rotary_factor: float = 1.0,
        rotary_offset: int = 0,
        mrope_section: Sequence[int] | None = None,
        mrope_interleaved: bool = False,
        max_position_embeddings: int | None = None,
        **parameters,
    ) -> RopeSpec:
        """Any method by its ``rope_type``; the constructors named after the methods call this one.

        Args:
            head_dim: dimensions of a head.
            rope_theta: the base b of theta_i = b ** (-2 i / rotary_dim); > 1.
            interleaved: pairs (2 j, 2 j + 1) instead of (j, j + rotary_dim / 2).
            partial_rotary_factor: share of the head that rotates: rotary_dim = int(head_dim * it).
                For ``proportional`` the share of the pairs that turn; rotary_dim is head_dim.
            rotary_offset: first rotated dimension of the head.
            mrope_section: pairs per position axis (temporal, height, width): a multi-axis spec.
            mrope_interleaved: the axes alternate along the pairs (Qwen3-VL) instead of lying in
                blocks (Qwen2-VL).
            max_position_embeddings: the length the model is made for. ``dynamic`` needs it,
                ``longrope`` and ``dynamic_yarn`` use it; for the others it is information.
            **parameters: the method's own, see :mod:`rope_fused.scaling`, and any other field of
                the spec (``axis_map``, ``q_temperature``, ``softmax_multiplier``, ...).

        Raises:
            ValueError: a parameter that the method does not have, or lacks, or that is outside
                its legal range.
        """
        head_dim = legal.integer("head_dim", head_dim, 2, legal.MOST_DIMS)
        share = legal.number("partial_rotary_factor", partial_rotary_factor)
        fields = {key: parameters.pop(key) for key in _FIELDS & parameters.keys()}
        accepted = scaling.accepts(rope_type)
        if "partial_rotary_factor" in accepted:
            rotary_dim, parameters["partial_rotary_factor"] = head_dim, share
        else:
            rotary_dim = int(head_dim * share)
            if share != 1 and (rotary_dim % 2 or not rotary_dim):
                raise ValueError(
                    "partial_rotary_factor must give an even rotary_dim > 0, got "
                    f"int({head_dim} * {share!r}) = {rotary_dim}"
                )
        if max_position_embeddings is not None:
            legal.number("max_position_embeddings", max_position_embeddings)
            if "max_position_embeddings" in accepted:
                parameters["max_position_embeddings"] = max_position_embeddings
        if mrope_section is not None:
            layout = "alternating" if mrope_interleaved else "blocks"
            fields["axis_map"] = tokens.axis_map(layout, rotary_dim // 2, mrope_section)
        return cls(
            rope_type,
            head_dim,
            rotary_dim,
            rope_theta,
            tuple(parameters.items()),
            interleaved=interleaved,
            rotary_offset=rotary_offset,
            max_position_embeddings=max_position_embeddings,
            **fields,
        )

    # What each takes: :meth:`of`, and the method of that name in :mod:`rope_fused.scaling`.

    @classmethod
    def default(cls, **arguments) -> RopeSpec:
        """Plain RoPE."""
        return cls.of("default", **arguments)

    @classmethod
    def linear(cls, **arguments) -> RopeSpec:
        """Position interpolation by ``factor``."""
        return cls.of("linear", **arguments)

    @classmethod
    def ntk(cls, **arguments) -> RopeSpec:
        """NTK-aware change of the base by ``factor``."""
        return cls.of("ntk", **arguments)

    @classmethod
    def dynamic(cls, **arguments) -> RopeSpec:
        """NTK-aware base that grows with the length: ``factor, max_position_embeddings``."""
        return cls.of("dynamic", **arguments)

    @classmethod
    def ntk_by_parts(cls, **arguments) -> RopeSpec:
        """NTK-by-parts: ``factor, original_max_position_embeddings``, ..."""
        return cls.of("ntk_by_parts", **arguments)

    @classmethod
    def llama3(cls, **arguments) -> RopeSpec:
        """Llama-3.1's NTK-by-parts, with all four parameters required."""
        return cls.of("llama3", **arguments)

    @classmethod
    def yarn(cls, **arguments) -> RopeSpec:
        """YaRN: ``factor, original_max_position_embeddings``, ..."""
        return cls.of("yarn", **arguments)

    @classmethod
    def dynamic_yarn(cls, **arguments) -> RopeSpec:
        """YaRN with the factor each length needs: ``original_max_position_embeddings``, ..."""
        return cls.of("dynamic_yarn", **arguments)

    @classmethod
    def longrope(cls, **arguments) -> RopeSpec:
        """LongRoPE: ``short_factor, long_factor, original_max_position_embeddings``, ..."""
        return cls.of("longrope", **arguments)

    @classmethod
    def proportional(cls, **arguments) -> RopeSpec:
        """p-RoPE: ``partial_rotary_factor=1.0, factor=1.0``."""
        return cls.of("proportional", **arguments)

    @classmethod
    def from_config(
        cls, config, layer_type=None, *, interleaved=None, rotary_offset=None, axes=None
    ) -> RopeSpec:
        """What a model configuration means; see :func:`rope_fused.configs.from_config`."""
        from . import configs

        return configs.from_config(
            config, layer_type, interleaved=interleaved, rotary_offset=rotary_offset, axes=axes
        )

    # -------------------------------------------------------------------------- numbers

    @property
    def axes(self) -> int:
        """How many position axes the spec reads: 1, or 3 for the usual mRoPE."""
        return 1 if self.axis_map is None else max(self.axis_map) + 1

    @property
    def cache_class(self) -> str:
        """What a change of length does to cached keys.

        "static": nothing. "switch": past :attr:`switch_length` they need the other of two tables.
        "dynamic": every length has its own table.
        """
        if self.rope_type in scaling.LAWS:
            return "dynamic"
        return "switch" if self.rope_type == "longrope" else "static"

    @property
    def switch_length(self) -> int | None:
        """A sequence longer than this uses the second table, any other the first."""
        if self.cache_class != "switch":
            return None
        return int(dict(self.parameters)["original_max_position_embeddings"])

    @property
    def n_start(self) -> int:
        """Tokens at positions below this use the last table, the base frequencies."""
        return dict(self.parameters).get("n_start", 0)

    @property
    def attention_factor(self) -> float | tuple[float, ...]:
        """Multiplies cos and sin of q and of k, so q . k by its square.

        One number, or one per pair (LongRoPE2). Where it depends on the length, that of
        :meth:`attention_factor_at` for None.
        """
        return self.attention_factor_at(None)

    def attention_factor_at(self, seq_len, precision="exact") -> float | tuple[float, ...]:
        """The attention factor for a sequence of ``seq_len`` tokens; None as in inv_freq()."""
        scales = self._tables(precision).scale
        if seq_len is None:
            return scales[0]
        seq_len = legal.integer("seq_len", seq_len, 1)
        if self.cache_class == "static":
            return scales[0]
        if self.cache_class == "switch":
            return scales[int(seq_len > self.switch_length)]
        return self._dynamic(torch.tensor([seq_len], device="cpu"))[1].item()

    def inv_freq(self, precision: str = "exact", seq_len=None) -> torch.Tensor:
        """The frequencies, radians per token: CPU tensor [rotary_dim / 2].

        Args:
            precision: "exact": float64, the correctly rounded values of the authors' formula (of a
                dynamic method: good to a few units in the last place). "hf": float32, the bits that
                transformers computes.
            seq_len: the length that chooses the table of ``longrope`` (None: short) or makes that
                of ``dynamic`` (None: max_position_embeddings) and ``dynamic_yarn`` (None: the same,
                or the original length). Static specs ignore it. With "hf" and "dynamic", a 0-d int
                tensor gives what a running model computes and an int what its constructor does,
                which differ in the last bits.

        Raises:
            ValueError: "hf", and transformers computes NaN or has no such method.
        """
        length = None if seq_len is None else legal.integer("seq_len", seq_len, 1)
        if precision == "hf":
            running = isinstance(seq_len, torch.Tensor) and self.cache_class == "dynamic"
            return self._hf_row(seq_len.reshape(()) if running else length)
        if self.cache_class == "dynamic" and length is not None:
            return self.rows_at(torch.tensor([length], device="cpu"), precision)[0]
        long = self.cache_class == "switch" and length is not None and length > self.switch_length
        return self.rows(precision)[int(long)]

    def rows(self, precision: str = "exact") -> torch.Tensor:
        """Every table: CPU tensor [tables, rotary_dim / 2], float64 ("hf": float32).

        One table; with a switch two, short and long; with :attr:`n_start` one more, last, the base
        frequencies.
        """
        if precision == "hf":
            lengths = [None] if self.switch_length is None else [None, self.switch_length + 1]
            return torch.stack([self._hf_row(length) for length in lengths])
        return torch.tensor(self._tables(precision).inv_freq, dtype=torch.float64, device="cpu")

    def scale_rows(self, precision: str = "exact") -> torch.Tensor:
        """The attention factor of every table and pair: CPU float64 [tables, rotary_dim / 2]."""
        pairs = self.rotary_dim // 2
        rows = [s if isinstance(s, tuple) else (s,) * pairs for s in self._tables(precision).scale]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    def turns(self) -> torch.Tensor:
        """rows() as 64-bit fractions of a turn (phase.py): CPU int64 [tables, rotary_dim / 2]."""
        return torch.tensor(_turns(self), dtype=torch.int64, device="cpu")

    def rows_at(self, seq_lens: torch.Tensor, precision="exact", constants=None) -> torch.Tensor:
        """The table of each of n lengths of a dynamic spec, on their device, without a host sync.

        Args:
            seq_lens: int tensor [n].
            constants: :meth:`dynamic_constants` on that device; None copies them there.

        Returns:
            [n, rotary_dim / 2], float64; "hf": float32, as a running model without history.
        """
        if precision == "hf":
            return torch.stack([self._hf_row(length) for length in seq_lens.unbind()])
        _check_precision(precision)
        return self._dynamic(seq_lens, constants)[0]

    def scale_rows_at(self, seq_lens: torch.Tensor, constants=None) -> torch.Tensor:
        """The attention factors that go with rows_at(): float64 [n, rotary_dim / 2]."""
        return self._dynamic(seq_lens, constants)[1].expand(-1, self.rotary_dim // 2)

    def dynamic_constants(self) -> torch.Tensor:
        """What rows_at() needs of a dynamic spec besides the lengths: CPU float64 [2, pairs]."""
        return torch.tensor(_constants(self), dtype=torch.float64, device="cpu")

    def table_index(self, positions: torch.Tensor, seq_len=None) -> torch.Tensor | None:
        """Which row of rows() each token uses, without a host sync; None if there is only one.

        Args:
            positions: int tensor [..., seqlen], of one axis.
            seq_len: int, or int tensor that broadcasts with ``positions``: the length that chooses
                the table. None: the largest position of each sequence plus 1.

        Returns:
            int64, shaped like ``positions``.
        """
        if self.cache_class != "switch":
            return None
        if seq_len is None:
            seq_len = tokens.lengths(positions)
        index = torch.as_tensor(seq_len, device=positions.device) > self.switch_length
        index = index.long().expand_as(positions)
        return torch.where(positions < self.n_start, 2, index) if self.n_start else index

    def cos_sin(
        self,
        positions: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        precision: str = "exact",
        *,
        seq_len=None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables for other kernels: cos and sin of every angle, without the attention factor.

        Args:
            positions: int tensor [..., seqlen]; with several :attr:`axes`, [axes, ..., seqlen]. Any
                int64 value is legal.
            dtype: of the tables.
            precision: "exact": 64-bit phase and float64 functions, rounded once. "hf": float32 as
                in transformers, then cast.
            seq_len: the length that chooses or makes the table of a length-dependent spec, as in
                :meth:`table_index`. None: the largest position of each sequence plus 1; "hf": of
                all sequences, as in transformers.

        Returns:
            cos, sin: [..., seqlen, rotary_dim / 2] on the device of ``positions``.
        """
        _check_precision(precision)
        tokens.check(positions)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
        one_axis, per_pair = positions, positions[..., None]
        if self.axes > 1:
            if positions.ndim < 2 or positions.shape[0] != self.axes:
                raise ValueError(
                    f"positions must be [{self.axes} axes, ...], got {tuple(positions.shape)}"
                )
            one_axis = positions.amax(0)
            per_pair = positions[list(self.axis_map)].movedim(0, -1)
        if seq_len is None and self.cache_class != "static":
            seq_len = tokens.lengths(positions.flatten() if precision == "hf" else one_axis)
        if precision == "hf":
            angle = per_pair.float() * self.inv_freq("hf", seq_len).to(positions.device)
            return angle.cos().to(dtype), angle.sin().to(dtype)
        if self.cache_class == "dynamic":
            seq_len = torch.as_tensor(seq_len, device=positions.device)
            turns = phase.turns_on_device(self.rows_at(seq_len.reshape(-1)))
            turns = turns.reshape(*seq_len.shape, self.rotary_dim // 2)
        else:
            turns, index = self.turns().to(positions.device), self.table_index(one_axis, seq_len)
            turns = turns[0] if index is None else turns[index]
        return phase.phase_cos_sin(per_pair, turns, dtype)

    def q_scale(self, positions: torch.Tensor, precision="exact") -> torch.Tensor | None:
        """The factor on each token's q, float32 like ``positions`` (of one axis); None without one.

        1 + beta ln(1 + floor((position + offset) / length)); see positions.py.
        """
        _check_precision(precision)
        tokens.check(positions)
        if self.q_temperature is None:
            return None
        return tokens.q_scale(positions, *self.q_temperature, precision)

    # -------------------------------------------------------------------------- evaluation

    def _tables(self, precision: str = "exact") -> scaling.Tables:
        _check_precision(precision)
        return _evaluate(self, precision)

    def _dynamic(self, seq_lens, constants=None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache_class != "dynamic":
            raise ValueError(f"seq_lens: a {self.cache_class} spec has no table per length")
        if constants is None:
            constants = self.dynamic_constants().to(seq_lens.device)
        return scaling.LAWS[self.rope_type](constants, seq_lens, **dict(self.parameters))

    def _hf_row(self, seq_len) -> torch.Tensor:
        """float32 [rotary_dim / 2] as transformers; a tensor ``seq_len`` stays on its device."""
        refusal = self.hf_refusal
        if self.rope_type not in scaling_hf.METHODS:
            refusal = f"transformers has no rope_type {self.rope_type!r}"
        elif any(isinstance(scale, tuple) for scale in self._tables("hf").scale):
            refusal = "transformers has no attention_factor per pair"
        if refusal:
            raise ValueError(f"precision must be 'exact' here: {refusal}")
        given = dict(self.parameters) | dict(self.hf_parameters)
        method = scaling_hf.METHODS[self.rope_type]
        row = method(self.rotary_dim, self.rope_theta, seq_len, **given)
        if not isinstance(seq_len, torch.Tensor) and not row.isfinite().all():
            raise ValueError(f"precision must be 'exact' here: transformers gets NaN from {self}")
        return row


@functools.lru_cache(maxsize=512)
def _evaluate(spec: RopeSpec, precision: str) -> scaling.Tables:
    given = dict(spec.parameters) | (dict(spec.hf_parameters) if precision == "hf" else {})
    return scaling.METHODS[spec.rope_type](spec.rotary_dim, spec.rope_theta, **given)


@functools.lru_cache(maxsize=512)
def _constants(spec: RopeSpec) -> tuple[tuple[float, ...], ...]:
    constants = scaling.CONSTANTS[spec.rope_type]
    return constants(spec.rotary_dim, spec.rope_theta, **dict(spec.parameters))


@functools.lru_cache(maxsize=512)
def _turns(spec: RopeSpec) -> list[list[int]]:
    return phase.exact_turns(spec.rows()).tolist()


def _check_precision(precision: str) -> None:
    if precision not in ("exact", "hf"):
        raise ValueError(f"precision must be 'exact' or 'hf', got {precision!r}")


def _brief(value) -> str:
    if isinstance(value, tuple) and len(value) > 6 and not isinstance(value[0], str):
        return f"<{len(value)}: {value[0]!r}, {value[1]!r}, ..., {value[-1]!r}>"
    return repr(value)
