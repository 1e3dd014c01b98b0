"""Other rotary frequencies and another temperature for a loaded model, and back again."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from types import MethodType

import torch

from ..spec import RopeSpec
from .rotation import unscaled

# Where it is held: attentions patched by rope_fused read it there (integrations/handler.py).
_OVERRIDE = "rope_override"


@contextlib.contextmanager
def swapped(model, spec=None, *, inv_freq=None, attention_factor=1.0):
    """Inside the ``with``, ``model`` rotates as :func:`set_rope` says; then as before.

    Swaps may be nested. Costs microseconds; nothing is loaded, copied or moved.
    """
    owners = [*_rotary_modules(model), *_attentions(model)]
    held = [owner.__dict__.get(_OVERRIDE) for owner in owners]
    set_rope(model, spec, inv_freq=inv_freq, attention_factor=attention_factor)
    try:
        yield model
    finally:
        for owner, override in zip(owners, held, strict=True):
            _put(owner, override)


def set_rope(model, spec=None, *, inv_freq=None, attention_factor=1.0) -> None:
    """Rotate by ``spec``, or by ``inv_freq`` and ``attention_factor``, from now on.

    Works for transformers models as they are and for those under ``rope_fused.patch``. Buffers,
    weights and configuration stay as they are, so that :func:`reset_rope` undoes it and
    ``save_pretrained`` writes the model that was loaded.

    A plain model makes its tables in its own code (float32 angles, its layout) from the frequencies
    given; of a spec, those of ``precision="hf"`` where transformers knows the method, so that the
    logits are those of a model loaded with that block. A patched attention passes them to its
    operator. Both ways, gradients reach ``inv_freq`` and ``attention_factor`` if they require them.

    Args:
        model: a transformers model with one rotary table for all layers.
        spec: a RopeSpec of the same rotary_dim. Of LongRoPE's two tables each sequence takes its
            own; a dynamic spec goes by the longest sequence of a batch.
        inv_freq: instead of ``spec``: radians per token, floating [rotary_dim / 2], any device.
        attention_factor: with ``inv_freq``: multiplies cos and sin; a float or a 0-d tensor.

    Raises:
        TypeError: both ``spec`` and ``inv_freq``, or neither.
        ValueError: wrong length; a factor per pair; a model without ``inv_freq`` or with one per
            kind of layer.
    """
    if (spec is None) == (inv_freq is None):
        raise TypeError("pass either spec or inv_freq")
    modules = _rotary_modules(model)
    pairs = modules[0].inv_freq.shape[-1]
    if spec is not None:
        if spec.rotary_dim // 2 != pairs:
            raise ValueError(f"spec must have {pairs} pairs, got {spec.rotary_dim // 2}")
        source, override = _OfSpec(spec), {"spec": spec}
    else:
        inv_freq = torch.as_tensor(inv_freq)
        if inv_freq.shape != (pairs,) or not inv_freq.is_floating_point():
            raise ValueError(
                f"inv_freq must be floating [{pairs}], got {inv_freq.dtype} {[*inv_freq.shape]}"
            )
        if isinstance(attention_factor, torch.Tensor) and attention_factor.dim():
            raise ValueError(
                f"attention_factor must be one number, got shape {[*attention_factor.shape]}"
            )
        source = _OfTensors(inv_freq, attention_factor)
        override = {"inv_freq": inv_freq, "attention_factor": attention_factor}
        own = _known_spec(model)
        if own is not None and own.cache_class != "static":  # it has more tables than the one given
            override["spec"] = unscaled(own)
    for rotary in modules:
        if not _is_ours(rotary) and "forward" in rotary.__dict__:
            raise ValueError(f"model must have a {type(rotary).__name__} without hooks")
    for rotary in modules:
        _put(rotary, source)
    for attention in _attentions(model):
        _put(attention, override)


def reset_rope(model) -> None:
    """Rotate as the configuration says again."""
    for owner in (*_rotary_modules(model), *_attentions(model)):
        _put(owner, None)


def forget_lengths(model) -> None:
    """Let dynamic NTK start afresh: in transformers it remembers the longest input of all calls.

    A measurement then does not depend on what was measured before it. Other models stay as they
    are.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and hasattr(module, "original_inv_freq"):
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
            module.max_seq_len_cached = module.original_max_seq_len


@dataclasses.dataclass(frozen=True, eq=False)
class _OfTensors:
    inv_freq: torch.Tensor
    attention_factor: object

    def tables(self, position_ids):
        """([(inv_freq, attention factor), …], which of them each token uses, or None)."""
        return [(self.inv_freq, self.attention_factor)], None


class _OfSpec:
    def __init__(self, spec):
        self.spec = spec
        try:
            self.precision = "hf"
            rows = spec.rows("hf") if spec.cache_class != "dynamic" else None
        except ValueError:
            self.precision = "exact"
            rows = spec.rows()
        if rows is None:
            self.fixed = None
            return
        scales = spec.scale_rows(self.precision)
        if not torch.equal(scales, scales[:, :1].expand_as(scales)):
            raise ValueError(f"attention_factor must be one number, got one per pair in {spec}")
        self.fixed = list(zip(rows.float(), scales[:, 0].tolist(), strict=False))

    def tables(self, position_ids):
        if self.fixed is not None:
            return self.fixed, self.spec.table_index(position_ids)
        length = int(position_ids.max()) + 1
        factor = self.spec.attention_factor_at(length)
        return [(self.spec.inv_freq("exact", length).float(), factor)], None


def _forward(rotary, x, position_ids, *args, **kwargs):
    """The rotary module's own arithmetic, on other frequencies, with gradients for them."""
    own = inspect.unwrap(type(rotary).forward)  # no decorator that rewrites inv_freq, no no_grad
    rows, index = rotary.__dict__[_OVERRIDE].tables(position_ids)
    held = rotary.inv_freq, rotary.attention_scaling
    made = []
    try:
        for inv_freq, factor in rows:
            rotary.inv_freq = inv_freq.to(device=x.device, dtype=torch.float32)
            rotary.attention_scaling = factor
            made.append(own(rotary, x, position_ids, *args, **kwargs))
    finally:
        rotary.inv_freq, rotary.attention_scaling = held
    tables = made[0]
    for row, others in enumerate(made[1:], 1):
        here = (index == row)[..., None]
        tables = tuple(torch.where(here, *pair) for pair in zip(others, tables, strict=True))
    # Attentions patched by rope_fused take their own operands for tables that say what they are.
    tag = getattr(type(rotary).forward, "tag", None)
    return tables if tag is None else tag(tables, position_ids, *args, **kwargs)


def _rotary_modules(model):
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor)
        and hasattr(module, "attention_scaling")
    ]
    if not found:
        raise ValueError(
            f"model must have a rotary module with one inv_freq for all layers, which "
            f"{type(model).__name__} has not"
        )
    return found


def _attentions(model):
    return [module for module in model.modules() if "Attention" in type(module).__name__]


def _known_spec(model):
    """The rotary embedding that the configuration means; None for families we do not know."""
    try:
        return RopeSpec.from_config(model.config)
    except (TypeError, ValueError):
        return None


def _is_ours(rotary):
    return getattr(rotary.__dict__.get("forward"), "__func__", None) is _forward


def _put(owner, override):
    """Give a rotary module or an attention its override; None takes it away."""
    owner.__dict__.pop(_OVERRIDE, None)
    if _is_ours(owner):
        del owner.__dict__["forward"]
    if override is None:
        return
    owner.__dict__[_OVERRIDE] = override
    if not isinstance(override, dict):
        owner.__dict__["forward"] = MethodType(_forward, owner)
