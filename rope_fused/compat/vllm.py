"""vLLM's rotary layer: flat queries and keys, positions per token, exact at any position."""

from __future__ import annotations

from torch import nn

from ..api import apply_rope
from ..modules import RotaryEmbedding as _RotaryEmbedding
from ..spec import RopeSpec


class RotaryEmbedding(nn.Module):
    """What ``vllm.model_executor.layers.rotary_embedding.RotaryEmbedding`` takes and returns.

    The table of cosines (``max_position_embeddings`` long, in the model's dtype) is replaced by
    exact angles of a spec; positions may exceed it, and scaling methods are those of the spec.
    Queries and keys are not written over.

    Args:
        head_size, rotary_dim, max_position_embeddings, base, is_neox_style, dtype: as in vLLM.
            ``is_neox_style`` is half-split; ``dtype`` and ``max_position_embeddings`` have no
            effect on the angles.
        spec: a RopeSpec instead (YaRN, LongRoPE, ...): of the same head_dim and rotary_dim.
    """

    def __init__(
        self,
        head_size,
        rotary_dim,
        max_position_embeddings,
        base,
        is_neox_style,
        dtype=None,
        *,
        spec: RopeSpec | None = None,
    ):
        super().__init__()
        if rotary_dim > head_size:
            raise ValueError(f"rotary_dim must be at most head_size {head_size}, got {rotary_dim}")
        if spec is None:
            spec = RopeSpec(
                "default",
                head_size,
                rotary_dim,
                base,
                interleaved=not is_neox_style,
                max_position_embeddings=max_position_embeddings,
            )
        if (spec.head_dim, spec.rotary_dim) != (head_size, rotary_dim):
            raise ValueError(
                f"spec must have head_dim {head_size} and rotary_dim {rotary_dim}, got "
                f"{spec.head_dim} and {spec.rotary_dim}"
            )
        self.rotary = _RotaryEmbedding(spec, layout="thd")

    def forward(self, positions, query, key=None):
        """(query, key) rotated, in their shapes.

        positions: int [tokens] ([axes, tokens] for mRoPE); query, key: [tokens, heads * head_size]
        or [tokens, heads, head_size]; key may be None.
        """
        spec = self.rotary.spec
        heads = [None if t is None else t.view(len(t), -1, spec.head_dim) for t in (query, key)]
        q, k = apply_rope(*heads, spec, positions, layout="thd")
        return q.reshape(query.shape), None if key is None else k.reshape(key.shape)
