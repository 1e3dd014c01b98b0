"""A minute of random calls, legal and illegal; `make fuzz MINUTES=n` makes more of them."""

import pytest
import torch

import fuzz
import rope_fused as rf
from fuzzing.calls import INTERPRETED
from helpers import assert_same_bits, check, make_longrope, make_qk, make_spec
from rope_fused import ops, reference

# Legal and illegal calls: some 30 and 10 seconds of them on the CPU.
COUNTS = {"cpu": (1500, 1500), "reference": (100, 0)}
COUNTS |= dict.fromkeys(INTERPRETED, (30, 100))


@pytest.mark.parametrize("illegal", [False, True], ids=["legal", "illegal"])
def test_random_calls(illegal, backend, device, request):
    if device.type != "cpu":
        pytest.skip("draws tensors of the CPU")
    first = request.config.getoption("--seed") * 10**6
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(first, first + COUNTS[backend][illegal]):
            wrong = fuzz.attempt(number, backend, illegal)
            assert wrong is None, wrong
    finally:
        torch.set_num_threads(before)


# -- what went wrong once ----------------------------------------------------------------------


def test_positions_of_no_tokens():
    spec = rf.RopeSpec.longrope(
        head_dim=4,
        rope_theta=1e4,
        short_factor=[1.0, 1.5],
        long_factor=[2.0, 4.0],
        factor=8.0,
        original_max_position_embeddings=4,
    )
    q, k = make_qk("bshd", 2, 0, 2, 1, 4)
    check(q, k, spec, torch.zeros(2, 0, dtype=torch.int64))


def test_positions_before_the_first_tokens_of_longrope():
    """Negative positions have a table of their own as well, that of the tokens before n_start."""
    q, k = make_qk("bshd", 1, 5, 2, 1)
    check(q, k, make_longrope(n_start=3), torch.arange(-4, 1), seq_lens=torch.tensor([20]))


def test_a_table_for_each_sequence_of_a_dynamic_spec():
    spec = rf.RopeSpec.dynamic(head_dim=8, rope_theta=1e4, factor=2.0, max_position_embeddings=8)
    q, k = make_qk("bshd", 2, 5, 2, 1, 8)
    inv_freq = torch.rand(2, 4, dtype=torch.float64)
    check(q, k, spec, seq_lens=torch.tensor([9, 20]), inv_freq=inv_freq)


def test_gradients_of_tables_that_the_batch_shares_or_not():
    """One shared by the batch and one not: each gradient has the shape of its own table."""
    q, k = make_qk("bhsd")
    cos, sin = (torch.randn(n, 9, 16, requires_grad=True) for n in (1, 2))
    out = rf.apply_rotary_pos_emb(q, k, cos, sin)
    grads = torch.autograd.grad(out, (cos, sin), [torch.ones_like(y) for y in out])
    assert [g.shape for g in grads] == [cos.shape, sin.shape]


def test_a_sign_that_torch_keeps_aside():
    """The imaginary part of a conjugate is a view whose numbers are stored with the other sign."""
    q = torch.randn(1, 3, 2, 8, dtype=torch.complex64)
    plain = q.imag.neg()
    assert q.conj().imag.is_neg()
    want, _ = rf.apply_rope(plain, None, make_spec(8))
    for x in (q.conj().imag, plain):
        got, _ = rf.apply_rope(x, None, make_spec(8))
        assert_same_bits(got, want)
        with torch.no_grad():
            got, _ = rf.apply_rope(x, None, make_spec(8), out=(torch.empty(1, 3, 2, 8), None))
        assert_same_bits(got, want)
        target = torch.zeros(1, 3, 2, 8, dtype=torch.complex64)
        with torch.no_grad():
            rf.apply_rope(x, None, make_spec(8), out=(target.conj().imag, None))
        assert_same_bits(target.imag.neg(), want)


def test_autocast_leaves_float64_alone():
    """As torch's own linear layers do."""
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, _ = rf.qkv_rope(x, weight, weight, spec=make_spec(8))
        assert q.dtype == torch.nn.functional.linear(x, weight).dtype == torch.float64


def test_a_projection_on_meta_tensors():
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(16, 8, device="meta")
    q, k, _ = rf.qkv_rope(x, weight, weight, spec=make_spec(8))
    assert q.shape == k.shape == (3, 2, 8) and q.device.type == "meta"


