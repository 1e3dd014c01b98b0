"""The public functions: what they mean, what they take, what they refuse."""

from __future__ import annotations

import functools
import numbers

import torch

from . import composite, dispatch, ops, phase
from .spec import RopeSpec

LAYOUTS = {"bshd": 4, "bhsd": 4, "thd": 3}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def apply_rope(
    q,
    k,
    spec,
    positions=None,
    *,
    layout="bshd",
    cu_seqlens=None,
    seq_lens=None,
    conjugate=False,
    inv_freq=None,
    attention_factor=None,
    q_scale=None,
    precision="exact",
    backend="auto",
    out=None,
):
    """Rotate queries and keys by their positions.

    For every pair (a, b) of the rotated dimensions of a head, with the angle ``t = position * inv_freq_j``::

        y = attention_factor_j * (a cos t - b sin t, b cos t + a sin t)

    Pairs are (j, j + rotary_dim / 2), or (2 j, 2 j + 1) when ``spec.interleaved`` (RoFormer, arXiv:2104.09864, eq. 34).
    Dimensions outside the rotated slice are copied. ``q`` is multiplied by ``q_scale``, in all of its dimensions.

    Args:
        q: [batch, seqlen, num_heads, head_dim], or as ``layout`` says; float32, float64, bfloat16 or float16; any
            strides.
        k: the same with num_kv_heads, or None.
        spec: a :class:`RopeSpec`: frequencies, factors, pairing.
        positions: int32 or int64, [seqlen], [1 | batch, seqlen] or (layout "thd") [tokens]; with ``spec.axes`` > 1 a
            leading [axes] dimension. None: 0 .. seqlen - 1, starting again at every boundary of ``cu_seqlens``.
        layout: "bshd", "bhsd" or "thd" (packed: [tokens, heads, head_dim]).
        cu_seqlens: int [num_seqs + 1], where packed sequences begin and end: 0, ..., tokens. With "thd", or batch 1.
        seq_lens: int [num_seqs], the length that chooses the table of a length-dependent spec; pass the admitted
            length to pin the choice for a sequence's life. None: max(position) + 1 of each sequence, found on the
            device. ``dynamic`` specs require it.
        conjugate: rotate by -t instead: the inverse, up to the factors.
        inv_freq: [rotary_dim / 2] or [tables, rotary_dim / 2], in place of the spec's frequencies; differentiable.
        attention_factor: number, 0-d or [rotary_dim / 2] tensor, in place of the spec's; differentiable.
        q_scale: per token, shaped like one axis of ``positions``, in place of ``spec.q_scale``; differentiable.
        precision: "exact": 64-bit phases, |error of cos, sin| <= 2e-7 in float32 for |position| < 2**31, float32
            arithmetic (float64 for float64 tensors), one rounding. "hf": the tables and the roundings of
            transformers, bit for bit.
        backend: "auto", "cpu", "triton", "cuda" or "reference"; who computes, never what.
        out: (q2, k2) to write into, when gradients are disabled. They may be q and k themselves.

    Returns:
        (q2, k2): new tensors with the strides of ``torch.empty_like``; k2 is None when k is. Inputs are never written.
        Differentiable to every order in q, k, inv_freq, attention_factor and q_scale.

    Raises:
        ValueError, TypeError: an argument that cannot be meant, named, before anything is computed.
        RuntimeError: a backend that this machine does not have.
    """
    heads = _check_heads(q, k, spec, layout)
    _check_common(spec, precision, backend, q)
    out = _check_out(out, (q, k), ("q", "k"))
    call = _Call(spec, q.device, q.dtype, heads.shape[0], heads.shape[1], layout == "thd")
    call.read(positions, cu_seqlens, seq_lens, inv_freq, attention_factor, q_scale)
    if precision == "hf":
        cos, sin, token_scale = call.tables(conjugate)
        constants = (spec.interleaved, spec.rotary_offset, False, layout, backend)
        q2, k2 = ops.rotate_tables(q, k, cos, sin, *constants)
        if token_scale is not None:
            token_scale = token_scale[..., None, None].to(q.dtype)
            token_scale = token_scale.transpose(1, 2) if layout == "bhsd" else token_scale
            q2 = q2 * (token_scale[0] if layout == "thd" else token_scale)
        return _into(out, (q2, k2))
    rotation = call.rotation(conjugate=conjugate, layout=layout, backend=backend)
    if out is not None and not torch.compiler.is_compiling():
        return _into(out, dispatch.rotate(q, k, rotation, out), written=True)
    return _into(out, ops.rotate(q, k, rotation))


