"""Whether a module may be read instead of run: plain, unhooked, with an ordinary weight."""

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

_PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)  # torch.export traces with the last
IMPURE = "hooks, a forward of its own, or a weight that is not a plain tensor"


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
    # A hook of accelerate that was taken off leaves the class's own forward in the instance.
    if "forward" in module.__dict__:
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
