"""The modules that make cos and sin: which RopeSpec each of their tables is, and at what positions.

transformers makes the tables once per forward and hands them to every layer; which positions they
are for, and which kind of layer, is known only where they are made. So a patched rotary module
leaves a tag on its tables, which goes wherever they go, the recomputation of a checkpoint included:
(name of the tables, position ids).
"""

import dataclasses
import functools
import inspect
import math

import torch
from torch import nn

from ..spec import RopeSpec
from .classes import has_own_forward, patched_class, plain_class

_TAG = "_rope_fused_tag"
ULP = 2.0**-24  # half a unit in the last place of a float32 in [1, 2)


class Refused(Exception):
    """A module cannot be patched at the level that is being tried; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """One kind of tables that a rotary module makes.

    name        says which, in the tags
    rotary      a module like it on the CPU, its buffers newly made from its configuration
    layer_type  what its forward is told besides the positions, or None
    spec        what the tables are; None, with the ``reason``, if that cannot be said
    """

    name: str
    rotary: nn.Module
    layer_type: str | None
    spec: RopeSpec | None
    reason: str = ""

    @property
    def axes(self):
        return 1 if self.spec is None else self.spec.axes

    def make(self, x, positions):
        """What the rotary module returns, for ``x`` (its dtype and device count)."""
        rest = () if self.layer_type is None else (self.layer_type,)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            made = self.rotary(x.cpu(), positions.cpu(), *rest)
        if isinstance(made, torch.Tensor):
            return made.to(x.device)
        return tuple(t.to(x.device) for t in made)

    def positions(self):
        """Position ids that start again and differ per row and axis: small ones, and large ones
        on both sides of the length where tables switch."""
        switch = None if self.spec is None else self.spec.switch_length
        for top in (6, 1000) if switch is None else (switch - 1, switch):
            # Both rows end up equally long: transformers chooses its tables by the batch, we by
            # row.
            rows = torch.tensor([[0, 1, 2, 0, 1, top, 3], [top, 5, 6, 4, 0, 2, 1]], device="cpu")
            rows = rows.clamp(max=top)
            yield rows if self.axes == 1 else torch.stack([rows, *(r * rows // 2 for r in (0, 1))])


def budget(positions):
    """How far float32 frequencies, angles, functions and norms may put an element off, as a share
    of the largest: 8 units of 2**-24 of a position in radians, and 8 more. A rotation keeps the
    length of a pair, which is below twice its larger member."""
    return 2 * ULP * (8 * positions.double().abs() + 8)


# -- tags ----------------------------------------------------------------------------------------


def tag_of(tables):
    """(name, position ids) of cos and sin, of either, or of a complex table; None if unknown, or
    if they were written to since."""
    first = tables[0] if isinstance(tables, tuple | list) and tables else tables
    tag = getattr(first, _TAG, None) if isinstance(first, torch.Tensor) else None
    if tag is None or (tag[2] is not None and _version(first) not in (tag[2], None)):
        return None
    return tag[:2]


def tagged(tables, name, positions):
    """``tables``, which from now on say what they are."""
    for table in tables if isinstance(tables, tuple | list) else (tables,):
        if isinstance(table, torch.Tensor):
            setattr(table, _TAG, (name, positions, _version(table)))
    return tables


def _version(t):
    """How often ``t`` was written to; None where that is not counted."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version


def tagging_class(rotary, name):
    """The class for a rotary module that tags its tables: by ``name``, and by their kind."""
    kind = plain_class(type(rotary))
    original = kind.forward

    def tag(made, position_ids, *args, **kwargs):
        layer_type = args[0] if args else kwargs.get("layer_type")
        # A copy: who keeps positions in a buffer may fill it anew before the backward pass.
        positions = None if position_ids is None else position_ids.clone()
        return tagged(made, table_name(name, layer_type), positions)

    def forward(self, x, position_ids=None, *args, **kwargs):
        return tag(original(self, x, position_ids, *args, **kwargs), position_ids, *args, **kwargs)

    forward.tag = tag  # for tables that somebody else makes in its place (context/swap.py)
    return patched_class(kind, functools.wraps(original)(forward))


def table_name(name, layer_type):
    return name if layer_type is None else f"{name}:{layer_type}"


# -- what tables are -----------------------------------------------------------------------------


def is_rotary(module):
    """Whether ``module`` makes tables from position ids."""
    if not isinstance(module, nn.Module) or "Rotary" not in type(module).__name__:
        return False
    names = [*inspect.signature(plain_class(type(module)).forward).parameters][1:]
    return names[1:2] == ["position_ids"] and names[2:] in ([], ["layer_type"])


