"""What a rewritten attention calls: our operators, where its modules may be read, not run."""

import dataclasses
import warnings

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from ..api import apply_rope, apply_rotary_pos_emb, qkv_rope
from ..distributed import is_sharded
from ..spec import RopeSpec
from .parallel import is_column_parallel

_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)  # torch.export traces with the last
_IMPURE = "hooks, a forward of its own, or a weight that is not a plain tensor"


@dataclasses.dataclass(frozen=True)
class Handler:
    """Pure data and no module, so that all layers alike, and all their copies, share one.

    spec, precision, backend   as the public functions take them; spec may be None at level 0 "hf"
    projections                attribute names of the projections of q, of k and perhaps of v
    norms                      attribute names of the norms of q and k, or ()
    norm_types                 their classes, as they were when they were checked
    """

    spec: RopeSpec | None
    precision: str
    backend: str
    projections: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    norm_types: tuple[type, ...] = ()

    def fuses(self, module, positions):
        """Whether this call may read the weights of q and k instead of running their modules."""
        return positions is not None and not self.obstacle(module)

    def obstacle(self, module):
        """Why ``module``, as it is now, has to run its own projections; "" if it need not."""
        for name in self.projections[:2]:
            child = getattr(module, name)
            if type(child) is not nn.Linear:
                return f"{name} is a {type(child).__name__}, not a plain Linear"
            if not (is_plain_linear(child) or is_column_parallel(child)):
                return f"{name} has {_IMPURE}"
        if len({is_sharded(getattr(module, name).weight) for name in self.projections[:2]}) > 1:
            return "one of q and k is spread over ranks, the other is not"
        for name, kind in zip(self.norms, self.norm_types, strict=True):
            if not is_plain_norm(getattr(module, name), kind):
                return f"{name} has {_IMPURE}"
        return ""

    def project(self, module, x, positions):
        """q and k projected, normed and rotated, v projected: [batch, heads, seqlen, head_dim]."""
        q, k, *rest = [getattr(module, name) for name in self.projections]
        operands = {"q_bias": q.bias, "k_bias": k.bias}
        alike = is_column_parallel if is_sharded(q.weight) else is_plain_linear
        fused_value = len(rest) == 1 and alike(rest[0])
        if fused_value:
            operands |= {"v_weight": rest[0].weight, "v_bias": rest[0].bias}
        if self.norms:
            q_norm, k_norm = [getattr(module, name) for name in self.norms]
            operands |= {"q_norm_weight": q_norm.weight, "k_norm_weight": k_norm.weight}
            operands |= {"norm_eps": norm_eps(q_norm)}
        query, key, value = qkv_rope(
            x,
            q.weight,
            k.weight,
            **operands,
            **self.rope(module),
            positions=positions,
            precision=self.precision,
            backend=self.backend,
        )
        if not rest:
            return query.transpose(1, 2), key.transpose(1, 2)
        if not fused_value:
            value = rest[0](x)
            value = value.view(*value.shape[:-1], -1, self.spec.head_dim)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def rope(self, module):
        """The spec, and perhaps factors, as operands: those of ``module.rope_override`` go first.

        That is a dict, and how frequencies are changed without patching again (context/swap.py).
        """
        return {"spec": self.spec} | module.__dict__.get("rope_override", {})

    def rotate(self, original, module, q, k, cos, sin, positions):
        """q and k [batch, heads, seqlen, head_dim] rotated; ``original`` is the model's own."""
        if self.precision == "hf":
            # What comes before the rotation may sum its gradient over tokens (a norm does, for its
            # weight), and torch sums in the order of memory: the bits depend on the strides.
            return apply_rotary_pos_emb(_EagerStrides.apply(q), _EagerStrides.apply(k), cos, sin)
        if positions is None:
            if not torch.compiler.is_compiling():
                warnings.warn(
                    "an attention patched by rope_fused was called without position_ids: it "
                    "rotated by the tables it was given, in their precision",
                    stacklevel=3,
                )
            return original(q, k, cos, sin)
        return apply_rope(
            q, k, **self.rope(module), positions=positions, layout="bhsd", backend=self.backend
        )


class _EagerStrides(torch.autograd.Function):
    """The identity, with a contiguous gradient: as the eager rotation leaves it in any case."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


def is_plain_linear(module):
    """Whether calling ``module`` is x @ weight.T + bias of ordinary tensors and nothing else."""
    return type(module) is nn.Linear and is_plain_tensor(module.weight, 2) and is_unhooked(module)


def is_plain_norm(module, kind):
    """Whether ``module`` is still a ``kind`` that calls nothing else and has an ordinary weight."""
    return type(module) is kind and is_plain_tensor(module.weight, 1) and is_unhooked(module)


def is_plain_tensor(t, dims):
    """Whether ``t`` is an ordinary floating tensor: no shard, no quantised subclass."""
    return type(t) in _PLAIN and t.dim() == dims and t.is_floating_point()


def is_unhooked(module):
    """Whether calling ``module`` runs its class's forward and nothing else."""
    if (
        "forward" in module.__dict__
    ):  # a hook of accelerate that was taken off leaves the class's own
        forward = module.__dict__["forward"]
        if getattr(forward, "__func__", None) is not type(module).forward:
            return False
    return not (
        _has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "_hf_hook" in module.__dict__
    )


def norm_eps(norm):
    """The epsilon of an RMSNorm, under either of the names in use; None if it has none."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
