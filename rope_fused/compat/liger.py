"""Liger-Kernel's rotary embedding: its signature, any backend, inputs left alone."""

from __future__ import annotations

import torch

from .. import checks, legal
from ..api import apply_rotary_pos_emb


def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """Rotate q and k by given tables, half-split: x cos + rotate_half(x) sin.

    Unlike Liger's kernel, which writes over q and k and over incoming gradients, this returns new
    tensors and has derivatives of every order, in the tables too.

    Args:
        q, k: [batch, heads, seqlen, head_dim]; with ``unsqueeze_dim=2`` [batch, seqlen, heads,
            head_dim].
        cos, sin: [1 | batch, seqlen, width]: rotary_dim wide, with every entry twice, as
            transformers makes them, or rotary_dim / 2 wide (gpt-oss).
        position_ids: not used, as in Liger: the tables are those of the positions.
        rotary_dim: how many leading dimensions of a head turn. None: the width of the tables.
    """
    if rotary_dim is not None:
        checks.floats("cos", cos)
        rotary_dim = legal.integer("rotary_dim", rotary_dim, 2)
        if cos.shape[-1] not in (rotary_dim, rotary_dim / 2):
            raise ValueError(
                f"rotary_dim must be the width of cos, or twice it, got {rotary_dim} and "
                f"{cos.shape[-1]}"
            )
        if cos.shape[-1] != rotary_dim:
            cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
