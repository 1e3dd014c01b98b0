"""The public functions: what they mean, what they take, what they refuse."""

from __future__ import annotations

import torch

from . import checks, dispatch, distributed, ops
from .operands import Operands, between


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

    For every pair (a, b) of the rotated dimensions of a head, with the angle ``t = position *
    inv_freq_j``::

        y = attention_factor_j * (a cos t - b sin t, b cos t + a sin t)

    Pairs are (j, j + rotary_dim / 2), or (2 j, 2 j + 1) when ``spec.interleaved`` (RoFormer,
    arXiv:2104.09864, eq. 34). Dimensions outside the rotated slice are copied. ``q`` is multiplied
    by ``q_scale``, in all of its dimensions.

    Args: q: [batch, seqlen, num_heads, head_dim], or as ``layout`` says; float32, float64, bfloat16
        or float16; any
            strides.
        k: the same with num_kv_heads, or None.
        spec: a :class:`RopeSpec`: frequencies, factors, pairing.
        positions: int32 or int64, [seqlen], [1 | batch, seqlen] or (layout "thd") [tokens]; with
            ``spec.axes`` > 1 a leading [axes] dimension. None: 0 .. seqlen - 1, starting again at
            every boundary of ``cu_seqlens``.
        layout: "bshd", "bhsd" or "thd" (packed: [tokens, heads, head_dim]).
        cu_seqlens: int [num_seqs + 1], where packed sequences begin and end: 0, ..., tokens. With
        "thd", or batch 1.
        seq_lens: int [num_seqs], the length that chooses the table of a length-dependent spec; pass
            the admitted length to pin the choice for a sequence's life. None: max(position) + 1 of
            each sequence, found on the device. ``dynamic`` specs require it.
        conjugate: rotate by -t instead: the inverse, up to the factors.
        inv_freq: [rotary_dim / 2] or [tables, rotary_dim / 2], in place of the spec's frequencies;
        differentiable.
        attention_factor: number, 0-d or [rotary_dim / 2] tensor, in place of the spec's;
        differentiable.
        q_scale: per token, shaped like one axis of ``positions``, in place of ``spec.q_scale``;
        differentiable.
        precision: "exact": 64-bit phases, |error of cos, sin| <= 2e-7 in float32 for |position| <
            2**31, float32 arithmetic (float64 for float64 tensors), one rounding. "hf": the tables
            and the roundings of transformers, bit for bit.
        backend: "auto", "cpu", "triton", "cuda" or "reference"; who computes, never what.
        out: (q2, k2) to write into, when gradients are disabled. They may be q and k themselves.

    Returns: (q2, k2): new tensors with the strides of ``torch.empty_like``; k2 is None when k is.
        Inputs are never written. Differentiable to every order in q, k, inv_freq, attention_factor
        and q_scale.

    Raises:
        ValueError, TypeError: an argument that cannot be meant, named, before anything is computed.
        RuntimeError: a backend that this machine does not have.
    """
    batch, seqlen = checks.heads(q, k, spec, layout)
    checks.flag("conjugate", conjugate)
    _check_choices(precision, backend, q)
    if distributed.is_sharded(q, k):
        return distributed.apply_rope(
            apply_rope,
            q,
            k,
            spec,
            positions,
            layout=layout,
            cu_seqlens=cu_seqlens,
            seq_lens=seq_lens,
            conjugate=conjugate,
            inv_freq=inv_freq,
            attention_factor=attention_factor,
            q_scale=q_scale,
            precision=precision,
            backend=backend,
            out=out,
        )
    operands = Operands(
        spec,
        q,
        batch,
        seqlen,
        positions=positions,
        cu_seqlens=cu_seqlens,
        seq_lens=seq_lens,
        inv_freq=inv_freq,
        attention_factor=attention_factor,
        q_scale=q_scale,
    )
    shapes = (q.shape, None if k is None else k.shape)
    inputs = (q, k, positions, cu_seqlens, seq_lens, inv_freq, attention_factor, q_scale)
    out = checks.outputs(out, inputs, ("q", "k"), shapes, in_place=True)
    if precision == "hf":
        return _into(out, _rotate_hf(q, k, operands, conjugate, layout, backend))
    # norm_eps is spelled out: a default would be a symbolic float to a dynamic torch.compile.
    rotation = operands.rotation(norm_eps=1e-6, conjugate=conjugate, layout=layout, backend=backend)
    if _directly(out, q, k, *rotation):
        dispatch.rotate(q, k, rotation, out)
        return _written(out)
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
    """Project hidden states to queries, keys and values, with RMSNorm and rotary embedding applied
    on the way out.

    ``q = rope(norm(x q_weight^T + q_bias))``, k alike, ``v = x v_weight^T + v_bias``; rope as in
    :func:`apply_rope`, norm as ``n / sqrt(mean(n**2) + norm_eps) * norm_weight`` over each head.

    Args: x: [batch, seqlen, d_model] or [tokens, d_model]. q_weight, k_weight, v_weight: as
        nn.Linear holds them, [heads * head_dim, d_model]; separate, or row slices of
            one packed projection. No v_weight, no v.
        spec, positions, cu_seqlens, seq_lens, inv_freq, attention_factor, q_scale, precision,
            backend: as in :func:`apply_rope` ([tokens, d_model] being layout "thd").
        q_bias, k_bias, v_bias: [heads * head_dim], or None.
        q_norm_weight, k_norm_weight: RMSNorm weights, [head_dim], or [heads * head_dim] with
            ``norm_scope="all"``; any float dtype. For a norm that multiplies by 1 + w (Gemma), pass
            1 + w. Not with ``precision="hf"``.
        norm_eps: added to the mean square.
        norm_scope: "head", or "all": one norm over all heads of a token (OLMo-2).
        out: (q, k, v) to write into, when gradients are disabled; v None without v_weight.

    Returns: (q, k, v), each [.., heads, head_dim]; v is the plain projection, or None. Under
        autocast, x, weights and biases are cast as a linear layer's would be; factors and norm
        weights are not. Differentiable to every order in every tensor; keeps x and the weights for
        the backward, and with a norm or a learned factor the projections.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`apply_rope`.
    """
    device = x.device.type if isinstance(x, torch.Tensor) else "meta"
    if device != "meta" and torch.is_autocast_enabled(device):  # torch knows no autocast there
        dtype = torch.get_autocast_dtype(device)
        x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias = (
            t.to(dtype) if _is_cast(t) else t
            for t in (x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias)
        )
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    checks.projection(x, weights, biases, spec)
    _check_choices(precision, backend, x)
    norms = (q_norm_weight, k_norm_weight)
    checks.norms(*norms, weights, norm_eps, norm_scope, precision, spec)
    if distributed.is_sharded(x, *weights):
        return distributed.qkv_rope(
            qkv_rope,
            x,
            weights,
            biases,
            spec=spec,
            positions=positions,
            q_norm_weight=q_norm_weight,
            k_norm_weight=k_norm_weight,
            norm_eps=norm_eps,
            norm_scope=norm_scope,
            cu_seqlens=cu_seqlens,
            seq_lens=seq_lens,
            inv_freq=inv_freq,
            attention_factor=attention_factor,
            q_scale=q_scale,
            precision=precision,
            backend=backend,
            out=out,
        )
    head_dim = spec.head_dim
    shapes = [
        None if w is None else (*x.shape[:-1], w.shape[0] // head_dim, head_dim) for w in weights
    ]
    batch, seqlen = (1, *x.shape[:-1]) if x.dim() == 2 else x.shape[:-1]
    layout = "thd" if x.dim() == 2 else "bshd"
    operands = Operands(
        spec,
        x,
        batch,
        seqlen,
        positions=positions,
        cu_seqlens=cu_seqlens,
        seq_lens=seq_lens,
        inv_freq=inv_freq,
        attention_factor=attention_factor,
        q_scale=q_scale,
    )
    inputs = (x, *weights, *biases, *norms, positions, cu_seqlens, seq_lens)
    inputs += (inv_freq, attention_factor, q_scale)
    out = checks.outputs(out, inputs, ("q", "k", "v"), shapes, in_place=False)
    if precision == "hf":
        linear = torch.nn.functional.linear
        q, k, v = (
            None if w is None else linear(x, w, b).unflatten(-1, (-1, head_dim))
            for w, b in zip(weights, biases, strict=True)
        )
        return _into(out, (*_rotate_hf(q, k, operands, False, layout, backend), v))
    rotation = operands.rotation(
        q_norm=q_norm_weight,
        k_norm=k_norm_weight,
        norm_eps=float(norm_eps),
        norm_all=norm_scope == "all",
        layout=layout,
        backend=backend,
    )
    flat = out is not None and all(t is None or t.stride()[-2:] == (head_dim, 1) for t in out)
    if flat and _directly(out, x, *weights, *biases, *rotation):
        dispatch.project(x, weights, biases, head_dim, rotation, False, out)
        return _written(out)
    learned = operands.learned
    return _into(out, ops.project(x, weights, biases, head_dim, rotation, learned))


def rerotate(
    k,
    positions,
    from_spec,
    to_spec,
    *,
    layout="bshd",
    cu_seqlens=None,
    from_seq_lens=None,
    to_seq_lens=None,
    backend="auto",
    out=None,
):
    """Move rotated keys from one table to another: what :func:`apply_rope` with ``to_spec`` would
    have made of the unrotated keys, without them.

    Both rotations turn by a multiple of the position, so one by the difference is enough: with the
    angle ``t = position * (to_inv_freq_j - from_inv_freq_j)`` every pair (a, b) becomes::

        to_factor_j / from_factor_j * (a cos t - b sin t, b cos t + a sin t)

    The difference is taken of the 64-bit phases, where it is exact at any position, and the result
    is rounded once; what the first rotation rounded away stays lost. It repairs the rotation alone:
    in a transformer, the keys of deeper layers come from hidden states that were computed under
    ``from_spec``, and stay so.

    Args:
        k: keys (or queries) that were rotated with ``from_spec``: [batch, seqlen, num_kv_heads,
            head_dim], or as ``layout`` says; any strides. As :func:`apply_rope` takes them.
        positions: where they were rotated to; as :func:`apply_rope` takes them, None for 0, 1, ...
        from_spec, to_spec: :class:`RopeSpec` of the same head, which rotate the same pairs. They
            may be one spec whose tables depend on the length (LongRoPE at its switch).
        layout, cu_seqlens, backend: as in :func:`apply_rope`.
        from_seq_lens, to_seq_lens: int [num_seqs], the ``seq_lens`` of the two rotations: each
            chooses the table of a length-dependent spec. None: max(position) + 1 of each sequence;
            ``dynamic`` specs require theirs.
        out: a tensor to write into, when gradients are disabled. It may be ``k`` itself.

    Returns: a new tensor like ``k``, or ``out``. Differentiable to every order in ``k``. LongRoPE's
        first ``n_start`` tokens have a table of their own on either side. A factor on each query
        (``q_temperature``) is left as it is.

    Raises:
        ValueError, TypeError: an argument that cannot be meant, named, before anything is computed.
        RuntimeError: a backend that this machine does not have.
    """
    batch, seqlen = checks.heads(k, None, from_spec, layout, names=("k", "from_spec"))
    checks.same_pairs(from_spec, to_spec)
    dispatch.check_backend(backend, k)
    sides = [
        Operands(
            spec,
            k,
            batch,
            seqlen,
            positions=positions,
            cu_seqlens=cu_seqlens,
            seq_lens=seq_lens,
            inv_freq=None,
            attention_factor=None,
            q_scale=None,
            seq_lens_name=name,
        ).rotation(norm_eps=1e-6, layout=layout, backend=backend)
        for name, spec, seq_lens in (
            ("from_seq_lens", from_spec, from_seq_lens),
            ("to_seq_lens", to_spec, to_seq_lens),
        )
    ]
    per_sequence = from_spec.cache_class == to_spec.cache_class == "dynamic"
    rotation = between(*sides, per_sequence)
    inputs = (k, positions, cu_seqlens, from_seq_lens, to_seq_lens)
    out = None if out is None else (out,)
    out = checks.outputs(out, inputs, ("k",), (k.shape,), in_place=True)
    if _directly(out, k, *rotation):
        dispatch.rotate(k, None, rotation, (*out, None))
        return _written(out)[0]
    k2, _ = ops.rotate(k, None, rotation)
    return k2 if out is None else out[0].copy_(k2)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' ``apply_rotary_pos_emb``: ``x * cos + rotate_half(x) * sin``, bit for bit, with
    complete gradients.

    Args: q, k: [batch, heads, seqlen, head_dim] with ``unsqueeze_dim=1``, [batch, seqlen, heads,
        head_dim] with 2. k may
            be None.
        cos, sin: [1 | batch, seqlen, rotary_dim], one entry per dimension, attention factor folded
            in, as transformers' rotary modules return them. A table narrower than the head turns
            its first rotary_dim dimensions and leaves the rest, as models with partial rotary do.
        unsqueeze_dim: where q and k have their heads: 1 or 2.

    Returns: (q2, k2): new tensors, in the dtype torch would promote q and cos to. Differentiable in
        q, k, cos and sin.
    """
    layout = checks.tables(q, k, cos, sin, unsqueeze_dim)
    dtype = torch.promote_types(q.dtype, cos.dtype)
    q, cos, sin = q.to(dtype), cos.to(dtype), sin.to(dtype)
    k = None if k is None else k.to(dtype)
    return ops.rotate_tables(q, k, cos, sin, False, 0, False, layout, "auto")