def rotaries_in(owner):
    """{name: module} of the modules that make tables which ``owner`` holds, itself or in a dict."""
    found = {}
    for name, child in owner._modules.items():
        many = isinstance(child, nn.ModuleDict)
        held = {f"{name}.{n}": m for n, m in child.items()} if many else {name: child}
        found |= {n: m for n, m in held.items() if is_rotary(m)}
    return found


def read_tables(name, rotary, precision):
    """The Tables of every kind that the module ``rotary`` makes."""
    if has_own_forward(rotary):
        raise Refused(f"the forward of its {type(rotary).__name__} has been replaced")
    fresh = _fresh(rotary)
    kinds = [None]
    if "layer_type" in inspect.signature(plain_class(type(rotary)).forward).parameters:
        made = getattr(fresh, "layer_types", None) or getattr(rotary.config, "layer_types", None)
        kinds = sorted(kind for kind in {*(made or ())} if _buffers(fresh, kind)) or [None]
    found = []
    for kind in kinds:
        try:
            spec, reason = _spec(rotary, fresh, kind, precision), ""
        except Refused as refusal:
            spec, reason = None, str(refusal)
        found.append(Tables(table_name(name, kind), fresh, kind, spec, reason))
    return tuple(found)


def _fresh(rotary):
    """A rotary module like ``rotary`` on the CPU, its tables newly made from its configuration."""
    kind = plain_class(type(rotary))
    # OLMo-3 of transformers 4 tells the module of its sliding layers that they are not scaled.
    told = {"rope_type"} & {*inspect.signature(kind).parameters}
    try:
        with torch.device("cpu"):
            fresh = kind(rotary.config, **{name: getattr(rotary, name) for name in told})
    except Exception as error:
        raise Refused(f"its {type(rotary).__name__} cannot be made anew: {error}") from None
    if any(
        buffer.is_meta for buffer in fresh.buffers()
    ):  # init_empty_weights(include_buffers=True)
        raise Refused("buffers of new modules are put on the meta device here: patch elsewhere")
    return fresh


def _buffers(rotary, kind):
    """{name: value} of the tensors and numbers that ``rotary`` makes tables from."""
    held = {**vars(rotary), **dict(rotary.named_buffers())}
    prefix = "" if kind is None else f"{kind}_"
    return {
        name: value
        for name, value in held.items()
        if name.startswith(prefix) and name.endswith(("inv_freq", "attention_scaling"))
    }


def _spec(rotary, fresh, kind, precision):
    """The RopeSpec of the tables of ``kind``, which is the one that gives their numbers."""
    problem, specs = "", []
    for candidate in _candidates(rotary.config, kind, fresh):
        try:
            specs.append(candidate())
        except (TypeError, ValueError, KeyError) as error:
            problem = problem or str(error)
    if any(spec.cache_class == "dynamic" for spec in specs):
        raise Refused("dynamic scaling in transformers depends on the lengths of earlier calls")
    spec = next((spec for spec in specs if _reproduces(spec, fresh, kind, precision)), None)
    if spec is None and specs:
        raise Refused(f"its configuration does not mean the tables of its {type(rotary).__name__}")
    if spec is None:
        raise Refused(f"the configuration of its {type(rotary).__name__} is refused: {problem}")
    _check_buffers(rotary, fresh, kind, spec, precision)
    return dataclasses.replace(spec, q_temperature=None, softmax_multiplier=1.0)


def _candidates(config, kind, fresh):
    """Functions that read ``config``, from the most to the least of what is known about it."""
    yield lambda: RopeSpec.from_config(config, kind)
    kinds = [kind] if kind else [*dict.fromkeys(getattr(config, "layer_types", None) or ())]
    if kind is None:  # layers that do not rotate are none of the kinds that make tables
        for one in kinds or ("chunked_attention", "sliding_attention", "full_attention"):
            yield lambda one=one: RopeSpec.from_config(config, one)
    # A family nobody has told us about: its rotary block, and as many dimensions as it has tables.
    read = config.to_dict()
    block = dict(read.get("rope_parameters") or read.get("rope_scaling") or {})
    if kind and isinstance(block.get(kind), dict):
        block = dict(block[kind])
    if block.get("rope_type") != "proportional":  # whose tables are as wide as the head
        block.pop("partial_rotary_factor", None)
    widths = [len(v) for v in _buffers(fresh, kind).values() if isinstance(v, torch.Tensor)]
    keys = ("rope_theta", "max_position_embeddings", "original_max_position_embeddings")
    plain = {key: read[key] for key in keys if read.get(key) is not None}
    plain |= {"head_dim": 2 * widths[0] if widths else 0, "rope_parameters": block}
    told = {"interleaved": False, "rotary_offset": 0}
    yield lambda: RopeSpec.from_config(plain, axes=1, **told)
    if block.get("mrope_section"):
        for alternating in (False, True):
            block = block | {"mrope_interleaved": alternating}
            axes = len(block["mrope_section"])
            read = plain | {"rope_parameters": block}
            yield lambda read=read, axes=axes: RopeSpec.from_config(read, axes=axes, **told)


