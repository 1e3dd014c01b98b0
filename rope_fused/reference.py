"""The slow truth: rotary embedding in plain torch and float64, differentiable, on any device.

Two layers. `rotate` and `rotate_tables` compute what an op computes, from an op's operands.
`apply_rope` and `qkv_rope` take what the public functions take and go through the batch one
sequence at a time, so that nothing is shared with the vectorised code they are the measure of.

For a pair (a, b) of a head, at angle t = position * inv_freq:

    y = scale * (a cos t - b sin t,  b cos t + a sin t)

Results are float64; the caller rounds them once. Autograd goes through every operation, to any
order and in every floating argument.
"""

import torch

# 2*pi to 212 bits: each part is the float64 nearest to what the parts before it leave.
_TWO_PI = (
    6.283185307179586,
    2.4492935982947064e-16,
    -5.989539619436679e-33,
    2.2249084417267306e-49,
)


def rotate(
    q,
    k,
    *,
    inv_freq,
    scale,
    positions=None,
    table_index=None,
    axis_map=None,
    token_scale=None,
    q_norm=None,
    k_norm=None,
    norm_eps=1e-6,
    norm_scope="head",
    rotary_offset=0,
    interleaved=False,
    conjugate=False,
    layout="bshd",
):
    """RMS-norm (where a weight is given), rotate and scale q and k. Returns float64 (q2, k2).

    q, k         float, in `layout` "bshd" | "bhsd" | "thd"; k may be None, and k2 is None then
    inv_freq     [tables, pairs] float64; rotary_dim = 2 * pairs
    scale        [tables, pairs] float64, multiplies the rotated dimensions of q and of k
    positions    int [1|batch, seqlen], with `axis_map` [axes, 1|batch, seqlen]; None: 0, 1, 2, ...
    table_index  int [1|batch, seqlen], the row of the tables that a token uses; None: row 0
    axis_map     int [pairs], the position axis that drives each pair
    token_scale  [1|batch, seqlen], multiplies every dimension of q
    q_norm       RMS-norm weight, [head_dim], or [heads * head_dim] with norm_scope="all"
    """
    home = _home(q)
    seqlen = _as_bshd(q, layout).shape[1]
    if positions is None:
        positions = torch.arange(seqlen).expand(1 if axis_map is None else max(axis_map) + 1, 1, -1)
        positions = positions if axis_map is not None else positions[0]
    positions = positions.to(home, torch.int64)
    if axis_map is None:
        positions = positions[..., None]  # [batch, seqlen, 1]
    else:
        axis_map = torch.as_tensor(axis_map, dtype=torch.int64, device=home)
        positions = positions[axis_map].movedim(0, -1)  # [batch, seqlen, pairs]

    tables = torch.stack([t.to(home, torch.float64) for t in (inv_freq, scale)])
    row = 0 if table_index is None else table_index.to(home, torch.int64)
    freq, scale = tables[:, row]  # [pairs] each, or [batch, seqlen, pairs]
    angle = _angle(positions, freq)
    cos = (scale * angle.cos()).unsqueeze(-2)  # one angle for all heads of a token
    sin = (scale * angle.sin()).unsqueeze(-2)
    if conjugate:
        sin = -sin

    def one(x, norm_weight, token_scale):
        x = _as_bshd(x, layout).to(home, torch.float64)
        if norm_weight is not None:
            x = _rms_norm(x, norm_weight.to(home, torch.float64), norm_eps, norm_scope)
        before, x, after = x.tensor_split(
            (rotary_offset, rotary_offset + 2 * inv_freq.shape[-1]), dim=-1
        )
        a, b = _pairs(x, interleaved)
        x = _unpair(a * cos - b * sin, b * cos + a * sin, interleaved)
        x = torch.cat((before, x, after), dim=-1)
        if token_scale is not None:
            x = x * token_scale.to(home, torch.float64)[..., None, None]
        return _from_bshd(x, layout)

    return one(q, q_norm, token_scale), None if k is None else one(k, k_norm, None)


