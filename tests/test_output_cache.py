"""Memory of large outputs: lent again when an output has died, never while it lives."""

import pytest
import torch

import rope_fused as rf
from helpers import assert_same_bits, check, make_qk, make_spec
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


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_and_strides(layout, dtype):
    q, k = make_qk(layout, dtype=dtype)
    check(q, k, SPEC, layout=layout)
    q, k = q.transpose(0, 1).contiguous().transpose(0, 1), k
    q2, _ = rf.apply_rope(q, k, SPEC, layout=layout)
    assert q2.stride() == torch.empty_like(q).stride()


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
