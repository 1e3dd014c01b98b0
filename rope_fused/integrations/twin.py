"""A twin of a module to try things on: its class and weights in float64, and nothing else of it.

No hooks, no gradients, no shared memory. A linear layer that is not a plain one (an adapter, a
quantised one, a shard) is a plain one of the same features in the twin.
"""

import torch
from torch import nn

from .classes import plain_class
from .eligible import is_plain_linear, is_plain_tensor


class Numbers:
    """Random float64 numbers, the same on every device, and no step of the global generator."""

    def __init__(self, device):
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape, scale=1.0):
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return (scale * x).to(self.device)


def home(module):
    """Where the parameters of ``module`` are, or the CPU if float64 cannot be computed there."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type in ("meta", "mps") else device


def is_linear(module):
    """Whether ``module`` is a linear layer of any kind."""
    return all(isinstance(getattr(module, f"{s}_features", None), int) for s in ("in", "out"))


def twin_of(module, numbers, children=None):
    """A copy of ``module`` and its ``children`` (names; None: all), in float64, without hooks."""
    if module is None:
        return None
    if is_linear(module) and not is_plain_linear(module):
        return _linear_like(module, numbers)
    # Not by __init__, which draws random numbers, nor by deepcopy, which would copy the hooks.
    twin = object.__new__(plain_class(type(module)))
    state = dict(module.__dict__)
    for name in ("forward", "_hf_hook", "_old_forward"):
        state.pop(name, None)
    state |= {k: type(v)() for k, v in state.items() if "_hooks" in k and isinstance(v, dict)}
    # FSDP1 puts its views of a flat weight where no parameter is registered.
    state |= {n: _copy(t, numbers, 0.0) for n, t in state.items() if isinstance(t, torch.Tensor)}
    for kind in ("_parameters", "_buffers"):
        noise = 0.1 * (kind == "_parameters")
        state[kind] = {n: _copy(t, numbers, noise) for n, t in state[kind].items()}
    state["_modules"] = {
        name: twin_of(child, numbers)
        for name, child in module._modules.items()
        if children is None or name in children
    }
    twin.__dict__.update(state)
    return twin.eval()


def _linear_like(module, numbers):
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    weight = numbers(*linear.weight.shape, scale=linear.in_features**-0.5)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _copy(t, numbers, noise):
    """``t`` in float64, or random numbers of its shape where it has no values to compute with."""
    if t is None:
        return None
    if is_plain_tensor(t, t.dim()) and _has_values(t):
        copy = t.detach().to(numbers.device, torch.float64, copy=True)
        if bool(copy.isfinite().all()):
            # Norms begin as ones and biases as zeros, which hide what is done with them.
            return copy + numbers(*copy.shape, scale=noise) if t.dim() == 1 else copy
    if not t.is_floating_point() and _has_values(t):
        return t.detach().to(numbers.device, copy=True)
    return numbers(*t.shape, scale=max([1, *t.shape[-1:]]) ** -0.5)


def _has_values(t):
    """Whether there is memory behind ``t``; FSDP1 frees it between forwards."""
    return t.device.type != "meta" and (not t.numel() or t.untyped_storage().nbytes() > 0)
