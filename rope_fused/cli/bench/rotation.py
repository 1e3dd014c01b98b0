"""Rotating q and k, and turning gradients back, against a copy and against everybody else."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ... import apply_rope, apply_rotary_pos_emb, backends, ops
from ...operands import Operands
from . import baselines, roofline
from .baselines import ROTARY_ROUNDINGS, Problem
from .harness import Case, Missing, Target, Variant, assert_copied, assert_rounded, sample_tokens
from .shapes import LONGROPE, YARN

OPS = ("rotate", "unrotate", "rotate-forward-backward", "norm-rotate")
NORM_EPS = 1e-6
DECODED_POSITION = 8191


@dataclass(frozen=True, kw_only=True)
class Rotation(Case):
    """q and k of one layer.

    rotate                   forward
    unrotate                 backward: gradients of the rotated q and k turned back
    rotate-forward-backward  both, through autograd
    norm-rotate              RMSNorm of each head first (QK-norm)
    """

    op: str = "rotate"
    layout: str = "bhsd"  # as transformers has it: a transposed view of what the projection wrote
    packed: bool = False  # q and k are slices of one packed qkv
    partial: float = 1.0
    interleaved: bool | None = None  # None: as the model has it
    rope: str = ""  # "yarn", or "longrope": a batch of short and long sequences
    sequences: int = 1  # more: cu_seqlens
    asked: tuple[str, ...] = field(default=(), compare=False)  # baselines named by the user

    limit = "clone"

    @property
    def autocapture(self):
        return self.op != "unrotate"  # a graph made outside a capture cannot run inside one

    @property
    def batch(self) -> int:
        return 4 if self.rope == "longrope" else 1

    @property
    def variant(self) -> str:
        parts = ["" if self.layout == "bhsd" else self.layout]
        parts += ["packed" if self.packed else ""]
        parts += [f"partial {self.partial:g}" if self.partial != 1 else ""]
        if self.interleaved is not None:
            parts += ["interleaved" if self.interleaved else "half-split"]
        parts += [{"": "", "yarn": "YaRN", "longrope": "LongRoPE, 2 short + 2 long"}[self.rope]]
        parts += [f"{self.sequences} sequences" if self.sequences > 1 else ""]
        return ", ".join(part for part in (*parts, super().variant) if part)

    @property
    def elements(self) -> int:
        """Of q and k together."""
        model = self.model
        return self.batch * self.seqlen * (model.heads + model.kv_heads) * model.head_dim

    @property
    def set_bytes(self):
        passes = 2 if self.op == "rotate-forward-backward" else 1
        return 2 * passes * self.elements * self.dtype.itemsize

    @property
    def needs(self):
        # Inputs and a result; of the eager formula, up to four more such tensors, and autograd's.
        held = {"rotate": 7, "unrotate": 10, "rotate-forward-backward": 12, "norm-rotate": 13}
        return held[self.op] * self.elements * self.dtype.itemsize

    @property
    def effort(self):
        return 8.0 + super().effort

    @property
    def spec(self):
        options = {} if self.interleaved is None else {"interleaved": self.interleaved}
        if self.partial != 1:
            options["partial_rotary_factor"] = self.partial
        return self.model.spec({"yarn": YARN, "longrope": LONGROPE}.get(self.rope), **options)

    @property
    def targets(self):
        if self.op not in ("rotate", "unrotate") or self.seqlen < 4096 or self.warm:
            return ()  # fits into caches, where a copy is no limit
        if self.device == "cuda":
            least, aim = (0.90, 0.95) if self.op == "rotate" else (0.85, 0.93)
            return (Target("rope_fused", "clone", least, aim, speedup=True),)
        to_copy = Target("rope_fused", "clone", 1.25, 1.05)
        plain = self.model.name == "Llama-3-8B" and not self.variant
        if self.op == "unrotate" or not plain or self.dtype != torch.bfloat16:
            return (to_copy,)
        return (
            to_copy,
            Target("rope_fused", "hf-eager", 10, 19, speedup=True),
            Target("rope_fused", "hf-compile", 4, 11, speedup=True),
        )

    def cost(self, impl):
        passes = 2 if self.op == "rotate-forward-backward" else 1
        tokens, size = self.batch * self.seqlen, self.dtype.itemsize
        norm = self.op == "norm-rotate"
        costs = roofline.rotation_costs(self.model, tokens, size, norm=norm, passes=passes)
        if self.op == "unrotate":
            costs.pop("hf-eager")  # whose backward is autograd's, and not this model's
        return costs.get(impl)

    # -- data ----------------------------------------------------------------------------------

    def make(self):
        """(q, k, gradient of q, gradient of k): random, in the layout and strides of the case; the
        gradients are None where they are not needed."""
        q, k = self._random()
        if self.op in ("rotate", "norm-rotate"):
            return q, k, None, None
        return q.requires_grad_(), k.requires_grad_(), torch.randn_like(q), torch.randn_like(k)

    def _random(self):
        model, options = self.model, {"dtype": self.dtype, "device": self.device}
        heads = (model.heads, model.kv_heads, model.kv_heads)
        shape = (self.batch, self.seqlen)
        if self.packed:
            qkv = torch.randn(*shape, sum(heads), model.head_dim, **options)
            q, k, _ = qkv.split(heads, -2)
        else:
            q, k = (torch.randn(*shape, n, model.head_dim, **options) for n in heads[:2])
        return self.as_bshd(q), self.as_bshd(k)

    def as_bshd(self, x):
        """Between the layout of the case and bshd; its own inverse."""
        return x.transpose(1, 2) if self.layout == "bhsd" else x

    def packing(self):
        """(cu_seqlens or None, positions [1 | batch, seqlen]); sequences of growing lengths."""
        if self.sequences > 1:
            steps = torch.arange(self.sequences + 1, dtype=torch.float64)
            bounds = (self.seqlen * (steps / self.sequences).square()).long()
            positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])
            return bounds.to(self.device, torch.int32), positions[None].to(self.device)
        positions = torch.arange(self.seqlen, device=self.device)[None]
        if self.seqlen == 1:
            positions = positions + DECODED_POSITION
        if self.rope == "longrope":  # the last two continue a long context
            starts = torch.tensor([0, 0, 65536, 65536], device=self.device)
            positions = positions + starts[:, None]
        return None, positions

    # -- variants ------------------------------------------------------------------------------

    def variants(self, inputs):
        spec = self.spec
        cu_seqlens, positions = self.packing()
        given = {"layout": self.layout, "cu_seqlens": cu_seqlens}
        if self.batch > 1 or self.seqlen == 1:
            given["positions"] = positions
        truth = _Truth(self, inputs, positions)
        exact = truth.checker(1 + 2 * (self.op == "norm-rotate"), 2.0**-21)
        variants = {}

        def ours(name, backend="auto"):
            def rotate(q, k):
                return apply_rope(q, k, spec, backend=backend, **given)

            def turn_back(_q, _k, dq, dk):
                return apply_rope(dq, dk, spec, conjugate=True, backend=backend, **given)

            if self.op == "unrotate":
                variants[name] = Variant(_bind(turn_back), exact)
            elif self.op == "norm-rotate":
                variants[name] = Variant(_bind(self._norm_rotate(truth.norms, backend)), exact)
            else:
                variants[name] = Variant(self._bind_op(rotate), exact)
            if self.op == "unrotate" and backend == "auto":
                variants[f"{name}-autograd"] = Variant(self._bind_op(rotate), exact)

        ours("rope_fused")
        if self.device == "cuda":
            for backend in ("triton", "cuda"):
                if backends()[backend].startswith("ready"):
                    ours(f"rope_fused-{backend}", backend)
        # The second has its memory already: no allocation, and on a CPU no page faults.
        variants["clone"] = Variant(self._bind_copy(fresh=True), truth.check_copy)
        variants["copy"] = Variant(self._bind_copy(fresh=False), truth.check_copy)

        derivative = self.op not in ("rotate", "norm-rotate")
        problem = Problem(spec, positions, self.dtype, self.layout, self.sequences > 1, derivative)
        roundings = ROTARY_ROUNDINGS + 2 * (self.op == "norm-rotate")
        theirs = truth.checker(roundings, problem.table_error(truth.at))
        if self.op == "norm-rotate":
            variants |= self._transformers_norm(problem, truth.norms, theirs)
            return variants
        if not spec.interleaved and not baselines.missing("transformers"):
            cos, sin = problem.wide()
            heads_dim = problem.heads_dim

            def drop_in(q, k):
                return apply_rotary_pos_emb(q, k, cos, sin, heads_dim)

            variants["rope_fused-hf"] = Variant(self._bind_op(drop_in), theirs)
        for rotary in baselines.rotaries(self.compile_modes, self.asked):
            if reason := rotary.obstacle(problem):
                variants[rotary.name] = Missing(reason)
                continue
            bind = self._bind_op(rotary.bind(problem))
            variants[rotary.name] = Variant(bind, theirs, rotary.in_place)
        return variants

    def _bind_op(self, rotate):
        """The bind of the case's op, from what rotates (q, k)."""

        def bind(inputs):
            q, k, dq, dk = inputs
            if self.op == "rotate":
                return lambda: rotate(q, k)
            if self.op == "unrotate":
                with torch.enable_grad(), baselines.keeping_buffers():
                    outputs = rotate(q, k)
                return lambda: torch.autograd.grad(outputs, (q, k), (dq, dk), retain_graph=True)

            def both():
                with torch.enable_grad():
                    outputs = rotate(q, k)
                    grads = torch.autograd.grad(outputs, (q, k), (dq, dk))
                return *(t.detach() for t in outputs), *grads

            return both

        return bind

    def _bind_copy(self, fresh):
        def bind(inputs):
            # What a rotation in the same direction reads: q and k, or their gradients, or both.
            chosen = {"unrotate": inputs[2:], "rotate-forward-backward": inputs}
            tensors = [t.detach() for t in chosen.get(self.op, inputs[:2])]
            if fresh:
                return lambda: [t.clone() for t in tensors]
            copies = [torch.empty_like(t) for t in tensors]
            return lambda: [c.copy_(t) for c, t in zip(copies, tensors, strict=True)]

        return bind

    def _norm_rotate(self, norms, backend):
        """(q, k) -> normed and rotated; what patch() uses where it may not read the projections."""
        spec, layout = self.spec, self.layout
        options = {"norm_eps": NORM_EPS, "layout": layout, "backend": backend}
        unset = dict.fromkeys(("positions", "cu_seqlens", "seq_lens", "inv_freq"))
        unset |= dict.fromkeys(("attention_factor", "q_scale"))

        def call(q, k, *_):
            operands = Operands(spec, q, q.shape[0], self.seqlen, **unset)
            rotation = operands.rotation(q_norm=norms[0], k_norm=norms[1], **options)
            return ops.rotate(q, k, rotation)

        return call

    def _transformers_norm(self, problem, weights, check):
        names = ("hf-eager", *self.compile_modes)
        if none := baselines.missing("transformers"):
            return dict.fromkeys(names, none)
        rotate = baselines.transformers_rotary(problem.spec, problem.heads_dim)
        norms = [baselines.rms_norm(w, NORM_EPS) for w in weights]
        cos, sin = problem.wide()

        def eager(q, k, *_):
            return rotate(norms[0](q), norms[1](k), cos, sin)

        variants = {"hf-eager": Variant(_bind(eager), check)}
        for name, mode in self.compile_modes.items():
            variants[name] = Variant(_bind(baselines.compiled(eager, mode)), check)
        return variants


