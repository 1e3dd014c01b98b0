"""The backward of a rotation in differentiable torch operations.

What ops.py differentiates again for derivatives of a derivative, and what computes the backward
where no kernel does."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FactorGradients(NamedTuple):
    """Gradients of the factors of a rotation; None or empty where there is no such operand."""

    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    inv_freq: torch.Tensor  # like the tables
    scale: torch.Tensor
    token_scale: torch.Tensor | None  # [batch, seqlen]


def gradient_memory(dq, dk, dv, packed, empty=None, empty_like=None):
    """(what a backend's rotate_backward returns first and second, (where it writes the gradients of
    q and of k)): two tensors, or (packed) one with the heads of q, k and v, into which dv is
    copied.

    empty, empty_like: the backend's own way to ask for memory, as torch.Tensor.new_empty and
    torch.empty_like.
    """
    empty, empty_like = empty or torch.Tensor.new_empty, empty_like or torch.empty_like
    if not packed:
        to_q, to_k = empty_like(dq), None if dk is None else empty_like(dk)
        return to_q, dq.new_empty(0) if dk is None else to_k, (to_q, to_k)
    heads = [0 if t is None else t.shape[-2] for t in (dq, dk, dv)]
    both = empty(dq, (*dq.shape[:-2], sum(heads), dq.shape[-1]))
    to_q, to_k, to_v = both.split(heads, dim=-2)
    if dv is not None:
        to_v.copy_(dv)
    return both, dq.new_empty(0), (to_q, None if dk is None else to_k)


def rotate_backward(rotate, dq, dk, q, k, rotation):
    """Gradients of ``rotate(q, k, rotation)`` for the output gradients dq and dk: (dq, dk | None,
    FactorGradients).

    With n = x rstd, h = n w (or h = x), r = R(t) h and y = token_scale scale r::

        dh = token_scale scale R(-t) g            d inv_freq = sum position token_scale scale (g_b
        r_a - g_a r_b) dn = w dh                                 d scale    = sum token_scale (g_a
        r_a + g_b r_b) dx = rstd (dn - n mean(dn n))             d token    = sum of g . y /
        token_scale dw = sum dh n

    Args:
        rotate: (q, k, rotation) -> (q2, k2), a differentiable rotation; the formulas do the rest.
        rotation: an ops.Rotation; q and k are what the forward was given.
    """
    wide = torch.float64 if dq.dtype == torch.float64 else torch.float32
    layout, index = rotation.layout, rotation.table_index
    begin, end = rotation.rotary_offset, rotation.rotary_offset + 2 * rotation.pairs
    scale = rotation.scale[0] if index is None else rotation.scale[index.long()]
    position = _positions(rotation, bshd(dq, layout).shape[1])
    forward = rotation._replace(
        scale=torch.ones_like(rotation.scale),
        token_scale=None,
        q_norm=None,
        k_norm=None,
        layout="bshd",
    )
    back = forward._replace(scale=rotation.scale, conjugate=not rotation.conjugate)
    operands = [(dq, q, rotation.q_norm, rotation.token_scale)]
    if dk is not None:
        operands.append((dk, k, rotation.k_norm, None))

    grads, norms = [], [None, None]
    d_freq = d_scale = 0.0
    d_token = None
    for i, (g, x, weight, token_scale) in enumerate(operands):
        dtype = x.dtype
        g, x = bshd(g, layout).to(wide), bshd(x, layout).to(wide)
        h = x
        if weight is not None:
            group = (-2, -1) if rotation.norm_all else (-1,)
            weight = weight.to(wide).reshape(-1, x.shape[-1])  # [heads | 1, head_dim]
            rstd = torch.rsqrt(x.square().mean(group, keepdim=True) + rotation.norm_eps)
            n = x * rstd
            h = n * weight
        dh, _ = rotate(g, None, back._replace(token_scale=token_scale))
        r, _ = rotate(h, None, forward)
        (g_a, g_b), (r_a, r_b) = (
            members(t[..., begin:end].double(), rotation.interleaved) for t in (g, r)
        )
        factor = 1.0 if token_scale is None else token_scale.double()[..., None]
        dot = (g_a * r_a + g_b * r_b).sum(-2)
        d_freq = d_freq + position * factor * scale * (g_b * r_a - g_a * r_b).sum(-2)
        d_scale = d_scale + factor * dot
        if token_scale is not None:
            carried = g.double() * h.double()
            carried = carried[..., :begin].sum((-2, -1)) + carried[..., end:].sum((-2, -1))
            d_token = (scale * dot).sum(-1) + carried
        dx = dh
        if weight is not None:
            dn = dh * weight
            dx = rstd * (dn - n * (dn * n).mean(group, keepdim=True))
            dw = (dh * n).double().sum((0, 1))
            norms[i] = dw.flatten() if rotation.norm_all else dw.sum(0)
        grads.append(_from_bshd(dx.to(dtype), layout))
    grads.append(None)
    d_freq, d_scale = (_by_table(t, index, rotation.scale) for t in (d_freq, d_scale))
    return grads[0], grads[1], FactorGradients(*norms, d_freq, d_scale, d_token)


def _positions(rotation, seqlen):
    """d angle / d inv_freq: [1|batch, seqlen, 1 | pairs], negative for the conjugate."""
    position = rotation.positions
    if position is None:
        position = torch.arange(seqlen, device=rotation.turns.device)[None]
    if position.dim() == 3:
        position = position[rotation.axis_map.long()].movedim(0, -1)
    else:
        position = position[..., None]
    return position.double() * (-1.0 if rotation.conjugate else 1.0)


def _by_table(per_token, index, like):
    """Sum [batch, seqlen, pairs] into the rows that the tokens used."""
    if index is None:
        return per_token.sum((0, 1))[None]
    rows = index.expand(per_token.shape[:2]).flatten().long()
    return torch.zeros_like(like).index_add(0, rows, per_token.flatten(0, 1))


def bshd(x, layout):
    """x as a view [batch, seqlen, heads, head_dim]."""
    if layout == "thd":
        return x.unsqueeze(0)
    return x.transpose(1, 2) if layout == "bhsd" else x


def _from_bshd(x, layout):
    if layout == "thd":
        return x.squeeze(0)
    return x.transpose(1, 2) if layout == "bhsd" else x


def members(x, interleaved):
    """The first and the second member of each pair."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
