"""The same bits for any number of threads and in every run: each kernel, each sum over tokens."""

import pytest
import torch

import rope_fused as rf
from helpers import assert_same_bits, make_longrope, make_qk, make_spec, randn, threads
from problems import leaf, uniform

# One token, sums of one chunk and of many, blocks that no number of threads divides; the last ones
# are more than a single thread is given.
SEQLENS = (1, 63, 65, 301, 1025)
THREADS = (1, 2, 3, 5, 8)
DTYPES = (torch.float32, torch.bfloat16)


def assert_deterministic(compute):
    """`compute` gives the same bits with every number of threads, and again with each."""
    results = []
    for number in THREADS:
        with threads(number):
            results += [compute(), compute()]
    first, *rest = results
    for other in rest:
        for name in first:
            assert_same_bits(other[name], first[name], name)


def gradients(outputs, leaves):
    torch.manual_seed(0)
    outputs = [y for y in outputs if y is not None]
    incoming = [randn(*y.shape, dtype=y.dtype) for y in outputs]
    found = torch.autograd.grad(outputs, [*leaves.values()], incoming)
    results = {f"result {i}": y.detach() for i, y in enumerate(outputs)}
    return results | dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("seqlen", SEQLENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_rotation_and_its_gradients(interleaved, dtype, seqlen):
    spec = make_longrope(32, original=300, interleaved=interleaved)
    q, k = make_qk("bshd", 2, seqlen, 6, 3, 32, dtype=dtype)
    leaves = {
        "q": leaf(q),
        "k": leaf(k),
        "inv_freq": leaf(spec.rows()),
        "attention_factor": uniform(16),
        "q_scale": uniform(2, seqlen, dtype=torch.float32),
    }
    factors = {name: leaves[name] for name in ("inv_freq", "attention_factor", "q_scale")}

    def learned():
        return gradients(rf.apply_rope(leaves["q"], leaves["k"], spec, **factors), leaves)

    def plain():
        pair = {name: leaves[name] for name in "qk"}
        return gradients(rf.apply_rope(*pair.values(), spec), pair)

    assert_deterministic(learned)
    assert_deterministic(plain)


@pytest.mark.parametrize("seqlen", SEQLENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scope", ["head", "all"])
def test_norms_and_biases(scope, dtype, seqlen):
    """x is one column, so that the products have one term, and no order of them matters; the sums
    over tokens are those of the norms, of the factors and of the biases."""
    spec, heads = make_spec(32), {"q": 6, "k": 3, "v": 3}
    x = randn(2, seqlen, 1, dtype=dtype)
    rows = {name: n * 32 for name, n in heads.items()}
    weights = {f"{name}_weight": randn(n, 1, dtype=dtype) for name, n in rows.items()}
    leaves = {f"{name}_bias": leaf(randn(n, dtype=dtype)) for name, n in rows.items()}
    for name in "qk":
        size = rows[name] if scope == "all" else 32
        leaves[f"{name}_norm_weight"] = leaf(randn(size, dtype=torch.float32))
    leaves |= {"inv_freq": leaf(spec.inv_freq()), "attention_factor": uniform()}

    def compute():
        return gradients(rf.qkv_rope(x, **weights, spec=spec, norm_scope=scope, **leaves), leaves)

    assert_deterministic(compute)


@pytest.mark.parametrize("seqlen", SEQLENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_given_tables_and_moved_keys(dtype, seqlen):
    q, k = (leaf(t) for t in make_qk("bhsd", 2, seqlen, 6, 3, 32, dtype=dtype))
    cos, sin = (leaf(randn(2, seqlen, 32, dtype=dtype)) for _ in range(2))
    leaves = {"q": q, "k": k, "cos": cos, "sin": sin}
    assert_deterministic(lambda: gradients(rf.apply_rotary_pos_emb(q, k, cos, sin), leaves))
    old, new = make_spec(32), make_longrope(32, original=300)

    def moved():
        return gradients([rf.rerotate(k, None, old, new, layout="bhsd")], {"k": k})

    assert_deterministic(moved)
