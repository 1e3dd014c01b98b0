"""From the arguments of a public call to the operands of an operator: tables, positions,
factors."""

from __future__ import annotations

import contextlib
import functools
import numbers

import torch

from . import ops, phase
from .checks import floats, ints, refusal
from .spec import RopeSpec

_LARGEST = torch.finfo(torch.float64).max


def _constant(function):
    """Let torch.compile call `function` while tracing and keep what it returns, guarded by the
    identity of its arguments: no table is made inside a trace.

    The mark is what torch.compiler.assume_constant_result sets; that name imports Dynamo.
    """
    function._dynamo_marked_constant = True
    return function


@contextlib.contextmanager
def _anywhere():
    """What is made here is an ordinary tensor, whoever else is to find it in a cache: in inference
    mode and in the transforms of torch.func as well."""
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
        yield


@functools.lru_cache(maxsize=256)
def _cached_tables(spec: RopeSpec, device: torch.device) -> tuple:
    with _anywhere():
        axis_map = spec.axis_map
        if axis_map is not None:
            axis_map = torch.tensor(axis_map, dtype=torch.int32, device=device)
        if spec.cache_class == "dynamic":
            return spec.dynamic_constants().to(device), None, None, axis_map
        tables = (spec.rows(), spec.turns(), spec.scale_rows())
        return *(t.to(device) for t in tables), axis_map


@functools.lru_cache(maxsize=256)
def _cached_hf_tables(spec: RopeSpec, device: torch.device) -> tuple:
    with _anywhere():
        scale = spec.scale_rows("hf").float()
        scale = scale.to(device) if (scale != 1).any() else None
        return spec.rows("hf").to(device), scale


@_constant
def _tables(spec, device):
    """(inv_freq, turns, scale, axis_map) of `spec` on `device`, made once. Of a dynamic spec, which
    has a table for every length: (its constants, None, None, axis_map)."""
    return _cached_tables(spec, device)


def factors(spec, device):
    """(inv_freq, attention factors) of a spec that has tables: float64 [tables, pairs], cached."""
    inv_freq, _, scale, _ = _tables(spec, device)
    return inv_freq, scale


@_constant
def _hf_tables(spec, device):
    """(inv_freq, attention factors or None if all are 1), float32, as transformers has them."""
    return _cached_hf_tables(spec, device)


def warm(spec: RopeSpec, device) -> None:
    """Make the tables of `spec` on `device` now, so that no later call has to (a graph capture)."""
    _cached_tables(spec, torch.device(device))


def between(old: ops.Rotation, new: ops.Rotation, per_sequence: bool) -> ops.Rotation:
    """The rotation that leads from the results of `old` to those of `new`, of the same tokens.

    per_sequence: both have a row for each sequence, which only meets its own. Otherwise, where both
    have several, there is a row for each two of them.
    """
    index = new.table_index if old.table_index is None else old.table_index
    tables = [(r.inv_freq, r.turns, r.scale) for r in (old, new)]
    if old.table_index is not None and new.table_index is not None and not per_sequence:
        rows, columns = old.scale.shape[0], new.scale.shape[0]
        index = old.table_index * columns + new.table_index
        tables = [
            [t.repeat_interleave(columns, 0) for t in tables[0]],
            [t.repeat(rows, 1) for t in tables[1]],
        ]
    (inv_freq, turns, scale), (to_inv_freq, to_turns, to_scale) = tables
    return new._replace(
        inv_freq=to_inv_freq - inv_freq,
        turns=to_turns - turns,
        scale=to_scale / scale,
        table_index=index,
        token_scale=None,
    )


