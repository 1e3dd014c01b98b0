"""Decides, for each attention of a model, what can be done with it; why not more, in words."""

import dataclasses
import inspect

import torch

from ..operands import warm
from . import layouts
from .classes import has_own_forward, patched_class, plain_class
from .handler import Handler
from .parallel import in_forward
from .recognise import find_norms, find_projections, heads_of, watch
from .rotary import Refused, read_tables, rotaries_in, tagging_class
from .selftest import self_test
from .source import Unrecognised, read, rewrite
from .twin import Numbers, home, is_linear, twin_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done with one attention: the class to give it, None to leave it alone.

    still    it does not rotate, so that there is nothing to do
    rotaries {name: class} for the modules that make its tables
    layout   how its heads are rotated, in words
    """

    level: int | None
    reason: str = ""
    kind: type | None = None
    still: bool = False
    rotaries: dict[str, type] = dataclasses.field(default_factory=dict)
    layout: str = ""


_STILL = Plan(None, "this layer does not rotate (NoPE)", still=True)


class Planner:
    """The Plans of one model; layers alike share one look and one self-test."""

    def __init__(self, model, fuse, precision, backend):
        self.modules = dict(model.named_modules())
        self.fuse, self.precision, self.backend = fuse, precision, backend
        self.answers = {}

    def plan(self, name, module):
        """The Plan of the attention ``module``, which the model knows as ``name``."""
        try:
            if has_own_forward(module):
                raise Refused("its forward has been replaced on this instance")
            source = self._once(read, plain_class(type(module)).forward)
            names, kinds = self._rotaries(name, source)
            # Modules are alike if the names and shapes of their parameters are, and the classes and
            # attributes of them and of their children: what their forward may decide by.
            shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
            key = shapes, _traits(module), _given(module, kinds)
            if key not in self.answers:
                self.answers[key] = self._examined(module, source, kinds)
            answer = self.answers[key]
            if isinstance(answer, Refused):
                raise answer
        except (Refused, Unrecognised) as reason:
            return Plan(None, str(reason))
        if isinstance(answer, Plan):
            return answer
        plan, handler = answer
        there = in_forward(name, self.modules)
        obstacle = handler.obstacle(there)
        level = handler.level(there) if obstacle else plan.level
        for device in {p.device for p in module.parameters() if p.device.type != "meta"}:
            for spec in {s for one, many in handler.specs.values() for s in (one, *many) if s}:
                warm(spec, device)
        rotaries = {} if not handler.specs else {n: self.modules[n] for n in names}
        return dataclasses.replace(
            plan,
            level=level,
            reason="; ".join(filter(None, (plan.reason, obstacle, _weightless(module)))),
            rotaries={n: self._once(tagging_class, m, n) for n, m in rotaries.items()},
        )

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

    def _rotaries(self, name, source):
        """(names, Tables) of the rotary modules of the attention ``name``: the nearest above it.

        Its own come last if it is given tables: some have one that they do not use.
        """
        parts = name.split(".") if name else []
        depths = [*range(len(parts), -1, -1)]
        if "position_embeddings" in inspect.signature(source.function).parameters:
            depths = [*depths[1:], depths[0]]
        for depth in depths:
            path = ".".join(parts[:depth])
            owner = self.modules.get(path)
            children = rotaries_in(owner) if owner is not None else {}
            found = {f"{path}.{n}".lstrip("."): m for n, m in children.items()}
            if found:
                kinds = (self._once(read_tables, n, m, self.precision) for n, m in found.items())
                return [*found], tuple(kind for each in kinds for kind in each)
        raise Refused("there is no rotary module with a known form above it")

    def _examined(self, module, source, kinds):
        """(Plan, Handler) of modules like ``module``; a Plan alone or a Refused."""
        try:
            return _Examination(self, module, source, kinds).result()
        except Refused as reason:
            return reason
        except Exception as error:  # other people's code, on weights that may be of any kind
            return Refused(f"its forward cannot be tried: {type(error).__name__}: {error}")


class _Examination:
    """One attention, looked at from the highest level down."""

    def __init__(self, planner, module, source, kinds):
        self.planner, self.module, self.source = planner, module, source
        self.precision = planner.precision
        if self.precision == "exact" and all(kind.spec is None for kind in kinds):
            raise Refused(kinds[0].reason)
        self.kinds = [k for k in kinds if k.spec is not None or self.precision == "hf"]
        self.default = _given(module, kinds)
        numbers = Numbers(home(module))
        # A method of the module may read more of its children than the statements of forward do.
        methods = any(hasattr(type(module), name) for name in source.children)
        self.twin = twin_of(module, numbers, None if methods else source.children)
        self.x = numbers(2, 7, _width(module, self.twin))

    def result(self):
        """(Plan, Handler) at the highest level that is right; a Plan alone of what is still."""
        with torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
            if self.default == "":
                return _STILL
            kind, positions, seen = self._watched()
            if not seen.turns:
                return _STILL
            if len({turn.site for turn in seen.turns}) < len(seen.turns):
                raise Refused("its forward rotates in a loop")
            sites = self._sites(seen, kind, positions)
            shortfall = ""
            if self.planner.fuse:
                for level, recognised in ((2, self._fused), (1, self._normed)):
                    try:
                        norms, layers = recognised(seen, sites)
                        return self._tested(level, sites, shortfall, norms, layers)
                    except Refused as reason:
                        shortfall = shortfall or str(reason)
            return self._tested(0, sites, shortfall)

    def _watched(self):
        """(Tables, positions, Watch) of a run; tables that the forward cannot run with go."""
        seen, failure = {}, None
        for kind in self.kinds:
            positions = next(kind.positions())
            try:
                run = watch(self.source, self.twin, self.x, kind, self.kinds, positions)
                seen[kind.name] = kind, positions, run
            except Exception as error:  # heads may be of another width than another layer's tables
                failure = failure or error
        if not seen:
            raise failure
        self.kinds = [kind for kind, _, _ in seen.values()]
        return seen.get(self.default) or next(iter(seen.values()))

    def _sites(self, seen, kind, positions):
        """The Site of each rotation that the forward may come by, None where it did not."""
        sites = [None] * self.source.sites
        spec = {"spec": kind.spec, "positions": positions} if self.precision == "exact" else {}
        for turn in seen.turns:
            what = turn.function, turn.args, turn.kwargs, turn.result
            sites[turn.site] = layouts.find(*what, **spec)
        return tuple(sites)

    def _fused(self, seen, sites):
        """(norms, Projections) of level 2."""
        if self.source.varying:
            raise Refused(f"its forward goes different ways: {self.source.varying}")
        layers, norms = find_projections(seen, heads_of(seen.turns, sites))
        for name in layers.names[:2]:
            if name in self.source.optional:
                raise Refused(f"{name} runs or not by {self.source.optional[name]}")
        if norms and self.precision == "hf":
            raise Refused("precision='hf' leaves QK-norm to the model's own modules")
        if self.precision == "hf" and any(k.spec is None for k in self.kinds):
            raise Refused(next(k.reason for k in self.kinds if k.spec is None))
        switching = any(k.spec.switch_length is not None for k in self.kinds)
        if switching and any(s.conjugate for s in sites if s is not None):
            raise Refused("it turns by the opposite angle, with tables that switch")
        return norms, layers

    def _normed(self, seen, sites):
        """(norms, None) of level 1."""
        if self.precision == "hf":
            raise Refused("precision='hf' leaves QK-norm to the model's own modules")
        if self.source.varying:
            raise Refused(f"its forward goes different ways: {self.source.varying}")
        return find_norms(seen, heads_of(seen.turns, sites)), None

    def _tested(self, level, sites, shortfall, norms=(), layers=None):
        """(Plan, Handler) of a level, or Refused if the forward then computes otherwise."""
        specs = {}
        if self.precision == "exact" or layers is not None:
            for kind in self.kinds:
                if fits := _fits(kind.spec, sites, layers):
                    specs[kind.name] = fits
        handler = Handler(
            self.precision,
            "auto",  # which backend runs on which device is not the question of the test
            sites,
            specs,
            self.default if self.default in specs else None,
            norms,
            layers,
        )
        names = {n.name for n in norms if n is not None} | set(layers.names if layers else ())
        kinds = [k for k in self.kinds if not specs or k.name in specs]
        test = self.source, self.twin, handler, names, kinds, self.x
        if difference := self_test(*test):
            raise Refused(f"the self-test failed: {difference}")
        handler = dataclasses.replace(handler, backend=self.planner.backend)
        kind = patched_class(
            plain_class(type(self.module)), rewrite(self.source, handler, names - {None})
        )
        layout = next(s for s in sites if s is not None).words(layers, kinds[0].spec)
        return Plan(level, shortfall, kind, layout=layout), handler


def _fits(spec, sites, layers):
    """(``spec`` for the projection, and for each site); None if the heads are not of its width."""
    try:
        fits = tuple(None if s is None else s.fit(spec) for s in sites)
        if layers is None:
            return None, fits
        first = next(s for s in sites if s is not None)
        whole = {"head_dim": layers.head_dim, "rotary_offset": layers.rotary_offset}
        return dataclasses.replace(first, **whole).fit(spec), fits
    except ValueError:
        return None


def _traits(module):
    """The classes and attributes of a module and of what is in it."""
    other = ("training", "layer_idx", "layer_id", "forward")
    return tuple(
        (name, plain_class(type(part)))
        + tuple(
            (k, _frozen(v))
            for k, v in sorted(vars(part).items())
            if not k.startswith("_") and k not in other
        )
        for name, part in module.named_modules()
    )


def _frozen(value):
    """``value``, or what stands for it where values are compared: objects are themselves alone."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((_frozen(k), _frozen(v)) for k, v in value.items())
    return id(value)


def _given(module, kinds):
    """The name of the tables that ``module`` is for; "" if it is for none, None if unknown."""
    if len(kinds) == 1 and kinds[0].layer_type is None:
        return kinds[0].name
    held = vars(module)
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    names = ("rope_layer_type", "layer_type", "attention_type")
    layer_type = next((held[n] for n in names if n in held), None)
    index = held.get("layer_idx")
    if layer_type is None and isinstance(index, int) and index < len(types):
        layer_type = types[index]
    same_words = any(kind.layer_type in types for kind in kinds)
    unrotated = "" if same_words and layer_type in types else None
    names = [kind.name for kind in kinds if kind.layer_type == layer_type]
    return names[0] if len(names) == 1 else unrotated


def _width(module, twin):
    """The width of the hidden states that ``module`` takes."""
    config = getattr(module, "config", None)
    for child in twin._modules.values():
        if child is not None and is_linear(child):
            return child.in_features
    return config.hidden_size


def _weightless(module):
    """A note for the report on modules whose own weights the self-test could not use."""
    meta = any(p.is_meta for p in module.parameters())
    return "self-tested with random weights, its own being on the meta device" if meta else ""
