"""flash-attention's apply_rotary_emb: its signature, any backend."""

from __future__ import annotations

import numbers

import torch

from .. import checks, ops, packing


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
        order.

    Raises:
        TypeError, ValueError: an argument that is none of these, or a position outside of the
            tables. Offsets and ends in tensors on other devices are not looked at (a host sync)
            without ROPE_FUSED_CHECK=1: torch's indexing decides there.
    """
    checks.floats("x", x)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.floats(name, table, device=x.device)
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
    positions = _positions(x, seqlen_offsets, cu_seqlens, len(cos))
    cos, sin = (_per_dimension(t[positions], interleaved) for t in (cos, sin))
    wide = torch.promote_types(x.dtype, torch.float32)
    layout = "bshd" if cu_seqlens is None else "thd"
    # What autograd keeps for the tables' gradients must not be written over.
    wide_x = x.to(wide, copy=inplace and (cos.requires_grad or sin.requires_grad))
    cos, sin = cos.to(wide), sin.to(wide)
    out, _ = ops.rotate_tables(wide_x, None, cos, sin, interleaved, 0, False, layout, "auto")
    out = out.to(x.dtype)
    return x.copy_(out) if inplace else out


def _positions(x, offsets, cu_seqlens, length):
    """int64 [1 | batch, seqlen], of packed tokens [1, tokens]; all of them below ``length``."""
    tokens = x.shape[1] if cu_seqlens is None else x.shape[0]
    sequences = x.shape[0]
    if cu_seqlens is None:
        positions = torch.arange(tokens, device=x.device)[None]
    else:
        checks.ints("cu_seqlens", cu_seqlens, x.device)
        if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
            raise checks.refusal("cu_seqlens", "[batch + 1]", cu_seqlens)
        if not torch.compiler.is_compiling():
            packing.check_sequences(cu_seqlens, None, tokens, "")
        sequences = len(cu_seqlens) - 1
        positions = packing.token_positions(cu_seqlens, tokens)
    if isinstance(offsets, torch.Tensor):
        checks.ints("seqlen_offsets", offsets, x.device)
        if offsets.shape != (sequences,):
            raise checks.refusal("seqlen_offsets", f"an int or [{sequences}]", offsets)
        offsets = offsets.long()
        if cu_seqlens is None:
            offsets = offsets[:, None]
        elif sequences:
            offsets = offsets[packing.sequence_of_token(cu_seqlens, tokens)]
    elif not isinstance(offsets, numbers.Integral | torch.SymInt) or isinstance(offsets, bool):
        raise checks.refusal("seqlen_offsets", "an int or an int tensor", offsets, TypeError)
    elif not 0 <= offsets <= length:
        raise checks.refusal("seqlen_offsets", f"from 0 to {length}, as cos and sin are", offsets)
    positions = positions + offsets
    if torch.compiler.is_compiling() or not packing.checks_values(positions):
        return positions
    if positions.numel() and not 0 <= positions.min() <= positions.max() < length:
        raise ValueError(
            f"seqlen_offsets must lead to positions below {length}, the length of cos and sin, got "
            f"{int(positions.min())} to {int(positions.max())}"
        )
    return positions


def _per_dimension(t, interleaved):
    return t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)
