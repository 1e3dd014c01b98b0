"""What a patched attention calls: our operators, where its modules may be read, not run."""

import dataclasses
import functools
import warnings
import weakref

import torch
from torch import nn

from .. import ops
from ..api import qkv_rope
from ..distributed import is_sharded
from ..operands import Operands
from ..spec import RopeSpec
from .eligible import IMPURE, is_plain_linear, is_plain_norm
from .layouts import Site
from .parallel import is_column_parallel
from .rotary import are_tables, tag_of

_SEEN = weakref.WeakSet()  # attentions whose untagged tables were looked at
PROJECTION, NORM, ROTATION, TABLES = 2, 1, 0, None  # the levels; None: the model's own rotation


@dataclasses.dataclass(frozen=True)
class Norm:
    """An RMSNorm of q or k before the rotation: a child of the attention."""

    name: str
    kind: type
    eps: str  # its attribute with the epsilon
    plus_one: bool  # it multiplies by 1 + weight
    scope: str  # "head" | "all"

    def epsilon(self, module):
        return getattr(getattr(module, self.name), self.eps)

    def weight(self, module):
        weight = getattr(module, self.name).weight
        if not self.plus_one:
            return weight
        return 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))


@dataclasses.dataclass(frozen=True)
class Projections:
    """The linear layers of q, k and perhaps v: three of the attention's children, or one packed.

    names      of the children: (q, k, v or None), or (qkv,)
    rows       of a packed one: how many are q's, k's and v's, in this order
    head_dim, rotary_offset   of q and k as they leave the layers
    """

    names: tuple[str | None, ...]
    rows: tuple[int, ...]
    head_dim: int
    rotary_offset: int


