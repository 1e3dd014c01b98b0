"""Run an attention's forward on a twin, watch where q and k come from, and decide what to fuse.

What stands between a projection and a rotation is not read but seen: the tensor that is rotated is,
memory for memory, the tensor that a linear layer returned (or a norm, whose input a linear layer
returned), unchanged, cut into heads. Anything else that was done to it shows as other memory, or as
a newer version of it.
"""

import collections
import dataclasses
import inspect

import torch
from torch import nn

from .handler import Norm, Projections
from .rotary import Refused, tagged
from .source import rewrite
from .twin import is_linear


@dataclasses.dataclass
class Run:
    """``self.name(x)``, an nn.Module, was run; version: of ``output`` when it was returned."""

    name: str
    module: nn.Module
    x: torch.Tensor
    x_version: int
    output: torch.Tensor
    version: int


@dataclasses.dataclass
class Turn:
    """A rotary function was called."""

    site: int
    function: object
    args: tuple
    kwargs: dict
    result: object
    versions: tuple


class Watch:
    """The handler that runs a forward as it is, and writes down what it does."""

    def __init__(self):
        self.runs, self.turns = [], []

    def begin(self, module, tables, positions):
        self.module = module
        return self

    def run(self, name, *args, **kwargs):
        child = getattr(self.module, name)
        output = child(*args, **kwargs)
        usual = len(args) == 1 and not kwargs and isinstance(child, nn.Module)
        if usual and all(isinstance(t, torch.Tensor) for t in (args[0], output)):
            x = args[0]
            self.runs.append(Run(name, child, x, x._version, output, output._version))
        return output

    def rotate(self, at, function, *args, **kwargs):
        versions = tuple(t._version for t in args[:2] if isinstance(t, torch.Tensor))
        result = function(*args, **kwargs)
        self.turns.append(Turn(at, function, args, kwargs, result, versions))
        return result


def watch(source, twin, x, kind, kinds, positions):
    """The Watch of a run of the forward up to its last rotation."""
    seen = Watch()
    args, kwargs = arguments(source, twin, x, kind, kinds, positions)
    rewrite(source, seen, None, probe=True)(twin, *args, **kwargs)
    return seen


def arguments(source, twin, x, kind, kinds, positions):
    """The arguments, after self, for the forward of ``source``: by its parameters' names.

    kind, kinds   the Tables that it is to get, out of those that there are
    """
    here = positions.to(x.device)

    def tables(kind):
        return tagged(kind.make(x, positions), kind.name, here)

    by_type = {k.layer_type: tables(k) for k in kinds} if source.by_type else None
    known = {"position_embeddings": by_type or tables(kind), "position_ids": here}
    known |= {"layer_idx": getattr(twin, "layer_idx", 0)}
    # Keys and values of another layer, which the rest of the forward would use.
    known["shared_kv_states"] = collections.defaultdict(lambda: (x[:, None], x[:, None]))
    given = {}
    parameters = [*inspect.signature(source.function).parameters.values()][2:]
    for p in parameters:
        if p.kind is p.VAR_KEYWORD:
            given.setdefault("position_ids", here)
        elif p.name in known:
            given[p.name] = known[p.name]
        elif p.default is p.empty and p.kind is not p.VAR_POSITIONAL:
            given[p.name] = None
    return (x,), given


# -- where q and k come from ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a rotated tensor comes from: a norm or not, and a linear layer."""

    linear: Run
    norm: Norm | None
    row: int  # of the linear layer's output, where the tensor's first head starts
    head_dim: int
    heads: int
    offset: int  # in a head, where the part begins that the rotary function is given


def heads_of(turns, sites):
    """The tensors that are rotated, as their calls stand in the source, and their Sites."""
    found = []
    for turn in sorted(turns, key=lambda turn: turn.site):
        site = sites[turn.site]
        if site is None:
            raise Refused("its rotations are not all of a known form")
        found += [(t, site) for t in turn.args[: 1 + site.two]]
    if len(found) > 2:
        raise Refused(f"its forward rotates {len(found)} tensors")
    return found


def find_norms(seen, heads):
    """The Norm of each of ``heads`` right before its rotation, or None; Refused without any."""
    norms = []
    for t, site in heads:
        run = _producer(seen, t)
        norm = None if run is None or is_linear(run.module) else _norm(run, t, site)
        norms.append(norm)
    present = [n for n in norms if n is not None]
    if not present:
        raise Refused("it has no norm of a known form right before its rotation")
    _check_alike(seen.module, present)
    return tuple(norms)


def find_projections(seen, heads):
    """(Projections, norms) of q and k; raises Refused."""
    if len(heads) < 2:
        raise Refused("it rotates q alone: k comes from another layer")
    q, k = (_origin(seen, name, t, site) for name, (t, site) in zip("qk", heads, strict=True))
    if q.linear.x is not k.linear.x or q.linear.x_version != k.linear.x_version:
        raise Refused("its q and k are projected from different tensors")
    if (q.head_dim, q.offset) != (k.head_dim, k.offset):
        raise Refused("the heads of its q and k differ")
    norms = (q.norm, k.norm)
    present = [n for n in norms if n is not None]
    _check_alike(seen.module, present)
    site = heads[0][1]
    offset = q.offset + site.rotary_offset
    names, rows = _layers(seen, q, k)
    if site.halves:
        raise Refused("its rotation changes the order of the dimensions")
    return Projections(names, rows, q.head_dim, offset), norms if present else ()