def _bind(function):
    """The bind of a function of the four inputs."""
    return lambda inputs: lambda: function(*inputs)


class _Truth:
    """Results of the reference in float64, on a sample of tokens."""

    def __init__(self, case, inputs, positions):
        self.case, self.inputs = case, inputs
        self.at = sample_tokens(case.seqlen).to(case.device)
        q, k, dq, dk = (None if t is None else case.as_bshd(t.detach())[:, self.at] for t in inputs)
        at, spec, self.norms = positions[:, self.at], case.spec, None

        def turned(q, k, conjugate=False):
            options = {"conjugate": conjugate, "backend": "reference"}
            return apply_rope(q.double(), k.double(), spec, at, **options)

        with torch.no_grad():
            if case.op == "norm-rotate":
                options = {"dtype": case.dtype, "device": case.device}
                size = case.model.head_dim
                self.norms = [torch.empty(size, **options).uniform_(0.9, 1.1) for _ in range(2)]
                q, k = (_normed(t, w) for t, w in zip((q, k), self.norms, strict=True))
            self.expected = () if case.op == "unrotate" else turned(q, k)
            if dq is not None:
                self.expected += turned(dq, dk, conjugate=True)

    def checker(self, roundings, beyond):
        def check(result):
            for actual, expected in zip(result, self.expected, strict=True):
                assert_rounded(self.case.as_bshd(actual)[:, self.at], expected, roundings, beyond)

        return check

    def check_copy(self, result):
        originals = self.inputs[-len(result) :] if self.case.op == "unrotate" else self.inputs
        for actual, original in zip(result, originals, strict=False):
            assert_copied(actual, original)


def _normed(x, weight):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * weight.double()
