"""flash-attention's apply_rotary_emb: its signature, any backend."""

from __future__ import annotations

import torch

from .. import ops, packing


def apply_rotary_emb(
    x,
    cos,
    sin,
    interleaved=False,
    inplace=False,
    seqlen_offsets=0,
    cu_seqlens=None,
    max_seqlen=None,
):
    """Rotate x by given tables, in float32 (float64 for float64), rounded once.

    Args:
        x: [batch, seqlen, heads, head_dim], or with ``cu_seqlens`` [tokens, heads, head_dim].
        cos, sin: [length, rotary_dim / 2], by position; the first rotary_dim dimensions turn.
        interleaved: pairs (2 j, 2 j + 1) instead of (j, j + rotary_dim / 2).
        inplace: write the result into x as well, which then may not be a leaf that requires grad.
        seqlen_offsets: int, or int [batch]: position of each sequence's first token.
        cu_seqlens: int [batch + 1], where packed sequences begin and end.
        max_seqlen: not used: the tables say how long they are.

    Returns:
        A new tensor like x, or x itself if ``inplace``. Differentiable in x, cos and sin to every
        order. A position outside of the tables is an error on the CPU; on other devices torch's
        indexing decides.
    """
    if x.dim() != (4 if cu_seqlens is None else 3):
        raise ValueError(
            "x must be [batch, seqlen, heads, head_dim], or [tokens, heads, head_dim] with "
            f"cu_seqlens, got {list(x.shape)}"
        )
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos and sin must be [length, at most {x.shape[-1] // 2}], got {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    cos, sin = (_per_dimension(t[positions], interleaved) for t in (cos, sin))
    wide = torch.promote_types(x.dtype, torch.float32)
    layout = "bshd" if cu_seqlens is None else "thd"
    wide_x, cos, sin = x.to(wide), cos.to(wide), sin.to(wide)
    out, _ = ops.rotate_tables(wide_x, None, cos, sin, interleaved, 0, False, layout, "auto")
    out = out.to(x.dtype)
    return x.copy_(out) if inplace else out


def _positions(x, offsets, cu_seqlens):
    """int64 [1 | batch, seqlen], of packed tokens [1, tokens]."""
    batched = isinstance(offsets, torch.Tensor)
    if cu_seqlens is None:
        steps = torch.arange(x.shape[1], device=x.device)
        return (steps + offsets[:, None] if batched else steps[None] + offsets).long()
    positions = packing.token_positions(cu_seqlens, x.shape[0])
    if batched:
        rows = torch.arange(x.shape[0], device=x.device)
        offsets = offsets[torch.bucketize(rows, cu_seqlens[1:-1], right=True)]
    return (positions + offsets).long()


def _per_dimension(t, interleaved):
    return t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)
