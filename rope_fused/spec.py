"""RopeSpec: what a model's rotary embedding means, as frozen, hashable data."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from numbers import Integral

import torch

from . import phase, scaling, scaling_hf

_PRECISIONS = ("exact", "hf")


@dataclasses.dataclass(frozen=True, repr=False)
class RopeSpec:
    """The rotary embedding of one attention layer: frequencies, factors, and which dimensions they turn.

    Pure data: build it with :meth:`from_config` or one of the constructors named after the methods, compare it,
    hash it, pickle it. Tensors are made on demand, on the CPU.

    The frequency of a pair *is* the float64 number that :meth:`inv_freq` returns, and the angle of a token is
    ``position * inv_freq`` in real arithmetic. ``precision="exact"`` means what the model's authors meant;
    ``precision="hf"`` what transformers computes in float32, bit for bit and faults included, or a ValueError where
    it computes NaN or has no such method.
    """

    rope_type: str
    head_dim: int
    rotary_dim: int
    rope_theta: float
    parameters: tuple[tuple[str, object], ...] = ()
    """The method's parameters under transformers' key names, complete and in the order of its signature."""
    interleaved: bool = False
    """False: pairs (j, j + rotary_dim / 2), half-split; True: pairs (2 j, 2 j + 1)."""
    rotary_offset: int = 0
    """Where in the head the rotated slice starts."""
    axis_map: tuple[int, ...] | None = None
    """Which position axis drives each pair (mRoPE); None with one axis."""
    q_temperature: tuple[float, float, float] | None = None
    """(beta, length, offset) of :meth:`q_scale`."""
    softmax_multiplier: float = 1.0
    """Multiplies the softmax scale (DeepSeek); not applied by the rotation."""
    hf_parameters: tuple[tuple[str, object], ...] = ()
    """Parameters transformers reads differently from the authors: they replace the method's for ``precision="hf"``."""
    hf_refusal: str = ""
    """Why ``precision="hf"`` is refused, if it is."""
    max_position_embeddings: int | None = dataclasses.field(default=None, compare=False)
    """The model's length, for reports."""
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Keys without effect, and disagreements inside the configuration or between implementations."""

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)
        for name, least in (("head_dim", 2), ("rotary_dim", 2), ("rotary_offset", 0)):
            put(name, _integer(name, getattr(self, name), least))
        if self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, got {self.rotary_dim}")
        if self.rotary_offset + self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_offset must leave room for rotary_dim: {self.rotary_offset} + {self.rotary_dim} > head_dim "
                f"{self.head_dim}"
            )
        if not isinstance(self.interleaved, bool):
            raise ValueError(f"interleaved must be True or False, got {self.interleaved!r}")
        put("rope_theta", float(scaling.number("rope_theta", self.rope_theta)))
        put(
            "parameters", scaling.parameters(self.rope_type, dict(self.parameters), self.rotary_dim)
        )
        unread = dict(self.hf_parameters).keys() - dict(self.parameters).keys()
        if unread:
            raise ValueError(
                f"hf_parameters must be parameters of {self.rope_type!r}, got {sorted(unread)}"
            )
        hf = {**dict(self.parameters), **dict(self.hf_parameters)}
        hf = scaling.parameters(self.rope_type, hf, self.rotary_dim)
        put("hf_parameters", tuple(item for item in hf if item not in self.parameters))
        if self.axis_map is not None:
            put("axis_map", _axes(self.axis_map, self.rotary_dim // 2))
        if self.q_temperature is not None:
            put("q_temperature", _temperature(self.q_temperature))
        multiplier = self.softmax_multiplier
        if isinstance(multiplier, bool) or not 0 < multiplier < math.inf:
            raise ValueError(f"softmax_multiplier must be a finite number > 0, got {multiplier!r}")
        put("softmax_multiplier", float(multiplier))
        put("notes", tuple(self.notes))
        self._tables()  # a spec that exists can be evaluated

    # The hash is looked up on every call of an op: kept, but not pickled, since string hashes differ per process.
    def __hash__(self):
        if "_hash" not in self.__dict__:
            values = (getattr(self, f.name) for f in dataclasses.fields(self) if f.compare)
            object.__setattr__(self, "_hash", hash(tuple(values)))
        return self._hash

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __repr__(self):
        shown = [repr(self.rope_type)]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name == "parameters":
                defaults = inspect.signature(scaling.METHODS[self.rope_type]).parameters
                shown += [
                    f"{k}={_brief(v)}"
                    for k, v in value
                    if v is not None and v != defaults[k].default
                ]
            elif value != field.default and not (
                field.name == "rotary_dim" and value == self.head_dim
            ):
                shown.append(f"{field.name}={_brief(value)}")
        return f"RopeSpec({', '.join(shown)})"

    # ---------------------------------------------------------------- constructors

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
        mrope_section: tuple[int, ...] | None = None,
        mrope_interleaved: bool = False,
        max_position_embeddings: int | None = None,
        **parameters,
    ) -> RopeSpec:
        """Any method by its ``rope_type``; every other constructor is this one with the type filled in.

        Args:
            head_dim: dimensions of a head.
            rope_theta: the base b of theta_i = b ** (-2 i / rotary_dim); > 1.
            interleaved: pairs (2 j, 2 j + 1) instead of (j, j + rotary_dim / 2).
            partial_rotary_factor: share of the head that is rotated: rotary_dim = int(head_dim * it). For
                ``proportional`` the share of the pairs that turn; rotary_dim is then head_dim.
            rotary_offset: first rotated dimension of the head.
            mrope_section: pairs per position axis (temporal, height, width); makes the spec multi-axis.
            mrope_interleaved: axes alternate along the pairs (Qwen3-VL) instead of lying in blocks (Qwen2-VL).
            max_position_embeddings: the length the model is made for; ``dynamic`` needs it, ``longrope`` uses it.
            **parameters: the method's own, see ``rope_fused.scaling``.

        Raises:
            ValueError: a parameter is unknown to the method, missing, or outside its legal range.
        """
        head_dim = _integer("head_dim", head_dim, 2)
        share = scaling.number("partial_rotary_factor", partial_rotary_factor)
        rotary_dim = head_dim
        if rope_type == "proportional":
            parameters = {"partial_rotary_factor": share, **parameters}
        elif share != 1:
            rotary_dim = int(head_dim * share)
            if rotary_dim % 2 or rotary_dim == 0:
                raise ValueError(
                    f"partial_rotary_factor must give an even rotary_dim > 0, got {share!r} * head_dim {head_dim} = "
                    f"{head_dim * share}, rotary_dim {rotary_dim}"
                )
        if max_position_embeddings is not None:
            scaling.number("max_position_embeddings", max_position_embeddings)
            if "max_position_embeddings" in scaling.accepts(rope_type):
                parameters = {"max_position_embeddings": max_position_embeddings, **parameters}
        axis_map = None
        if mrope_section is not None:
            axis_map = mrope_axis_map(mrope_section, rotary_dim // 2, interleaved=mrope_interleaved)
        return cls(
            rope_type,
            head_dim,
            rotary_dim,
            rope_theta,
            tuple(parameters.items()),
            interleaved=interleaved,
            rotary_offset=rotary_offset,
            axis_map=axis_map,
            max_position_embeddings=max_position_embeddings,
        )

    @classmethod
    def default(cls, *, head_dim, rope_theta, **options) -> RopeSpec:
        """Plain RoPE; ``options`` as in :meth:`of`. See :func:`rope_fused.scaling.default`."""
        return cls.of("default", head_dim=head_dim, rope_theta=rope_theta, **options)

    @classmethod
    def linear(cls, *, head_dim, rope_theta, factor, **options) -> RopeSpec:
        """Position interpolation by ``factor``. See :func:`rope_fused.scaling.linear`."""
        return cls.of("linear", head_dim=head_dim, rope_theta=rope_theta, factor=factor, **options)

    @classmethod
    def ntk(cls, *, head_dim, rope_theta, factor, **options) -> RopeSpec:
        """NTK-aware base change by ``factor``; also ``mixed_b``. See :func:`rope_fused.scaling.ntk`."""
        return cls.of("ntk", head_dim=head_dim, rope_theta=rope_theta, factor=factor, **options)

    @classmethod
    def dynamic(
        cls, *, head_dim, rope_theta, factor, max_position_embeddings, **options
    ) -> RopeSpec:
        """NTK-aware base that grows with the length. See :func:`rope_fused.scaling.dynamic_rows`."""
        options |= {"factor": factor, "max_position_embeddings": max_position_embeddings}
        return cls.of("dynamic", head_dim=head_dim, rope_theta=rope_theta, **options)

    @classmethod
    def ntk_by_parts(
        cls, *, head_dim, rope_theta, factor, original_max_position_embeddings, **options
    ) -> RopeSpec:
        """NTK-by-parts; also ``low_freq_factor=1, high_freq_factor=32``. See :func:`rope_fused.scaling.llama3`."""
        options |= {
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }
        return cls.of("ntk_by_parts", head_dim=head_dim, rope_theta=rope_theta, **options)

    @classmethod
    def llama3(
        cls,
        *,
        head_dim,
        rope_theta,
        factor,
        original_max_position_embeddings,
        low_freq_factor,
        high_freq_factor,
        **options,
    ) -> RopeSpec:
        """Llama-3.1's NTK-by-parts. See :func:`rope_fused.scaling.llama3`."""
        options |= {
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }
        options |= {"low_freq_factor": low_freq_factor, "high_freq_factor": high_freq_factor}
        return cls.of("llama3", head_dim=head_dim, rope_theta=rope_theta, **options)

    @classmethod
    def yarn(
        cls, *, head_dim, rope_theta, factor, original_max_position_embeddings, **options
    ) -> RopeSpec:
        """YaRN; also ``beta_fast=32, beta_slow=1, truncate=True, mscale=None, mscale_all_dim=None,
        attention_factor=None, ramp="dimension"``. See :func:`rope_fused.scaling.yarn`."""
        options |= {
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }
        return cls.of("yarn", head_dim=head_dim, rope_theta=rope_theta, **options)

    @classmethod
    def dynamic_yarn(
        cls, *, head_dim, rope_theta, original_max_position_embeddings, **options
    ) -> RopeSpec:
        """YaRN whose factor is the length of the sequence over the original length; also ``beta_fast=32,
        beta_slow=1, truncate=True``. See :func:`rope_fused.scaling.dynamic_yarn_rows`."""
        options |= {"original_max_position_embeddings": original_max_position_embeddings}
        return cls.of("dynamic_yarn", head_dim=head_dim, rope_theta=rope_theta, **options)

    @classmethod
    def longrope(
        cls,
        *,
        head_dim,
        rope_theta,
        short_factor,
        long_factor,
        original_max_position_embeddings,
        **options,
    ) -> RopeSpec:
        """LongRoPE; also ``factor=None, attention_factor=None, short_mscale=None, long_mscale=None,
        magnitude_scaling_policy="su", n_start=0``. See :func:`rope_fused.scaling.longrope`."""
        options |= {"short_factor": short_factor, "long_factor": long_factor}
        options |= {"original_max_position_embeddings": original_max_position_embeddings}
        return cls.of("longrope", head_dim=head_dim, rope_theta=rope_theta, **options)

    @classmethod
    def proportional(
        cls, *, head_dim, rope_theta, partial_rotary_factor=1.0, **options
    ) -> RopeSpec:
        """p-RoPE; also ``factor=1.0``. See :func:`rope_fused.scaling.proportional`."""
        options |= {"partial_rotary_factor": partial_rotary_factor}
        return cls.of("proportional", head_dim=head_dim, rope_theta=rope_theta, **options)

    @classmethod
    def from_config(
        cls, config, layer_type=None, *, interleaved=None, rotary_offset=None, axes=None
    ) -> RopeSpec:
        """The spec of a model configuration in any dialect; see :func:`rope_fused.configs.from_config`."""
        from . import configs

        return configs.from_config(
            config, layer_type, interleaved=interleaved, rotary_offset=rotary_offset, axes=axes
        )

    # ---------------------------------------------------------------- numbers

    @property
    def axes(self) -> int:
        """How many position axes the spec reads: 1, or 3 for the usual mRoPE."""
        return 1 if self.axis_map is None else max(self.axis_map) + 1

    @property
    def cache_class(self) -> str:
        """What a length change does to cached keys: "static" nothing, "switch" they need the other of two tables
        (:attr:`switch_length`), "dynamic" every length has its own table."""
        if self.rope_type in scaling.DYNAMIC_ROWS:
            return "dynamic"
        return "switch" if self.rope_type == "longrope" else "static"

    @property
    def switch_length(self) -> int | None:
        """A sequence longer than this uses the second table, any other the first; None without a switch."""
        if self.cache_class != "switch":
            return None
        return int(dict(self.parameters)["original_max_position_embeddings"])

    @property
    def n_start(self) -> int:
        """Tokens at positions below this use the last table, the base frequencies (LongRoPE's n-hat)."""
        return dict(self.parameters).get("n_start", 0)

    @property
    def attention_factor(self) -> float | tuple[float, ...]:
        """Multiplies cos and sin of q and of k, hence q . k by its square; one number, or one per pair (LongRoPE2)."""
        return self.attention_factor_at(None)

    def attention_factor_at(self, seq_len, precision: str = "exact") -> float | tuple[float, ...]:
        """:attr:`attention_factor` for a sequence of ``seq_len`` tokens; None as in :meth:`inv_freq`."""
        scales = self._tables(precision).scale
        if seq_len is None or self.cache_class == "static":
            return scales[0]
        seq_len = _integer("seq_len", seq_len, 1)
        if self.cache_class == "switch":
            return scales[int(seq_len > self.switch_length)]
        return self._dynamic(torch.tensor([seq_len]))[1].item()

    def inv_freq(self, precision: str = "exact", seq_len=None) -> torch.Tensor:
        """The frequencies, radians per token: CPU tensor [rotary_dim / 2].

        Args:
            precision: "exact": float64, the correctly rounded values of the authors' formula. "hf": float32, the
                bits transformers computes.
            seq_len: the length that chooses the table of a ``longrope`` spec (None: short) or makes that of a
                ``dynamic`` one (None: max_position_embeddings; of ``dynamic_yarn``: likewise, or the original
                length). Ignored by static specs. With precision="hf" and "dynamic" a 0-d int tensor gives what a
                running model computes, an int what its constructor does; they differ in the last bits.

        Raises:
            ValueError: transformers gives NaN or has no such method (``precision="hf"``).
        """
        _check_precision(precision)
        length = None if seq_len is None else _integer("seq_len", seq_len, 1)
        if precision == "hf":
            tensor = isinstance(seq_len, torch.Tensor) and self.rope_type == "dynamic"
            return self._hf_row(seq_len.reshape(()) if tensor else length)
        if self.cache_class == "dynamic" and length is not None:
            return self._dynamic(torch.tensor([length], device="cpu"))[0][0]
        return self.rows()[
            int(length is not None and self.cache_class == "switch" and length > self.switch_length)
        ]

    def rows(self, precision: str = "exact") -> torch.Tensor:
        """Every table: CPU tensor [tables, rotary_dim / 2], float64 ("hf": float32).

        One table; with a switch two (short, long); with :attr:`n_start` one more, the base frequencies.
        """
        _check_precision(precision)
        if precision == "exact":
            return torch.tensor(self._tables().inv_freq, dtype=torch.float64, device="cpu")
        lengths = [None] if self.switch_length is None else [None, self.switch_length + 1]
        return torch.stack([self._hf_row(length) for length in lengths])

    def scale_rows(self, precision: str = "exact") -> torch.Tensor:
        """The attention factor of every table and pair: CPU float64 [tables, rotary_dim / 2]."""
        pairs = self.rotary_dim // 2
        rows = [s if isinstance(s, tuple) else (s,) * pairs for s in self._tables(precision).scale]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    def turns(self) -> torch.Tensor:
        """:meth:`rows` as 64-bit fractions of a turn: CPU int64 [tables, rotary_dim / 2]; see :mod:`rope_fused.phase`."""
        return torch.tensor(_turns(self), dtype=torch.int64, device="cpu")

    def rows_at(self, seq_lens: torch.Tensor, precision: str = "exact") -> torch.Tensor:
        """The table of each of n lengths of a "dynamic" spec: [n, rotary_dim / 2] on the device of ``seq_lens``.

        float64, or float32 for "hf" (as a running model with no history computes it). No host sync.
        """
        _check_precision(precision)
        if precision == "exact":
            return self._dynamic(seq_lens)[0]
        return torch.stack([self._hf_row(length) for length in seq_lens.unbind()])

    def scale_rows_at(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """The attention factors that go with :meth:`rows_at`: float64 [n, rotary_dim / 2]."""
        return self._dynamic(seq_lens)[1].expand(-1, self.rotary_dim // 2)

    def table_index(self, positions: torch.Tensor, seq_len=None) -> torch.Tensor | None:
        """Which row of :meth:`rows` each token uses: int64, like ``positions`` [..., seqlen] (one axis), no host sync.

        Args:
            positions: int tensor whose last dimension runs along one sequence.
            seq_len: int, or int tensor that broadcasts with ``positions``: the length that chooses the table. None:
                the largest position of each sequence plus 1.

        Returns:
            None when there is only one table.
        """
        if self.cache_class != "switch":
            return None
        if seq_len is None:
            longest = positions.amax(-1, keepdim=True) if positions.numel() else positions
            index = (longest >= self.switch_length).long().expand_as(positions)
        else:
            length = torch.as_tensor(seq_len, device=positions.device)
            index = (length > self.switch_length).long().expand_as(positions)
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
            positions: int tensor [...]; with :attr:`axes` > 1, [axes, ...]. Any int64 value is legal. The last
                dimension runs along one sequence.
            dtype: of the tables.
            precision: "exact": 64-bit phase and float64 functions, rounded once. "hf": float32 as transformers,
                then cast.
            seq_len: the length that chooses or makes the table of a length-dependent spec; int, or int tensor
                broadcasting with ``positions`` (of one axis). None: the largest position of each sequence plus 1;
                for "hf" of all sequences, as transformers does.

        Returns:
            cos, sin: [..., rotary_dim / 2] on the device of ``positions``.
        """
        _check_precision(precision)
        if (
            positions.dtype.is_floating_point
            or positions.dtype.is_complex
            or positions.dtype == torch.bool
        ):
            raise TypeError(f"positions must be an integer tensor, got {positions.dtype}")
        if self.axes > 1 and (positions.ndim < 2 or positions.shape[0] != self.axes):
            raise ValueError(
                f"positions must have a leading dimension of {self.axes} axes, got {positions.shape}"
            )
        device = positions.device
        one_axis = positions.amax(0) if self.axes > 1 else positions
        if self.axis_map is None:
            per_pair = positions[..., None]
        else:
            per_pair = positions[list(self.axis_map)].movedim(0, -1)
        if precision == "hf":
            if seq_len is None and self.cache_class != "static":
                seq_len = one_axis.max() + 1
            row = self.inv_freq("hf", seq_len).to(device)
            angle = per_pair.float() * row
            return angle.cos().to(dtype), angle.sin().to(dtype)
        if self.cache_class == "dynamic":
            if seq_len is None:
                seq_len = one_axis.amax(-1, keepdim=True) + 1 if one_axis.numel() else one_axis
            lengths = torch.as_tensor(seq_len, device=device)
            rows = self._dynamic(lengths.reshape(-1))[0].reshape(*lengths.shape, -1)
            return phase.phase_cos_sin(per_pair, phase.turns_on_device(rows), dtype)
        turns = self.turns().to(device)
        index = self.table_index(one_axis, seq_len)
        return phase.phase_cos_sin(per_pair, turns[0] if index is None else turns[index], dtype)

    def q_scale(self, positions: torch.Tensor, precision: str = "exact") -> torch.Tensor | None:
        """The per-token factor on q: 1 + beta ln(1 + floor((position + offset) / length)), or None without one.

        Llama-4's NoPE layers (offset 1) and Ministral-3 (offset 0). Positions below 0 give 1.

        Returns:
            float32 like ``positions``; float64 inside, or transformers' float32 operations for "hf".
        """
        _check_precision(precision)
        if self.q_temperature is None:
            return None
        beta, length, offset = self.q_temperature
        if precision == "hf":
            steps = torch.floor((positions.float() + offset) / length)
            # Two models, two spellings: Llama-4 (offset 1) has log1p, Ministral the logarithm of a sum.
            return (torch.log1p(steps) if offset else torch.log(1 + steps)) * beta + 1.0
        steps = torch.floor((positions.to(torch.int64) + int(offset)).double() / length).clamp(
            min=0
        )
        return (1.0 + beta * torch.log1p(steps)).float()

    # ---------------------------------------------------------------- evaluation

    def _tables(self, precision: str = "exact") -> scaling.Tables:
        _check_precision(precision)
        return _evaluate(self, precision)

    def _dynamic(self, seq_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache_class != "dynamic":
            raise ValueError(
                f"seq_lens: only a dynamic spec has a table per length, this one is {self.cache_class}"
            )
        law = scaling.DYNAMIC_ROWS[self.rope_type]
        return law(self.rotary_dim, self.rope_theta, seq_lens, **dict(self.parameters))

    def _hf_row(self, seq_len) -> torch.Tensor:
        if self.hf_refusal:
            raise ValueError(f"precision must be 'exact' here: {self.hf_refusal}")
        if self.rope_type not in scaling_hf.METHODS:
            raise ValueError(
                f"precision must be 'exact': transformers has no rope_type {self.rope_type!r}"
            )
        given = {**dict(self.parameters), **dict(self.hf_parameters)}
        row = scaling_hf.METHODS[self.rope_type](self.rotary_dim, self.rope_theta, seq_len, **given)
        if not isinstance(seq_len, torch.Tensor) and not row.isfinite().all():
            raise ValueError(
                f"precision must be 'exact': transformers computes NaN for this {self.rope_type!r} configuration ({self!r})"
            )
        return row


@functools.lru_cache(maxsize=512)
def _evaluate(spec: RopeSpec, precision: str) -> scaling.Tables:
    given = dict(spec.parameters) | (dict(spec.hf_parameters) if precision == "hf" else {})
    return scaling.METHODS[spec.rope_type](spec.rotary_dim, spec.rope_theta, **given)


@functools.lru_cache(maxsize=512)
def _turns(spec: RopeSpec) -> list[list[int]]:
    return phase.exact_turns(spec.rows()).tolist()


def mrope_axis_map(section, pairs: int, *, interleaved: bool = False) -> tuple[int, ...]:
    """Which axis (0 temporal, 1 height, 2 width, ...) drives each pair.

    Blocks in order (Qwen2-VL), or, interleaved (Qwen3-VL), pair i of axis a >= 1 where i % axes == a and
    i < axes * section[a], else axis 0.
    """
    section = [_integer("mrope_section", n, 0) for n in section]
    if sum(section) != pairs:
        raise ValueError(f"mrope_section must sum to rotary_dim / 2 = {pairs}, got {section}")
    axes = len(section)
    if not interleaved:
        return tuple(axis for axis, n in enumerate(section) for _ in range(n))
    axis_of = [i % axes for i in range(pairs)]
    return tuple(a if i < axes * section[a] else 0 for i, a in enumerate(axis_of))


def _check_precision(precision: str) -> None:
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be 'exact' or 'hf', got {precision!r}")


def _integer(name: str, value, least: int) -> int:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.dtype.is_floating_point:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def _axes(axis_map, pairs: int) -> tuple[int, ...]:
    axis_map = tuple(_integer("axis_map", axis, 0) for axis in axis_map)
    if len(axis_map) != pairs:
        raise ValueError(f"axis_map must have one axis per pair, {pairs}, got {len(axis_map)}")
    return axis_map


def _temperature(values) -> tuple[float, float, float]:
    beta, length, offset = map(float, values)
    if not (math.isfinite(beta) and beta >= 0 and 0 < length < math.inf and offset in (0.0, 1.0)):
        raise ValueError(
            f"q_temperature must be (beta >= 0, length > 0, offset 0 or 1), finite, got {tuple(values)!r}"
        )
    return beta, length, offset


def _brief(value) -> str:
    if isinstance(value, tuple) and len(value) > 6 and not isinstance(value[0], str):
        return f"<{len(value)}: {value[0]!r}, {value[1]!r}, ..., {value[-1]!r}>"
    return repr(value)