@dataclasses.dataclass(frozen=True)
class Handler:
    """Pure data and no module, so that all layers alike, and all their copies, share one.

    precision, backend   as the public functions take them
    sites        the Site of each rotation in the forward; None where the model's own runs
    norms        of q and k, each may be None; () at level 0
    projections  None below level 2
    specs        {name of tables: (the spec for the projection, the spec of each site)}
    default      the tables that a call is for which cannot say so
    """

    precision: str
    backend: str
    sites: tuple[Site | None, ...]
    specs: dict[str, tuple[RopeSpec | None, tuple[RopeSpec | None, ...]]]
    default: str | None = None
    norms: tuple[Norm | None, ...] = ()
    projections: Projections | None = None

    def begin(self, module, tables, positions):
        """The Call that one forward of ``module`` makes.

        tables     its position_embeddings; False if its forward has no such argument
        positions  its position_ids, or None
        """
        if self.precision == "hf" and self.projections is None:
            return Call(self, module, TABLES, None, False)
        tag = tag_of(tables)
        told = self.told(tag)
        plain = tag is None and tables is not None and not isinstance(tables, dict)
        if plain and self.default is not None:
            # Text positions are all that a layer is given; with several axes they are not enough.
            one_axis = positions is not None and positions.dim() == 2
            one_axis = one_axis and self.axes(self.default) == 1
            if one_axis and (tables is False or self.are_ours(module, tables, positions)):
                told = self.default, positions
        level = TABLES if told is None else self.level(module)
        return Call(self, module, level, told, tag is not None)

    def told(self, tag):
        """(name of tables, position ids with all axes) from a tag; None without a usable one."""
        name, positions = (None, None) if tag is None else tag
        if name not in self.specs or positions is None:
            return None
        axes = self.axes(name)
        if axes > 1 and positions.dim() == 2:
            positions = positions.expand(axes, *positions.shape)
        fits = positions.dim() == 2 or (positions.dim() == 3 and positions.shape[0] == axes)
        return (name, positions) if fits and (axes > 1) == (positions.dim() == 3) else None

    def axes(self, name):
        return next(spec for spec in self.specs[name][1] if spec is not None).axes

    def are_ours(self, module, tables, positions):
        """Whether tables without a tag are those that ``module`` was patched for.

        Copies are (to another device, by a hook); those of a rotary module that somebody put in
        the place of the model's are not. One look at each attention has to do: on a GPU it waits.
        """
        if torch.compiler.is_compiling() or module in _SEEN:
            return True
        spec = next(spec for spec in self.specs[self.default][1] if spec is not None)
        parts = tables if isinstance(tables, tuple | list) else (tables,)
        if not all(isinstance(t, torch.Tensor) for t in parts):
            return False
        on_cpu = tuple(t.detach().cpu() for t in parts)
        made = on_cpu if isinstance(tables, tuple | list) else on_cpu[0]
        if not are_tables(made, spec, positions.cpu(), self.precision):
            return False
        _SEEN.add(module)
        return True

    @property
    def conjugate(self):
        return any([s is not None and s.conjugate for s in self.sites])  # noqa: C419 (Dynamo)

    def has_norm(self, name):
        return any([n is not None and n.name == name for n in self.norms])  # noqa: C419 (Dynamo)

    def level(self, module):
        """The level that ``module``, as it is now, is fit for."""
        if self.norms and self.norm_obstacle(module):
            return ROTATION
        if self.projections is None or self.projection_obstacle(module):
            return NORM if self.norms else ROTATION
        return PROJECTION

    def obstacle(self, module):
        """Why ``module``, as it is now, stays below the level that it is recognised for, or ""."""
        return self.norm_obstacle(module) or (
            self.projection_obstacle(module) if self.projections else ""
        )

    def norm_obstacle(self, module):
        for norm in self.norms:
            if norm is not None and not is_plain_norm(getattr(module, norm.name), norm.kind):
                return f"{norm.name} has {IMPURE}"
        epsilons = [n.epsilon(module) for n in self.norms if n is not None]
        if epsilons != epsilons[:1] * len(epsilons):
            return "the norms of q and k have different epsilons"
        return ""

    def projection_obstacle(self, module):
        for name in self.projections.names[:2]:
            child = getattr(module, name)
            if type(child) is not nn.Linear:
                kind = type(child)
                return f"{name} is a {kind.__module__}.{kind.__qualname__}, not a torch.nn.Linear"
            # A packed layer is cut into rows, which a shard of it has not.
            packed = bool(self.projections.rows)
            if not (is_plain_linear(child) or (is_column_parallel(child) and not packed)):
                return f"{name} has {IMPURE}"
        names = self.projections.names[:2]
        if len({is_sharded(getattr(module, name).weight) for name in names}) > 1:
            return "one of q and k is spread over ranks, the other is not"
        whole = any([n is not None and n.scope == "all" for n in self.norms])  # noqa: C419 (Dynamo)
        if whole and is_sharded(getattr(module, names[0]).weight):
            return "its norms are over all heads, of which each rank has some"
        return ""

    def rope(self, module, spec):
        """``spec``, and perhaps factors, as operands: those of ``module.rope_override`` go first.

        That is a dict, and how frequencies are changed without patching again (context/swap.py).
        """
        override = module.__dict__.get("rope_override", {})
        if "spec" in override:
            spec = _fitted(override["spec"], spec)
        return override | {"spec": spec}

    def project(self, module, x, name, positions):
        """{child: what it returns, except that q and k are normed and rotated}."""
        layers, spec = self.projections, self.specs[name][0]
        children = [getattr(module, n) if n else None for n in layers.names]
        if layers.rows:
            weights = children[0].weight.split(layers.rows)
            bias = children[0].bias
            biases = (None,) * 3 if bias is None else bias.split(layers.rows)
        else:
            alike = is_column_parallel if is_sharded(children[0].weight) else is_plain_linear
            if children[2] is not None and not alike(children[2]):
                children[2] = None
            weights = [None if c is None else c.weight for c in children]
            biases = [None if c is None else c.bias for c in children]
        norms = {}
        for letter, norm in zip("qk", self.norms, strict=False):
            if norm is not None:
                norms |= {"norm_eps": norm.epsilon(module), "norm_scope": norm.scope}
                norms[f"{letter}_norm_weight"] = norm.weight(module)
        results = qkv_rope(
            x,
            *weights,
            **self.rope(module, spec),
            positions=positions,
            **dict(zip(("q_bias", "k_bias", "v_bias"), biases, strict=True)),
            **norms,
            precision=self.precision,
            backend=self.backend,
        )
        flat = [None if t is None else t.flatten(-2) for t in results]
        if layers.rows:
            return {layers.names[0]: Packed(flat)}
        return {n: t for n, t in zip(layers.names, flat, strict=True) if t is not None}

    def norm_and_rotate(self, module, q, k, norms, site, spec, positions):
        """q and k, each with its norm or None, normed and rotated by one operator."""
        batch, seqlen = q.shape[0], q.shape[site.token_dim]
        rope = {"inv_freq": None, "attention_factor": None} | self.rope(module, spec)
        rest = {"cu_seqlens": None, "seq_lens": None, "q_scale": None, "positions": positions}
        operands = Operands(rope.pop("spec"), q, batch, seqlen, **rope, **rest)
        norm = next(n for n in norms if n is not None)
        weights = [None if n is None else n.weight(module) for n in norms]
        rotation = operands.rotation(
            q_norm=weights[0],
            k_norm=weights[1],
            norm_eps=norm.epsilon(module),
            norm_all=norm.scope == "all",
            conjugate=site.conjugate,
            layout=site.layout,
            backend=self.backend,
        )
        return site.sorted(*ops.rotate(q, k, rotation))


