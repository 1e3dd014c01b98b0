"""Large outputs: written past the caches, into memory that dead outputs have left."""

import pytest
import torch

import rope_fused as rf
from helpers import DTYPES, assert_same_bits, check, make_qk, make_spec
from rope_fused.cli.demo.layer import peak
from rope_fused.dispatch import native

pytestmark = pytest.mark.skipif(
    getattr(native, "_OutputBuffer", None) is None,
    reason="the CPU kernels are not built, or no cache",
)
SPEC = make_spec()


@pytest.fixture(autouse=True)
def every_output_is_large(monkeypatch):
    monkeypatch.setattr(native, "_LARGE", 1)


def test_a_dead_output_is_the_next_one():
    q, k = make_qk()
    q2, k2 = rf.apply_rope(q, k, SPEC)
    expected = q2.clone(), k2.clone()
    freed = {q2.data_ptr(), k2.data_ptr()}
    q2.fill_(torch.nan)
    k2.fill_(torch.nan)
    del q2, k2
    again = rf.apply_rope(q, k, SPEC)
    assert {t.data_ptr() for t in again} <= freed
    for actual, true in zip(again, expected, strict=True):
        assert_same_bits(actual, true)


def test_a_living_output_is_nobody_elses():
    q, k = make_qk()
    held = [rf.apply_rope(q + i, k, SPEC) for i in range(8)]
    views = [pair[0].flatten()[:3] for pair in held]  # a view keeps its memory alive
    copies = [pair[0].flatten()[:3].clone() for pair in held]
    del held
    rf.apply_rope(q - 1, k, SPEC)
    for view, copy in zip(views, copies, strict=True):
        assert_same_bits(view, copy)


@pytest.mark.parametrize("head_dim", [16, 128])  # too small for whole vectors, and large enough
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_and_strides(layout, dtype, interleaved, head_dim):
    spec = make_spec(head_dim, interleaved=interleaved)
    q, k = make_qk(layout, head_dim=head_dim, dtype=dtype)
    check(q, k, spec, layout=layout)
    q, k = q.transpose(0, 1).contiguous().transpose(0, 1), k
    q2, _ = rf.apply_rope(q, k, spec, layout=layout)
    assert q2.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("partial", [0.5, 0.75])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dimensions_that_do_not_turn(dtype, partial):
    q, k = make_qk(head_dim=256, dtype=dtype)
    check(q, k, make_spec(256, partial_rotary_factor=partial))


@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_without_alignment_change_no_bit(dtype):
    spec = make_spec(128)
    q, k = make_qk(head_dim=128, dtype=dtype)
    out = tuple(torch.full((t.numel() + 1,), torch.nan, dtype=dtype)[1:].view_as(t) for t in (q, k))
    rf.apply_rope(q, k, spec, out=out)
    for actual, true in zip(out, rf.apply_rope(q, k, spec), strict=True):
        assert_same_bits(actual, true)


def test_an_output_may_be_changed_in_place_and_differentiated():
    q, k = (t.requires_grad_() for t in make_qk())
    q2, k2 = rf.apply_rope(q, k, SPEC)
    q2.mul_(2)
    (q2.sum() + k2.sum()).backward()
    expected = rf.apply_rope(torch.ones_like(q), torch.ones_like(k), SPEC, conjugate=True)
    assert_same_bits(q.grad, 2 * expected[0])
    assert_same_bits(k.grad, expected[1])


def test_a_profiler_of_memory_can_see_them():
    q, k = make_qk(seqlen=64)
    assert peak(lambda: rf.apply_rope(q, k, SPEC)) >= (q.numel() + k.numel()) * q.element_size()