# Each gave a result, a warning, or an error that named nothing.
MISTAKES = {
    "nan in hf": lambda q, k: {"inv_freq": torch.full((8,), torch.nan), "precision": "hf"},
    "nan for no tokens": lambda q, k: {"q": q[:, :0], "k": k[:, :0],
                                       "inv_freq": torch.full((8,), torch.nan)},
    "sparse": lambda q, k: {"q": q.to_sparse()},
    "nested": lambda q, k: {"q": torch.nested.nested_tensor(list(q))},
    "mkldnn": lambda q, k: {"k": k.to_mkldnn()},
    "conjugate": lambda q, k: {"conjugate": 1},
    "attention_factor": lambda q, k: {"attention_factor": 10**400},
    "out in one place": lambda q, k: {"out": (torch.zeros(1).expand(q.shape), torch.empty_like(k))},
    "out in q_scale": lambda q, k: {"out": (q, k), "q_scale": q.view(-1)[:9]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", MISTAKES)
def test_what_was_not_refused_once(name):
    q, k = make_qk()
    call = {"q": q, "k": k, "spec": make_spec()} | MISTAKES[name](q, k)
    word = {"nan in hf": "inv_freq", "nan for no tokens": "inv_freq", "sparse": "q", "nested": "q",
            "mkldnn": "k"}.get(name, name.split()[0])  # fmt: skip
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match=rf"(?<!\w){word}(?!\w)"):
        rf.apply_rope(**call)


def test_out_beside_a_factor_that_asks_for_its_gradient():
    q, _ = make_qk()
    factor = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="out"):
        rf.apply_rope(
            q, None, make_spec(), attention_factor=factor, out=(torch.empty_like(q), None)
        )


def test_autograd_is_told_what_is_written():
    """What it had saved of an output is gone, and a backward that needs it must say so."""
    spec, (q, _) = make_spec(), make_qk()
    calls = {
        "apply_rope": lambda t: rf.apply_rope(q, None, spec, out=(t, None)),
        "in place": lambda t: rf.apply_rope(t, None, spec, out=(t, None)),
        "rerotate": lambda t: rf.rerotate(t, None, spec, make_longrope(), out=t),
        "hf": lambda t: rf.apply_rope(t, None, spec, out=(t, None), precision="hf"),
    }
    for call in calls.values():
        saved = torch.randn_like(q, requires_grad=True)
        target = saved * 1.0
        y = target * target
        with torch.no_grad():
            call(target)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_projections_into_sequences_that_lie_between_each_other():
    x, weight = torch.randn(3, 2, 8), torch.randn(16, 8)
    bias, spec = torch.randn(16), make_spec(8)
    want = rf.qkv_rope(x, weight, weight, spec=spec, q_bias=bias)
    out = tuple(torch.empty(2, 3, 2, 8).transpose(0, 1) for _ in range(2))
    with torch.no_grad():
        got = rf.qkv_rope(x, weight, weight, spec=spec, q_bias=bias, out=(*out, None))
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b)


def test_a_norm_over_all_heads_without_gradients(backend, device):
    """The projections are then rotated where they lie, while their other heads are still read."""
    x, weight = torch.randn(2, 5, 9, device=device), torch.randn(128, 9, device=device)
    norm = torch.randn(128, device=device)
    call = {"spec": make_spec(), "q_norm_weight": norm, "norm_scope": "all"}
    with torch.no_grad():
        got = rf.qkv_rope(x, weight, weight, backend=backend, **call)[0]
    torch.testing.assert_close(
        got.double(), reference.qkv_rope(x, weight, weight, **call)[0], rtol=1e-5, atol=1e-5
    )


def test_a_refusal_comes_before_the_products():
    x, weight = torch.randn(3, 8), torch.randn(8, 8)
    out = tuple(torch.zeros(3, 1, 8) for _ in range(2))
    call = {"spec": make_spec(8), "inv_freq": torch.full((4,), torch.nan), "out": (*out, None)}
    with torch.no_grad(), pytest.raises(ValueError, match="inv_freq"):
        rf.qkv_rope(x, weight, weight, **call)
    assert not any(t.any() for t in out)


@pytest.mark.parametrize("conjugate", [False, True])
def test_no_product_is_fused_with_a_sum(conjugate):
    """Pairs of float64 beside each other, which GCC 12 likes to multiply and add at once."""
    q, _ = make_qk("bshd", 2, 33, 3, 1, 20, dtype=torch.float64)
    cos, sin = torch.randn(2, 33, 20).double(), torch.randn(2, 33, 20).double()
    options = {"layout": "bshd", "interleaved": True, "transpose": conjugate}
    want, _ = reference.rotate_tables(q, None, cos, sin, **options)
    got, _ = ops.rotate_tables(q, None, cos, sin, True, 0, conjugate, "bshd", "auto")
    assert_same_bits(got, want)
