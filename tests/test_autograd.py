"""Derivatives of apply_rope and qkv_rope: in every argument, of both orders, in every mode."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import rope_fused as rf
from helpers import (
    assert_same_bits,
    assert_within_rotation_budget,
    make_longrope,
    make_qk,
    make_spec,
    randn,
)
from problems import (
    PROJECTION_CASES,
    ROPE_CASES,
    Case,
    leaf,
    projection_problem,
    rope_problem,
    uniform,
)
from rope_fused import reference

# -- gradcheck, gradgradcheck ------------------------------------------------------------------


def derivatives_are_right(order, backend, function, inputs):
    """gradcheck or gradgradcheck: entry by entry where that is quick, else in random directions."""
    check = gradcheck if order == 1 else gradgradcheck
    return check(function, inputs, fast_mode=order == 2 or backend in ("reference", "triton"))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ROPE_CASES)
def test_apply_rope_in_every_argument(name, order, backend, device):
    spec, options, q, k, factors = rope_problem(name, device)

    def function(q, k, *values):
        overrides = dict(zip(factors, values, strict=True))
        return rf.apply_rope(q, k, spec, backend=backend, **options, **overrides)

    assert derivatives_are_right(order, backend, function, (q, k, *factors.values()))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["inv_freq", "attention_factor", "q_scale", "0-d", "none"])
def test_apply_rope_in_one_argument(name, order, backend, device):
    """Each factor alone, so that no path depends on another one being there."""
    spec, options, q, k, factors = rope_problem("bshd", device)
    if name == "0-d":
        name, factors = "attention_factor", {"attention_factor": uniform(device=device)}
    if name == "none":
        assert derivatives_are_right(
            order, backend, lambda q: rf.apply_rope(q, None, spec, backend=backend)[0], (q,)
        )
        return

    def of_all(q, k, value):
        return rf.apply_rope(q, k, spec, backend=backend, **{name: value})

    assert derivatives_are_right(order, backend, of_all, (q, k, factors[name]))
    q, k = q.detach(), k.detach()
    assert derivatives_are_right(
        order, backend, lambda value: of_all(q, k, value), (factors[name],)
    )
    assert derivatives_are_right(
        order, backend, lambda value: of_all(q, None, value)[0], (factors[name],)
    )


@pytest.mark.parametrize("order", [1, 2])
def test_apply_rope_in_a_factor_per_table(order, backend, device):
    spec = make_longrope(4, original=4)
    q, k = make_qk("bshd", 2, 3, 2, 1, 4, dtype=torch.float64, device=device)
    q, k = leaf(q), leaf(k)
    seq_lens = torch.tensor([4, 5], device=device)
    rows = uniform(2, 2, device=device)

    def function(q, k, rows, alpha):
        return rf.apply_rope(
            q, k, spec, seq_lens=seq_lens, inv_freq=rows, attention_factor=alpha, backend=backend
        )

    assert derivatives_are_right(order, backend, function, (q, k, rows, uniform(2, device=device)))


def test_factors_that_are_zero(backend, device):
    """Nothing divides by a factor: derivatives at zero are as good as anywhere."""
    spec, _, q, k, factors = rope_problem("bshd", device)
    with torch.no_grad():
        factors["attention_factor"][0] = 0
        factors["q_scale"][0] = 0
        factors["inv_freq"][1] = 0

    def function(q, k, *values):
        overrides = dict(zip(factors, values, strict=True))
        return rf.apply_rope(q, k, spec, backend=backend, **overrides)

    assert derivatives_are_right(1, backend, function, (q, k, *factors.values()))
    assert derivatives_are_right(2, backend, function, (q, k, *factors.values()))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", PROJECTION_CASES)
def test_qkv_rope_in_every_argument(name, order, backend, device):
    constants, tensors = projection_problem(name, device)

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        return tuple(y for y in rf.qkv_rope(**named, **constants, backend=backend) if y is not None)

    assert derivatives_are_right(order, backend, function, tuple(tensors.values()))


@pytest.mark.parametrize("order", [1, 2])
def test_qkv_rope_with_a_zero_norm_weight(order, backend, device):
    constants, tensors = projection_problem("norm", device)
    with torch.no_grad():
        tensors["q_norm_weight"][1] = 0
        tensors["k_norm_weight"].zero_()

    def function(*values):
        return rf.qkv_rope(**dict(zip(tensors, values, strict=True)), **constants, backend=backend)

    assert derivatives_are_right(order, backend, function, tuple(tensors.values()))


@pytest.mark.parametrize("name", [*ROPE_CASES, *PROJECTION_CASES])
def test_gradients_on_the_graph_are_the_same(name, backend, device):
    """What is differentiated again is made by other formulas, which gradgradcheck compares only
    with themselves: the first derivatives are those of the kernels."""
    if name in ROPE_CASES:
        spec, options, q, k, tensors = rope_problem(name, device)
        leaves = [q, k, *tensors.values()]
        out = rf.apply_rope(q, k, spec, backend=backend, **options, **tensors)
    else:
        constants, tensors = projection_problem(name, device)
        leaves = [*tensors.values()]
        out = rf.qkv_rope(**tensors, **constants, backend=backend)
    out = [y for y in out if y is not None]
    grads = [torch.randn_like(y) for y in out]
    plain = torch.autograd.grad(out, leaves, grads, retain_graph=True)
    graph = torch.autograd.grad(out, leaves, grads, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        # Sums of fewer than 2**7 products of numbers below 2**7, in another order.
        torch.testing.assert_close(b.detach(), a, rtol=0, atol=2.0 ** (7 + 7 - 53))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_every_entry(check, backend, device):
    """Slow, and thorough: once for each function, with all that can be differentiated."""
    spec, _, q, k, factors = rope_problem("bshd", device)

    def rotate(q, k, *values):
        return rf.apply_rope(q, k, spec, backend=backend, **dict(zip(factors, values, strict=True)))

    assert check(rotate, (leaf(q[:1]), leaf(k[:1]), *factors.values()))

    constants, tensors = projection_problem("norm", device)
    tensors["x"] = leaf(tensors["x"][:1])

    def project(*values):
        return rf.qkv_rope(**dict(zip(tensors, values, strict=True)), **constants, backend=backend)

    assert check(project, tuple(tensors.values()))


@pytest.mark.parametrize("wanted", ["x", "q_weight", "k_weight", "v_weight", "k_norm_weight"])
def test_qkv_rope_with_all_else_frozen(wanted, backend, device):
    constants, tensors = projection_problem("norm", device, factors=False)
    frozen = {key: value.detach() for key, value in tensors.items()}

    def function(value):
        return rf.qkv_rope(**(frozen | {wanted: value}), **constants, backend=backend)

    assert derivatives_are_right(1, backend, function, (tensors[wanted],))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_qkv_rope_with_some_outputs_used(used, backend, device):
    constants, tensors = projection_problem("bias", device)

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        out = rf.qkv_rope(**named, **constants, backend=backend)
        return tuple(out[i] for i in used)

    assert derivatives_are_right(1, backend, function, tuple(tensors.values()))


@pytest.mark.parametrize("used", [0, 1])
def test_apply_rope_with_one_output_used(used, backend, device):
    spec, options, q, k, factors = rope_problem("bshd", device)
    g = randn(*(q, k)[used].shape, dtype=torch.float64, device=device)

    def gradients(function, **extra):
        out = function(q, k, spec, **factors, **extra)[used]
        return torch.autograd.grad(out, [q, k, *factors.values()], g, allow_unused=True)

    got = gradients(rf.apply_rope, backend=backend)
    want = gradients(reference.apply_rope)
    for a, b, x in zip(got, want, [q, k, *factors.values()], strict=True):
        a = torch.zeros_like(x) if a is None else a
        b = torch.zeros_like(x) if b is None else b
        torch.testing.assert_close(a, b, rtol=0, atol=_float64_slack(q, g))


def test_what_is_not_used_has_no_gradient(backend, device):
    """None, as in eager code, and not zeros, for which optimizers would decay a weight."""
    constants, tensors = projection_problem("norm", device, factors=False)
    rf.qkv_rope(**tensors, **constants, backend=backend)[0].sum().backward()
    without = {name for name, t in tensors.items() if t.requires_grad and t.grad is None}
    assert without == {name for name in tensors if name[0] in "kv"}
    spec, options, q, k, _ = rope_problem("bshd", device)
    cos, sin = (t.repeat(1, 1, 2) for t in spec.cos_sin(torch.arange(q.shape[1])[None]))
    cos, sin = (t.to(device, q.dtype)[..., : q.shape[-1]] for t in (cos, sin))
    for x, y in ((q, k), (k, q)):
        for function in (
            lambda q, k: rf.apply_rope(q, k, spec, backend=backend),
            lambda q, k: rf.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2),
        ):
            x.grad = y.grad = None
            function(q, k)[0 if x is q else 1].sum().backward()
            assert x.grad is not None and y.grad is None


def _float64_slack(x, g):
    """48 products, positions below 16 and factors below 2, each sum off by 2**-50 of its size."""
    return 2.0**-50 * 2 * 2 * 16 * x.numel() * x.abs().max().item() * g.abs().max().item()


# -- forward mode, torch.func ------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])  # torch.no_grad does not end forward mode
def test_forward_mode_works_or_raises(grad, backend, device):
    spec, _, q, k, factors = rope_problem("bshd", device)
    tangent = torch.randn_like(q)
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = torch.autograd.forward_ad.make_dual(q.detach(), tangent)
        try:
            out, _ = rf.apply_rope(dual, None, spec, backend=backend)
        except (RuntimeError, NotImplementedError):
            return
        derivative = torch.autograd.forward_ad.unpack_dual(out).tangent
    assert derivative is not None, "a tangent was dropped in silence"
    want, _ = reference.apply_rope(tangent, None, spec)
    assert_within_rotation_budget(derivative, want, spec)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_of_the_projection_works_or_raises(grad, backend, device):
    constants, tensors = projection_problem("plain", device, factors=False)
    tangent = torch.randn_like(tensors["x"])
    frozen = {key: value.detach() for key, value in tensors.items()}
    try:
        with torch.set_grad_enabled(grad):
            _, derivative = torch.func.jvp(
                lambda x: rf.qkv_rope(**(frozen | {"x": x}), **constants, backend=backend)[0],
                (frozen["x"],),
                (tangent,),
            )
    except (RuntimeError, NotImplementedError):
        return
    want, _, _ = reference.qkv_rope(**(frozen | {"x": tangent}), **constants)
    torch.testing.assert_close(derivative, want, rtol=0, atol=2.0**-48 * 10)


def test_forward_mode_of_a_backward_works_or_raises(backend, device):
    constants, tensors = projection_problem("plain", device, factors=False)
    x = tensors["x"].detach().requires_grad_()
    weights = {key: value.detach() for key, value in tensors.items() if key != "x"}
    y = rf.qkv_rope(x=x, **weights, **constants, backend=backend)[0]
    with torch.autograd.forward_ad.dual_level():
        gradient = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        try:
            (dx,) = torch.autograd.grad(y, x, gradient)
        except (RuntimeError, NotImplementedError):
            return
        derivative = torch.autograd.forward_ad.unpack_dual(dx).tangent
    assert derivative is not None, "a tangent was dropped in silence"


def test_tables_first_made_in_a_transform_serve_everyone(device):
    spec = rf.RopeSpec.default(head_dim=16, rope_theta=98765.0)
    q = torch.randn(1, 3, 2, 16, device=device)
    torch.func.grad(lambda q: rf.apply_rope(q, None, spec)[0].sum())(q)
    out, _ = rf.apply_rope(q, None, spec, out=(torch.empty_like(q), None))
    assert torch.equal(out, rf.apply_rope(q, None, spec)[0])


def test_func_grad(backend, device):
    spec, options, q, k, factors = rope_problem("bshd", device)
    values = {key: value.detach() for key, value in factors.items()} | {"q": q.detach()}
    weight_q, weight_k = torch.randn_like(q), torch.randn_like(k)

    def loss(values):
        q = values["q"]
        overrides = {key: values[key] for key in factors}
        q2, k2 = rf.apply_rope(q, k.detach(), spec, backend=backend, **overrides)
        return (q2 * weight_q).sum() + (k2 * weight_k).sum()

    got = torch.func.grad(loss)(values)
    leaves = {key: leaf(value) for key, value in values.items()}
    want = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for key, expected in zip(leaves, want, strict=True):
        slack = _float64_slack(q, weight_q)
        torch.testing.assert_close(got[key], expected, rtol=0, atol=slack)

    constants, tensors = projection_problem("norm-all-bias", device)
    tensors = {key: value.detach() for key, value in tensors.items()}

    def loss(tensors):
        return sum(y.square().sum() for y in rf.qkv_rope(**tensors, **constants, backend=backend))

    got = torch.func.grad(loss)(tensors)
    leaves = {key: leaf(value) for key, value in tensors.items()}
    want = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for key, expected in zip(leaves, want, strict=True):
        torch.testing.assert_close(got[key], expected, rtol=2.0**-46, atol=2.0**-46)


# -- what surrounds a call --------------------------------------------------------------------


def test_sibling_branches_and_saved_tensors(backend, device):
    """Inputs, outputs and their gradients are all used, and saved, by others as well."""
    spec, _, q, k, factors = rope_problem("bshd", device)

    def function(q, k, inv_freq):
        a, b = q * 1.5, k.tanh()
        q2, k2 = rf.apply_rope(a, b, spec, inv_freq=inv_freq, backend=backend)
        return q2.tanh() * a.square() + q2, k2 * b + k2.exp(), q2 * inv_freq.sum()

    assert derivatives_are_right(1, backend, function, (q, k, factors["inv_freq"]))
    assert derivatives_are_right(2, backend, function, (q, k, factors["inv_freq"]))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint(reentrant, backend, device):
    constants, tensors = projection_problem("norm-all-bias", device, torch.float32)

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        q, k, v = rf.qkv_rope(**named, **constants, backend=backend)
        q, k = rf.apply_rope(q, k, constants["spec"], backend=backend)
        return (q.square().sum(-1) + k.square().sum(-1) * v.sum(-1)).sum()

    want = torch.autograd.grad(function(*tensors.values()), list(tensors.values()))
    for value in tensors.values():
        value.grad = None
    checkpoint(function, *tensors.values(), use_reentrant=reentrant).backward()
    for (name, value), expected in zip(tensors.items(), want, strict=True):
        assert value.grad is not None, name
        assert_same_bits(value.grad, expected, name)


def test_autocast_of_the_projection(backend, device):
    """Activations and weights are cast; tables, and everything that makes them, are not."""
    x, weights, options = Case("autocast", norm="head").operands(torch.float32, device)
    tensors = [leaf(t) for t in (x, *weights)]
    options["positions"] = torch.arange(9, device=device) + 1_000_000
    options["inv_freq"] = uniform(8, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = rf.qkv_rope(*tensors, backend=backend, **options)
    narrow = [leaf(t.bfloat16()) for t in tensors]
    for name in ("q_norm_weight", "k_norm_weight"):
        assert options[name].dtype == torch.float32
    want = rf.qkv_rope(*narrow, backend=backend, **options)
    for y, expected in zip(out, want, strict=True):
        assert y.dtype == torch.bfloat16
        assert_same_bits(y, expected)
    grads = [torch.randn_like(y) for y in out]
    got = torch.autograd.grad(out, [*tensors, options["inv_freq"]], grads)
    expected = torch.autograd.grad(want, [*narrow, options["inv_freq"]], grads)
    for a, b, x in zip(got, expected, [*tensors, options["inv_freq"]], strict=True):
        assert a.dtype == x.dtype
        assert_same_bits(a, b.to(x.dtype))


def test_autocast_of_a_rotation(backend, device):
    q, k = make_qk(device=device)
    spec = make_spec()
    positions = torch.arange(9, device=device) + 1_000_000
    with torch.autocast(device.type, torch.bfloat16):
        q2, k2 = rf.apply_rope(q, k, spec, positions, backend=backend)
        # What a projection under autocast hands over.
        narrow, _ = rf.apply_rope(q.bfloat16(), None, spec, positions, backend=backend)
    want, _ = reference.apply_rope(q.to(q2.dtype), None, spec, positions)
    assert_within_rotation_budget(q2, want, spec, positions)
    want, _ = reference.apply_rope(q.bfloat16(), None, spec, positions)
    assert narrow.dtype == torch.bfloat16
    assert_within_rotation_budget(narrow, want, spec, positions)
