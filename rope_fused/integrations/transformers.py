"""patch(model): the attentions of Hugging Face models, one by one, on this package's operators."""

import dataclasses
import re

import torch
from torch import nn

from ..dispatch import check_backend
from .classes import Patched, change_class, plain_class
from .handler import forget
from .planner import Plan, Planner
from .source import rotates

_LEVELS = {2: "projection + rope", 1: "norm + rope", 0: "rope only", None: "left alone"}


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did to each attention module; ``print(report)`` shows a table.

    levels   {module name: 2 projection + rope | 1 norm + rope | 0 rope only | None left alone}
    reasons  {module name: why it is not at the level asked for, or what else there is to know}. A
             model in which no attention was found has one entry, for its root, named ``""``.
    layouts  {module name: how the heads of a patched one are rotated, in words}
    """

    levels: dict[str, int | None]
    reasons: dict[str, str]
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self):
        rows = {}
        for name, level in self.levels.items():  # most layers of a model share a row
            words = self.layouts.get(name, ""), self.reasons.get(name, "")
            row = re.sub(r"\d+", "*", name) or "(model)", level, *words
            rows[row] = rows.get(row, 0) + 1
        width = max(len(pattern) for pattern, *_ in rows)
        done = sum(level is not None for level in self.levels.values())
        lines = [f"rope_fused.patch: {done} of {len(self.levels)} attention modules patched"]
        for (pattern, level, layout, reason), count in rows.items():
            mark = "-" if level is None else level
            line = f"  {pattern:<{width}}  {count:>3} x  {mark}  {_LEVELS[level]}"
            line += f", {layout}" if layout else ""
            lines.append(f"{line}: {reason}" if reason else line)
        return "\n".join(lines)


def patch(model, *, fuse_projection=True, precision="exact", backend="auto", strict=False):
    """Run the rotary embedding of a transformers model, and its projection, on this package.

    An attention is recognised by what it does: its forward runs on a twin in float64, up to the
    last rotation, and the tensors that are rotated are followed back to norms and linear layers.
    Then the calls of these in its source, and of its rotary function, are handed to us; the new
    forward is compared with the old one, and only if they agree is that one instance given a class
    with it. The module that makes cos and sin gets one too, whose tables carry the positions they
    are for. Transformers' own classes, weights, parameter names and state-dict keys stay as they
    are. :func:`unpatch` undoes it; a deep copy is a patched model of its own; a pickle comes back
    unpatched.

    Every call looks at the modules again. While the projection of q or k is anything but a plain
    ``nn.Linear`` (LoRA, quantised, sharded, with hooks), the model's own modules run, and only norm
    and rotation (level 1), or the rotation (level 0), are ours. A call whose tables do not say what
    positions they are for, and which is given no position_ids either, keeps the model's rotation.
    What the frequencies are is found out here: after a change of them (other buffers, another
    configuration or rotary module) patch again.

    Args:
        model: the model, or any module around it (PEFT, DDP, ...); changed in place.
        fuse_projection: True, level 2: one operator projects, norms (QK-norm) and rotates. False,
            level 0: the rotation alone.
        precision: "exact": frequencies from the configuration in float64, exact angles from the
            position ids, whatever type the buffers of the model are in; LongRoPE's long factors are
            chosen for each sequence, where transformers chooses for the batch. "hf": as
            transformers rounds; level 0 reads the model's own tables and is bit-identical to it.
        backend: as for :func:`rope_fused.qkv_rope`; a rotation by the model's own tables ("hf" at
            level 0) always runs where "auto" would.
        strict: raise, and change nothing, unless every attention that rotates reaches the level
            asked for.

    Returns:
        PatchReport.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: an argument has a value it cannot have, or ``strict`` and an attention falls
            short.
        RuntimeError: a backend that this machine does not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in (("fuse_projection", fuse_projection), ("strict", strict)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if precision not in ("exact", "hf"):
        raise ValueError(f"precision must be 'exact' or 'hf', got {precision!r}")
    check_backend(backend, next(model.parameters(), torch.empty(0)))
    planner = Planner(model, fuse_projection, precision, backend)
    # Tensors of inference mode have no versions nor gradients, those of a meta device no values.
    with torch.inference_mode(False), torch.device("cpu"):
        plans = {
            name: planner.plan(name, module)
            for name, module in planner.modules.items()
            if "Attention" in type(module).__name__ or rotates(type(module).forward)
        }
    if not plans:
        plans[""] = Plan(None, f"{type(model).__name__} has no attention that is known as one")
    report = PatchReport(
        levels={name: plan.level for name, plan in plans.items()},
        reasons={name: plan.reason for name, plan in plans.items() if plan.reason},
        layouts={name: plan.layout for name, plan in plans.items() if plan.layout},
    )
    wanted = 2 if fuse_projection else 0
    if strict and any(
        plan.level is None or plan.level < wanted for plan in plans.values() if not plan.still
    ):
        raise ValueError(f"strict asks for level {wanted} everywhere\n{report}")
    unpatch(model)
    for name, plan in plans.items():
        if plan.kind is not None:
            change_class(planner.modules[name], plan.kind)
        for rotary, kind in plan.rotaries.items():
            change_class(planner.modules[rotary], kind)
    return report


def unpatch(model):
    """Undo :func:`patch`: every module of ``model`` runs its class's own forward again."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, Patched):
            change_class(module, plain_class(type(module)))
            forget(module)
