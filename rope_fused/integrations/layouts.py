"""What a family's rotary function does with its arguments: found by running it, not by its name.

Families share a few layouts under many signatures: heads before tokens or after, pairs half-split
or interleaved, a slice of the head at its beginning or end, tables as wide as the slice or half of
it or complex, arithmetic in float32 or in the type of the input, the angle of either sign, the
result in the order of the input or sorted into halves. The layout of a call is the one whose result
is the function's own: within the rounding of transformers' tables, or bit for bit by these.
"""

import dataclasses
import inspect
import itertools

import torch

from .. import function as autograd
from .. import ops
from ..api import apply_rope
from ..composite import bshd
from .rotary import Refused, budget

_TABLES = (("cos", "sin"), ("freqs_cis",))


@dataclasses.dataclass(frozen=True)
class Site:
    """How one call of a rotary function is written, and what it does.

    tables       where its tables are: an index among the positional arguments, or a keyword
    two          whether it takes q and k, or one of them
    layout       of q and k: "bhsd" or "bshd"
    head_dim     of q and k
    interleaved, rotary_offset, conjugate   as elsewhere in this package; conjugate: by -t
    halves       interleaved pairs come out half-split
    entries      the tables have one for each of the "dimensions" or "pairs", or for the dimensions
                 of half-split pairs, whatever the pairs are ("halves")
    round_inputs, round_tables, round_back   q and k go to float32 first, cos and sin do, the
                 result goes back to the type of the input (these for "hf" only)
    apart        each of the two products rounds its inputs, and their gradients, on its own
    contiguous   the result is contiguous where it would take over the strides of q and k
    mixed        its bits are the function's also with tables of another type than q and k
    """

    tables: tuple[int | str, ...]
    two: bool
    layout: str
    head_dim: int
    interleaved: bool = False
    rotary_offset: int = 0
    conjugate: bool = False
    halves: bool = False
    entries: str = "dimensions"
    round_inputs: bool = False
    round_tables: bool = False
    round_back: bool = False
    apart: bool = False
    contiguous: bool = False
    mixed: bool = True

    @property
    def token_dim(self):
        return 2 if self.layout == "bhsd" else 1

    def fit(self, spec):
        """``spec`` for the heads of this call."""
        return dataclasses.replace(
            spec,
            head_dim=self.head_dim,
            rotary_offset=self.rotary_offset,
            interleaved=self.interleaved,
        )

    def words(self, layers, spec):
        """The layout for people: pairs, how much of a head, which part; ``spec`` may be None."""
        head, offset = self.head_dim, self.rotary_offset
        if layers is not None:
            head, offset = layers.head_dim, layers.rotary_offset
        words = ["interleaved" if self.interleaved else "half-split"]
        if spec is not None and spec.rotary_dim < head:
            words.append(f"{spec.rotary_dim} of {head}" + (f" from {offset}" if offset else ""))
        words += ["sorted into halves"] * self.halves + ["by the opposite angle"] * self.conjugate
        if spec is not None and spec.axes > 1:
            words.append(f"{spec.axes} position axes")
        return ", ".join(words)

    def tables_of(self, args, kwargs):
        return tuple(args[at] if isinstance(at, int) else kwargs[at] for at in self.tables)

    def rotate(self, q, k, positions, backend, **rope):
        """q and k in exact precision; ``rope``: a spec that fits, and perhaps factors."""
        options = {"layout": self.layout, "conjugate": self.conjugate, "backend": backend}
        return self.sorted(*apply_rope(q, k, positions=positions, **options, **rope))

    def rotate_by_tables(self, q, k, tables):
        """q and k by the model's own tables, with its roundings."""
        cos, sin = (tables[0].real, tables[0].imag) if len(tables) == 1 else tables
        if self.entries == "halves":
            cos, sin = (t[..., : t.shape[-1] // 2] for t in (cos, sin))
        if self.entries != "dimensions" and self.interleaved:
            cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
        elif self.entries != "dimensions":
            cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
        # What comes before the rotation may sum its gradient over tokens (a norm does, for its
        # weight), and torch sums in the order of memory: the bits depend on the strides.
        before = q.dtype
        q, k = (None if t is None else autograd.applied(_EagerStrides)(t) for t in (q, k))
        if self.round_tables:
            cos, sin = cos.float(), sin.float()
        given = torch.float32 if self.round_inputs else before
        dtype = torch.promote_types(given, cos.dtype)
        cos, sin = cos.to(dtype), sin.to(dtype)

        def turn(cos, sin):
            pair = (None if t is None else t.to(given).to(dtype) for t in (shared or (q, k)))
            constants = self.interleaved, self.rotary_offset, self.conjugate, self.layout, "auto"
            return ops.rotate_tables(*pair, cos, sin, *constants)

        shared = None
        if self.apart or dtype != given:
            # Two products of other types than their inputs: each rounds its gradient to theirs.
            if not self.apart:
                shared = tuple(None if t is None else t.to(given) for t in (q, k))
            halves = turn(cos, torch.zeros_like(sin)), turn(torch.zeros_like(cos), sin)
            q, k = (None if a is None else a + b for a, b in zip(*halves, strict=True))
        else:
            q, k = turn(cos, sin)
        if self.round_back:
            q, k = (None if t is None else t.to(before) for t in (q, k))
        if self.contiguous:
            q, k = (None if t is None else t.contiguous() for t in (q, k))
        return self.sorted(q, k)

    def sorted(self, q, k):
        """q and k in the order in which the function leaves the members of its pairs."""
        if not self.halves:
            return q, k
        return tuple(
            None if t is None else t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            for t in (q, k)
        )


class _EagerStrides(torch.autograd.Function):
    """The identity, with a contiguous gradient: as the eager rotation leaves it in any case."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        autograd.tell_unused(ctx)

    @staticmethod
    def backward(ctx, grad):
        return None if grad is None else grad.contiguous()


def find(function, args, kwargs, result, *, spec=None, positions=None):
    """The Site of one call of a rotary function; raises Refused.

    spec, positions   what the tables are, for exact precision; without them, "hf"
    """
    name = getattr(function, "__name__", "its rotary function")
    first = _arguments(name, function, args, kwargs)
    q, k = args[0], args[1] if first.two else None
    exact = spec is not None
    if not exact and first.tables_of(args, kwargs)[0].dim() > 3:
        raise Refused(f"{name} is given tables for each axis of the positions, and chooses")
    candidates = _candidates(first, q, args, kwargs, spec)
    if exact:
        expected = result if first.two else (result, None)
        found = (s for s in candidates if _same_exact(s, q, k, expected, spec, positions))
    else:
        found = filter(None, (_of_bits(s, function, q, k, args, kwargs) for s in candidates))
        found = (_of_strides(s, q, k, args, kwargs, result) for s in found)
    site = next(found, None)
    if site is None:
        how = "no rotation by its tables" if exact else "no rotation that rounds as our kernels do"
        raise Refused(f"{name} computes {how}")
    return site


def _arguments(name, function, args, kwargs):
    """The Site of a call, as far as its signature tells."""
    try:
        parameters = [*inspect.signature(function).parameters]
    except (TypeError, ValueError) as error:
        raise Refused(f"the signature of {name} cannot be read: {error}") from None
    where = dict(zip(parameters, range(len(args)), strict=False)) | {key: key for key in kwargs}
    names = next((t for t in _TABLES if all(n in where for n in t)), None)
    heads = [n for n in where if isinstance(where[n], int) and n not in (names or ())]
    heads = [n for n in heads if isinstance(args[where[n]], torch.Tensor)]
    if names is None or [where[n] for n in heads] not in ([0], [0, 1]) or args[0].dim() != 4:
        raise Refused(f"{name} has arguments of no known form")
    tables = tuple(where[n] for n in names)
    return Site(tables, len(heads) == 2, "bhsd", args[0].shape[-1])


def _candidates(first, q, args, kwargs, spec):
    """Every layout that the shapes allow, the most usual ones first."""
    cos = first.tables_of(args, kwargs)[0]
    seqlen = cos.shape[-2]
    layouts = [name for name, at in (("bhsd", 2), ("bshd", 1)) if q.shape[at] == seqlen]
    exact = spec is not None
    either = (False,) if exact else (False, True)
    orders = ((False, False), (True, False), (True, True))  # (interleaved, halves)
    roundings = ((False, False),) if exact else ((False, False), (True, False), (True, True))
    choices = itertools.product(either, roundings, either, (False, True), orders, layouts)
    for back, (inputs, apart), tables, conjugate, (interleaved, halves), layout in choices:
        for entries in ("dimensions",) if exact else ("dimensions", "halves", "pairs"):
            width = spec.rotary_dim if exact else cos.shape[-1] * (1 + (entries == "pairs"))
            offsets = dict.fromkeys((0, first.head_dim - width)) if width <= first.head_dim else ()
            for offset in offsets:
                if (halves or apart) and width != first.head_dim:
                    continue
                yield dataclasses.replace(
                    first,
                    layout=layout,
                    interleaved=interleaved,
                    halves=halves,
                    conjugate=conjugate,
                    entries=entries,
                    rotary_offset=offset,
                    round_inputs=inputs,
                    round_tables=tables,
                    round_back=back,
                    apart=apart,
                )


def _same_exact(site, q, k, expected, spec, positions):
    """Whether ``site`` computes what the function did, within the rounding of its tables."""
    one_axis = positions if spec.axes == 1 else positions.amax(0)
    limit = budget(one_axis).to(q.device)[..., None, None]
    ours = site.rotate(q, k, positions.to(q.device), "auto", spec=site.fit(spec))
    for a, b in zip(ours, expected, strict=True):
        if b is None:
            continue
        if a.shape != b.shape:
            return False
        difference = bshd(a - b, site.layout).abs()
        if not bool((difference <= limit * b.abs().max()).all()):
            return False
    return True


_TYPES = torch.float64, torch.float32, torch.bfloat16


def _of_bits(site, function, q, k, args, kwargs):
    """``site``, if it gives the bits of ``function`` and of its gradient in every type; or None."""
    call = function, q, k, args, kwargs
    if not all(_same_bits(site, *call, dtype, dtype) for dtype in _TYPES):
        return None
    # With one type for everything it does not show whether the result goes back to that of q.
    for rounded in (site, dataclasses.replace(site, round_back=True)):
        if _same_bits(rounded, *call, torch.bfloat16, torch.float32):
            return rounded
    return dataclasses.replace(site, mixed=False)


def _of_strides(site, q, k, args, kwargs, result):
    """``site`` with results that lie in memory as those of the function: sums depend on it."""
    ours = site.rotate_by_tables(q, k, site.tables_of(args, kwargs))
    theirs = result if site.two else (result,)
    same = all(a.stride() == b.stride() for a, b in zip(ours, theirs, strict=False))
    return site if same else dataclasses.replace(site, contiguous=True)


def _same_bits(site, function, q, k, args, kwargs, dtype, table_type):
    generator = torch.Generator().manual_seed(0)

    def numbers(like, dtype):
        x = torch.randn(like.shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(like.device, dtype)

    args, kwargs = list(args), dict(kwargs)
    inputs = [numbers(t, dtype) for t in (q, k) if t is not None]
    grads = [numbers(t, dtype) for t in inputs]
    for at, old in zip(site.tables, site.tables_of(args, kwargs), strict=True):
        table = old if old.is_complex() else old.to(table_type)
        (args if isinstance(at, int) else kwargs)[at] = table
    results = []
    for ours in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.enable_grad():
            if ours:
                pair = leaves if site.two else (*leaves, None)
                y = site.rotate_by_tables(*pair, site.tables_of(args, kwargs))
                y = [t for t in y if t is not None]
            else:
                y = function(*leaves, *args[len(leaves) :], **kwargs)
                y = list(y) if site.two else [y]
            if ours and [t.dtype for t in y] != [t.dtype for t in results[0][: len(y)]]:
                return False
            same_type = [g.to(t.dtype) for g, t in zip(grads, y, strict=True)]
            made = torch.autograd.grad(y, leaves, same_type)
        results.append([*y, *made])
    return all(map(torch.equal, *results))