def _rotate_hf(q, k, operands: Operands, conjugate, layout, backend):
    """Rotate by transformers' tables with transformers' roundings, then scale q."""
    spec = operands.spec
    for name in ("inv_freq", "attention_factor", "q_scale"):
        checks.finite(name, getattr(operands, name))
    cos, sin = operands.tables(conjugate)
    constants = (spec.interleaved, spec.rotary_offset, False, layout, backend)
    q, k = ops.rotate_tables(q, k, cos, sin, *constants)
    token_scale = operands.token_scale("hf")
    if token_scale is not None:
        token_scale = token_scale[..., None, None].to(q.dtype)
        if layout == "bhsd":
            token_scale = token_scale.transpose(1, 2)
        q = q * (token_scale[0] if layout == "thd" else token_scale)
    return q, k


def _is_cast(t) -> bool:
    """Whether autocast casts an argument of a linear layer: it leaves float64 as it is. What is
    not dense stays as it is too, to be refused."""
    floating = isinstance(t, torch.Tensor) and t.is_floating_point() and checks.is_dense(t)
    return floating and t.dtype != torch.float64


def _check_choices(precision, backend, tensor) -> None:
    checks.one_of("precision", precision, ("exact", "hf"))
    dispatch.check_backend(backend, tensor)


def _directly(out, *inputs) -> bool:
    """Whether kernels may write `out` themselves: no trace has to see it, and no tensor keeps its
    sign aside, as torch's views of conjugates do (the operators resolve that on their way)."""
    if out is None or torch.compiler.is_compiling():
        return False
    return not any(isinstance(t, torch.Tensor) and t.is_neg() for t in (*inputs, *out))


def _written(out):
    """`out`, autograd having been told: what it has saved of these tensors is no longer there."""
    torch.autograd.graph.increment_version([t for t in out if t is not None])
    return out


def _into(out, results):
    """The results, copied into `out` if there is one."""
    if out is None:
        return results
    for target, result in zip(out, results, strict=True):
        if target is not None:
            target.copy_(result)
    return out