def rotate_tables(
    q, k, cos, sin, *, layout="bhsd", interleaved=False, rotary_offset=0, transpose=False
):
    """What transformers computes: x * cos + rotate_half(x) * sin, each step rounded as torch does.

    cos, sin: [1|batch, seqlen, rotary_dim], every dimension with an entry of its own. `transpose`
    gives the adjoint (the gradient), with the products rounded before the sum, as autograd's are.
    Formula: transformers, models/llama/modeling_llama.py, apply_rotary_pos_emb.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def one(x):
        x = _as_bshd(x, layout)
        before, x, after = x.tensor_split((rotary_offset, rotary_offset + cos.shape[-1]), dim=-1)
        if transpose:
            a, b = _pairs(x * sin, interleaved)
            x = x * cos + _unpair(b, -a, interleaved)
        else:
            a, b = _pairs(x, interleaved)
            x = x * cos + _unpair(-b, a, interleaved) * sin
        x = x if before.shape[-1] + after.shape[-1] == 0 else torch.cat((before, x, after), -1)
        return _from_bshd(x, layout)

    return one(q), None if k is None else one(k)


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
    q_norm_weight=None,
    k_norm_weight=None,
    norm_eps=1e-6,
    norm_scope="head",
):
    """`rope_fused.apply_rope` in exact precision, one sequence after the other; float64 results.

    The norm weights, which only `rope_fused.qkv_rope` offers, are applied before the rotation.
    """
    q, k = _as_bshd(q, layout), None if k is None else _as_bshd(k, layout)
    batch, seqlen = q.shape[:2]
    if cu_seqlens is None:
        sequences = [(row, 0, seqlen) for row in range(batch)]
    else:  # packed: one row that holds all tokens
        ends = cu_seqlens.tolist()
        sequences = [(0, start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]
    if positions is not None:
        positions = positions if spec.axes > 1 else positions[None]
        positions = positions if positions.dim() == 3 else positions[:, None]
        positions = positions.expand(spec.axes, batch, seqlen)
    if q_scale is not None:
        q_scale = q_scale.expand(batch, seqlen)

    done_q, done_k = [], []
    for number, (row, start, end) in enumerate(sequences):
        if positions is None:
            here = torch.arange(end - start, device=q.device).expand(spec.axes, end - start)
        else:
            here = positions[:, row, start:end].to(torch.int64)
        if seq_lens is not None:
            length = int(seq_lens[number])
        else:
            length = int(here.max()) + 1 if here.numel() else 0
        one_axis = here.amax(0) if here.numel() else here[0]
        freq = inv_freq
        if inv_freq is not None and inv_freq.dim() == 2 and spec.cache_class == "dynamic":
            freq = inv_freq[number]  # a table for each sequence
        tables, scales, index = _tables(spec, length, one_axis, freq, attention_factor)
        if q_scale is not None:
            token_scale = q_scale[row : row + 1, start:end]
        else:
            token_scale = spec.q_scale(one_axis)
            token_scale = None if token_scale is None else token_scale[None]
        rotated_q, rotated_k = rotate(
            q[row : row + 1, start:end],
            None if k is None else k[row : row + 1, start:end],
            inv_freq=tables,
            scale=scales,
            positions=here[0][None] if spec.axis_map is None else here[:, None],
            table_index=index[None],
            axis_map=spec.axis_map,
            token_scale=token_scale,
            q_norm=q_norm_weight,
            k_norm=k_norm_weight,
            norm_eps=norm_eps,
            norm_scope=norm_scope,
            rotary_offset=spec.rotary_offset,
            interleaved=spec.interleaved,
            conjugate=conjugate,
        )
        done_q.append(rotated_q)
        done_k.append(rotated_k)

    def join(parts, like):
        if not parts:  # an empty batch
            return _from_bshd(like.to(_home(like), torch.float64), layout)
        return _from_bshd(torch.cat(parts, dim=0 if cu_seqlens is None else 1), layout)

    return join(done_q, q), None if k is None else join(done_k, k)


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
    **rope,
):
    """`rope_fused.qkv_rope` in exact precision: project, norm, rotate; float64 results.

    `rope`: norm_eps, norm_scope and the keyword arguments of `apply_rope` but layout, conjugate.
    """
    home = _home(x)

    def project(weight, bias):
        if weight is None:
            return None
        bias = None if bias is None else bias.to(home, torch.float64)
        y = torch.nn.functional.linear(
            x.to(home, torch.float64), weight.to(home, torch.float64), bias
        )
        return y.unflatten(-1, (weight.shape[0] // spec.head_dim, spec.head_dim))

    q, k = apply_rope(
        project(q_weight, q_bias),
        project(k_weight, k_bias),
        spec,
        positions,
        layout="bshd" if x.dim() == 3 else "thd",
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        **rope,
    )
    return q, k, project(v_weight, v_bias)


def _tables(spec, length, positions, inv_freq, attention_factor):
    """inv_freq and scale rows of a sequence of `length`, and which of its tokens uses which row.

    Row 0 is the sequence's own table. Row 1 is for tokens before LongRoPE's n-hat, which keep
    the frequencies of the model before its extension.
    """
    if spec.cache_class == "dynamic":
        own = torch.tensor([length])
        rows, scales = spec.rows_at(own), spec.scale_rows_at(own)
        row = 0
    else:
        rows, scales = spec.rows(), spec.scale_rows()
        row = 1 if spec.switch_length is not None and length > spec.switch_length else 0
    if inv_freq is not None:
        rows = inv_freq.expand(rows.shape)
    if attention_factor is not None:
        scales = torch.as_tensor(attention_factor, dtype=torch.float64).expand(scales.shape)
    index = ((positions < spec.n_start) & (spec.n_start > 0)).to(torch.int64)
    return rows[[row, -1]].double(), scales[[row, -1]].double(), index


def _angle(positions, freq):
    """position * freq modulo 2*pi, in [-2*pi, 2*pi], error <= 1e-15 for every int64 position.

    float64 holds 53 bits, so a position is split into two parts of at most that many.
    """
    with torch.no_grad():
        low = positions.fmod(1 << 10)
        angle = sum(_reduced_product(p.double(), freq.detach()) for p in (positions - low, low))
    # freq - freq is zero, and carries the derivative: d angle / d freq = position.
    return angle + positions.double() * (freq - freq.detach())


def _reduced_product(p, w):
    """p * w - 2*pi*n for a whole n that brings it into [-pi, pi]; p and w are float64.

    The product, n times each part of 2*pi, and their sum are all unevaluated sums of two float64
    numbers (T. J. Dekker, A floating-point technique for extending the available precision,
    Numer. Math. 18, 1971), so that cancellation leaves every bit that float64 can show. n itself
    is only as good as float64 where it exceeds 2**53: the second round takes what is left.
    """
    hi, lo = _two_product(p, w)
    for _ in range(2):
        n = torch.round(hi / _TWO_PI[0])
        for part in _TWO_PI:
            x, y = _two_product(n, torch.full_like(n, -part))
            hi, error = _two_sum(hi, x)
            lo, error_of_lo = _two_sum(lo, y)
            hi, lo = _two_sum(hi, lo + error)
            hi, lo = _two_sum(hi, lo + error_of_lo)
    return hi + lo


def _two_sum(a, b):
    """(s, e): s = a + b rounded, and s + e = a + b exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a, b):
    """(p, e): p = a * b rounded, and p + e = a * b exactly (Dekker, halves by Veltkamp)."""
    p = a * b
    (a_hi, a_lo), (b_hi, b_lo) = _halves(a), _halves(b)
    return p, ((a_hi * b_hi - p) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo


def _halves(a):
    """a = hi + lo with at most 26 bits each, so that products of halves are exact."""
    t = a * 134217729.0  # 2**27 + 1
    hi = t - (t - a)
    return hi, a - hi


def _rms_norm(x, weight, eps, scope):
    """x / sqrt(mean(x**2) + eps) * weight, over a head or over all heads of a token."""
    heads = x.shape[-2:]
    x = x if scope == "head" else x.flatten(-2)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return x if scope == "head" else x.unflatten(-1, heads)


def _pairs(x, interleaved):
    """The first and the second member of each pair: (2j, 2j + 1), or (j, j + rotary_dim / 2)."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def _unpair(a, b, interleaved):
    return torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)


def _as_bshd(x, layout):
    """A view [batch, seqlen, heads, head_dim]."""
    if layout == "thd":
        return x.unsqueeze(0)
    return x.transpose(1, 2) if layout == "bhsd" else x


def _from_bshd(x, layout):
    if layout == "thd":
        return x.squeeze(0)
    return x.transpose(1, 2) if layout == "bhsd" else x


def _home(x):
    """Where to compute: x's device, or the CPU where the device has no float64 (Apple's MPS)."""
    return torch.device("cpu") if x.device.type == "mps" else x.device
