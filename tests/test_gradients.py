"""First derivatives: no input and no incoming gradient is written, accuracy, memory, threads."""

import pytest
import torch

import rope_fused as rf
from helpers import (
    assert_same_bits,
    assert_unchanged,
    assert_within_projection_budget,
    assert_within_rotation_budget,
    half_ulp,
    interpreted,
    make_longrope,
    make_qk,
    make_spec,
    randn,
    snapshot,
    threads,
)
from problems import Case, eager, leaf, uniform
from rope_fused import reference

# -- no side effects ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "expanded", "transposed", "sliced"])
def test_incoming_gradients_are_never_written(kind, dtype, backend, device):
    spec = make_spec()
    q, k = (leaf(t) for t in make_qk(dtype=dtype, device=device))
    inv_freq = uniform(8, device=device)
    alpha = uniform(device=device)

    def incoming(x):
        if kind == "expanded":
            return torch.ones((), dtype=dtype, device=device).expand(x.shape)
        if kind == "transposed":
            return randn(*x.transpose(1, 2).shape, dtype=dtype, device=device).transpose(1, 2)
        if kind == "sliced":
            return randn(*x.shape[:-1], 40, dtype=dtype, device=device)[..., 5:21]
        return randn(*x.shape, dtype=dtype, device=device)

    grads = incoming(q), incoming(k)
    out = rf.apply_rope(q, k, spec, inv_freq=inv_freq, attention_factor=alpha, backend=backend)
    before = snapshot(q, k, inv_freq, alpha, *grads, *out)
    first = torch.autograd.grad(out, (q, k, inv_freq, alpha), grads, retain_graph=True)
    assert_unchanged(before)
    again = torch.autograd.grad(out, (q, k, inv_freq, alpha), grads)
    assert_unchanged(before)
    for a, b in zip(first, again, strict=True):
        assert_same_bits(a, b)
    options = {"inv_freq": inv_freq.detach(), "attention_factor": alpha.detach()}
    want = reference.apply_rope(*grads, spec, conjugate=True, **options)
    for x, y, y64 in zip((q, k), first, want, strict=False):
        assert y.dtype == x.dtype
        assert_within_rotation_budget(y, y64, spec)


@pytest.mark.parametrize("norm", [None, "head"])
def test_projection_writes_no_input_and_no_gradient(norm, backend, device):
    x, weights, options = Case("effects", norm=norm).operands(torch.float32, device)
    tensors = [leaf(t) for t in (x, *weights)]
    out = rf.qkv_rope(*tensors, backend=backend, **options)
    grads = [torch.randn_like(y) for y in out]
    before = snapshot(*tensors, *grads, *out)
    torch.autograd.grad(out, tensors, grads, retain_graph=True)
    assert_unchanged(before)
    torch.autograd.grad(out, tensors, grads)
    assert_unchanged(before)


def test_gradients_seen_by_hooks(backend, device):
    """A hook keeps a reference to the gradient: it must still hold the same numbers at the end."""
    spec = make_spec()
    q, k = (leaf(t) for t in make_qk(device=device))
    seen = []
    out = rf.apply_rope(q * 1.0, k * 1.0, spec, backend=backend)
    for y in out:
        y.register_hook(lambda g: seen.append((g, g.clone())))
    sum((y * y).sum() for y in out).backward()
    assert len(seen) == 2
    for gradient, copy in seen:
        assert_same_bits(gradient, copy)


# -- accuracy of first derivatives -------------------------------------------------------------


def reduction_budget(reference64, terms, count, dtype, out_dtype):
    """For a gradient that sums `count` terms over tokens and heads; `terms` is the sum of sizes.

    A term has the rounding of the kept output (half an ulp of `dtype`) and the slack of a
    rotation, 2**-21; a sum of n float32 numbers is off by at most n * 2**-24 of the sum of their
    sizes in any order; the result is rounded once to the factor's dtype.
    """
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    arithmetic = 2.0**-50 if dtype == torch.float64 else 2.0**-21
    relative = torch.finfo(dtype).eps / 2 + arithmetic + count * unit
    return relative * terms + half_ulp(reference64, out_dtype)


