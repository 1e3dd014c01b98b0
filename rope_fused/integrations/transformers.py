"""patch(model): the attentions of Hugging Face models, one by one, on this package's operators."""

import copy
import dataclasses
import re
from types import MethodType

import torch
from torch import nn

from ..dispatch import check_backend
from ..operands import warm
from ..spec import RopeSpec
from .handler import Handler, norm_eps
from .rewrite import Unrecognised, examine, rewrite
from .selftest import self_test

_LEVELS = {2: "projection + rope", 1: "norm + rope", 0: "rope only", None: "left alone"}


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did to each attention module; ``print(report)`` shows a table.

    levels   {module name: 2 projection + rope | 1 norm + rope | 0 rope only | None left alone}
    reasons  {module name: why it is not at the level asked for, or what else there is to know}. A
             model in which no attention was found has one entry, for its root, named ``""``.
    """

    levels: dict[str, int | None]
    reasons: dict[str, str]

    def __str__(self):
        rows = {}
        for name, level in self.levels.items():  # most layers of a model share a row
            row = re.sub(r"\d+", "*", name) or "(model)", level, self.reasons.get(name, "")
            rows[row] = rows.get(row, 0) + 1
        width = max(len(pattern) for pattern, _, _ in rows)
        done = sum(level is not None for level in self.levels.values())
        lines = [f"rope_fused.patch: {done} of {len(self.levels)} attention modules patched"]
        for (pattern, level, reason), count in rows.items():
            mark = "-" if level is None else level
            line = f"  {pattern:<{width}}  {count:>3} x  {mark}  {_LEVELS[level]}"
            lines.append(f"{line}: {reason}" if reason else line)
        return "\n".join(lines)


def patch(model, *, fuse_projection=True, precision="exact", backend="auto", strict=False):
    """Run the rotary embedding of a transformers model, and its projection, on this package.

    An attention is recognised by the source of its class's ``forward``. The statements that project
    q and k and rotate them are guarded, the new forward is compared with the old one on a twin of
    the module, and only then is that one instance given a class with it. Transformers' own classes,
    weights, parameter names and state-dict keys stay as they are. :func:`unpatch` undoes it; a deep
    copy is a patched model of its own; a pickle comes back unpatched.

    Every call looks at the projections again. While q_proj or k_proj is anything but a plain
    ``nn.Linear`` (LoRA, quantised, sharded, with hooks), the model's own modules run, and only the
    rotation is ours.

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
        strict: raise, and change nothing, unless every attention reaches the level asked for.

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
    planner = _Planner(model, fuse_projection, precision, backend)
    plans = {
        name: planner.plan(name, module)
        for name, module in planner.modules.items()
        if "Attention" in type(module).__name__
    }
    if not plans:
        plans[""] = _Plan(
            None, f"{type(model).__name__} has no module of a class named *Attention*"
        )
    report = PatchReport(
        levels={name: plan.level for name, plan in plans.items()},
        reasons={name: plan.reason for name, plan in plans.items() if plan.reason},
    )
    wanted = 2 if fuse_projection else 0
    if strict and any(level is None or level < wanted for level in report.levels.values()):
        raise ValueError(f"strict asks for level {wanted} everywhere\n{report}")
    unpatch(model)
    for name, plan in plans.items():
        if plan.kind is not None:
            _change_class(planner.modules[name], plan.kind)
    return report


def unpatch(model):
    """Undo :func:`patch`: every attention of ``model`` runs its class's own forward again."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, Patched):
            _change_class(module, _plain_class(type(module)))


class Patched:
    """Comes before the class of an attention, in the class that a patched instance of it has.

    A class of its own, and not a method stored in the instance, is what survives a copy: replicas
    of nn.DataParallel and deep copies call their own forward, and no module refers to itself.
    """

    def __reduce_ex__(self, protocol):
        # A pickle names a class by where it is found, and ours is found nowhere: it takes the plain
        # module, in a form that the pickler does not check against the class of this one.
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return object.__new__, (_plain_class(type(self)),), *state

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def _patched_class(kind, forward):
    """The class ``kind``, under its name, with another forward."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(
        kind.__name__, (Patched, kind), names | {"__doc__": kind.__doc__, "forward": forward}
    )


