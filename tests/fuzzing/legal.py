"""Random legal calls: made, held against the reference, and seen to leave all else alone."""

from __future__ import annotations

import contextlib

import torch

import rope_fused as rf
from fuzzing import draws
from fuzzing.calls import AUTOCAST, INTERPRETED, Call
from fuzzing.draws import Draw
from fuzzing.projections import QkvRope
from fuzzing.rotations import ApplyRope, Rerotate, Tables
from helpers import assert_same_bits, assert_unchanged, snapshot
from rope_fused.dispatch import native

MODES = ("grad",) * 5 + ("no_grad", "inference_mode", *AUTOCAST)
FAMILIES = {
    "apply_rope": ApplyRope,
    "qkv_rope": QkvRope,
    "rerotate": Rerotate,
    "apply_rotary_pos_emb": Tables,
}


def make(number: int, small: bool = False) -> Call:
    """The legal call that `number` draws; a `small` one for an interpreter."""
    draw = Draw(number, "legal", small)
    names = ["apply_rope"] * 4 + ["qkv_rope"] * 4 + ["rerotate"] * 2
    names += [] if small else ["apply_rotary_pos_emb"]  # which chooses its backend itself
    call = FAMILIES[draw.one(*names)].draw(draw)
    floating = [k for k, v in call.tensors().items() if v.is_floating_point()]
    learned = tuple(k for k in floating if draw.chance(0.5))
    call = call._replace(learned=learned, large=draw.chance(0.15))
    modes = MODES if call.out is None else ("no_grad", "inference_mode")
    return call._replace(mode=draw.one(*modes))


def run(number: int, backend="auto") -> None:
    """Make the call that `number` draws and hold all it gives against the reference."""
    call = make(number, small=backend in INTERPRETED)
    verify(call, backend)


def perform(call: Call, backend="auto"):
    """(arguments, results): the former with requires_grad where it was asked for."""
    arguments = dict(call.arguments)
    for name in call.learned:
        arguments[name] = arguments[name].detach().requires_grad_()
    options = {} if call.out is None else {"out": call.out}
    if call.family != "apply_rotary_pos_emb":
        options["backend"] = backend
    if call.family == "rerotate" and call.out is not None:
        options["out"] = call.out[0]
    context = contextlib.nullcontext()
    if call.mode in AUTOCAST:
        context = torch.autocast("cpu", AUTOCAST[call.mode])
    elif call.mode != "grad":
        context = getattr(torch, call.mode)()
    with context, outputs_are_large(call.large):
        results = getattr(rf, call.family)(**arguments, **options)
    return arguments, (results,) if isinstance(results, torch.Tensor) else results


@contextlib.contextmanager
def outputs_are_large(large: bool):
    """Take outputs from the cache of large ones, and write them past the processor's caches."""
    before = getattr(native, "_LARGE", None)
    if native is not None and large:
        native._LARGE = 1
    try:
        yield
    finally:
        if native is not None:
            native._LARGE = before


def verify(call: Call, backend="auto") -> None:
    family = FAMILIES[call.family]
    expected = family.expect(call)
    # Views of what is written are as old as it is.
    written = {t.untyped_storage().data_ptr() for t in call.out or () if t is not None}
    inputs = call.tensors().values()
    before = snapshot(*(t for t in inputs if t.untyped_storage().data_ptr() not in written))
    versions = [t._version for t in call.out or () if t is not None]
    check_margins = margins([t for t in call.out or () if t is not None])
    arguments, results = perform(call, backend)
    assert_unchanged(before)
    check_margins()
    outputs = [t for t in call.out or () if t is not None]
    assert all(t._version > n for t, n in zip(outputs, versions, strict=True)), "autograd not told"
    assert len(results) == len(expected.values)
    for i, y in enumerate(results):
        assert (y is None) == (expected.values[i] is None)
        if call.out is not None:
            assert y is call.out[i], "not written where it was asked for"
        if y is not None:
            derived = bool(call.learned) and (call.mode == "grad" or call.mode in AUTOCAST)
            assert y.dtype == expected.dtype and (derived or not y.requires_grad)
            try:
                expected.check(i, y.detach())
            except AssertionError as error:
                raise AssertionError(f"result {i}: {error}") from None
    if call.learned and (call.mode == "grad" or call.mode in AUTOCAST):
        _gradients(call, family, expected, arguments, results)


def margins(targets):
    """A check that the memory around some tensors, in their storages, is not written."""
    kept = {}
    for target in targets:
        address = target.untyped_storage().data_ptr()
        if address not in kept:
            storage = torch.empty(0, dtype=target.dtype).set_(target.untyped_storage())
            kept[address] = storage, storage.clone(), torch.ones(storage.shape, dtype=torch.bool)
        outside = kept[address][2]
        outside.as_strided(target.shape, target.stride(), target.storage_offset()).fill_(False)

    def check():
        for storage, before, outside in kept.values():
            assert_same_bits(storage[outside], before[outside], "around an output")

    return check


def describe(call: Call, number: int, options: str = "") -> str:
    """The call in words, and how to repeat it."""
    lines = [f"python tests/fuzz.py --only {number}{options}", f"  rf.{call.family}, {call.mode}"]
    rest = {"out": call.out, "gradients": call.learned, "large": call.large}
    for name, value in {**call.arguments, **rest}.items():
        lines.append(f"    {name}: {_words(value)}")
    return "\n".join(lines)


def _words(value):
    if isinstance(value, torch.Tensor):
        numbers = f" = {value.tolist()}" if 0 < value.numel() <= 8 else ""
        at = f"{tuple(value.stride())} from {value.storage_offset()}"
        return f"{value.dtype} {tuple(value.shape)}, strides {at}{numbers}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_words, value))})"
    return repr(value)


# -- gradients ---------------------------------------------------------------------------------


def _gradients(call, family, expected, arguments, results):
    """Gradients of every result in every learned argument, from gradients in any kind of memory."""
    draw = Draw(0, f"{call.family} {[tuple(y.shape) for y in results if y is not None]}")
    wide = dict(call.arguments)
    if family.wide:
        wide = {k: v.double() if k in call.learned else v for k, v in wide.items()}
    wide |= {k: wide[k].detach().clone().requires_grad_() for k in call.learned}
    # An output may ask for a gradient for the sake of another: only the reference's are compared.
    both = zip(results, family.values(wide), strict=True)
    both = [(y, wanted) for y, wanted in both if y is not None and wanted.requires_grad]
    results, outputs = (list(t) for t in zip(*both, strict=True))
    incoming = [draws.strided(draw, y.shape, y.dtype) for y in results]
    leaves = [arguments[name] for name in call.learned]
    before = snapshot(*leaves, *incoming, *results)
    got = torch.autograd.grad(results, leaves, incoming, allow_unused=True, materialize_grads=True)
    assert_unchanged(before)
    for name, leaf, grad in zip(call.learned, leaves, got, strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape), name
        assert bool(grad.isfinite().all()), f"gradient of {name} is not finite"
    if call.mode in AUTOCAST and call.family == "qkv_rope":
        return  # casts on the way: what they round is torch's
    incoming = [g.to(y.dtype) for g, y in zip(incoming, outputs, strict=True)]
    inputs = [wide[name] for name in call.learned]
    want = torch.autograd.grad(outputs, inputs, incoming, allow_unused=True, materialize_grads=True)
    for name, a, b in zip(call.learned, got, want, strict=True):
        try:
            family.check_gradient(call, name, a, b, incoming, outputs)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None