def _reproduces(spec, fresh, kind, precision):
    """Whether the tables of ``fresh`` are those of ``spec``, within what rounding explains."""
    tables = Tables("", fresh, kind, spec)
    if spec.rope_type == "none" or (spec.axes == 1) == _takes_axes(tables):
        return False
    for positions in tables.positions():
        try:
            made = tables.make(torch.empty(0, dtype=torch.float64), positions)
        except Exception:  # a wrong guess at the axes may not even fit
            return False
        if not are_tables(made, spec, positions, precision):
            return False
    return True


def are_tables(made, spec, positions, precision):
    """Whether ``made``, cos and sin or a complex table, are those of ``spec`` at ``positions``,
    within what rounding explains; on the CPU."""
    made = (made.real, made.imag) if isinstance(made, torch.Tensor) else made
    one_axis = positions if spec.axes == 1 else positions.amax(0)
    # Some leave it to the rotation to choose among the tables of the axes (mrope_section).
    apart = spec.axes > 1 and made[0].dim() == 4
    axes = [p.expand_as(positions) for p in positions] if apart else [positions]
    try:
        each = [spec.cos_sin(p, torch.float64, precision) for p in axes]
    except ValueError:
        return False
    expected = [torch.stack(t) for t in zip(*each, strict=True)] if apart else each[0]
    length = int(one_axis.max()) + 1
    index = int(spec.switch_length is not None and length > spec.switch_length)
    scale = spec.scale_rows(precision)[index]
    for table, truth in zip(made, expected, strict=True):
        pairs = truth.shape[-1]
        if table.shape[:-1] != truth.shape[:-1] or table.shape[-1] not in (pairs, 2 * pairs):
            return False
        limit = (budget(one_axis)[..., None] + torch.finfo(table.dtype).eps) * scale
        ways = [table] if table.shape[-1] == pairs else [table[..., :pairs], table[..., ::2]]
        if not any(((t.double() - scale * truth).abs() <= limit).all() for t in ways):
            return False
    return True


def _takes_axes(tables):
    """Whether the rotary module makes tables of positions on three axes: one, or three."""

    def made_for(*shape):
        rows = torch.arange(math.prod(shape), device="cpu").view(shape)
        try:
            made = tables.make(torch.empty(0, dtype=torch.float64), rows)
        except Exception:
            return None
        return (made if isinstance(made, torch.Tensor) else made[0]).shape[:-1]

    # One that multiplies whatever it is given by its frequencies makes three as well.
    made = made_for(3, 2, 7)
    return made == (2, 7) or (made == (3, 2, 7) and made_for(2, 7) is None)


def _check_buffers(rotary, fresh, kind, spec, precision):
    """Raise Refused if somebody changed the tables of ``rotary`` after they were made."""
    held, made = _buffers(rotary, kind), _buffers(fresh, kind)
    for name, value in made.items():
        ours = held.get(name)
        if not isinstance(value, torch.Tensor):
            if ours != value:
                raise Refused(f"its {name} is not what its configuration says")
            continue
        # Length-dependent frequencies are written over inv_freq, and come back from the original.
        if spec.cache_class != "static" and "original" not in name:
            continue
        if not isinstance(ours, torch.Tensor):
            raise Refused(f"its {type(rotary).__name__} has no {name}")
        if ours.device.type == "meta":
            continue
        # A cast of the whole model rounds the buffers, which exact precision does not read, to 8
        # bits (bfloat16) or multiples of 2**-24 (float16). What is further off was meant to be.
        ours, value = ours.detach().cpu().double(), value.double()
        near = ours.shape == value.shape and bool(
            ((ours - value).abs() <= 2**-8 * value.abs() + 2**-24).all()
        )
        if not (near if precision == "exact" else torch.equal(ours.float(), value.float())):
            raise Refused(f"its {name} is not what its configuration says")
