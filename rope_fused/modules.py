"""Modules for models of one's own: a rotary embedding, a projection with it, an attention."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from . import checks
from .api import apply_rope, qkv_rope
from .operands import factors, warm
from .spec import RopeSpec

_LEARNABLE = ("inv_freq", "attention_factor")


class RotaryEmbedding(nn.Module):
    """:func:`rope_fused.apply_rope` as a module: rotates q and k by the frequencies of a spec.

    Frequencies are no buffers. They are made from the spec, in float64, for each device that is
    used: ``model.to(torch.bfloat16)``, initialisation on the meta device, FSDP and checkpoints do
    not reach them, and the state dict is empty.

    Learnable factors are parameters that begin at zero::

        inv_freq         = spec's * exp(log_inv_freq)            [tables, rotary_dim / 2]
        attention_factor = spec's * exp(log_attention_factor)    0-d

    so that a cast to a narrow type rounds what has been learned and not the frequency itself
    (bfloat16 frequencies are wrong by radians at position 1 000).

    Args:
        spec: a :class:`RopeSpec`.
        layout: of q and k: "bshd", "bhsd" or "thd".
        learn: names of the factors to learn: "inv_freq", "attention_factor".
        precision, backend: as :func:`rope_fused.apply_rope` takes them.
        device, dtype: of the learnable parameters, and the device to make the tables for now.

    Raises:
        TypeError, ValueError: an argument that cannot be meant; ``learn`` with a spec that has a
            table for every length, or with different attention factors in its tables.
    """

    def __init__(
        self,
        spec,
        *,
        layout="bshd",
        learn=(),
        precision="exact",
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check(spec, layout, learn, precision)
        self.spec = _first_of(spec, spec.max_position_embeddings, spec.notes)
        self.layout, self.learn = layout, tuple(learn)
        self.precision, self.backend = precision, backend
        tables = 1 if spec.cache_class == "dynamic" else len(spec.rows())
        shapes = {"inv_freq": (tables, spec.rotary_dim // 2), "attention_factor": ()}
        for name in _LEARNABLE:
            value = None
            if name in learn:
                value = nn.Parameter(torch.empty(shapes[name], device=device, dtype=dtype))
            self.register_parameter(f"log_{name}", value)
        self.reset_parameters()
        _warm(spec, torch.empty(0, device=device).device)

    def reset_parameters(self):
        """Learnable factors back to those of the spec."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, q, k=None, positions=None, **options):
        """(q2, k2): q and k (or None) rotated; ``options`` as :func:`rope_fused.apply_rope` has
        them: cu_seqlens, seq_lens, conjugate, q_scale."""
        return apply_rope(
            q,
            k,
            self.spec,
            positions,
            layout=self.layout,
            **self.factors(q.device),
            precision=self.precision,
            backend=self.backend,
            **options,
        )

    def factors(self, device) -> dict:
        """What is learned, float64: ``inv_freq`` and ``attention_factor`` for the functions."""
        learned = {}
        if self.learn:
            inv_freq, scale = factors(self.spec, device)
            if self.log_inv_freq is not None:
                learned["inv_freq"] = inv_freq * self.log_inv_freq.double().exp()
            if self.log_attention_factor is not None:
                learned["attention_factor"] = scale[0] * self.log_attention_factor.double().exp()
        return learned

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        _warm(self.spec, fn(torch.empty(0, device="cpu")).device)
        return self

    def extra_repr(self):
        learn = f", learn={self.learn}" if self.learn else ""
        return f"{self.spec}, layout={self.layout!r}, precision={self.precision!r}{learn}"


