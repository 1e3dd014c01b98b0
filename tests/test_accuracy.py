"""cos and sin as apply_rope computes them, against 60-digit arithmetic."""

import mpmath
import pytest
import torch

import rope_fused as rf
from helpers import assert_same_bits, make_spec
from rope_fused import reference

POSITIONS = (0, 1, 4_095, 131_071, 1_048_575, 16_777_216, 2**31 - 1)
POSITIONS = torch.tensor(sorted({sign * p for p in POSITIONS for sign in (1, -1)}))
HEAD_DIM = 64


def truth(inv_freq, positions, digits=60):
    """cos and sin of position * inv_freq, [positions, pairs], as float64 rounded from `digits`."""
    with mpmath.workdps(digits):
        angles = [[p * mpmath.mpf(w) for w in inv_freq.tolist()] for p in positions.tolist()]
        return tuple(
            torch.tensor(
                [[float(f(angle)) for angle in row] for row in angles], dtype=torch.float64
            )
            for f in (mpmath.cos, mpmath.sin)
        )


@pytest.fixture(scope="module", params=[1e4, 5e5, 1e6], ids=lambda theta: f"theta-{theta:.0e}")
def case(request):
    spec = make_spec(HEAD_DIM, rope_theta=request.param)
    return spec, *truth(spec.inv_freq(), POSITIONS)


def extract(rotate, dtype, device, interleaved=False):
    """cos and sin of every pair, from the unit vectors (1, 0) and, to be sure, (0, 1)."""
    first = torch.zeros(len(POSITIONS), 2, HEAD_DIM, dtype=dtype, device=device)
    lo, hi = (
        (slice(0, None, 2), slice(1, None, 2))
        if interleaved
        else (slice(0, HEAD_DIM // 2), slice(HEAD_DIM // 2, None))
    )
    first[:, 0, lo] = 1
    first[:, 1, hi] = 1
    out = rotate(first)
    assert out.dtype == dtype
    cos, sin = out[:, 0, lo], out[:, 0, hi]
    assert_same_bits(out[:, 1, hi] + 0.0, cos + 0.0)  # -0 is 0 here
    assert_same_bits(0.0 - out[:, 1, lo], sin + 0.0)
    return cos.cpu().double(), sin.cpu().double()


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-7), (torch.float64, 1e-9)], ids=["float32", "float64"]
)
def test_cos_and_sin(case, dtype, bound, interleaved, integer, backend, device):
    spec, cos, sin = case
    spec = make_spec(HEAD_DIM, rope_theta=spec.rope_theta, interleaved=interleaved)
    positions = POSITIONS.to(device, integer)
    got = extract(
        lambda x: rf.apply_rope(x, None, spec, positions, layout="thd", backend=backend)[0],
        dtype,
        device,
        interleaved,
    )
    assert (got[0] - cos).abs().max() <= bound
    assert (got[1] - sin).abs().max() <= bound


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-7), (torch.float64, 1e-9)], ids=["float32", "float64"]
)
def test_overridden_frequencies(case, dtype, bound, backend, device):
    """inv_freq given as a tensor reaches its fixed-point form on its own device."""
    spec, cos, sin = case
    inv_freq = spec.inv_freq().to(device)
    other = make_spec(HEAD_DIM, rope_theta=10.0)

    def rotate(x):
        out, _ = rf.apply_rope(
            x, None, other, POSITIONS.to(device), layout="thd", inv_freq=inv_freq, backend=backend
        )
        return out

    got = extract(rotate, dtype, device)
    assert (got[0] - cos).abs().max() <= bound
    assert (got[1] - sin).abs().max() <= bound


def test_a_float32_angle_fails(case):
    """The bound is one that the usual formula does not meet, nor float64 angles in one product."""
    spec, cos, sin = case
    angle = POSITIONS[:, None].float() * spec.inv_freq().float()
    got = extract(
        lambda x: reference.rotate_tables(
            x, None, *(f(angle).repeat(1, 2)[None] for f in (torch.cos, torch.sin)), layout="thd"
        )[0],
        torch.float32,
        "cpu",
    )
    assert (got[0] - cos).abs().max() > 100 * 2e-7
    assert (got[1] - sin).abs().max() > 100 * 2e-7


def test_cos_sin_of_the_spec(case, device):
    spec, cos, sin = case
    for dtype, bound in ((torch.float32, 2e-7), (torch.float64, 1e-9)):
        got = spec.cos_sin(POSITIONS.to(device), dtype=dtype)
        assert (got[0].cpu().double() - cos).abs().max() <= bound
        assert (got[1].cpu().double() - sin).abs().max() <= bound


def test_reference_is_the_truth(case, device):
    """The arbiter of every other test, to 1e-15 of an angle."""
    spec, cos, sin = case
    got = extract(
        lambda x: reference.apply_rope(x, None, spec, POSITIONS.to(device), layout="thd")[0],
        torch.float64,
        device,
    )
    assert (got[0] - cos).abs().max() <= 1.5e-15
    assert (got[1] - sin).abs().max() <= 1.5e-15


def test_reference_at_every_int64_position(device):
    """Beyond 2**53, where a float64 position is no longer exact."""
    edges = [2**53 - 1, 2**53 + 1, -(2**53) - 1, 2**62 + 1, 2**63 - 1, -(2**63), -(2**63) + 1]
    positions = torch.cat((torch.tensor(edges), torch.randint(-(2**62), 2**62, (20,))))
    inv_freq = torch.tensor([1.0, 0.8659643233600653, 1e-3, 3.0, torch.pi / 2], dtype=torch.float64)
    x = torch.ones(1, len(positions), 1, 10, dtype=torch.float64, device=device)
    x[..., 5:] = 0
    out, _ = reference.rotate(
        x,
        None,
        inv_freq=inv_freq[None].to(device),
        scale=torch.ones(1, 5, dtype=torch.float64, device=device),
        positions=positions[None].to(device),
    )
    for got, want in zip(out[0, :, 0].cpu().split(5, -1), truth(inv_freq, positions), strict=True):
        assert (got - want).abs().max() <= 1.5e-15
