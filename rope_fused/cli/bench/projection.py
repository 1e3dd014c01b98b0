"""The fused projection against the bare product, and against transformers' steps in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from ... import apply_rope, backends, qkv_rope
from . import baselines, roofline
from .baselines import ROTARY_ROUNDINGS, Problem
from .harness import (
    Case,
    Missing,
    Target,
    Variant,
    assert_rounded,
    sample_tokens,
)

OPS = ("projection", "projection-backward", "projection-forward-backward")
NORM_EPS = 1e-6

# d_model: must and aim of time / product alone, and of the speed-up over product + best rotation.
_GPU_TO_PRODUCT = {4096: (1.04, 1.00), 2048: (1.06, 1.02), 1024: (1.10, 1.04)}
_GPU_TO_SEPARATE = {4096: (1.03, 1.07), 2048: (1.08, 1.13), 1024: (1.15, 1.22)}
_GPU_TO_EAGER = {4096: (1.3, 1.37), 1024: (2.0, 2.3)}


class Inputs(NamedTuple):
    """x [1, seqlen, d_model]; the weights of q, k and v, as one matrix and as three; gradients of
    q, k and v [1, seqlen, heads, head_dim] or None."""

    x: torch.Tensor
    packed: torch.Tensor
    separate: list[torch.Tensor]
    grads: list[torch.Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Projection(Case):
    """q, k and v of a layer, from hidden states: forward, backward or both."""

    op: str = "projection"
    norm: bool | None = None  # None: as the model has it

    limit = "linear"

    @property
    def autocapture(self):
        return self.op != "projection-backward"

    @property
    def least(self):
        # The targets of the plain one on a CPU speak of the best of three medians of 31.
        return self.device == "cpu" and self.op == "projection" and not self.normed

    @property
    def rounds(self):
        if self.device == "cuda":
            return super().rounds
        # Products of several tenths of a second: what varies in between evens out inside them.
        long = self.op != "projection" or self.flops > 1e11
        return (11 if long else super().rounds) * (self.processes if self.least else 1)

    @property
    def normed(self) -> bool:
        if self.op != "projection":
            return False  # the gradients of a norm have no truth here
        return self.model.norm if self.norm is None else self.norm

    @property
    def variant(self):
        parts = ["" if self.norm is None else ("QK-norm" if self.norm else "no QK-norm")]
        return ", ".join(part for part in (*parts, super().variant) if part)

    @property
    def set_bytes(self):
        touched = roofline.total(self.cost("linear")).bytes
        return int(touched)

    @property
    def needs(self):
        model, rows = self.model, sum(self.model.rows)
        held = self.seqlen * (3 * model.d_model + 6 * rows) + 4 * rows * model.d_model
        return held * self.dtype.itemsize + (1 << 28)

    @property
    def flops(self):
        return roofline.total(self.cost("linear")).flops

    @property
    def effort(self):
        speed = 3e11 if self.device == "cpu" else 5e14
        return 10.0 + self.rounds * 6 * self.flops / speed

    @property
    def targets(self):
        if self.op != "projection" or self.normed or self.warm:
            return ()
        if self.device == "cpu":
            if not 512 <= self.seqlen <= 8192:
                return ()
            return (
                Target("rope_fused", "linear-three", 1.05, 1.0),
                Target("rope_fused-packed", "linear", 1.05, 1.0),
            )
        if self.seqlen < 8192:
            return ()
        width, packed = self.model.d_model, "rope_fused-packed"
        tables = (
            (_GPU_TO_PRODUCT, "linear", False),
            (_GPU_TO_SEPARATE, "linear+rotate", True),
            (_GPU_TO_EAGER, "hf-eager", True),
        )
        return tuple(
            Target(packed, other, *table[width], speedup=speedup)
            for table, other, speedup in tables
            if width in table
        )

    def cost(self, impl):
        size = self.dtype.itemsize
        if self.op == "projection":
            costs = roofline.projection_costs(self.model, self.seqlen, size, norm=self.normed)
        else:
            forward = self.op == "projection-forward-backward"
            costs = roofline.projection_step_costs(self.model, self.seqlen, size, forward=forward)
        return costs.get(impl)

    def make(self):
        model, options = self.model, {"dtype": self.dtype, "device": self.device}
        x = torch.randn(1, self.seqlen, model.d_model, **options)
        weight = torch.randn(sum(model.rows), model.d_model, device=self.device)
        packed = (weight / model.d_model**0.5).to(self.dtype)
        separate = [part.clone() for part in packed.split(model.rows)]
        if self.op == "projection":
            return Inputs(x, packed, separate, None)
        for t in (x, packed, *separate):
            t.requires_grad_()
        heads = (model.heads, model.kv_heads, model.kv_heads)
        grads = [torch.randn(1, self.seqlen, n, model.head_dim, **options) for n in heads]
        return Inputs(x, packed, separate, grads)

    # -- variants ------------------------------------------------------------------------------

    def variants(self, inputs):
        spec, model = self.model.spec(), self.model
        given = {"spec": spec}
        positions = torch.arange(self.seqlen, device=self.device)[None]
        if self.seqlen == 1:
            positions = positions + 8191
            given["positions"] = positions
        if self.normed:
            options = {"dtype": self.dtype, "device": self.device}
            for name in ("q_norm_weight", "k_norm_weight"):
                given[name] = torch.empty(model.head_dim, **options).uniform_(0.9, 1.1)
            given["norm_eps"] = NORM_EPS
        forward = _Truth(inputs, given, positions)
        backward = None if inputs.grads is None else _GradientTruth(inputs, spec, positions, self)

        def variant(project, roundings, *, packed=False, beyond=0.0, products=False):
            check = forward.checker(roundings, beyond, products)
            if backward is not None:
                both = self.op == "projection-forward-backward"
                check = backward.checker(check, both, products, beyond)
            return Variant(self._bind_op(project, packed), check)

        def fused(weights, x, backend="auto"):
            return qkv_rope(x, *weights, backend=backend, **given)

        def in_rows(packed, x):
            return fused(packed.split(model.rows), x)

        def product(packed, x):
            q, k, v = linear(x, packed).split(model.rows, -1)
            return tuple(t.unflatten(-1, (-1, model.head_dim)) for t in (q, k, v))

        def products(weights, x):
            return tuple(linear(x, w).unflatten(-1, (-1, model.head_dim)) for w in weights)

        # Rounded after the product, if that is written, and after the rotation.
        variants = {
            "rope_fused": variant(fused, 2),
            "rope_fused-packed": variant(in_rows, 2, packed=True),
            "linear": variant(product, 1, packed=True, products=True),
            "linear-three": variant(products, 1, products=True),
        }
        if self.device == "cuda":
            for backend in ("triton", "cuda"):
                if backends()[backend].startswith("ready"):

                    def by(packed, x, backend=backend):
                        return fused(packed.split(model.rows), x, backend)

                    variants[f"rope_fused-{backend}"] = variant(by, 2, packed=True)
        if self.op == "projection" and not self.normed:

            def rotated_after(packed, x):
                q, k, v = product(packed, x)
                at = given.get("positions")
                return *apply_rope(q, k, spec, at, out=(q, k)), v

            variants["linear+rotate"] = variant(rotated_after, 2, packed=True)
        return variants | self._transformers(Problem(spec, positions, self.dtype), given, variant)

    def _transformers(self, problem, given, variant):
        modes = self.compile_modes
        names = ("hf-eager", *modes)
        if reason := baselines.missing("transformers"):
            return dict.fromkeys(names, Missing(reason.reason))
        rotate = baselines.transformers_rotary(problem.spec, problem.heads_dim)
        cos, sin = problem.wide()
        weights = [given.get(name) for name in ("q_norm_weight", "k_norm_weight")]
        norms = [
            torch.nn.Identity() if w is None else baselines.rms_norm(w, NORM_EPS) for w in weights
        ]

        def eager(weights, x):
            q, k, v = (linear(x, w).unflatten(-1, (-1, self.model.head_dim)) for w in weights)
            q, k = (norm(t).transpose(1, 2) for norm, t in zip(norms, (q, k), strict=True))
            q, k = rotate(q, k, cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2), v

        # The product; normed, it is rounded before and after the weight; then the rotation.
        roundings = 1 + 2 * self.normed + ROTARY_ROUNDINGS
        error = problem.table_error(sample_tokens(self.seqlen).to(self.device))
        functions = {"hf-eager": eager}
        functions |= {name: baselines.compiled(eager, mode) for name, mode in modes.items()}
        return {n: variant(f, roundings, beyond=error) for n, f in functions.items()}

    def _bind_op(self, project, packed):
        """The bind of the case's op, from what projects (weights, x) to (q, k, v)."""

        def bind(inputs):
            x, weights = inputs.x, inputs.packed if packed else inputs.separate
            if self.op == "projection":
                return lambda: project(weights, x)
            leaves = [x, inputs.packed] if packed else [x, *inputs.separate]
            if self.op == "projection-backward":
                with torch.enable_grad(), baselines.keeping_buffers():
                    outputs = project(weights, x)
                options = {"retain_graph": True}
                return lambda: torch.autograd.grad(outputs, leaves, inputs.grads, **options)

            def both():
                with torch.enable_grad():
                    outputs = project(weights, x)
                    grads = torch.autograd.grad(outputs, leaves, inputs.grads)
                return *(t.detach() for t in outputs), *grads

            return both

        return bind


