"""Weights that are spread over ranks: tensor-parallel linear layers, and what FSDP2 makes whole."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import nn

from ..distributed import is_sharded
from .eligible import is_unhooked


def is_column_parallel(module) -> bool:
    """Whether ``module`` is a Linear sharded by columns, and calling it does nothing but that.

    Such a layer takes a plain tensor, equal on all ranks, and returns this rank's features as a
    plain tensor: what qkv_rope does with its weights. It is what ColwiseParallel of
    torch.distributed.tensor.parallel (hooks) and of transformers' tp_plan (a forward of the
    instance) make of a Linear when they are not told to redistribute.
    """
    if type(module) is not nn.Linear or not is_sharded(module.weight):
        return False
    weight, bias = module.weight, module.bias
    if weight.device_mesh.ndim != 1 or not _is_split(weight):
        return False
    if bias is not None and not (is_sharded(bias) and _is_split(bias)):
        return False
    if "forward" in module.__dict__:
        return _is_transformers(module) and not _hooks(module)
    return _is_torch(module)


def _is_split(t):
    (placement,) = t.placements
    return placement.is_shard(0)


def _hooks(module):
    return [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]


def _is_torch(module):
    """Its only hooks are the pair that distribute_module installs for ColwiseParallel."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel

    pre, post = [*module._forward_pre_hooks.values()], [*module._forward_hooks.values()]
    if len(pre) != 1 or len(post) != 1 or len(_hooks(module)) != 2:
        return False
    before = _captured(pre[0], "torch.distributed.tensor", "input_fn")
    after = _captured(post[0], "torch.distributed.tensor", "output_fn")
    if not isinstance(before, functools.partial) or not isinstance(after, functools.partial):
        return False
    whole, columns = (Replicate(),), (Shard(-1),)
    return (
        before.func is ColwiseParallel._prepare_input_fn
        and after.func is ColwiseParallel._prepare_output_fn
        and (before.args, after.args) == ((whole, whole), (columns, True))
        and not before.keywords
        and not after.keywords
    )


def _is_transformers(module):
    """Its forward is the one that transformers' ColwiseParallel installs, around the class's."""
    from torch.distributed.tensor import Replicate, Shard

    forward = module.__dict__["forward"]
    style = _captured(forward, "transformers", "self")
    inner = _captured(forward, "transformers", "original_forward")
    if type(style).__name__ != "ColwiseParallel" or not type(style).__module__.startswith(
        "transformers."
    ):
        return False
    return (
        getattr(inner, "__func__", None) is nn.Linear.forward
        and _captured(forward, "transformers", "module") is module
        and (style.input_layouts, style.output_layouts) == (Replicate(), Shard(-1))
        and style.use_local_output
        and not getattr(module, "_hf_quantized_needs_local_tp", False)
    )


def _captured(function, package, name):
    """The closure variable ``name`` of a function of ``package``; None if it is not one."""
    if not inspect.isfunction(function) or not f"{function.__module__}.".startswith(f"{package}."):
        return None
    if name not in function.__code__.co_freevars:
        return None
    return inspect.getclosurevars(function).nonlocals.get(name)


def in_forward(path, modules):
    """The module ``path`` of ``modules`` ({path: module}) as it is while it runs.

    That differs where FSDP2 (fully_shard) of the module or of one around it gathers its weights
    for each forward: then it is a stand-in, with whole weights on the meta device.
    """
    module = modules[path]
    if not is_sharded(*module.parameters()):
        return module
    from torch.distributed.fsdp import FSDPModule

    parts = path.split(".")
    around = [modules.get(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    return _gathered(module) if any(isinstance(m, FSDPModule) for m in around) else module


def _gathered(module):
    stand_in = object.__new__(type(module))
    gathered = is_unhooked(module)  # what a tensor-parallel plan has split stays so
    parameters = {n: _whole(p) if gathered else p for n, p in module._parameters.items()}
    children = {name: c and _gathered(c) for name, c in module._modules.items()}
    stand_in.__dict__ |= module.__dict__ | {"_parameters": parameters, "_modules": children}
    return stand_in


def _whole(t):
    if not is_sharded(t):
        return t
    return nn.Parameter(torch.empty(t.shape, dtype=t.dtype, device="meta"))
