"""Random calls: projections beside their eager formula, and small problems to differentiate."""

import dataclasses

import torch
import torch.nn.functional as F

from helpers import make_qk, make_spec, randn
from rope_fused import reference


def eager_norm(x, weight, eps, scope):
    """RMS-norm as in transformers (models/qwen3, models/olmo2): float32, then the weight."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = x.shape
    x = x if scope == "head" else x.flatten(-2)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (weight * y.to(x.dtype)).to(x.dtype).view(shape)


def eager(x, q_weight, k_weight, v_weight=None, *, spec, positions=None, cu_seqlens=None,
          q_bias=None, k_bias=None, v_bias=None, q_norm_weight=None, k_norm_weight=None,
          norm_eps=1e-6, norm_scope="head"):  # fmt: skip
    """Projection, norm and rotation as three steps in x's dtype, each rounded."""
    seqlen = x.shape[-2]
    if positions is None:
        positions = torch.arange(seqlen, device=x.device)
        if cu_seqlens is not None:
            starts = torch.zeros_like(positions)
            for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
                starts[start:end] = start
            positions = positions - starts
    # The table at its best: from float64 angles, rounded once to the dtype of the arithmetic.
    angle = positions[..., None].double() * spec.inv_freq().to(x.device)
    tables = [
        (f(angle) * spec.attention_factor).to(x.dtype).repeat(*[1] * (angle.dim() - 1), 2)
        for f in (torch.cos, torch.sin)
    ]
    if spec.interleaved:
        half = spec.rotary_dim // 2
        tables = [t[..., :half].repeat_interleave(2, dim=-1) for t in tables]
    tables = [t if t.dim() == 3 else t[None] for t in tables]

    def head(weight, bias):
        y = F.linear(x, weight, bias)
        return y.view(*y.shape[:-1], -1, spec.head_dim)

    q, k = head(q_weight, q_bias), head(k_weight, k_bias)
    if q_norm_weight is not None:
        q = eager_norm(q, q_norm_weight, norm_eps, norm_scope)
    if k_norm_weight is not None:
        k = eager_norm(k, k_norm_weight, norm_eps, norm_scope)
    q, k = reference.rotate_tables(
        q,
        k,
        *tables,
        layout="bshd" if x.dim() == 3 else "thd",
        interleaved=spec.interleaved,
        rotary_offset=spec.rotary_offset,
    )
    return q, k, None if v_weight is None else head(v_weight, v_bias)


@dataclasses.dataclass
class Case:
    """Sizes of one projection and the options it is called with."""

    id: str
    rows: tuple = (2, 9)
    d_model: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    bias: bool = False
    v: bool = True
    norm: str | None = None
    norm_dtype: torch.dtype | None = None
    spec: dict = dataclasses.field(default_factory=dict)

    def operands(self, dtype, device):
        def weight(heads):
            return randn(heads * self.head_dim, self.d_model, dtype=dtype, device=device) * (
                self.d_model**-0.5
            )

        def vector(n, dtype):
            return randn(n, dtype=dtype, device=device)

        sizes = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        x = randn(*self.rows, self.d_model, dtype=dtype, device=device)
        weights = [weight(n) for n in sizes.values()]
        options = {"spec": make_spec(self.head_dim, **self.spec)}
        if not self.v:
            weights.pop()
            sizes.pop("v")
        if self.bias:
            for name, heads in sizes.items():
                options[f"{name}_bias"] = vector(heads * self.head_dim, dtype)
        if self.norm:
            for name in ("q", "k"):
                heads = sizes[name] if self.norm == "all" else 1
                options[f"{name}_norm_weight"] = vector(
                    heads * self.head_dim, self.norm_dtype or dtype
                )
            options["norm_scope"] = self.norm
            options["norm_eps"] = 1e-5
        return x, weights, options