class _Truth:
    """(q, k, v) in float64 on a sample of tokens, and how far from it sums in float32 may be."""

    def __init__(self, inputs, given, positions):
        self.at = sample_tokens(inputs.x.shape[1]).to(inputs.x.device)
        x, weights = inputs.x.detach()[:, self.at].double(), [w.detach() for w in inputs.separate]
        weights = [w.double() for w in weights]
        given = {name: value for name, value in given.items() if name != "positions"}
        norms = {n: t.double() for n, t in given.items() if isinstance(t, torch.Tensor)}
        with torch.no_grad():
            options = {"positions": positions[:, self.at], "backend": "reference"}
            self.qkv = qkv_rope(x, *weights, **given | norms, **options)
            heads = (-1, given["spec"].head_dim)
            self.products = [linear(x, w).unflatten(-1, heads) for w in weights]
        self.sums = max(_sum_error(x[0], w.T) for w in weights)
        # The weights of a norm may enlarge errors by more than the numbers: at most by this.
        self.uneven = max([1.0, *((w.max() / w.min()).item() for w in norms.values())])

    def checker(self, roundings, beyond, products):
        """Compares (q, k, v): so many roundings, and relative errors `beyond` after the product."""

        def check(result):
            expected = self.products if products else self.qkv
            errors = self.sums if products else self.uneven * self.sums + 2.0**-21 + beyond
            for actual, truth in zip(result[:3], expected, strict=True):
                assert_rounded(actual[:, self.at], truth, roundings, errors)

        return check


