"""What a loaded model does with positions, found by running it: its tables, and its layers."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch
from torch import nn

# A rotation has to be measured at growing distances: each step fixes the frequency well enough to
# count the whole turns of the next, also in bfloat16.
_STEP, _FARTHEST = 4, 1024


@dataclasses.dataclass(frozen=True)
class Rotation:
    """One measured rotation.

    inv_freq   float64 [pairs], radians per token
    error      how far it may be off, by the formats it went through: float64 [pairs]
    factor     what multiplies cos and sin; None if it could not be told
    """

    inv_freq: torch.Tensor
    error: torch.Tensor
    factor: float | None
    factor_error: float


def ladder(start: int, end: int) -> torch.Tensor:
    """Positions from ``start`` on, below ``end``: at the distances 0, 1, 4, 16, ..."""
    distances, distance = [0], 1
    while distance <= _FARTHEST and start + distance < end:
        distances.append(distance)
        distance *= _STEP
    return start + torch.tensor(distances, device="cpu")


def tables(rotary: nn.Module, positions: torch.Tensor, spec, layer_type=None) -> Rotation:
    """The rotation of the cos and sin that a rotary module returns for ``positions``."""
    device = next((b.device for b in rotary.buffers()), torch.device("cpu"))
    ids = positions.to(device)[None]
    if spec.axes > 1:
        ids = ids.expand(spec.axes, 1, -1)
    extra = () if layer_type is None else (layer_type,)
    with torch.no_grad():
        made = rotary(torch.zeros(1, 1, 1, device=device), ids, *extra)
    if isinstance(made, torch.Tensor):
        z = made if made.is_complex() else torch.view_as_complex(made.float())
    else:
        z = torch.complex(*(t.double() for t in made))
    z = z.reshape(-1, len(positions), z.shape[-1])[-1].to("cpu", torch.complex128)
    pairs = spec.rotary_dim // 2
    if z.shape[-1] == 2 * pairs:
        first, second = z.chunk(2, -1)
        z = first if torch.equal(first, second) else z[:, 0::2]
    if z.shape[-1] != pairs:
        raise ValueError(f"its tables are {z.shape[-1]} wide, for {pairs} pairs")
    factor = z.abs().mean().item()
    angles = (z * z[:1].conj()).angle()
    return _rotation(positions, angles, torch.float32, factor)


def layers(model: nn.Module, positions: torch.Tensor, spec_of) -> dict[int, Rotation | str]:
    """{layer: its rotation, or why it cannot be told}, from the keys that each layer caches.

    A sequence of one token has the same hidden states wherever it stands: its only key differs by
    the rotation alone. ``spec_of(layer)`` says which dimensions turn.
    """
    parameter = next(model.parameters())
    token = model.config.get_text_config().vocab_size // 2
    ids = torch.full((len(positions), 1), token, device=parameter.device)
    seen = {}

    def look(module, args, kwargs):
        seen[module.layer_idx] = module, args[0] if args else kwargs["hidden_states"]

    attentions = [m for m in model.modules() if _is_attention(m)]
    with contextlib.ExitStack() as stack:
        for module in attentions:
            handle = module.register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        places = positions.to(parameter.device)[:, None]
        cache = model(input_ids=ids, position_ids=places, use_cache=True).past_key_values
        found = {}
        for layer, (module, hidden) in sorted(seen.items()):
            try:
                keys = _keys(cache.layers[layer], module, spec_of(layer))
                found[layer] = _layer(module, hidden, keys, positions, spec_of(layer))
            except Exception as error:  # other people's caches and attentions, of any kind
                found[layer] = f"{type(error).__name__}: {error}"
    return found


@contextlib.contextmanager
def evaluating(model):
    """No gradients and no dropout, with every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _is_attention(module):
    return "Attention" in type(module).__name__ and isinstance(
        getattr(module, "layer_idx", None), int
    )


def _keys(cached, module, spec):
    """The rotated keys of a layer: [positions, heads, seqlen, head_dim]."""
    keys = cached.keys
    if keys.dim() == 4 and keys.shape[-1] == spec.head_dim:
        return keys
    rank, values = getattr(module, "kv_lora_rank", None), cached.values
    if rank is not None and keys.shape[-1] == rank and values.shape[-1] == spec.head_dim:
        return values  # latent attention caches what keys are made of, and the rotated part
    if rank is not None and keys.shape[-1] == getattr(module, "qk_head_dim", None):
        return keys[..., -spec.head_dim :]
    raise ValueError(f"it caches keys of shape {[*keys.shape]}")


def _layer(module, hidden, keys, positions, spec):
    dtype, keys = keys.dtype, keys[:, :, -1].double().cpu()  # [positions, heads, head_dim]
    z, interleaved = _turning(keys, spec, dtype)
    # Weighted by their size: a pair without a key tells nothing.
    turned = (z * z[:1].conj()).sum(1)
    if not bool((turned[0].real > 0).all()):
        raise ValueError("its keys are zero")
    factor = None
    if isinstance(getattr(module, "k_proj", None), nn.Module):
        raw = module.k_proj(hidden[:1]).view(1, -1, spec.head_dim)
        if isinstance(norm := getattr(module, "k_norm", None), nn.Module):
            width = next((p.shape[-1] for p in norm.parameters()), None)
            raw = norm(raw) if width in (None, spec.head_dim) else norm(raw.flatten(1)).view_as(raw)
        raw = _pairs(raw.double().cpu(), spec, interleaved)
        ratios = z[0].abs().square().sum(0) / raw[0].abs().square().sum(0)
        # One factor for all pairs, or what was compared is not what was rotated.
        if ratios.max() <= ratios.min() * (1 + 32 * _unit(dtype)):
            factor = ratios.mean().sqrt().item()
    return _rotation(positions, turned.angle(), dtype, factor)


def _turning(keys, spec, dtype):
    """(the rotated pairs as complex numbers, whether they are neighbours).

    A rotation keeps the size of every pair. Some models (DeepSeek-V3 in transformers) put pairs
    that were neighbours half a head apart.
    """
    for interleaved in (spec.interleaved, not spec.interleaved):
        z = _pairs(keys, spec, interleaved)
        size = z.abs()
        if bool(((size - size[:1]).abs() <= 32 * _unit(dtype) * size.amax()).all()):
            return z, interleaved
    raise ValueError("its keys do not turn in pairs")


def _pairs(x, spec, interleaved):
    """The rotated slice of [.., head_dim] as complex numbers."""
    x = x[..., spec.rotary_offset : spec.rotary_offset + spec.rotary_dim]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    return torch.complex(first, second)


def _rotation(positions, angles, dtype, factor):
    """From angles [positions, pairs], against those of the first position."""
    distances = (positions - positions[0]).double()
    freq = torch.zeros(angles.shape[-1], dtype=torch.float64)
    for distance, angle in zip(distances[1:], angles[1:], strict=True):
        turns = ((freq * distance - angle) / (2 * math.pi)).round()
        freq = (angle + 2 * math.pi * turns) / distance
    if bool((freq <= 0).all()) and bool((freq < 0).any()):
        freq = -freq  # a model may turn the other way round, q and k alike
    # Of float32 phases at these positions 8 units of rounding, of the rotated values 4 of theirs.
    unit, farthest = _unit(dtype), positions[-1].item()
    error = (8 * 2.0**-24 * farthest * freq + 4 * unit) / distances[-1]
    return Rotation(freq, error, factor, 8 * unit)


def _unit(dtype):
    """The spacing of numbers near 1: tables are float32 at best, whatever the model computes in."""
    return max(torch.finfo(dtype).eps, 2.0**-23)