def qkv_rope(
    x,
    q_weight,
    k_weight,
    v_weight=None,
    *,
    spec,
    positions=None,
    q_bias=None,
    k_bias=None,
    v_bias=None,
    q_norm_weight=None,
    k_norm_weight=None,
    norm_eps=1e-6,
    norm_scope="head",
    cu_seqlens=None,
    seq_lens=None,
    inv_freq=None,
    attention_factor=None,
    q_scale=None,
    precision="exact",
    backend="auto",
    out=None,
):
    """Project hidden states to queries, keys and values, with RMSNorm and rotary embedding applied on the way out.

    ``q = rope(norm(x q_weight^T + q_bias))``, k alike, ``v = x v_weight^T + v_bias``; rope as in :func:`apply_rope`, norm
    as ``n / sqrt(mean(n**2) + norm_eps) * norm_weight`` over each head.

    Args:
        x: [batch, seqlen, d_model] or [tokens, d_model].
        q_weight, k_weight, v_weight: as nn.Linear holds them, [heads * head_dim, d_model]; separate, or row slices of
            one packed projection. No v_weight, no v.
        spec, positions, cu_seqlens, seq_lens, inv_freq, attention_factor, q_scale, precision, backend: as in
            :func:`apply_rope` ([tokens, d_model] being layout "thd").
        q_bias, k_bias, v_bias: [heads * head_dim], or None.
        q_norm_weight, k_norm_weight: RMSNorm weights, [head_dim], or [heads * head_dim] with ``norm_scope="all"``; any
            float dtype. For a norm that multiplies by 1 + w (Gemma), pass 1 + w. Not with ``precision="hf"``.
        norm_eps: added to the mean square.
        norm_scope: "head", or "all": one norm over all heads of a token (OLMo-2).
        out: (q, k, v) to write into, when gradients are disabled; v None without v_weight.

    Returns:
        (q, k, v), each [.., heads, head_dim]; v is the plain projection, or None. Under autocast, x, weights and biases
        are cast as a linear layer's would be; factors and norm weights are not. Differentiable to every order in
        every tensor; keeps x and the weights for the backward, and with a norm or a learned factor the projections.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`apply_rope`.
    """
    if isinstance(x, torch.Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias = (
            t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in (x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias)
        )
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    _check_projection(x, weights, biases, spec)
    _check_common(spec, precision, backend, x)
    norms = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
    _check_norms(norms, weights, norm_eps, norm_scope, precision, x, spec)
    packed = x.dim() == 2
    layout = "thd" if packed else "bshd"
    batch, seqlen = (1, x.shape[0]) if packed else x.shape[:2]
    shapes = [None if w is None else (*x.shape[:-1], w.shape[0] // spec.head_dim, spec.head_dim) for w in weights]
    out = _check_out(out, (x, *(w for w in (*weights, *biases))), ("q", "k", "v"), shapes)
    call = _Call(spec, x.device, x.dtype, batch, seqlen, packed)
    call.read(positions, cu_seqlens, seq_lens, inv_freq, attention_factor, q_scale)
    if precision == "hf":
        linear = torch.nn.functional.linear
        q, k, v = (
            None if w is None else linear(x, w, b).unflatten(-1, (-1, spec.head_dim))
            for w, b in zip(weights, biases, strict=True)
        )
        cos, sin, token_scale = call.tables(False)
        constants = (spec.interleaved, spec.rotary_offset, False, layout, backend)
        q, k = ops.rotate_tables(q, k, cos, sin, *constants)
        if token_scale is not None:
            token_scale = token_scale[..., None, None].to(q.dtype)
            q = q * (token_scale[0] if packed else token_scale)
        return _into(out, (q, k, v))
    rotation = call.rotation(
        q_norm=q_norm_weight,
        k_norm=k_norm_weight,
        norm_eps=float(norm_eps),
        norm_all=norm_scope == "all",
        layout=layout,
        backend=backend,
    )
    if out is not None and not torch.compiler.is_compiling():
        results = dispatch.project(x, weights, biases, spec.head_dim, rotation, False, out)
        return _into(out, results[:3], written=True)
    learned = _requires_grad(inv_freq) or _requires_grad(attention_factor) or _requires_grad(q_scale)
    return _into(out, ops.project(x, weights, biases, spec.head_dim, rotation, learned))


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' ``apply_rotary_pos_emb``: ``x * cos + rotate_half(x) * sin``, bit for bit, with complete gradients.

    Args:
        q, k: [batch, heads, seqlen, head_dim] with ``unsqueeze_dim=1``, [batch, seqlen, heads, head_dim] with 2. k may
            be None.
        cos, sin: [1 | batch, seqlen, rotary_dim], one entry per dimension, attention factor folded in, as
            transformers' rotary modules return them. A table narrower than the head turns its first rotary_dim
            dimensions and leaves the rest, as models with partial rotary do.
        unsqueeze_dim: where q and k have their heads: 1 or 2.

    Returns:
        (q2, k2): new tensors, in the dtype torch would promote q and cos to. Differentiable in q, k, cos and sin.
    """
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim: must be 1 (heads before tokens) or 2, got {unsqueeze_dim!r}")
    layout = "bhsd" if unsqueeze_dim == 1 else "bshd"
    _check_float("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: must have 4 dimensions, got shape {tuple(q.shape)}")
    view = composite.bshd(q, layout)
    if k is not None:
        _check_like("k", k, q)
        other = composite.bshd(k, layout)
        if k.dim() != 4 or (other.shape[0], other.shape[1], other.shape[3]) != (
            view.shape[0],
            view.shape[1],
            view.shape[3],
        ):
            raise ValueError(
                f"k: must have q's batch, seqlen and head_dim ({tuple(q.shape)}), got shape {tuple(k.shape)}"
            )
    for name, table in (("cos", cos), ("sin", sin)):
        _check_float(name, table)
        if table.device != q.device:
            raise ValueError(f"{name}: must be on q's device {q.device}, got {table.device}")
        if table.dim() != 3 or table.shape[0] not in (1, view.shape[0]) or table.shape[1] != view.shape[1]:
            raise ValueError(
                f"{name}: must be [1 or {view.shape[0]}, {view.shape[1]}, rotary_dim], got shape {tuple(table.shape)}"
            )
        if table.shape[2] % 2 or not 0 < table.shape[2] <= view.shape[3]:
            raise ValueError(
                f"{name}: its last dimension, rotary_dim, must be even and at most head_dim {view.shape[3]}, "
                f"got {table.shape[2]}"
            )
    if sin.shape[1:] != cos.shape[1:] or sin.dtype != cos.dtype:
        raise ValueError(
            f"sin: must be like cos ({tuple(cos.shape)}, {cos.dtype}), got {tuple(sin.shape)}, {sin.dtype}"
        )
    dtype = torch.promote_types(q.dtype, cos.dtype)
    q, cos, sin = q.to(dtype), cos.to(dtype), sin.to(dtype)
    return ops.rotate_tables(
        q, None if k is None else k.to(dtype), cos, sin, False, 0, False, layout, "auto"
    )


# ----------------------------------------------------------------------------------------------------------- operands


def _constant(function):
    """Let torch.compile call `function` while tracing and keep what it returns, guarded by its arguments' identity.

    This is the mark that torch.compiler.assume_constant_result sets; the public name would import Dynamo with us.
    """
    function._dynamo_marked_constant = True
    return function


@functools.lru_cache(maxsize=256)
def _cached_tables(spec: RopeSpec, device: torch.device) -> tuple:
    with torch.inference_mode(False), torch.no_grad():
        axis_map = spec.axis_map
        if axis_map is not None:
            axis_map = torch.tensor(axis_map, dtype=torch.int32, device=device)
        if spec.cache_class == "dynamic":
            return spec.dynamic_constants().to(device), None, None, axis_map
        tables = (spec.rows(), spec.turns(), spec.scale_rows())
        return *(t.to(device) for t in tables), axis_map


@functools.lru_cache(maxsize=256)
def _cached_hf_tables(spec: RopeSpec, device: torch.device) -> tuple:
    with torch.inference_mode(False), torch.no_grad():
        scale = spec.scale_rows("hf").float()
        scale = scale.to(device) if (scale != 1).any() else None
        return spec.rows("hf").to(device), scale


@_constant
def _tables(spec, device):
    """(inv_freq, turns, scale, axis_map) of `spec` on `device`, made once; of a dynamic spec, which has a table for
    every length, (its constants, None, None, axis_map)."""
    return _cached_tables(spec, device)


@_constant
def _hf_tables(spec, device):
    """(inv_freq, attention factors or None if all are 1), float32, as transformers has them."""
    return _cached_hf_tables(spec, device)


def warm(spec: RopeSpec, device: torch.device) -> None:
    """Make the tables of `spec` on `device` now, so that no later call has to (a graph capture, a trace)."""
    _cached_tables(spec, torch.device(device))


class _Call:
    """One call's operands, read and checked: what the two public functions share."""

    def __init__(self, spec, device, dtype, batch, seqlen, packed):
        self.spec, self.device, self.dtype = spec, device, dtype
        self.batch, self.seqlen, self.packed = batch, seqlen, packed

    def read(self, positions, cu_seqlens, seq_lens, inv_freq, attention_factor, q_scale):
        spec = self.spec
        self.positions = self._positions(positions)
        if cu_seqlens is not None:
            _check_ints("cu_seqlens", cu_seqlens, self.device)
            if self.batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
                raise ValueError(
                    f"cu_seqlens: must be [num_seqs + 1] beside packed tokens or batch 1, got shape "
                    f"{tuple(cu_seqlens.shape)} and batch {self.batch}"
                )
        sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if seq_lens is not None:
            _check_ints("seq_lens", seq_lens, self.device)
            if tuple(seq_lens.shape) != (sequences,):
                raise ValueError(f"seq_lens: must be [{sequences}], one per sequence, got {tuple(seq_lens.shape)}")
        elif spec.cache_class == "dynamic":
            raise ValueError(f"seq_lens: required, a {spec.rope_type!r} spec has a table for every length")
        self.cu_seqlens, self.seq_lens = cu_seqlens, seq_lens
        self.inv_freq = self._override_inv_freq(inv_freq)
        self.attention_factor = self._override_factor(attention_factor)
        self.q_scale = self._override_q_scale(q_scale)
        self.index = None
        if cu_seqlens is not None or seq_lens is not None or spec.cache_class != "static":
            self._place()

    def _place(self):
        """Positions of packed tokens, and the table that the sequence of each token uses."""
        spec, positions = self.spec, self.positions
        if positions is None and self.cu_seqlens is None:
            positions = torch.arange(self.seqlen, device=self.device)[None]
        choose = spec.cache_class != "static"
        own, index = ops.token_rows(
            positions,
            self.cu_seqlens,
            self.seq_lens,
            self.batch,
            self.seqlen,
            spec.switch_length,
            spec.n_start,
            choose,
        )
        self.positions = own if self.positions is None and self.cu_seqlens is not None else self.positions
        self.index = index if choose else None

    def rotation(self, **rest) -> ops.Rotation:
        """The operands of an exact call."""
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
            # A frequency that is not finite has no phase: its dimensions become NaN, which nobody overlooks.
            scale = torch.where(inv_freq.detach().isfinite(), scale, torch.nan)
        return ops.Rotation(
            inv_freq=inv_freq,
            turns=turns,
            scale=scale,
            positions=self.positions,
            table_index=self.index,
            axis_map=axis_map,
            token_scale=self._token_scale("exact"),
            rotary_offset=spec.rotary_offset,
            interleaved=spec.interleaved,
            **rest,
        )

    def tables(self, conjugate):
        """cos and sin [1|batch, seqlen, rotary_dim] in q's dtype as transformers makes them, and the factor on q.

        One choice of table for the whole batch: by the longest sequence, on the device.
        """
        spec, positions = self.spec, self.positions
        if positions is None:
            positions = torch.arange(self.seqlen, device=self.device)[None]
        if spec.cache_class == "dynamic":
            longest = self.seq_lens.amax()
            row, scale = spec.inv_freq("hf", seq_len=longest), None
        else:
            rows, scales = _hf_tables(spec, self.device)
            row, scale = rows[0], None if scales is None else scales[0]
            if spec.switch_length is not None:
                longest = positions.amax() + 1 if self.seq_lens is None else self.seq_lens.amax()
                is_long = longest > spec.switch_length
                row = torch.where(is_long, rows[1], row)
                scale = None if scales is None else torch.where(is_long, scales[1], scale)
        if self.inv_freq is not None:
            row = self.inv_freq[0].float()
        if self.attention_factor is not None:
            scale = self.attention_factor.float().expand(row.shape)
        at = positions[..., None] if spec.axis_map is None else positions[list(spec.axis_map)].movedim(0, -1)
        angle = _per_dimension(at.float() * row, spec.interleaved)
        cos, sin = angle.cos(), -angle.sin() if conjugate else angle.sin()
        if scale is not None:
            scale = _per_dimension(scale, spec.interleaved)
            cos, sin = cos * scale, sin * scale
        return cos.to(self.dtype), sin.to(self.dtype), self._token_scale("hf")

    def _token_scale(self, precision):
        if self.q_scale is not None or self.spec.q_temperature is None:
            return self.q_scale
        positions = self.positions
        if positions is None:
            positions = torch.arange(self.seqlen, device=self.device)[None]
        return self.spec.q_scale(positions.amax(0) if positions.dim() == 3 else positions, precision)

    def _positions(self, positions):
        """positions as [1|batch, seqlen] or [axes, 1|batch, seqlen], or None."""
        axes = self.spec.axes
        if positions is None:
            if axes > 1:
                raise ValueError(f"positions: required, this spec reads {axes} position axes")
            return None
        _check_ints("positions", positions, self.device)
        shape = tuple(positions.shape)
        lead = shape[:1] if axes > 1 else ()
        rest = shape[len(lead) :]
        fits = rest == (self.seqlen,) or rest in ((1, self.seqlen), (self.batch, self.seqlen))
        if (axes > 1 and lead != (axes,)) or not fits:
            want = f"[{self.seqlen}] or [1 or {self.batch}, {self.seqlen}]"
            if axes > 1:
                want = f"{want} behind a leading dimension of {axes} axes"
            raise ValueError(f"positions: must be {want}, got {list(shape)}")
        return positions if len(rest) == 2 else positions.unsqueeze(-2)

    def _override_inv_freq(self, value):
        if value is None:
            return None
        _check_float("inv_freq", value)
        spec, pairs = self.spec, self.spec.rotary_dim // 2
        tables = self.seq_lens.shape[0] if spec.cache_class == "dynamic" else _tables(spec, self.device)[2].shape[0]
        if tuple(value.shape) not in ((pairs,), (tables, pairs)) or value.device != self.device:
            raise ValueError(
                f"inv_freq: must be [{pairs}] or [{tables}, {pairs}] on {self.device}, got {list(value.shape)} on "
                f"{value.device}"
            )
        return value if value.dim() == 2 else value[None]

    def _override_factor(self, value):
        if value is None:
            return None
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            value = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise TypeError(f"attention_factor: must be a number or a float tensor, got {_kind(value)}")
        pairs = self.spec.rotary_dim // 2
        if tuple(value.shape) not in ((), (pairs,)) or value.device != self.device:
            raise ValueError(
                f"attention_factor: must be 0-d or [{pairs}] on {self.device}, got {list(value.shape)} on {value.device}"
            )
        return value

    def _override_q_scale(self, value):
        if value is None:
            return None
        _check_float("q_scale", value)
        shape = tuple(value.shape)
        fits = ((self.seqlen,), (1, self.seqlen), (self.batch, self.seqlen))
        if shape not in fits or value.device != self.device:
            raise ValueError(
                f"q_scale: must be [{self.seqlen}] or [1 or {self.batch}, {self.seqlen}] on {self.device}, got "
                f"{list(shape)} on {value.device}"
            )
        return value if value.dim() == 2 else value[None]


def _per_dimension(x, interleaved):
    """Both members of every pair: [.., pairs] -> [.., 2 * pairs]."""
    return x.repeat_interleave(2, -1) if interleaved else torch.cat((x, x), -1)


# ------------------------------------------------------------------------------------------------------------- checks


def _requires_grad(value) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _kind(value) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _check_float(name, value) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a tensor, got {_kind(value)}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name}: must be float32, float64, bfloat16 or float16, got {value.dtype}")


def _check_ints(name, value, device) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be an int32 or int64 tensor, got {_kind(value)}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: must be int32 or int64, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name}: must be on {device}, got {value.device}")


def _check_like(name, value, q, other="q") -> None:
    _check_float(name, value)
    if value.dtype != q.dtype:
        raise TypeError(f"{name}: must have {other}'s dtype {q.dtype}, got {value.dtype}")
    if value.device != q.device:
        raise ValueError(f"{name}: must be on {other}'s device {q.device}, got {value.device}")


def _check_heads(q, k, spec, layout):
    """q as [batch, seqlen, heads, head_dim], after checking q and k against the layout and the spec."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if not isinstance(spec, RopeSpec):
        raise TypeError(f"spec: must be a RopeSpec, got {_kind(spec)}")
    _check_float("q", q)
    if k is not None:
        _check_like("k", k, q)
    views = []
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        if x.dim() != LAYOUTS[layout]:
            raise ValueError(f"{name}: must have {LAYOUTS[layout]} dimensions for layout {layout!r}, got {list(x.shape)}")
        if x.shape[-1] != spec.head_dim:
            raise ValueError(f"{name}: its head_dim must be the spec's {spec.head_dim}, got {x.shape[-1]}")
        views.append(composite.bshd(x, layout))
    if k is not None and views[0].shape[:2] != views[1].shape[:2]:
        raise ValueError(
            f"k: must have q's batch and seqlen {tuple(views[0].shape[:2])}, got {tuple(views[1].shape[:2])}"
        )
    return views[0]


def _check_common(spec, precision, backend, tensor) -> None:
    if precision not in ("exact", "hf"):
        raise ValueError(f"precision: must be 'exact' or 'hf', got {precision!r}")
    dispatch.check_backend(backend, tensor)


def _check_projection(x, weights, biases, spec) -> None:
    if not isinstance(spec, RopeSpec):
        raise TypeError(f"spec: must be a RopeSpec, got {_kind(spec)}")
    _check_float("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: must be [batch, seqlen, d_model] or [tokens, d_model], got {list(x.shape)}")
    for letter, weight, bias in zip("qkv", weights, biases, strict=True):
        name = f"{letter}_weight"
        if weight is None and letter == "v":
            if bias is not None:
                raise ValueError("v_bias: given without v_weight")
            continue
        _check_like(name, weight, x, "x")
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(f"{name}: must be [heads * head_dim, {x.shape[-1]}], got {list(weight.shape)}")
        if weight.shape[0] % spec.head_dim or not weight.shape[0]:
            raise ValueError(
                f"{name}: its rows must be a multiple of the spec's head_dim {spec.head_dim}, got {weight.shape[0]}"
            )
        if bias is not None:
            _check_like(f"{letter}_bias", bias, x, "x")
            if tuple(bias.shape) != (weight.shape[0],):
                raise ValueError(f"{letter}_bias: must be [{weight.shape[0]}], got {list(bias.shape)}")


def _check_norms(norms, weights, norm_eps, norm_scope, precision, x, spec) -> None:
    if norm_scope not in ("head", "all"):
        raise ValueError(f"norm_scope: must be 'head' or 'all', got {norm_scope!r}")
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, numbers.Real) or not 0 <= norm_eps < float("inf"):
        raise ValueError(f"norm_eps: must be a finite number >= 0, got {norm_eps!r}")
    for (name, norm), weight in zip(norms.items(), weights, strict=False):
        if norm is None:
            continue
        if precision == "hf":
            raise ValueError(f"{name}: not with precision='hf', where the norm is the model's own module")
        _check_float(name, norm)
        size = weight.shape[0] if norm_scope == "all" else spec.head_dim
        if tuple(norm.shape) != (size,) or norm.device != x.device:
            raise ValueError(f"{name}: must be [{size}] on {x.device}, got {list(norm.shape)} on {norm.device}")


def _check_out(out, inputs, names, shapes=None):
    """`out` as a tuple, after checking that it can be written to."""
    if out is None:
        return None
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError("out: only with gradients disabled (torch.no_grad), nothing could be differentiated")
    shapes = [None if t is None else tuple(t.shape) for t in inputs] if shapes is None else shapes
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise ValueError(f"out: must be a tuple ({', '.join(names)}), got {_kind(out)}")
    for name, target, shape in zip(names, out, shapes, strict=True):
        if (target is None) != (shape is None):
            raise ValueError(f"out: {name} must be {'None' if shape is None else f'a tensor {list(shape)}'}")
        if target is None:
            continue
        _check_like(f"out: {name}", target, tensors[0], "the input")
        if tuple(target.shape) != tuple(shape):
            raise ValueError(f"out: {name} must be {list(shape)}, got {list(target.shape)}")
    return tuple(out)


def _into(out, results, written=False):
    """The results, copied into `out` if there is one and they are not there already."""
    if out is None:
        return results
    if not written:
        for target, result in zip(out, results, strict=True):
            if target is not None:
                target.copy_(result)
    return out