def reordering(x, weight, bias, norm, options):
    """How far apart two orders of summation can leave an element of the result.

    A sum of n products, in whatever order, is off by at most n units of rounding of the sum of
    their sizes (N. J. Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). A norm
    multiplies an error by rstd * weight, and moves rstd itself: twice over, for at most
    sqrt(head_dim) of its own standard deviation. A rotation adds two of them.
    """
    unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    sizes = x.double().abs() @ weight.double().abs().t()
    sizes = sizes if bias is None else sizes + bias.double().abs()
    count = x.shape[-1] + 1 if norm is None else x.shape[-1] + 1 + weight.shape[0]
    error = 2 * count * unit * sizes.max()
    if norm is not None:
        z = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        if options["norm_scope"] == "head":
            z = z.unflatten(-1, (-1, options["spec"].head_dim))
        rstd = torch.rsqrt(z.square().mean(-1) + options["norm_eps"]).max()
        error = error * rstd * norm.double().abs().max() * (1 + z.shape[-1] ** 0.5)
    factors = [options.get(name) for name in ("attention_factor", "q_scale")]
    for factor in factors:
        if factor is not None:
            error = error * max(1.0, torch.as_tensor(factor).abs().max().item())
    return 2 * error


# -- small problems, to differentiate in every argument ------------------------------------------


def leaf(x):
    return x.detach().clone().requires_grad_()


def uniform(*shape, dtype=torch.float64, device="cpu"):
    """In [0.5, 1.5): a factor."""
    return (0.5 + torch.rand(shape, dtype=torch.float64)).to(device, dtype).requires_grad_()


ROPE_CASES = {
    "bshd": ({}, {}),
    "bhsd": ({}, {"layout": "bhsd"}),
    "thd": ({}, {"layout": "thd"}),
    "interleaved": ({"interleaved": True}, {}),
    "partial": ({"partial_rotary_factor": 0.5, "rotary_offset": 2}, {}),
    "conjugate": ({"interleaved": True}, {"conjugate": True}),
    "positions": ({}, {"positions": torch.tensor([[4, -3, 0], [1, 1, 9]])}),
    "cu_seqlens": ({}, {"layout": "thd", "cu_seqlens": torch.tensor([0, 1, 1, 3])}),
}


def rope_problem(name, device):
    """(function of the differentiable arguments, those arguments): two tables' worth of them."""
    spec_options, options = ROPE_CASES[name]
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    layout = options.get("layout", "bshd")
    head_dim = 8 if name == "partial" else 4
    spec = make_spec(head_dim, **spec_options)
    batch = 1 if layout == "thd" else 2
    q, k = make_qk(layout, batch, 3, 2, 1, head_dim, dtype=torch.float64)
    q, k = leaf(q.to(device)), leaf(k.to(device))
    pairs = spec.rotary_dim // 2
    factors = {
        "inv_freq": uniform(pairs, device=device),
        "attention_factor": uniform(pairs, device=device),
        "q_scale": uniform(3, device=device),
    }
    return spec, options, q, k, factors


PROJECTION_CASES = {
    "plain": {},
    "tokens": {"rows": (3,)},
    "bias": {"bias": True},
    "no-v": {"v": False},
    "norm": {"norm": "head"},
    "norm-all-bias": {"norm": "all", "bias": True},
    "interleaved-partial": {"spec": {"interleaved": True, "partial_rotary_factor": 0.5}},
    "norm-partial": {"norm": "head", "spec": {"partial_rotary_factor": 0.5}},
}


def projection_problem(name, device, dtype=torch.float64, factors=True):
    """(function of named differentiable tensors, those tensors)."""
    sizes = {"rows": (2, 3), "d_model": 3, "heads": 2, "kv_heads": 1, "head_dim": 4}
    x, weights, options = Case(name, **(sizes | PROJECTION_CASES[name])).operands(dtype, device)
    spec = options["spec"]
    tensors = {"x": x, "q_weight": weights[0], "k_weight": weights[1]}
    if len(weights) == 3:
        tensors["v_weight"] = weights[2]
    constants = {}
    for key, value in options.items():
        (tensors if torch.is_tensor(value) else constants)[key] = value
    if factors:
        pairs = spec.rotary_dim // 2
        tensors |= {
            "inv_freq": uniform(pairs, device=device),
            "attention_factor": uniform(pairs, device=device),
            "q_scale": uniform(3, device=device),
        }
    return constants, {key: leaf(value) for key, value in tensors.items()}
