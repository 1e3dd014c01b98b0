"""Rotating q and k, and turning gradients back, against a copy and against transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._functorch import config as functorch_config

import rope_fused as rf

from . import baselines
from .harness import Case, Target, Variant, assert_copied, assert_rounded, sample_tokens

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SWEEP = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, kw_only=True)
class Rotate(Case):
    """q with 32 and k with 8 heads of 128, batch 1."""

    op: str = "rotate"
    seqlen: int = 4096
    layout: str = "bhsd"  # as transformers has it: a transposed view of what the projection wrote
    packed: bool = False  # q and k are slices of one packed qkv
    partial: float = 1.0
    interleaved: bool = False
    sequences: int = 1  # more: cu_seqlens

    limit = "clone"

    @property
    def impls(self):
        # transformers' signature, which rope_fused-hf has, knows half-split pairs only.
        ours = ("rope_fused",) if self.interleaved else ("rope_fused", "rope_fused-hf")
        return (*ours, "clone", "hf-eager", "hf-compile")

    @property
    def shape(self) -> str:
        parts = [f"{HEADS}+{KV_HEADS}x{HEAD_DIM}", self.layout]
        parts += ["packed"] if self.packed else []
        parts += [f"partial {self.partial:g}"] if self.partial != 1 else []
        parts += ["interleaved"] if self.interleaved else []
        parts += [f"{self.sequences} sequences"] if self.sequences > 1 else []
        return " ".join(parts)

    @property
    def targets(self):
        to_copy = Target("rope_fused", "clone", 1.25, 1.05)
        if self.seqlen < 4096:  # fits into caches, where a copy is no limit
            return ()
        speedups = (
            Target("rope_fused", "hf-eager", 10, 19, speedup=True),
            Target("rope_fused", "hf-compile", 4, 11, speedup=True),
        )
        plain = self.partial == 1 and not self.interleaved
        return (to_copy, *speedups) if plain and self.dtype == torch.bfloat16 else (to_copy,)

    @property
    def spec(self):
        return rf.RopeSpec.yarn(
            head_dim=HEAD_DIM,
            partial_rotary_factor=self.partial,
            interleaved=self.interleaved,
            **baselines.ROPE,
        )

    def make_qk(self):
        """Random q and k in the layout and with the strides of the case."""
        heads = (HEADS, KV_HEADS, KV_HEADS)
        if self.packed:
            qkv = torch.randn(1, self.seqlen, sum(heads) * HEAD_DIM, dtype=self.dtype)
            q, k, _ = qkv.unflatten(-1, (-1, HEAD_DIM)).split(heads, -2)
        else:
            q, k = (torch.randn(1, self.seqlen, n, HEAD_DIM, dtype=self.dtype) for n in heads[:2])
        return self.as_bshd(q), self.as_bshd(k)

    def as_bshd(self, x):
        """Between the layout of the case and bshd; its own inverse."""
        return x.transpose(1, 2) if self.layout == "bhsd" else x

    def make_packing(self):
        """(cu_seqlens or None, position of each token); sequences of growing lengths."""
        if self.sequences == 1:
            return None, torch.arange(self.seqlen)
        steps = torch.arange(self.sequences + 1, dtype=torch.float64)
        bounds = (self.seqlen * (steps / self.sequences).square()).long()
        positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])
        return bounds.to(torch.int32), positions

    def checker(self, q, k, positions, roundings, beyond):
        """Compares (q2, k2), on a sample of tokens, with the reference in float64."""
        at = sample_tokens(self.seqlen)
        inputs = [self.as_bshd(x)[:, at].double() for x in (q, k)]
        conjugate = self.op == "unrotate"
        with torch.no_grad():
            truth = rf.apply_rope(
                *inputs, self.spec, positions[at], conjugate=conjugate, backend="reference"
            )

        def check(result):
            for actual, expected in zip(result, truth, strict=True):
                assert_rounded(self.as_bshd(actual)[:, at], expected, roundings, beyond)

        return check

    def build(self):
        spec, (q, k) = self.spec, self.make_qk()
        cu_seqlens, positions = self.make_packing()
        ours = {"layout": self.layout, "cu_seqlens": cu_seqlens}

        def check_copy(result):
            for actual, original in zip(result, (q, k), strict=True):
                assert_copied(actual, original)

        variants = {
            "rope_fused": Variant(
                lambda: rf.apply_rope(q, k, spec, **ours),
                self.checker(q, k, positions, 1, 2.0**-21),
            ),
            "clone": Variant(lambda: (q.clone(), k.clone()), check_copy),
        }
        if none := baselines.missing("transformers"):
            return dict.fromkeys(self.impls, none) | variants
        unsqueeze_dim = 1 if self.layout == "bhsd" else 2
        eager = baselines.rotary(spec, unsqueeze_dim)
        compiled = baselines.compiled(eager)
        cos, sin = baselines.tables(spec, positions, self.dtype)
        error = baselines.table_error(spec, positions)
        check = self.checker(q, k, positions, baselines.ROTARY_ROUNDINGS, error)
        variants["hf-eager"] = Variant(lambda: eager(q, k, cos, sin), check)
        variants["hf-compile"] = Variant(lambda: compiled(q, k, cos, sin), check)
        if not self.interleaved:
            variants["rope_fused-hf"] = Variant(
                lambda: rf.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim), check
            )
        return variants


@dataclass(frozen=True, kw_only=True)
class Unrotate(Rotate):
    """The backward: gradients of the rotated q and k turned back, alone and through autograd."""

    op: str = "unrotate"

    impls = ("rope_fused", "rope_fused-autograd", "clone", "hf-eager", "hf-compile")

    @property
    def targets(self):
        return super().targets[:1]

    def build(self):
        spec, (q, k) = self.spec, self.make_qk()
        q.requires_grad_(), k.requires_grad_()
        _, positions = self.make_packing()
        grads = tuple(torch.randn_like(x) for x in (q, k))

        def check_copy(result):
            for actual, original in zip(result, grads, strict=True):
                assert_copied(actual, original)

        def backward_of(outputs):
            return lambda: torch.autograd.grad(outputs, (q, k), grads, retain_graph=True)

        check = self.checker(*grads, positions, 1, 2.0**-21)
        variants = {
            "rope_fused": Variant(
                lambda: rf.apply_rope(*grads, spec, layout=self.layout, conjugate=True), check
            ),
            "rope_fused-autograd": Variant(
                backward_of(rf.apply_rope(q, k, spec, layout=self.layout)), check
            ),
            "clone": Variant(lambda: tuple(g.clone() for g in grads), check_copy),
        }
        if none := baselines.missing("transformers"):
            return dict.fromkeys(self.impls, none) | variants
        eager = baselines.rotary(spec, 1 if self.layout == "bhsd" else 2)
        tables = baselines.tables(spec, positions, self.dtype)
        error = baselines.table_error(spec, positions)
        check = self.checker(*grads, positions, baselines.ROTARY_ROUNDINGS, error)
        variants["hf-eager"] = Variant(backward_of(eager(q, k, *tables)), check)
        # A backward that is run again must not use its saved tensors as scratch memory.
        with functorch_config.patch(donated_buffer=False):
            outputs = baselines.compiled(eager)(q, k, *tables)
        variants["hf-compile"] = Variant(backward_of(outputs), check)
        return variants


def _cases():
    for dtype in (torch.bfloat16, torch.float32):
        quick = dtype == torch.bfloat16
        for seqlen in SWEEP:
            yield Rotate(dtype=dtype, seqlen=seqlen, quick=seqlen == 4096)
        yield Rotate(dtype=dtype, layout="bshd")
        yield Rotate(dtype=dtype, packed=True, quick=quick)
        yield Rotate(dtype=dtype, partial=0.5, quick=quick)
        yield Rotate(dtype=dtype, interleaved=True, quick=quick)
        yield Rotate(dtype=dtype, sequences=8, quick=quick)
        for seqlen in SWEEP:
            yield Unrotate(dtype=dtype, seqlen=seqlen, quick=quick and seqlen == 4096)
        yield Unrotate(dtype=dtype, layout="bshd")


CASES = tuple(_cases())


def test_rotate(measure):
    measure()