class QKVProjection(nn.Module):
    """:func:`rope_fused.qkv_rope` as a module: hidden states to rotated q, k and plain v.

    Children ``q_proj``, ``k_proj``, ``v_proj`` are nn.Linear, ``q_norm`` and ``k_norm`` (with
    ``qk_norm``) nn.RMSNorm: state dicts are those of attentions in transformers. Their weights are
    read by one fused operator. While one of them is not a plain Linear or RMSNorm (a LoRA adapter,
    a quantised layer, a hook), the children are called, and only the rotation is fused.

    Args:
        spec: a :class:`RopeSpec`; its head_dim is that of the heads.
        d_model: width of the hidden states.
        num_heads, num_kv_heads: heads of q, and of k and v (None: as many).
        bias: whether the projections have biases.
        qk_norm: None; "head": RMSNorm of each head of q and of k (Qwen3); "all": over all heads of
            a token (OLMo-2).
        norm_eps: added to the mean square.
        value: False leaves v out; the third result is then None.
        learn: names of factors to learn, as in :class:`RotaryEmbedding`, which is the child
            ``rotary``.
        precision, backend: as :func:`rope_fused.qkv_rope` takes them.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        spec,
        d_model,
        num_heads,
        num_kv_heads=None,
        *,
        bias=False,
        qk_norm=None,
        norm_eps=1e-6,
        value=True,
        learn=(),
        precision="exact",
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if qk_norm not in (None, "head", "all"):
            raise ValueError(f"qk_norm must be None, 'head' or 'all', got {qk_norm!r}")
        if qk_norm is not None and precision == "hf":
            raise ValueError(f"qk_norm must be None with precision='hf', got {qk_norm!r}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        kinds = {"device": device, "dtype": dtype}
        self.rotary = RotaryEmbedding(
            spec, learn=learn, precision=precision, backend=backend, **kinds
        )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.qk_norm, self.norm_eps = qk_norm, norm_eps
        q_width, kv_width = num_heads * spec.head_dim, num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(d_model, q_width, bias=bias, **kinds)
        self.k_proj = nn.Linear(d_model, kv_width, bias=bias, **kinds)
        self.v_proj = nn.Linear(d_model, kv_width, bias=bias, **kinds) if value else None
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            widths = (q_width, kv_width) if qk_norm == "all" else (spec.head_dim,) * 2
            self.q_norm, self.k_norm = (nn.RMSNorm(w, norm_eps, **kinds) for w in widths)

    @property
    def spec(self) -> RopeSpec:
        """The spec that q and k are rotated by."""
        return self.rotary.spec

    @property
    def fused(self) -> bool:
        """Whether a call now is one operator, and not the children and a rotation."""
        linears = (self.q_proj, self.k_proj, self.v_proj)
        return all(_is_plain(m, nn.Linear) for m in linears if m is not None) and all(
            _is_plain(m, nn.RMSNorm) for m in (self.q_norm, self.k_norm) if m is not None
        )

    def forward(self, x, positions=None, *, cu_seqlens=None, seq_lens=None, q_scale=None):
        """(q, k, v), each [.., heads, head_dim]; arguments as :func:`rope_fused.qkv_rope`."""
        tokens = {"cu_seqlens": cu_seqlens, "seq_lens": seq_lens, "q_scale": q_scale}
        if not self.fused:
            return self._unfused(x, positions, tokens)
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        norms = {}
        if self.qk_norm is not None:
            norms = {"q_norm_weight": self.q_norm.weight, "k_norm_weight": self.k_norm.weight}
            norms |= {"norm_eps": self.norm_eps, "norm_scope": self.qk_norm}
        return qkv_rope(
            x,
            q.weight,
            k.weight,
            None if v is None else v.weight,
            q_bias=q.bias,
            k_bias=k.bias,
            v_bias=None if v is None else v.bias,
            spec=self.spec,
            positions=positions,
            **norms,
            **tokens,
            **self.rotary.factors(x.device),
            precision=self.rotary.precision,
            backend=self.rotary.backend,
        )

    def _unfused(self, x, positions, tokens):
        heads = (-1, self.spec.head_dim)
        projected = []
        for linear, norm in ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm)):
            y = linear(x)
            if self.qk_norm == "all":
                y = norm(y)
            y = y.unflatten(-1, heads)
            projected.append(norm(y) if self.qk_norm == "head" else y)
        q, k = apply_rope(
            *projected,
            self.spec,
            positions,
            layout="thd" if x.dim() == 2 else "bshd",
            **tokens,
            **self.rotary.factors(x.device),
            precision=self.rotary.precision,
            backend=self.rotary.backend,
        )
        return q, k, None if self.v_proj is None else self.v_proj(x).unflatten(-1, heads)


class RopeAttention(QKVProjection):
    """Causal self-attention with grouped queries: the projection, torch's attention, ``o_proj``.

    Its state dict has the keys of transformers' Llama, Qwen2 and Qwen3 attentions. The softmax
    scale is ``head_dim ** -0.5 * spec.softmax_multiplier``.

    Args: those of :class:`QKVProjection` (``value`` is always True), and

        o_bias: whether ``o_proj`` has a bias; None: as ``bias``.
    """

    def __init__(self, spec, d_model, num_heads, num_kv_heads=None, *, o_bias=None, **options):
        if "value" in options:
            raise ValueError("value must not be given: an attention needs v")
        super().__init__(spec, d_model, num_heads, num_kv_heads, **options)
        bias = options.get("bias", False) if o_bias is None else o_bias
        kinds = {name: options.get(name) for name in ("device", "dtype")}
        self.o_proj = nn.Linear(num_heads * spec.head_dim, d_model, bias=bias, **kinds)

    def forward(self, x, positions=None, *, attn_mask=None, seq_lens=None, q_scale=None):
        """[batch, seqlen, d_model]: attention of every token to itself and those before it.

        Args:
            x: [batch, seqlen, d_model].
            positions, seq_lens, q_scale: as :func:`rope_fused.qkv_rope` takes them.
            attn_mask: as torch's scaled_dot_product_attention takes it, instead of the causal one
                (for padding, or packed sequences).
        """
        q, k, v = super().forward(x, positions, seq_lens=seq_lens, q_scale=q_scale)
        y = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask,
            is_causal=attn_mask is None,
            scale=self.spec.head_dim**-0.5 * self.spec.softmax_multiplier,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(y.transpose(1, 2).flatten(-2))


@functools.lru_cache(maxsize=256)
def _first_of(spec, *uncompared):
    """The first of the specs that are equal, also in what their comparison leaves out: layers share
    compiled code, which is guarded by the identity of its spec."""
    return spec


def _check(spec, layout, learn, precision):
    if not isinstance(spec, RopeSpec):
        raise checks.refusal("spec", "a RopeSpec", spec, TypeError)
    checks.one_of("layout", layout, checks.LAYOUTS)
    checks.one_of("precision", precision, ("exact", "hf"))
    if isinstance(learn, str):
        raise checks.refusal("learn", "a tuple of names", learn, TypeError)
    for name in learn:
        checks.one_of("learn", name, _LEARNABLE)
    if learn and spec.cache_class == "dynamic":
        raise checks.refusal("learn", f"() with {spec.rope_type!r}, a table per length", learn)
    if "attention_factor" in learn and (spec.scale_rows() != spec.scale_rows()[0]).any():
        raise checks.refusal("learn", "without 'attention_factor': the tables have two", learn)


def _warm(spec, device):
    """Make the tables before the first call, which a graph capture may be."""
    if device.type != "meta":
        warm(spec, device)


def _is_plain(module, kind):
    """Whether calling ``module`` is what its class does with its weights, and nothing else."""
    return type(module) is kind and not (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
