"""The operators: schema, fake, registration and autograd.Function of each, side by side.

An operator is one opaque, functional call (torch.library), so that torch.compile, export,
checkpointing and distributed tensors see an operation and not its kernels. The autograd.Function
stands outside it: a backward calls the differentiable entry again (the gradient of a rotation is
the rotation by the opposite angle), which makes derivatives of every order come out right. The gate
is `function.derived()`, not `requires_grad`: under forward mode the latter is false, and a bare
operator would drop tangents silently where the Function refuses."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import batching, composite, dispatch, function, packing


class Rotation(NamedTuple):
    """The operands that q and k share, in the order of the schemas."""

    inv_freq: torch.Tensor  # float64 [tables, pairs], radians per token
    turns: torch.Tensor  # int64 [tables, pairs], inv_freq in fixed point (phase.py)
    scale: torch.Tensor  # float64 [tables, pairs], attention factor
    positions: torch.Tensor | None = None  # int [1|batch, seqlen] or [axes, 1|batch, seqlen]
    table_index: torch.Tensor | None = None  # int [1|batch, seqlen], row of the tables per token
    axis_map: torch.Tensor | None = None  # int [pairs], position axis of each pair
    token_scale: torch.Tensor | None = None  # [1|batch, seqlen], multiplies q
    q_norm: torch.Tensor | None = None  # RMSNorm weights, [head_dim] or [heads * head_dim]
    k_norm: torch.Tensor | None = None
    norm_eps: float = 1e-6
    norm_all: bool = False  # one norm over all heads of a token
    rotary_offset: int = 0
    interleaved: bool = False
    conjugate: bool = False
    layout: str = "bshd"
    backend: str = "auto"

    @property
    def pairs(self) -> int:
        return self.turns.shape[-1]


_ROTATION = (
    "Tensor inv_freq, Tensor turns, Tensor scale, Tensor? positions, Tensor? table_index, "
    "Tensor? axis_map, Tensor? token_scale, Tensor? q_norm, Tensor? k_norm, float norm_eps, "
    "bool norm_all, int rotary_offset, bool interleaved, bool conjugate, str layout, str backend"
)


def _define(name: str, schema: str, kernel, fake, batched=None) -> torch._ops.OpOverload:
    """Register `kernel` for every device under rope_fused::name and return the operator.

    batched: (operator, size, in_dims, args) -> (outputs, out_dims), its rule for vmap; None: the
    elements are computed one by one.
    """
    qualified = f"rope_fused::{name}"
    torch.library.define(qualified, schema)
    for key in ("CPU", "CUDA", "MPS", "XPU"):
        torch.library.impl(qualified, key, kernel)
    torch.library.register_fake(qualified, fake)
    operator = getattr(torch.ops.rope_fused, name).default
    batched = batched or batching.one_by_one

    def vmap(info, in_dims, *args):
        return batched(operator, info.batch_size, in_dims, args)

    torch.library.register_vmap(qualified, vmap)
    return operator


# ------------------------------------------------------------------------------------------- rotate


def _rotate_kernel(q, k, *rotation):
    return dispatch.rotate(q, k, Rotation(*rotation))


def _rotate_fake(q, k, *rotation):
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _rotate_batched(call, size, in_dims, args):
    names = ("q", "k", *Rotation._fields)
    return batching.together(call, size, in_dims, names, args, ("q", "k"))


_rotate = _define(
    "rotate",
    f"(Tensor q, Tensor? k, {_ROTATION}) -> (Tensor, Tensor)",
    _rotate_kernel,
    _rotate_fake,
    _rotate_batched,
)


def rotate(q, k, rotation: Rotation):
    """RMS-norm (where there is a weight), rotate and scale q and k; differentiable to every order.

    Returns (q2, k2), new tensors with the strides of `torch.empty_like`; k2 is None when k is.
    """
    call = function.applied(_Rotate) if function.derived() else _rotate
    q2, k2 = call(q, k, *rotation)
    return q2, None if k is None else k2


class _Rotate(torch.autograd.Function):
    @staticmethod
    @function.parameters("q", "k", *Rotation._fields)
    def forward(q, k, *rotation):
        return _rotate(q, k, *rotation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, *rotation = inputs
        rotation = Rotation(*rotation)
        ctx.has_k = k is not None
        # A rotation by known angles needs no activation; a norm or a learned factor needs its
        # input.
        ctx.keeps = _needs_input(rotation, ctx.needs_input_grad[2:])
        function.tell_unused(ctx, q, k)
        _save(ctx, rotation, *((q, k) if ctx.keeps else (None, None)))

    @staticmethod
    def backward(ctx, *grads):
        rotation, (q, k) = _saved(ctx)
        used, (dq2, dk2) = function.with_unused(ctx, grads)
        dq, dk, factors = _turn_back(dq2, dk2 if ctx.has_k else None, q, k, rotation)
        return *function.of_used(used, dq, dk), *_factor_gradients(factors, rotation, used)

    @staticmethod
    def vmap(info, in_dims, *args):
        call = _Rotate.apply if function.derived() else _rotate
        return _rotate_batched(call, info.batch_size, in_dims, args)


# ---------------------------------------------------------------------------------- rotate_backward


def _backward_kernel(dq, dk, dv, q, k, *rest):
    *rotation, packed = rest
    return dispatch.rotate_backward(dq, dk, dv, q, k, Rotation(*rotation), packed)


def _backward_fake(dq, dk, dv, q, k, *rest):
    *rotation, packed = rest
    rotation = Rotation(*rotation)
    empty = dq.new_empty(0)
    if packed:
        heads = sum(t.shape[-2] for t in (dq, dk, dv) if t is not None)
        first, second = dq.new_empty((*dq.shape[:-2], heads, dq.shape[-1])), empty
    else:
        first, second = torch.empty_like(dq), empty if dk is None else torch.empty_like(dk)
    none = dq.new_empty(0, dtype=torch.float64)
    if q is None:
        return first, second, none, *(torch.empty_like(none) for _ in range(4))
    norms = (
        torch.empty_like(none) if w is None else torch.empty_like(w, dtype=torch.float64)
        for w in (rotation.q_norm, rotation.k_norm)
    )
    tables = (torch.empty_like(rotation.scale) for _ in range(2))
    tokens = composite.bshd(dq, rotation.layout).shape[:2]
    return first, second, *norms, *tables, dq.new_empty(tokens, dtype=torch.float64)


def _backward_batched(call, size, in_dims, args):
    if args[3] is not None:  # the gradients of factors are sums over the batch, one per element
        return batching.one_by_one(call, size, in_dims, args)
    names = ("dq", "dk", "dv", "q", "k", *Rotation._fields, "packed")
    return batching.together(call, size, in_dims, names, args, ("dq", "dk", "dv"))


_rotate_backward = _define(
    "rotate_backward",
    f"(Tensor dq, Tensor? dk, Tensor? dv, Tensor? q, Tensor? k, {_ROTATION}, bool packed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
    _backward_batched,
)


def _turn_back(dq, dk, q, k, rotation: Rotation):
    """The gradients of rotate's q and k, and a composite.FactorGradients (None when q, its input,
    was not kept)."""
    if q is None:
        return *rotate(dq, dk, rotation._replace(conjugate=not rotation.conjugate)), None
    if function.derived():
        return composite.rotate_backward(rotate, dq, dk, q, k, rotation)
    dq, dk2, *factors = _rotate_backward(dq, dk, None, q, k, *rotation, False)
    return dq, None if dk is None else dk2, composite.FactorGradients(*factors)


# ------------------------------------------------------------------------------------------ project


_PROJECTIONS = ("q_weight", "k_weight", "v_weight", "q_bias", "k_bias", "v_bias")


def _project_kernel(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, *rest):
    *rotation, head_dim, keep = rest
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    return dispatch.project(x, weights, biases, head_dim, Rotation(*rotation), keep)


def _project_fake(x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, *rest):
    *_, head_dim, keep = rest

    def heads(weight):
        if weight is None:
            return x.new_empty(0)
        return x.new_empty((*x.shape[:-1], weight.shape[0] // head_dim, head_dim))

    kept = (heads(w if keep else None) for w in (q_weight, k_weight))
    return heads(q_weight), heads(k_weight), heads(v_weight), *kept


def _project_batched(call, size, in_dims, args):
    names = ("x", *_PROJECTIONS, *Rotation._fields, "head_dim", "keep")
    return batching.together(call, size, in_dims, names, args, ("x",), _PROJECTIONS)


_project = _define(
    "project",
    "(Tensor x, Tensor q_weight, Tensor k_weight, Tensor? v_weight, Tensor? q_bias, "
    f"Tensor? k_bias, Tensor? v_bias, {_ROTATION}, int head_dim, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _project_kernel,
    _project_fake,
    _project_batched,
)


def project(x, weights, biases, head_dim: int, rotation: Rotation, learned: bool = False):
    """x projected by three weights, q and k then normed, rotated and scaled; differentiable to
    every order.

    `learned`: a factor may need its gradient, for which the projections are kept.
    Returns (q, k, v), each [.., heads, head_dim]; v is None when its weight is.
    """
    if function.derived():
        keep = learned or rotation.q_norm is not None or rotation.k_norm is not None
        q, k, v, _, _ = function.applied(_Project)(x, *weights, *biases, *rotation, head_dim, keep)
    else:
        q, k, v, _, _ = _project(x, *weights, *biases, *rotation, head_dim, False)
    return q, k, None if weights[2] is None else v


class _Project(torch.autograd.Function):
    @staticmethod
    @function.parameters("x", *_PROJECTIONS, *Rotation._fields, "head_dim", "keep")
    def forward(x, *rest):
        return _project(x, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *rest = inputs
        weights, biases, (*rotation, ctx.head_dim, keep) = rest[:3], rest[3:6], rest[6:]
        zq, zk = output[3:]
        ctx.mark_non_differentiable(zq, zk)
        ctx.biased = tuple(b is not None for b in biases)
        function.tell_unused(ctx, *output[:3])
        kept = (zq, zk) if keep else (None, None)
        _save(ctx, Rotation(*rotation), x, *weights, *biases, *kept)

    @staticmethod
    def backward(ctx, *grads):
        used, (dq, dk, dv) = function.with_unused(ctx, grads[:3])
        rotation, (x, *weights, q_bias, k_bias, v_bias, zq, zk) = _saved(ctx)
        biases = (q_bias, k_bias, v_bias)
        dv = None if weights[2] is None else dv
        needs = ctx.needs_input_grad
        if function.derived():
            # Derivatives of a derivative go through the projections as well: make them anew, on the
            # graph.
            if zq is not None:
                zq, zk = (
                    torch.nn.functional.linear(x, w, b).unflatten(-1, (-1, ctx.head_dim))
                    for w, b in zip(weights[:2], biases[:2], strict=True)
                )
            dzq, dzk, factors = _turn_back(dq, dk, zq, zk, rotation)
            dz = torch.cat([t for t in (dzq, dzk, dv) if t is not None], -2)
        else:
            dz, _, *factors = _rotate_backward(dq, dk, dv, zq, zk, *rotation, True)
            factors = None if zq is None else composite.FactorGradients(*factors)
        # One packed gradient: [tokens, (q | k | v) features].
        rows = [w.shape[0] for w in weights if w is not None]
        dz = dz.flatten(-2).flatten(0, -2)
        dx = None
        if needs[0]:
            dx = _times_weights(dz, [w for w in weights if w is not None], rows).reshape(x.shape)
        d_weights = [None] * 3
        if any(needs[1:4]):
            parts = dz.mT.mm(x.reshape(-1, x.shape[-1])).split(rows)
            d_weights = [*parts, *(None for _ in range(3 - len(parts)))]
            d_weights = function.of_used(used, *d_weights)
        d_biases = [None] * 3
        if any(needs[4:7]):
            sums = dz.sum(0).split(rows)
            d_biases = [
                s if has else None for s, has in zip((*sums, None), ctx.biased, strict=False)
            ]
            d_biases = function.of_used(used, *d_biases)
        return dx, *d_weights, *d_biases, *_factor_gradients(factors, rotation, used), None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        call = _Project.apply if function.derived() else _project
        return _project_batched(call, info.batch_size, in_dims, args)


def _times_weights(dz, weights, rows):
    """dz @ [weights], with one product when the weights lie behind each other in memory (a packed
    qkv_proj)."""
    if not function.derived() and not torch.compiler.is_compiling():
        packed = dispatch.packed_weight(weights)
        if packed is not None:
            return dz.mm(packed)
    total = None
    for part, weight in zip(dz.split(rows, -1), weights, strict=True):
        total = part.mm(weight) if total is None else torch.addmm(total, part, weight)
    return total


# ------------------------------------------------------------------------------------ rotate_tables


def _tables_kernel(q, k, *rest):
    return dispatch.rotate_tables(q, k, *rest)


def _tables_fake(q, k, *rest):
    return _rotate_fake(q, k)


_TABLES = ("q", "k", "cos", "sin", "interleaved", "rotary_offset", "transpose", "layout", "backend")


def _tables_batched(call, size, in_dims, args):
    return batching.together(call, size, in_dims, _TABLES, args, ("q", "k"))


_rotate_tables = _define(
    "rotate_tables",
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, int rotary_offset, "
    "bool transpose, str layout, str backend) -> (Tensor, Tensor)",
    _tables_kernel,
    _tables_fake,
    _tables_batched,
)


def rotate_tables(q, k, cos, sin, interleaved, rotary_offset, transpose, layout, backend):
    """x * cos + rotate_half(x) * sin in transformers' arithmetic (`transpose`: its adjoint), all of
    one dtype.

    cos, sin: [1|batch, seqlen, rotary_dim]. Differentiable in q, k, cos and sin, to every order.
    """
    call = function.applied(_RotateTables) if function.derived() else _rotate_tables
    q2, k2 = call(q, k, cos, sin, interleaved, rotary_offset, transpose, layout, backend)
    return q2, None if k is None else k2


class _RotateTables(torch.autograd.Function):
    @staticmethod
    def forward(q, k, cos, sin, interleaved, rotary_offset, transpose, layout, backend):
        return _rotate_tables(
            q, k, cos, sin, interleaved, rotary_offset, transpose, layout, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, cos, sin, *ctx.constants = inputs
        ctx.has_k = k is not None
        function.tell_unused(ctx, q, k)
        keep = any(ctx.needs_input_grad[2:4])
        ctx.save_for_backward(cos, sin, *((q, k) if keep else (None, None)))

    @staticmethod
    def backward(ctx, *grads):
        cos, sin, q, k = ctx.saved_tensors
        interleaved, offset, transpose, layout, backend = ctx.constants
        used, (dq2, dk2) = function.with_unused(ctx, grads)
        dk2 = dk2 if ctx.has_k else None
        dq, dk = rotate_tables(
            dq2, dk2, cos, sin, interleaved, offset, not transpose, layout, backend
        )
        d_cos = d_sin = None
        if q is not None:
            d_cos, d_sin = 0.0, 0.0
            inside = slice(offset, offset + cos.shape[-1])
            for x, g in ((q, dq2), (k, dk2)):
                if x is None:
                    continue
                x, g = (composite.bshd(t, layout)[..., inside] for t in (x, g))
                d_cos = d_cos + (x * g).sum(-2)
                # With J the quarter turn: y = x cos + J(x) sin; its adjoint y = x cos + J^T(x sin).
                turned = x * _quarter(g, interleaved) if transpose else g * _quarter(x, interleaved)
                d_sin = d_sin + turned.sum(-2)
            d_cos, d_sin = d_cos.sum_to_size(cos.shape), d_sin.sum_to_size(sin.shape)
        return *function.of_used(used, dq, dk), d_cos, d_sin, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        call = _RotateTables.apply if function.derived() else _rotate_tables
        return _tables_batched(call, info.batch_size, in_dims, args)


def _quarter(x, interleaved):
    """x turned by a quarter, (a, b) -> (-b, a): rotate_half."""
    a, b = composite.members(x, interleaved)
    return torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)


# --------------------------------------------------------------------------------------- token_rows


def _tokens_fake(
    positions, cu_seqlens, seq_lens, batch, seqlen, switch_length, n_start, choose, seq_lens_name
):
    device = next(t.device for t in (positions, cu_seqlens, seq_lens) if t is not None)
    rows = 1 if cu_seqlens is not None else batch
    own = torch.empty((1, seqlen) if positions is None else (0,), dtype=torch.int64, device=device)
    return own, torch.empty((rows, seqlen) if choose else (0,), dtype=torch.int32, device=device)


token_rows = _define(
    "token_rows",
    "(Tensor? positions, Tensor? cu_seqlens, Tensor? seq_lens, SymInt batch, SymInt seqlen, "
    "int? switch_length, int n_start, bool choose, str seq_lens_name) -> (Tensor, Tensor)",
    packing.token_rows,
    _tokens_fake,
)


# -------------------------------------------------------------------------------------------- saved


def _needs_input(rotation: Rotation, needs) -> bool:
    """Whether the backward needs what the rotation was applied to: with a norm, or for the gradient
    of a factor."""
    needs = Rotation(*needs)
    return bool(
        rotation.q_norm is not None
        or rotation.k_norm is not None
        or needs.inv_freq
        or needs.scale
        or needs.token_scale
    )


_CONSTANTS = Rotation._fields.index("norm_eps")  # behind the tensors of a Rotation


def _save(ctx, rotation: Rotation, *tensors) -> None:
    """Save tensors through autograd (which sees versions and hooks), the constants as they are."""
    ctx.count = len(tensors)
    ctx.constants = rotation[_CONSTANTS:]
    ctx.save_for_backward(*tensors, *rotation[:_CONSTANTS])


def _saved(ctx):
    saved = ctx.saved_tensors  # unpacked once: checkpointing forbids a second time
    return Rotation(*saved[ctx.count :], *ctx.constants), saved[: ctx.count]


def _factor_gradients(factors: composite.FactorGradients | None, rotation: Rotation, used) -> tuple:
    """One gradient (or None) per field of Rotation, each like its operand."""
    grads = dict.fromkeys(Rotation._fields)
    if factors is not None:
        q_norm, k_norm = function.of_used(used, factors.q_norm, factors.k_norm)
        factors = factors._replace(q_norm=q_norm, k_norm=k_norm)
        for name, grad in factors._asdict().items():
            operand = getattr(rotation, name)
            if operand is None or grad is None:
                continue
            if name == "token_scale" and operand.shape[0] == 1:  # shared by the batch
                grad = grad.sum(0, keepdim=True)
            grads[name] = grad.to(operand.dtype)
    return tuple(grads.values())