def _sum_error(a, b) -> float:
    """How far a @ b may be off when summed in float32, relative to its root mean square.

    Each of the additions is off by at most 2**-24 of a partial sum, itself at most sum |a| |b|;
    being of either sign, the errors add up as their squares do.
    """
    most, real = (t.square().mean().sqrt() for t in (a.abs() @ b.abs(), a @ b))
    return a.shape[-1] ** 0.5 * 2.0**-24 * (most / real).item()


class _GradientTruth:
    """Gradients of x and of the weights in float64, on a sample of tokens and of features."""

    # Of each term: the tables, the products, their sum, the gradient of the projection; then of the
    # sums: one for each of three weights, which may be added in the dtype.
    ROUNDINGS = ROTARY_ROUNDINGS + 1 + 2 * 3

    def __init__(self, inputs, spec, positions, case):
        self.case = case
        rows = sum(case.model.rows)
        self.at = sample_tokens(case.seqlen).to(case.device)
        self.features = sample_tokens(rows, 64).to(case.device)
        x, weight = inputs.x.detach().double(), inputs.packed.detach().double()
        dq, dk, dv = (g.double() for g in inputs.grads)
        with torch.no_grad():
            options = {"conjugate": True, "backend": "reference"}
            plain = torch.cat((dq, dk, dv), -2).flatten(-2)
            turned = torch.cat((*apply_rope(dq, dk, spec, positions, **options), dv), -2).flatten(
                -2
            )
            self.expected = {}
            for products, dz in ((True, plain[0]), (False, turned[0])):
                factors = ((dz[self.at], weight), (dz[:, self.features].mT, x[0]))
                self.expected[products] = [(a @ b, _sum_error(a, b)) for a, b in factors]

    def checker(self, check_forward, both, products, beyond):
        """Compares the gradients, after (q, k, v) where ``both`` are there."""

        def check(result):
            if both:
                check_forward(result[:3])
                result = result[3:]
            dx, *dw = result
            gradients = (dx[0, self.at], torch.cat(dw)[self.features])
            for actual, (truth, sums) in zip(gradients, self.expected[products], strict=True):
                assert_rounded(actual, truth, self.ROUNDINGS, 2 * sums + 2.0**-21 + beyond)

        return check
