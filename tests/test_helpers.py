"""The measures themselves: a budget that nothing exceeds, poison that nobody meets, is no test."""

import pytest
import torch

from helpers import (
    assert_close_to,
    assert_within_projection_budget,
    assert_within_rotation_budget,
    half_ulp,
    make_spec,
    pair_magnitude,
    randn,
    same_bits,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_ulp(dtype):
    """Half the gap to the next number, found by asking torch for that number."""
    info = torch.finfo(dtype)
    x = torch.cat(
        (torch.randn(1000).to(dtype).abs(), torch.tensor([info.tiny, 1.0, 2.0]).to(dtype))
    )
    gap = torch.nextafter(x, torch.full_like(x, torch.inf)).double() - x.double()
    assert torch.equal(half_ulp(x.double(), dtype), gap / 2)
    smallest = info.smallest_normal * info.eps
    if dtype != torch.float64:  # half of its smallest number is 0
        assert (half_ulp(f64(0.0, smallest, info.tiny / 2), dtype) == smallest / 2).all()


def test_infinity_is_right_only_where_rounding_gives_it():
    none, inf = f64(0.0), float("inf")
    edge = 65504.0 + 16.0  # halfway to what would be the next float16
    assert_close_to(torch.tensor([inf]).half(), f64(edge), none)
    assert_close_to(torch.tensor([65504.0]).half(), f64(edge - 1e-9), none)
    assert_close_to(torch.tensor([inf]).half(), f64(edge - 1.0), f64(2.0))
    for got, reference64, slack in (
        (65504.0, edge, none),
        (inf, edge - 1.0, none),
        (-inf, edge + 1.0, f64(2.0)),
        (inf, 0.0, none),
        (float("nan"), 0.0, none),
        (0.0, float("nan"), none),
        (1.0, inf, none),
    ):
        with pytest.raises(AssertionError):
            assert_close_to(torch.tensor([got]).half(), f64(reference64), slack)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_unit_too_much_is_too_much(dtype):
    exact = randn(100, dtype=dtype)
    assert_close_to(exact, exact.double(), f64(0.0))
    up = torch.nextafter(exact, torch.full_like(exact, torch.inf))
    with pytest.raises(AssertionError):
        assert_close_to(up, exact.double(), f64(0.0))


def test_rotation_budget_sees_twice_its_slack():
    spec = make_spec(16)
    y = torch.randn(3, 5, 2, 16, dtype=torch.float64)
    near = (y * (1 + 2.0**-22)).float()
    assert_within_rotation_budget(near, y, spec)
    with pytest.raises(AssertionError):
        assert_within_rotation_budget((y * (1 + 2.0**-19)).float(), y, spec)
    with pytest.raises(AssertionError):
        assert_within_rotation_budget(y * (1 + 2.0**-48), y, spec)


def test_pair_magnitude():
    y = f64(3, 3, 5, 4, 4, 12, 7, -8).view(1, 1, 1, 8)
    half = make_spec(8, partial_rotary_factor=0.75)
    assert pair_magnitude(y, half).flatten().tolist() == [5, 5, 13, 5, 5, 13, 7, 8]
    pairs = make_spec(8, partial_rotary_factor=0.25, rotary_offset=1, interleaved=True)
    assert pair_magnitude(y, pairs).flatten().tolist() == [3, 34**0.5, 34**0.5, 4, 4, 12, 7, 8]


def test_projection_budget_sees_one_wrong_element():
    y = torch.randn(200, 64, dtype=torch.float64)
    eager = y.float()
    assert_within_projection_budget(y.float(), y, eager, 0.0)
    wrong = y.float()
    wrong[123, 45] += 1e-3
    with pytest.raises(AssertionError):
        assert_within_projection_budget(wrong, y, eager)
    with pytest.raises(AssertionError):
        assert_within_projection_budget(y.bfloat16().float(), y, eager)


def test_same_bits():
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(nan, (nan.view(torch.int32) + 1).view(torch.float32))


def test_memory_is_poisoned_for_the_package_alone():
    for code in (
        "torch.empty(3)",
        "torch.empty_like(x)",
        "torch.empty_strided((2, 2), (1, 2))",
        "x.new_empty(3)",
    ):
        names = {"torch": torch, "x": torch.zeros(2)}
        made = eval(code, names | {"__name__": "rope_fused.native"})
        assert made.isnan().all(), code
        ours = torch.zeros_like(made)
        assert eval("torch.zeros_like(y)", names | {"y": ours}).eq(0).all()
