"""torch.func.vmap over the public functions: the same as call by call, in one call where it can."""

import pytest
import torch
from torch.func import grad, vmap

import rope_fused as rf
from tiny import entries

SIZE, BATCH, SEQLEN = 3, 2, 5
YARN = rf.RopeSpec.yarn(head_dim=8, rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LONG = rf.RopeSpec.longrope(
    head_dim=8,
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=16,
    short_factor=[1.0, 2, 3, 4],
    long_factor=[5.0, 6, 7, 8],
)
SHAPES = {
    "bshd": ((BATCH, SEQLEN, 4, 8), (BATCH, SEQLEN, 2, 8)),
    "bhsd": ((BATCH, 4, SEQLEN, 8), (BATCH, 2, SEQLEN, 8)),
    "thd": ((SEQLEN, 4, 8), (SEQLEN, 2, 8)),
}


def randn(*shape, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64, device=device)


def each(function, in_dims, *args):
    """vmap by hand."""
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    results = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results)
    return tuple(map(torch.stack, zip(*results, strict=True)))


def agrees(function, in_dims, *args, count=None, slack=0.0):
    """``slack``: where sums are taken in another order, as a share of the largest element."""
    got, seen = entries(lambda: vmap(function, in_dims)(*args))
    expected = each(function, in_dims, *args)
    got, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= slack * b.abs().max()
    if count is not None:
        assert seen == count


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("precision", ["exact", "hf"])
@pytest.mark.parametrize("layout", SHAPES)
def test_apply_rope(layout, precision, enabled, device):
    q, k = (randn(SIZE, *shape, device=device) for shape in SHAPES[layout])

    def function(q, k, positions):
        return rf.apply_rope(q, k, YARN, positions, layout=layout, precision=precision)

    one = {"rotate" if precision == "exact" else "rotate_tables": 1}
    rows = 1 if layout == "thd" else BATCH
    shared = torch.randint(1000, (rows, SEQLEN), device=device)
    own = torch.randint(1000, (SIZE, rows, SEQLEN), device=device)
    with torch.set_grad_enabled(enabled):
        for in_dims, arguments in (
            ((0, 0, None), (q, k, shared)),
            ((0, 0, None), (q, k, shared[:1])),
            ((0, 0, 0), (q, k, own)),
            ((0, 0, 0), (q, k, own[:, :1])),
            ((None, None, 0), (q[0], k[0], own)),
            ((1, 2, 0), (q.movedim(0, 1), k.movedim(0, 2), own)),
            ((0, None, None), (q, k[0], shared)),
        ):
            agrees(function, in_dims, *arguments, count=one)
        agrees(lambda q, k: function(q, k, None), (0, 0), q, k, count=one)
        agrees(lambda q: function(q, None, shared)[0], (0,), q, count=one)


@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
def test_one_by_one(enabled, device):
    """Operands that all tokens of a call share: frequencies, factors, and packed sequences."""
    q, k = (randn(SIZE, *shape, device=device) for shape in SHAPES["bshd"])
    inv_freq = YARN.inv_freq().to(device) * torch.rand(SIZE, 1, device=device)
    factors = torch.rand(SIZE, device=device)
    with torch.set_grad_enabled(enabled):
        agrees(
            lambda q, f, a: rf.apply_rope(q, None, YARN, inv_freq=f, attention_factor=a)[0],
            (0, 0, 0),
            q,
            inv_freq,
            factors,
        )
        agrees(lambda q, k: rf.apply_rope(q, k, LONG), (0, 0), q, k)
        positions = torch.arange(SEQLEN, device=device) + torch.tensor([[0], [20]], device=device)
        agrees(lambda q, k: rf.apply_rope(q, k, LONG, positions), (0, 0), q, k)


@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("lead", [(BATCH, SEQLEN), (SEQLEN,)], ids=["batch", "packed"])
def test_qkv_rope(lead, enabled, device):
    x = randn(SIZE, *lead, 16, device=device)
    weights = [randn(8 * heads, 16, device=device) for heads in (4, 2, 2)]
    norm, bias = randn(8, device=device), randn(32, device=device)

    def function(x, q_weight, norm):
        rest = {"q_norm_weight": norm, "k_norm_weight": norm, "q_bias": bias}
        return rf.qkv_rope(x, q_weight, *weights[1:], spec=YARN, **rest)

    with torch.set_grad_enabled(enabled):
        # One product of another height: its sums may be taken in another order.
        slack = 16 * 2.0**-52
        agrees(function, (0, None, None), x, weights[0], norm, count={"project": 1}, slack=slack)
        several = weights[0] * torch.rand(SIZE, 1, 1, dtype=torch.float64, device=device)
        agrees(function, (None, 0, None), x[0], several, norm, slack=slack)
        agrees(function, (0, None, 0), x, weights[0], randn(SIZE, 8, device=device), slack=slack)


@pytest.mark.parametrize("normed", [False, True])
def test_gradients_per_sample(normed, device):
    """vmap(grad(...)), with respect to inputs, weights, norms and learned factors."""
    x = randn(SIZE, BATCH, SEQLEN, 16, device=device)
    # So that q and k are of the size of 1: the sine of a large number multiplies its roundings.
    weights = [randn(8 * heads, 16, device=device) / 4 for heads in (4, 2, 2)]
    norm = randn(8, device=device) if normed else None
    inv_freq = YARN.inv_freq().to(device)

    def loss(x, q_weight, k_weight, v_weight, *rest):
        inv_freq, norm = (*rest, None)[:2]
        q, k, v = rf.qkv_rope(
            x, q_weight, k_weight, v_weight, spec=YARN, q_norm_weight=norm, inv_freq=inv_freq
        )
        q, k = rf.apply_rope(q, k, YARN)
        return (q.sum(-2) * k.sum(-2)).sin().sum() + v.square().sum()

    # Once without a learned factor, where the backward is a rotation and keeps nothing.
    for rest in ((), (inv_freq, norm) if normed else (inv_freq,)):
        arguments = (x, *weights, *rest)

        def called(*arguments):
            x, wq, wk, wv, *rest = arguments
            return loss(x, wq, wk, wv, *(rest or (None,)))

        gradient = grad(called, tuple(range(len(arguments))))
        agrees(gradient, (0, *(None,) * (len(arguments) - 1)), *arguments, slack=2.0**-44)


def test_nested(device):
    q = randn(2, SIZE, *SHAPES["bshd"][0], device=device)

    def function(q):
        return rf.apply_rope(q, None, YARN)[0]

    got, count = entries(lambda: vmap(vmap(function))(q))
    assert count == {"rotate": 1}
    assert torch.equal(got, torch.stack([each(function, (0,), part) for part in q]))
    # The Hessian of a scalar is two of them.
    small = randn(1, 2, 1, 8, device=device)

    def energy(q):
        return rf.apply_rope(q, None, YARN)[0].pow(3).sum()

    hessian = torch.func.jacrev(grad(energy))(small)
    expected = torch.autograd.functional.hessian(energy, small)
    assert (hessian - expected).abs().max() <= 2.0**-44 * expected.abs().max()