def _layers(seen, q, k):
    """(names of the children, rows of a packed one)."""
    sizes = [o.head_dim * o.heads for o in (q, k)]
    if q.linear is k.linear:
        rest = q.linear.output.shape[-1] - sum(sizes)
        if (q.row, k.row) != (0, sizes[0]) or rest <= 0 or rest % q.head_dim:
            raise Refused(f"{q.linear.name} does not hold q, k and v one behind the other")
        if q.norm is not None or q.offset:
            raise Refused(f"q is cut out of {q.linear.name} and normed or cut again")
        return (q.linear.name,), (*sizes, rest)
    for o, size in zip((q, k), sizes, strict=True):
        if o.row or o.linear.output.shape[-1] != size:
            raise Refused(f"{o.linear.name} projects to more than the heads that are rotated")
    old, new = ("key", "value") if "key" in k.linear.name else ("k", "v")
    wanted = k.linear.name.replace(old, new, 1)
    value = None
    for run in seen.runs:
        same = run.x is q.linear.x and run.x_version == q.linear.x_version
        if same and run.name == wanted and is_linear(run.module):
            value = None if run.output.shape[-1] % q.head_dim else wanted
    return (q.linear.name, k.linear.name, value), ()


def _producer(seen, t):
    """The first Run whose output is the memory of ``t``, if nothing was written there since."""
    for run in seen.runs:
        if run.output.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
            return run if run.version == run.output._version else None
    return None


def _origin(seen, name, t, site):
    """The Origin of ``t``, which is rotated as ``name``."""
    run, norm = _producer(seen, t), None
    if run is not None and not is_linear(run.module):
        norm = _norm(run, t, site)
        if norm is None:
            raise Refused(f"{run.name}, before the rotation, is no RMSNorm over a head or over all")
        t, run = run.x, _producer(seen, run.x)
    if run is None or not is_linear(run.module):
        raise Refused(f"its {name} is not what a linear layer returned, or is changed on the way")
    out = run.output
    if norm is not None and norm.scope == "all":
        head_dim = site.head_dim
        whole = t.shape == out.shape
    else:
        # Memory of a linear layer's output is [batch, tokens, features], heads are features.
        tokens = t.dim() - 2 if t.dim() == 3 else site.token_dim
        others = [d for d in range(1, t.dim() - 1) if d != tokens]
        if norm is not None and t.dim() == 4:  # before or after the transposition
            others = [d for d in (1, 2) if t.stride(d) != out.stride(-2)] or [2]
        whole = t.dim() == 4 and t.stride(-1) == 1 and out.is_contiguous()
        heads = t.shape[others[0]] if others else 1
        head_dim = t.stride(others[0]) if others and heads > 1 else t.shape[-1]
    if not whole or head_dim <= 0:
        raise Refused(f"its {name} is not cut into heads as the features of {run.name} are")
    heads = out.shape[-1] // head_dim if norm is not None and norm.scope == "all" else heads
    start = t.storage_offset() - out.storage_offset()
    offset = start % head_dim if t.shape[-1] < head_dim else 0
    if norm is not None and norm.scope == "head" and t.shape[-1] != head_dim:
        raise Refused(f"{run.name} has more than the dimensions of {name} that are normed")
    return Origin(run, norm, start - offset, head_dim, heads, offset)


# -- norms ----------------------------------------------------------------------------------------


def _norm(run, t, site):
    """The Norm that ``run`` was, if it is an RMSNorm before the rotation of ``t``; or None."""
    norm, width = run.module, run.x.shape[-1]
    if run.output.shape != run.x.shape or t.shape[-1] != site.head_dim:
        return None
    if [n for n, _ in norm.named_parameters()] != ["weight"] or norm.weight.shape != (width,):
        return None
    heads = t.shape[3 - site.token_dim]
    if width == site.head_dim and run.x.dim() == 4:
        scope = "head"
    elif width == site.head_dim * heads and run.x.dim() == 3:
        scope = "all"
    else:
        return None
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        eps = getattr(norm, name, None)
        for plus_one in (False, True):
            if isinstance(eps, float) and _computes(norm, run.x, eps, plus_one):
                return Norm(run.name, type(norm), name, plus_one, scope)
    return None


def _check_alike(module, norms):
    if len({(n.epsilon(module), n.scope) for n in norms}) > 1:
        raise Refused("the norms of q and k differ")


def _computes(norm, x, eps, plus_one):
    """Whether ``norm`` computes x / sqrt(mean(x**2) + eps) * weight, or 1 + weight; in float32."""
    weight = norm.weight.double() + plus_one
    for scale in (1.0, 1e-3):  # small numbers show the epsilon
        given = (scale * x).double()
        expected = given * torch.rsqrt(given.square().mean(-1, keepdim=True) + eps) * weight
        got = norm(scale * x)
        if not torch.allclose(got.double(), expected, rtol=2e-6, atol=2e-6 * expected.abs().max()):
            return False
    return True