def _plain_class(kind):
    """``kind`` without what :func:`_patched_class` did to it."""
    if not issubclass(kind, Patched):
        return kind
    if Patched in kind.__bases__:
        return kind.__bases__[1]
    # A class that was made on top of ours, as FSDP2 makes one: the same on top of the original.
    names = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, tuple(map(_plain_class, kind.__bases__)), names)


def _change_class(module, kind):
    """Make ``module`` a ``kind``, also where its class's forward was bound and kept.

    That is what accelerate's hooks do: they keep the forward they wrap in _old_forward, and taken
    off they leave it in forward.
    """
    old = type(module).forward
    module.__class__ = kind
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is old:
            module.__dict__[name] = MethodType(kind.forward, module)


def _has_own_forward(module):
    """Whether somebody replaced the forward of this instance; accelerate's hooks do not count."""
    held = module.__dict__
    name = "_old_forward" if "_hf_hook" in held and "_old_forward" in held else "forward"
    return name in held and getattr(held[name], "__func__", None) is not type(module).forward


class Refused(Exception):
    """A module cannot be patched at the level that is being tried; the message says why."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to be done with one module: the class to give it, None to leave it alone."""

    level: int | None
    reason: str = ""
    kind: type | None = None


class _Planner:
    """Decides for each attention of a model; layers alike share one look and one self-test."""

    def __init__(self, model, fuse, precision, backend):
        self.modules = dict(model.named_modules())
        self.fuse, self.precision, self.backend = fuse, precision, backend
        self.answers = {}

    def plan(self, name, module):
        """The _Plan of the attention ``module``, which the model knows as ``name``."""
        try:
            if _has_own_forward(module):
                raise Refused("its forward has been replaced on this instance")
            anatomy = self._once(examine, _plain_class(type(module)).forward)
            rotary = self._rotary(name)
        except (Refused, Unrecognised) as reason:
            return _Plan(None, str(reason))
        shortfall = ""
        if self.fuse:
            try:
                handler = self._fused(module, anatomy, rotary)
                kind = self._tested(module, anatomy, handler, rotary)
                obstacle = handler.obstacle(module)
                return _Plan(0 if obstacle else 2, obstacle or _weightless(module), kind)
            except Refused as reason:
                shortfall = str(reason)
        try:
            exact = self.precision == "exact"
            if exact and anatomy.positions == "None":
                raise Refused("its forward is given no position_ids")
            spec = self._once(_spec, rotary, self.precision) if exact else None
            handler = Handler(spec, self.precision, self.backend)
            kind = self._tested(module, anatomy, handler, rotary)
            return _Plan(0, shortfall or _weightless(module), kind)
        except Refused as reason:
            return _Plan(None, str(reason))

    def _once(self, function, *args):
        """``function(*args)``, or the reason it raised, computed once for these arguments."""
        key = function, args
        if key not in self.answers:
            try:
                self.answers[key] = function(*args)
            except (Refused, Unrecognised) as reason:
                self.answers[key] = reason
        if isinstance(self.answers[key], Exception):
            raise self.answers[key]
        return self.answers[key]

    def _rotary(self, name):
        """The module that makes the tables of the attention ``name``: the nearest rotary_emb."""
        parts = name.split(".")
        for depth in range(len(parts), -1, -1):
            owner = self.modules.get(".".join(parts[:depth]))
            rotary = getattr(owner, "rotary_emb", None)
            if isinstance(rotary, nn.Module):
                return rotary
        raise Refused("there is no rotary_emb above it")

    def _fused(self, module, anatomy, rotary):
        """The Handler that fuses the projections of ``module``."""
        if anatomy.obstacle:
            raise Refused(anatomy.obstacle)
        norms = tuple(p.norm for p in anatomy.projections if p.norm)
        if norms and self.precision == "hf":
            raise Refused("precision='hf' leaves QK-norm to the model's own modules")
        spec = self._once(_spec, rotary, self.precision)
        for norm in norms:
            weights = {n: tuple(p.shape) for n, p in getattr(module, norm).named_parameters()}
            if weights != {"weight": (spec.head_dim,)}:
                raise Refused(f"{norm} has not one weight for each dimension of a head")
        epsilons = {norm_eps(getattr(module, norm)) for norm in norms}
        if len(epsilons) > 1 or None in epsilons:
            raise Refused("the norms of q and k have no epsilon, or two")
        return Handler(
            spec,
            self.precision,
            self.backend,
            projections=tuple(p.module for p in anatomy.projections),
            norms=norms,
            norm_types=tuple(type(getattr(module, norm)) for norm in norms),
        )

    def _tested(self, module, anatomy, handler, rotary):
        """The class for ``module`` and its likes, or Refused if its forward computes otherwise."""
        # Modules are alike if their classes and the names and shapes of their parameters are.
        shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
        key = type(module), shapes, anatomy, handler, rotary
        if key not in self.answers:
            self.answers[key] = _test(module, anatomy, handler, rotary)
        if isinstance(self.answers[key], Refused):
            raise self.answers[key]
        for device in {p.device for p in module.parameters()}:
            if handler.spec is not None and device.type != "meta":
                warm(handler.spec, device)
        return self.answers[key]