@pytest.mark.parametrize("first", [0, -7, 1_000_000], ids=["at-0", "around-0", "at-1e6"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:]
)
def test_first_order_against_float64(dtype, interleaved, first, backend, device):
    spec = make_spec(32, interleaved=interleaved, partial_rotary_factor=0.5)
    q, k = (leaf(t) for t in make_qk(seqlen=13, head_dim=32, dtype=dtype, device=device))
    positions = torch.arange(first, first + 13, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = {
        "inv_freq": leaf(spec.inv_freq().to(device)),
        "attention_factor": uniform(8, dtype=wide, device=device),
        "q_scale": uniform(13, dtype=wide, device=device),
    }
    inputs = [q, k, *factors.values()]
    out = rf.apply_rope(q, k, spec, positions, backend=backend, **factors)
    grads = [torch.randn_like(y) for y in out]
    got = torch.autograd.grad(out, inputs, grads)

    wide_inputs = [leaf(t.double()) for t in inputs]
    wide_factors = dict(zip(factors, wide_inputs[2:], strict=True))
    wide_out = reference.apply_rope(*wide_inputs[:2], spec, positions, **wide_factors)
    want = torch.autograd.grad(wide_out, wide_inputs, [g.double() for g in grads])

    for x, a, b in zip(inputs, got, want, strict=True):
        assert a.dtype == x.dtype and a.shape == b.shape
    for i in (0, 1):
        assert_within_rotation_budget(got[i], want[i], spec, positions)

    def sizes(x):  # per token and head: the length of each pair
        part = x.detach().double()[..., : spec.rotary_dim]
        a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
        return torch.hypot(a, b)

    products = [sizes(g) * sizes(y) for g, y in zip(grads, wide_out, strict=True)]
    alpha = wide_factors["attention_factor"].detach()
    per_token = sum(p.sum((0, 2)) for p in products)  # [seqlen, pairs]
    count = 2 * sum(y.numel() // y.shape[-1] for y in out)
    budgets = {
        "inv_freq": ((positions.abs()[:, None] * per_token).sum(0), count),
        "attention_factor": ((per_token / alpha).sum(0), count),
        "q_scale": (
            (grads[0].double() * wide_out[0].detach()).abs().sum((0, 2, 3))
            + products[0].sum((0, 2, 3)),
            q.numel() // 13,
        ),
    }
    budgets["q_scale"] = (
        budgets["q_scale"][0] / wide_factors["q_scale"].detach().abs(),
        budgets["q_scale"][1],
    )
    for i, (name, x) in enumerate(factors.items(), start=2):
        terms, number = budgets[name]
        phase = 2 * torch.pi * positions.abs().max() * 2.0**-65
        budget = reduction_budget(want[i], terms, number, dtype, x.dtype) + phase * terms
        error = (got[i].double() - want[i]).abs()
        assert (error <= budget).all(), (name, (error / budget).max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_cancellation_at_large_positions(dtype, backend, device):
    """Scores depend on distances, so a shift of all positions must not change d score / d inv_freq.

    The gradients through q and through k are a million times what is left of their sum.
    """
    spec = make_spec(16)
    q, k = make_qk(heads=2, kv_heads=2, dtype=dtype, device=device)
    weight = randn(2, 2, 9, 9, dtype=dtype, device=device)
    shift = 1_000_000

    def gradient(function, q, k, positions, **kwargs):
        inv_freq = leaf(spec.inv_freq().to(device))
        q2, k2 = function(q, k, spec, positions, inv_freq=inv_freq, **kwargs)
        q2.retain_grad(), k2.retain_grad()
        scores = torch.einsum("bshd,bthd->bhst", q2, k2)
        (scores * weight.to(scores.dtype)).sum().backward()
        return inv_freq.grad, (q2, k2)

    near = torch.arange(9, device=device)
    got, _ = gradient(rf.apply_rope, q, k, near + shift, backend=backend)
    want, out = gradient(reference.apply_rope, q.double(), k.double(), near)
    terms = 0
    for y in out:
        (a, b), (c, d) = y.detach().chunk(2, -1), y.grad.chunk(2, -1)
        terms = terms + (torch.hypot(a, b) * torch.hypot(c, d)).sum((0, 1, 2))
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    # The incoming gradients are sums of 9 products, each of a rounded output; taken as one more
    # such sum of their sizes, which is larger than `terms` by what cancels in them.
    loose = torch.einsum("bhst,bshd,bthd->d", *(t.detach().abs() for t in (weight.double(), *out)))
    loose = 4 * loose.view(2, -1).sum(0)
    phase = 2 * torch.pi * shift * 2.0**-65
    relative = unit * (2 + 8 + 9 + 4 * q.shape[1] * q.shape[2] * 2) + phase
    budget = relative * (shift + 9) * (terms + loose)
    error = (got.double() - want).abs()
    assert (error <= budget).all(), (error / budget).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["plain", "bias", "head", "all", "interleaved", "partial", "head-partial"]
)
def test_projection_gradients_against_float64(kind, dtype, backend, device):
    """Each gradient no worse than that of the eager formula in the same dtype."""
    case = Case(
        kind,
        rows=(2, 33),
        bias=kind == "bias",
        norm={"head": "head", "all": "all", "head-partial": "head"}.get(kind),
        spec={"interleaved": kind == "interleaved"}
        | ({"partial_rotary_factor": 0.5} if "partial" in kind else {}),
    )
    x, weights, options = case.operands(dtype, device)
    named = dict(zip(("x", "q_weight", "k_weight", "v_weight"), (x, *weights), strict=True))
    constants = {}
    for key, value in options.items():
        (named if torch.is_tensor(value) else constants)[key] = value
    grads = [randn(2, 33, n, 16, dtype=dtype, device=device) for n in (4, 2, 2)]

    def gradients(function, cast, **kwargs):
        leaves = {key: leaf(cast(value)) for key, value in named.items()}
        out = function(**leaves, **constants, **kwargs)
        return torch.autograd.grad(out, list(leaves.values()), [cast(g) for g in grads])

    got = gradients(rf.qkv_rope, lambda t: t, backend=backend)
    want = gradients(reference.qkv_rope, torch.Tensor.double)
    formula = gradients(eager, lambda t: t)
    for name, a, b, c in zip(named, got, want, formula, strict=True):
        try:
            assert_within_projection_budget(a, b, c)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def test_gradients_do_not_depend_on_the_thread_count(backend, device):
    seqlen = 37 if interpreted(backend) else 301
    spec = make_longrope(64, original=seqlen - 1)
    q, k = (leaf(t) for t in make_qk("bshd", 2, seqlen, 6, 3, 64, device=device))
    factors = {
        "inv_freq": leaf(spec.rows().to(device)),
        "attention_factor": uniform(32, device=device),
        "q_scale": uniform(seqlen, dtype=torch.float32, device=device),
    }
    grads = [torch.randn_like(q), torch.randn_like(k)]
    results = []
    for number in (1, 2, 3):
        with threads(number):
            out = rf.apply_rope(q, k, spec, backend=backend, **factors)
            results.append(torch.autograd.grad(out, [q, k, *factors.values()], grads))
    for other in results[1:]:
        for name, a, b in zip(("q", "k", *factors), other, results[0], strict=True):
            assert_same_bits(a, b, name)


def test_norm_gradients_do_not_depend_on_the_thread_count(backend, device):
    """x is a row of zeros but for one column, so that the GEMMs have nothing to reorder."""
    rows = (2, 37 if interpreted(backend) else 301)
    case = Case("threads", rows, d_model=1, norm="head", heads=6, kv_heads=3, head_dim=64)
    x, weights, options = case.operands(torch.float32, device)
    leaves = [leaf(options.pop(f"{name}_norm_weight")) for name in "qk"]
    results, grads = [], None
    for number in (1, 2, 3):
        with threads(number):
            out = rf.qkv_rope(
                x, *weights, q_norm_weight=leaves[0], k_norm_weight=leaves[1],
                backend=backend, **options,
            )[:2]  # fmt: skip
            grads = grads or [torch.randn_like(y) for y in out]
            results.append(torch.autograd.grad(out, leaves, grads))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


# -- what is kept for the backward -------------------------------------------------------------


def _kept_bytes(function, *ignored):
    """Bytes that autograd saves, storages counted once, `ignored` tensors not at all."""
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    for t in ignored:
        storages.pop(t.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())


def test_a_rotation_keeps_no_activation(backend, device):
    q, k = (leaf(t) for t in make_qk(seqlen=512, device=device))
    spec = make_spec()
    kept = _kept_bytes(lambda: rf.apply_rope(q, k, spec, backend=backend))
    assert kept < q.numel() * q.element_size() / 4
    with_factor = _kept_bytes(
        lambda: rf.apply_rope(
            q, k, spec, inv_freq=leaf(spec.inv_freq().to(device)), backend=backend
        )
    )
    assert with_factor < 1.25 * (q.numel() + k.numel()) * q.element_size()


def test_the_projection_keeps_no_activation_but_x(backend, device):
    x, weights, options = Case("memory", rows=(1, 512)).operands(torch.float32, device)
    tensors = [leaf(t) for t in (x, *weights)]
    kept = _kept_bytes(lambda: rf.qkv_rope(*tensors, backend=backend, **options), *tensors)
    assert kept < x.shape[-2] * 4 * 16 * 4 / 4


def test_gradients_reach_slices_of_one_packed_weight(backend, device):
    x, weights, options = Case("packed").operands(torch.float64, device)
    packed = leaf(torch.cat(weights))
    sizes = [w.shape[0] for w in weights]
    grads = [randn(2, 9, n, 16, dtype=torch.float64, device=device) for n in (4, 2, 2)]
    x = leaf(x)
    got = torch.autograd.grad(
        rf.qkv_rope(x, *packed.split(sizes), backend=backend, **options), (x, packed), grads
    )
    want = torch.autograd.grad(
        reference.qkv_rope(x, *packed.split(sizes), **options), (x, packed), grads
    )
    for a, b in zip(got, want, strict=True):
        # Sums of at most 128 products of numbers below 16.
        torch.testing.assert_close(a, b, rtol=0, atol=128 * 2.0**-53 * 128)