def forget(module):
    """``module`` is not patched any more."""
    _SEEN.discard(module)


class Packed:
    """What a packed projection returns, until it is cut: q, k and v, each on its own."""

    def __init__(self, parts):
        self.parts = parts

    def __getitem__(self, index):
        cut = index[-1]
        stop = sum(part.shape[-1] for part in self.parts) if cut.stop is None else cut.stop
        start = 0
        for part in self.parts:
            width = part.shape[-1]
            if start == (cut.start or 0) and stop == start + width and len(index) == 2:
                return part
            start += width
        raise RuntimeError(f"rope_fused: a packed projection was cut at {cut}, not where it joins")


class Call:
    """One call of a patched forward.

    told     (name of the tables, position ids), or None
    tagged   whether the tables themselves said so
    """

    def __init__(self, handler, module, level, told, tagged):
        self.handler, self.module, self.level = handler, module, level
        self.told, self.tagged = told, tagged
        self.source, self.ready = None, {}

    def run(self, name, *args, **kwargs):
        """Stands for ``self.NAME(...)``, NAME being a projection or a norm."""
        handler = self.handler
        if self.level == PROJECTION and name in handler.projections.names:
            if self.source is None:
                self.project(args[0])
            if name in self.ready:
                if args[0] is not self.source:
                    raise RuntimeError(f"rope_fused: {name} got another input than q's")
                return self.ready[name]
        elif self.level in (PROJECTION, NORM) and handler.has_norm(name):
            return args[0]
        return getattr(self.module, name)(*args, **kwargs)

    def project(self, x):
        """Make q, k and v of ``x`` ready, all but their shapes."""
        handler, (name, positions) = self.handler, self.told
        if x.dim() != 3 or x.shape[1] != positions.shape[-1]:
            self.level = ROTATION
            return
        if handler.conjugate:
            positions = -positions
        self.source = x
        self.ready = handler.project(self.module, x, name, positions)

    def rotate(self, at, function, *args, **kwargs):
        """Stands for the rotary ``function``, the ``at``-th of this forward."""
        handler, site = self.handler, self.handler.sites[at]
        if site is None:
            return function(*args, **kwargs)
        q, k = args[0], args[1] if site.two else None
        if self.level == PROJECTION:
            return (q, k) if site.two else q
        tables = site.tables_of(args, kwargs)
        if handler.precision == "hf":
            if not site.mixed and q.dtype != tables[0].dtype:
                return function(*args, **kwargs)
            q, k = site.rotate_by_tables(q, k, tables)
            return (q, k) if site.two else q
        tag = tag_of(tables)
        told = handler.told(tag) if tag is not None or self.tagged else self.told
        norms = (None, None)
        if self.level == NORM:
            first = sum([1 + s.two for s in handler.sites[:at] if s is not None])  # noqa: C419
            norms = (*handler.norms[first : first + 1 + site.two], None)[:2]
        if told is None or told[1].shape[-1] != q.shape[site.token_dim]:
            q, k = [_normed(self.module, n, t, site) for n, t in zip(norms, (q, k), strict=True)]
            if not torch.compiler.is_compiling():
                warnings.warn(
                    "an attention patched by rope_fused was called without the position_ids of its "
                    "tables, or with tables that are not those it was patched for: it rotated by "
                    "the tables it was given, in their precision",
                    stacklevel=3,
                )
            return function(*((q, k) if site.two else (q,)), *args[1 + site.two :], **kwargs)
        spec = handler.specs[told[0]][1][at]
        if norms == (None, None):
            rope = handler.rope(self.module, spec)
            q, k = site.rotate(q, k, told[1], handler.backend, **rope)
        else:
            q, k = handler.norm_and_rotate(self.module, q, k, norms, site, spec, told[1])
        return (q, k) if site.two else q


def _normed(module, norm, x, site):
    """``x`` through the module of ``norm``, which was passed by on the way to the rotation."""
    if norm is None:
        return x
    if norm.scope == "head":
        return getattr(module, norm.name)(x)
    x = x.movedim(site.token_dim, 1)
    y = getattr(module, norm.name)(x.flatten(-2)).unflatten(-1, x.shape[-2:])
    return y.movedim(1, site.token_dim)


@functools.lru_cache(maxsize=256)
def _fitted(spec, like):
    """The frequencies of ``spec`` for the heads of ``like``."""
    names = "head_dim", "rotary_offset", "interleaved", "q_temperature", "softmax_multiplier"
    return dataclasses.replace(spec, **{name: getattr(like, name) for name in names})