def _test(module, anatomy, handler, rotary):
    """The class for modules like ``module``, or a Refused with the reason."""
    fuse = bool(handler.projections)
    try:
        difference = self_test(module, anatomy, handler, _fresh(rotary), fuse=fuse)
    except Refused as reason:
        return reason
    except Exception as error:  # other people's code, on weights that may be of any kind
        difference = f"{type(error).__name__}: {error}"
    if difference:
        return Refused(f"the self-test failed: {difference}")
    return _patched_class(_plain_class(type(module)), rewrite(anatomy, handler, fuse=fuse))


def _weightless(module):
    """A note for the report on modules whose own weights the self-test could not use."""
    meta = any(p.is_meta for p in module.parameters())
    return "self-tested with random weights, its own being on the meta device" if meta else ""


def _fresh(rotary):
    """A rotary module like ``rotary`` on the CPU, its tables newly made from its configuration."""
    try:
        with torch.device("cpu"):
            return type(rotary)(rotary.config)
    except Exception as error:
        raise Refused(f"its {type(rotary).__name__} cannot be made anew: {error}") from None


def _spec(rotary, precision):
    """The RopeSpec of the configuration of ``rotary``, if that is what its buffers hold."""
    fresh = _fresh(rotary)
    try:
        spec = RopeSpec.from_config(rotary.config)
        frequencies = spec.inv_freq(precision)
    except (TypeError, ValueError) as error:
        raise Refused(f"its configuration is refused: {error}") from None
    if spec.axes > 1 or spec.q_temperature is not None:
        raise Refused("positions with several axes and per-token factors on q are not patched")
    if spec.cache_class == "dynamic":
        raise Refused("dynamic scaling in transformers depends on the lengths of earlier calls")
    # Length-dependent frequencies are written over inv_freq, and come back from the original.
    name = "inv_freq" if spec.cache_class == "static" else "original_inv_freq"
    held, made = getattr(rotary, name, None), getattr(fresh, name, None)
    if not isinstance(held, torch.Tensor) or not isinstance(made, torch.Tensor):
        raise Refused(f"its {type(rotary).__name__} has no {name}")
    if held.device.type != "meta":
        held = held.detach().cpu().double()
        # A cast of the whole model rounds the buffers, which exact precision does not read, to 8
        # bits (bfloat16) or multiples of 2**-24 (float16). What is further off was meant to be.
        near = ((held - made.double()).abs() <= 2**-8 * made.abs() + 2**-24).all()
        same = torch.equal(held.float(), frequencies)
        if not (near if precision == "exact" else same):
            raise Refused(f"its {name} is not what its configuration says")
    scaling = "attention_scaling"
    if getattr(rotary, scaling, None) != getattr(fresh, scaling, None):
        raise Refused("its attention_scaling is not what its configuration says")
    return spec