class Operands:
    """One call's operands, read and checked: what apply_rope and qkv_rope share."""

    def __init__(
        self,
        spec,
        like,
        batch,
        seqlen,
        *,
        positions,
        cu_seqlens,
        seq_lens,
        inv_freq,
        attention_factor,
        q_scale,
        seq_lens_name="seq_lens",
    ):
        self.spec, self.device, self.dtype = spec, like.device, like.dtype
        self.batch, self.seqlen = batch, seqlen
        self.seq_lens_name = seq_lens_name
        self.pairs = spec.rotary_dim // 2
        self.positions = self._positions(positions)
        self._check_sequences(cu_seqlens, seq_lens)
        self.seq_lens = seq_lens
        self.inv_freq = self._inv_freq(inv_freq)
        self.attention_factor = self._attention_factor(attention_factor)
        self.q_scale = self._q_scale(q_scale)
        self.table_index = None
        if cu_seqlens is not None or seq_lens is not None or spec.cache_class != "static":
            self._place(cu_seqlens)

    @property
    def learned(self) -> bool:
        """Whether a factor may need its gradient."""
        factors = (self.inv_freq, self.attention_factor, self.q_scale)
        given = [t for t in factors if t is not None]
        return len(given) > 0 and any([t.requires_grad for t in given])  # noqa: C419 (Dynamo)

    def rotation(self, **rest) -> ops.Rotation:
        """The operands of an exact call; `rest` are further fields of ops.Rotation."""
        spec = self.spec
        inv_freq, turns, scale, axis_map = _tables(spec, self.device)
        if spec.cache_class == "dynamic":
            constants = inv_freq
            inv_freq = spec.rows_at(self.seq_lens, constants=constants)
            scale = spec.scale_rows_at(self.seq_lens, constants)
            turns = phase.turns_on_device(inv_freq)
        if self.inv_freq is not None:
            inv_freq = self.inv_freq.to(torch.float64).expand(scale.shape)
            turns = phase.turns_on_device(inv_freq)
        if self.attention_factor is not None:
            scale = self.attention_factor.to(torch.float64).expand(scale.shape)
        if self.inv_freq is not None and self.device.type != "cpu":
            # A frequency that is not finite has no phase. On the CPU the op refuses it; elsewhere,
            # where values are not looked at, its dimensions become NaN, which nobody overlooks.
            scale = torch.where(inv_freq.detach().isfinite(), scale, torch.nan)
        return ops.Rotation(
            inv_freq=inv_freq,
            turns=turns,
            scale=scale,
            positions=self.positions,
            table_index=self.table_index,
            axis_map=axis_map,
            token_scale=self.token_scale("exact"),
            rotary_offset=spec.rotary_offset,
            interleaved=spec.interleaved,
            **rest,
        )

    def tables(self, conjugate: bool):
        """cos and sin [1|batch, seqlen, rotary_dim] in the input's dtype, as transformers makes
        them: float32 angles, one choice of table for the whole batch, by its longest sequence."""
        spec, positions = self.spec, self._given_positions()
        row = None
        if spec.cache_class == "dynamic":
            rows, scales = spec.inv_freq("hf", seq_len=self.seq_lens.amax())[None], None
            if self.inv_freq is not None and self.inv_freq.shape[0] > 1:
                row = self.seq_lens.argmax()
        else:
            rows, scales = _hf_tables(spec, self.device)
            if spec.switch_length is not None:
                lengths = positions + 1 if self.seq_lens is None else self.seq_lens
                row = (lengths.amax() > spec.switch_length).long()
        if self.inv_freq is not None:
            rows = self.inv_freq.float()
        if self.attention_factor is not None:
            scales = self.attention_factor.float().expand(1, self.pairs)
        freq, scale = _row(rows, row), None if scales is None else _row(scales, row)
        if spec.axis_map is None:
            positions = positions[..., None]
        else:
            positions = positions[list(spec.axis_map)].movedim(0, -1)
        angle = _per_dimension(positions.float() * freq, spec.interleaved)
        cos, sin = angle.cos(), -angle.sin() if conjugate else angle.sin()
        if scale is not None:
            scale = _per_dimension(scale, spec.interleaved)
            cos, sin = cos * scale, sin * scale
        return cos.to(self.dtype), sin.to(self.dtype)

    def token_scale(self, precision: str):
        """The factor on q per token, [1|batch, seqlen], or None."""
        if self.q_scale is not None or self.spec.q_temperature is None:
            return self.q_scale
        positions = self._given_positions()
        one_axis = positions.amax(0) if positions.dim() == 3 else positions
        return self.spec.q_scale(one_axis, precision)

    def _given_positions(self):
        if self.positions is not None:
            return self.positions
        return torch.arange(self.seqlen, device=self.device)[None]

    def _place(self, cu_seqlens):
        """Positions of packed tokens, and the table that the sequence of each token uses."""
        spec, positions = self.spec, self.positions
        if positions is None and cu_seqlens is None:
            positions = self._given_positions()
        choose = spec.cache_class != "static"
        made, index = ops.token_rows(
            positions,
            cu_seqlens,
            self.seq_lens,
            self.batch,
            self.seqlen,
            spec.switch_length,
            spec.n_start,
            choose,
            self.seq_lens_name,
        )
        if positions is None:
            self.positions = made
        self.table_index = index if choose else None

    def _check_sequences(self, cu_seqlens, seq_lens):
        spec, sequences, name = self.spec, self.batch, self.seq_lens_name
        if cu_seqlens is not None:
            ints("cu_seqlens", cu_seqlens, self.device)
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
                raise refusal("cu_seqlens", "[num_seqs + 1] beside packed tokens", cu_seqlens)
            if self.batch != 1:
                raise refusal("cu_seqlens", f"None with a batch of {self.batch}", cu_seqlens)
            sequences = cu_seqlens.shape[0] - 1
        if seq_lens is not None:
            ints(name, seq_lens, self.device)
            if seq_lens.dim() != 1 or seq_lens.shape[0] != sequences:
                raise refusal(name, f"[{sequences}], one length per sequence", seq_lens)
        elif spec.cache_class == "dynamic":
            what = f"given: a {spec.rope_type!r} spec has a table for every length"
            raise refusal(name, what, None)

    def _positions(self, positions):
        """positions as [1|batch, seqlen] or [axes, 1|batch, seqlen], or None."""
        axes = self.spec.axes
        if positions is None:
            if axes > 1:
                raise refusal("positions", f"given: this spec reads {axes} position axes", None)
            return None
        ints("positions", positions, self.device)
        shape = tuple(positions.shape)
        rest = shape[1:] if axes > 1 else shape
        if not self._per_token(rest) or (axes > 1 and shape[0] != axes):
            lead = f", behind a leading dimension of {axes} axes" if axes > 1 else ""
            raise refusal("positions", self._per_token_words() + lead, positions)
        return positions if len(rest) == 2 else positions.unsqueeze(-2)

    def _per_token(self, shape) -> bool:
        return shape == (self.seqlen,) or (
            len(shape) == 2 and shape[1] == self.seqlen and shape[0] in (1, self.batch)
        )

    def _per_token_words(self) -> str:
        return f"[{self.seqlen}] or [1 or {self.batch}, {self.seqlen}]"

    def _inv_freq(self, value):
        if value is None:
            return None
        floats("inv_freq", value, device=self.device)
        spec = self.spec
        if spec.cache_class == "dynamic":
            tables = self.seq_lens.shape[0]
        else:
            tables = 1 + (spec.switch_length is not None) + (spec.n_start > 0)
        if tuple(value.shape) not in ((self.pairs,), (tables, self.pairs)):
            raise refusal("inv_freq", f"[{self.pairs}] or [{tables}, {self.pairs}]", value)
        return value if value.dim() == 2 else value[None]

    def _attention_factor(self, value):
        if value is None:
            return None
        name = "attention_factor"
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            if abs(value) > _LARGEST:
                raise refusal(name, "finite", value)
            value = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if not isinstance(value, torch.Tensor):
            raise refusal(name, "a number or a float tensor", value, TypeError)
        floats(name, value, device=self.device)
        if tuple(value.shape) not in ((), (self.pairs,)):
            raise refusal(name, f"0-d or [{self.pairs}]", value)
        return value

    def _q_scale(self, value):
        if value is None:
            return None
        floats("q_scale", value, device=self.device)
        if not self._per_token(tuple(value.shape)):
            raise refusal("q_scale", self._per_token_words(), value)
        return value if value.dim() == 2 else value[None]


def _row(table, row):
    """Row `row` (0-d tensor; None: 0) of a table; its only row if it has one."""
    if row is None or table.shape[0] == 1:
        return table[0]
    return table.index_select(0, row[None])[0]


def _per_dimension(x, interleaved):
    """Both members of every pair: [.., pairs] -> [.., 2 * pairs]."""
    return x.repeat_interleave(2, -1) if interleaved else torch.cat((x, x), -1)
