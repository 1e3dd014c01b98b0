"""The fused projection against the bare product, and against transformers' steps in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear

import rope_fused as rf

from . import baselines
from .harness import Case, Target, Variant, assert_rounded, sample_tokens

HEADS, KV_HEADS = 32, 8
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Projection(Case):
    """q, k, v of a layer with 32 query and 8 key heads, as in Llama; a packed or three weights."""

    op: str = "projection"
    seqlen: int = 2048
    d_model: int
    norm: bool = False  # RMSNorm of each head of q and k, as in Qwen3

    limit = "linear"
    impls = ("rope_fused", "rope_fused-packed", "linear", "linear-three", "hf-eager", "hf-compile")
    targets = (
        Target("rope_fused", "linear-three", 1.05, 1.0),
        Target("rope_fused-packed", "linear", 1.05, 1.0),
    )

    @property
    def blocks(self) -> int:
        return 1 if self.norm else 3  # the targets speak of the best of three for the plain one

    @property
    def head_dim(self) -> int:
        return self.d_model // HEADS

    @property
    def shape(self) -> str:
        norm = " norm" if self.norm else ""
        return f"d_model {self.d_model}, {HEADS}+{KV_HEADS}x{self.head_dim}{norm}"

    def build(self):
        spec = rf.RopeSpec.yarn(head_dim=self.head_dim, **baselines.ROPE)
        rows = [n * self.head_dim for n in (HEADS, KV_HEADS, KV_HEADS)]
        x = torch.randn(1, self.seqlen, self.d_model, dtype=self.dtype)
        weight = (torch.randn(sum(rows), self.d_model) / self.d_model**0.5).to(self.dtype)
        packed = weight.split(rows)
        separate = [part.clone() for part in packed]
        norms = {}
        if self.norm:
            names = ("q_norm_weight", "k_norm_weight")
            norms = {n: torch.empty(self.head_dim).uniform_(0.9, 1.1).to(self.dtype) for n in names}
            norms["norm_eps"] = NORM_EPS
        truth = Truth(x, packed, spec, norms)
        variants = {
            # Rounded after the product, if that is written, and after the rotation.
            "rope_fused": Variant(
                lambda: rf.qkv_rope(x, *separate, spec=spec, **norms), truth.checker(roundings=2)
            ),
            "rope_fused-packed": Variant(
                lambda: rf.qkv_rope(x, *packed, spec=spec, **norms), truth.checker(roundings=2)
            ),
            "linear": Variant(lambda: linear(x, weight).split(rows, -1), truth.check_products),
            "linear-three": Variant(lambda: [linear(x, w) for w in separate], truth.check_products),
        }
        if none := baselines.missing("transformers"):
            return dict.fromkeys(self.impls, none) | variants
        positions = torch.arange(self.seqlen)
        rotate = baselines.rotary(spec, unsqueeze_dim=1)
        cos, sin = baselines.tables(spec, positions, self.dtype)
        norm_modules = [
            baselines.rms_norm(norms[n], NORM_EPS) if norms else torch.nn.Identity()
            for n in ("q_norm_weight", "k_norm_weight")
        ]

        def eager():
            q, k, v = (linear(x, w).unflatten(-1, (-1, self.head_dim)) for w in separate)
            q, k = (norm(t).transpose(1, 2) for norm, t in zip(norm_modules, (q, k), strict=True))
            return *rotate(q, k, cos, sin), v.transpose(1, 2)

        compiled = baselines.compiled(eager)
        # The product; normed, it is rounded before and after the weight; then the rotation.
        roundings = 1 + 2 * self.norm + baselines.ROTARY_ROUNDINGS
        check = truth.checker(roundings, baselines.table_error(spec, positions), transposed=True)
        variants["hf-eager"] = Variant(eager, check)
        variants["hf-compile"] = Variant(compiled, check)
        return variants


class Truth:
    """The same in float64 on a sample of tokens, and how far from it sums in float32 may be."""

    def __init__(self, x, weights, spec, norms):
        self.at = sample_tokens(x.shape[1])
        x64, weights64 = x[:, self.at].double(), [w.double() for w in weights]
        norms = {n: w.double() if isinstance(w, torch.Tensor) else w for n, w in norms.items()}
        with torch.no_grad():
            self.products = [linear(x64, w) for w in weights64]
            self.qkv = rf.qkv_rope(
                x64, *weights64, spec=spec, positions=self.at, backend="reference", **norms
            )
        # Each of the d_model additions is off by at most 2**-24 of a partial sum, itself at most
        # sum |x| |w|; being of either sign, the errors add up as their squares do.
        bound = x.shape[-1] ** 0.5 * 2.0**-24
        self.sums = max(
            bound * (linear(x64.abs(), w.abs()).square().mean() / z.square().mean()).sqrt().item()
            for w, z in zip(weights64, self.products, strict=True)
        )
        # The weights of a norm may enlarge errors by more than the numbers: at most by this.
        weights = [w for w in norms.values() if isinstance(w, torch.Tensor)]
        self.uneven = max((w.max() / w.min()).item() for w in weights) if weights else 1.0

    def check_products(self, result):
        for actual, expected in zip(result, self.products, strict=True):
            assert_rounded(actual[:, self.at], expected, 1, self.sums)

    def checker(self, roundings, beyond=0.0, transposed=False):
        """Compares (q, k, v): so many roundings, and relative errors `beyond` after the product."""

        def check(result):
            for actual, expected in zip(result, self.qkv, strict=True):
                actual = actual.transpose(1, 2) if transposed else actual
                errors = self.uneven * self.sums + 2.0**-21 + beyond
                assert_rounded(actual[:, self.at], expected, roundings, errors)

        return check


CASES = tuple(
    Projection(dtype=dtype, d_model=d_model, norm=norm, quick=d_model == 2048 and not norm)
    for d_model in (2048, 4096)
    for dtype in (torch.bfloat16, torch.float32)
    for norm in (False, True)
)


def test_projection(measure):
    measure()
