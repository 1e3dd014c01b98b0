"""Shared by the tests: random operands, specs, and the error budgets of the numerics contract."""

import contextlib

import torch

import rope_fused as rf
from rope_fused import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# -- backends ----------------------------------------------------------------------------------


def usable_backends(device):
    """Names that `backend=` takes for tensors on `device`, the reference first."""
    names = ["reference"]
    for name, state in rf.backends().items():
        here = (name == "cpu" or state == "interpreted") == (torch.device(device).type == "cpu")
        if name != "reference" and state in ("ready", "interpreted") and here:
            names.append(name)
    return names


def interpreted(backend):
    """Whether a program of a kernel takes milliseconds, so that a test should do with few."""
    return rf.backends().get(backend) == "interpreted"


# -- operands ----------------------------------------------------------------------------------


def make_spec(head_dim=16, rope_theta=1e4, **kwargs):
    return rf.RopeSpec.default(head_dim=head_dim, rope_theta=rope_theta, **kwargs)


def make_longrope(head_dim=16, original=8, **kwargs):
    """Short and long factors that differ everywhere; sequences up to `original` are short."""
    pairs = head_dim // 2
    return rf.RopeSpec.longrope(
        head_dim=head_dim,
        rope_theta=1e4,
        short_factor=[1.0 + 0.125 * j for j in range(pairs)],
        long_factor=[2.0 + 0.5 * j for j in range(pairs)],
        factor=8.0,
        original_max_position_embeddings=original,
        **kwargs,
    )


def randn(*shape, dtype=torch.float32, device="cpu", requires_grad=False):
    """Standard normal numbers: drawn in float64 on the CPU, so that every device gets the same."""
    x = torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype)
    return x.requires_grad_(requires_grad)


def shape_of(layout, batch, seqlen, heads, head_dim):
    if layout == "thd":
        return (batch * seqlen, heads, head_dim)
    if layout == "bhsd":
        return (batch, heads, seqlen, head_dim)
    return (batch, seqlen, heads, head_dim)


def make_qk(layout="bshd", batch=2, seqlen=9, heads=4, kv_heads=2, head_dim=16, **kwargs):
    return (
        randn(*shape_of(layout, batch, seqlen, heads, head_dim), **kwargs),
        randn(*shape_of(layout, batch, seqlen, kv_heads, head_dim), **kwargs),
    )


def snapshot(*tensors):
    """Copies of values and version counters, for `assert_unchanged`."""
    return [(t, t.detach().clone(), t._version) for t in tensors if t is not None]


def assert_unchanged(snapshots):
    for tensor, value, version in snapshots:
        assert tensor._version == version, "an input was written in place"
        assert same_bits(tensor.detach(), value), "an input's values changed"


def same_bits(a, b):
    """Equal bit for bit: the sign of zero and the payload of NaN count."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = (t.resolve_neg().contiguous().view(ints) for t in (a, b))
    return torch.equal(a, b)


def assert_same_bits(a, b, message=""):
    if not same_bits(a, b):
        difference = (a.double() - b.double()).abs().max() if a.shape == b.shape else None
        raise AssertionError(
            f"not bit-identical {message}: {tuple(a.shape)} {a.dtype} against "
            f"{tuple(b.shape)} {b.dtype}, largest difference {difference}"
        )


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- error budgets -----------------------------------------------------------------------------


def half_ulp(x64, dtype):
    """Half the distance of neighbours of `dtype` around float64 numbers, subnormal ones too."""
    info = torch.finfo(dtype)
    digits = -round(torch.log2(torch.tensor(info.eps, dtype=torch.float64)).item())
    lowest = round(torch.log2(torch.tensor(info.tiny, dtype=torch.float64)).item())
    finite = torch.nan_to_num(x64, nan=0.0, posinf=0.0, neginf=0.0)
    _, exponent = torch.frexp(finite)  # 2**(exponent - 1) <= |x| < 2**exponent
    exponent = torch.where(finite == 0, lowest, exponent - 1).clamp(min=lowest)
    return torch.exp2((exponent - digits - 1).double())


def pair_magnitude(y64, spec):
    """hypot of the pair that each element belongs to; of itself where it is not rotated.

    Taken after the rotation, where the attention factor and q_scale are already in it.
    """
    start, half = spec.rotary_offset, spec.rotary_dim // 2
    magnitude = y64.abs().clone()
    part = y64[..., start : start + 2 * half]
    if spec.interleaved:
        both = torch.hypot(part[..., 0::2], part[..., 1::2]).repeat_interleave(2, dim=-1)
    else:
        both = torch.hypot(part[..., :half], part[..., half:]).repeat(*[1] * (y64.dim() - 1), 2)
    magnitude[..., start : start + 2 * half] = both
    return magnitude


def rotation_slack(dtype, largest_position):
    """What is granted beyond the rounding of the result, relative to the pair's magnitude.

    2**-21 in float32 arithmetic. float64 rounds a sine, a cosine, two products, a sum and the
    attention factor: 2**-50 is eight half-ulps. To both comes the rounding of the frequency to a
    64-bit fraction of a turn, half a unit for each position.
    """
    arithmetic = 2.0**-50 if dtype == torch.float64 else 2.0**-21
    return arithmetic + 2 * torch.pi * abs(largest_position) * 2.0**-65


def assert_close_to(actual, reference64, slack):
    """|actual - reference64| <= half an ulp + slack, where a result may round to infinity."""
    assert reference64.dtype == torch.float64
    assert actual.shape == reference64.shape, (actual.shape, reference64.shape)
    dtype, actual = actual.dtype, actual.detach().double()
    reference64, slack = reference64.detach(), slack.detach()
    info = torch.finfo(dtype)
    # From here on, round-to-nearest gives infinity.
    largest = torch.tensor(info.max, dtype=torch.float64)
    overflow = info.max + half_ulp(largest, dtype).item() if dtype != torch.float64 else torch.inf

    bad = actual.isnan() != reference64.isnan()
    infinite = reference64.isinf()
    bad |= infinite & (actual != reference64)
    finite = reference64.isfinite() & ~actual.isnan()
    may_overflow = finite & (reference64.abs() + slack >= overflow)
    must_overflow = finite & (reference64.abs() - slack >= overflow)
    is_infinite = actual.isinf() & (actual.sign() == reference64.sign())
    bad |= finite & actual.isinf() & ~(may_overflow & is_infinite)
    bad |= must_overflow & ~is_infinite
    compare = finite & actual.isfinite()
    error = torch.where(compare, (actual - reference64).abs(), 0.0)
    budget = half_ulp(reference64, dtype) + slack
    bad |= compare & (error > budget)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements of {dtype} are out of budget; first at "
            f"{at}: got {actual[at].item()!r}, reference {reference64[at].item()!r}, error "
            f"{error[at].item():.3e}, budget {budget[at].item():.3e}; worst error / budget "
            f"{(error / budget).max().item():.3f}"
        )


def assert_within_rotation_budget(actual, reference64, spec, positions=None):
    """|y - y64| <= ulp(y64) / 2 + 2**-21 * attention_factor * |q_scale| * hypot(a, b)."""
    if actual is None or reference64 is None:
        assert actual is None and reference64 is None
        return
    largest = actual.numel()
    if positions is not None:
        largest = positions.abs().max().item() if positions.numel() else 0
    slack = rotation_slack(actual.dtype, largest) * pair_magnitude(reference64, spec)
    assert_close_to(actual, reference64, torch.nan_to_num(slack, nan=0.0, posinf=0.0))


def assert_within_projection_budget(actual, reference64, eager, reordering=None):
    """No worse against float64 than the eager formula of the same dtype, plus one rounding.

    By root mean square, which does not depend on the order of a sum as single elements do. They are
    held to the largest error of the formula, a rounding, and `reordering`: how far apart two orders
    of the same sum can be. The largest error is what was seen, or what the formula's own rounding
    of the projections can do: half an ulp in each member of a pair, turned into one of them.
    float64 results have no better reference, and only this second bound.
    """
    assert actual.dtype == eager.dtype, (actual.dtype, eager.dtype)
    assert actual.shape == eager.shape == reference64.shape
    assert bool(actual.isfinite().all())
    if not actual.numel():
        return
    rounding = half_ulp(reference64, actual.dtype)
    ours = (actual.detach().double() - reference64).abs()
    theirs = (eager.detach().double() - reference64).abs()
    if actual.dtype != torch.float64:
        error, budget, slack = (e.square().mean().sqrt() for e in (ours, theirs, rounding))
        assert error <= budget + slack, f"rms: {error:.3e}, budget {budget + slack:.3e}"
    if reordering is not None:
        pair = 2**0.5 * reference64.abs().max()  # no smaller than the pair the rotation has kept
        projection = 2**0.5 * half_ulp(pair, actual.dtype)
        budget = torch.maximum(theirs.max(), projection) + rounding.max() + reordering
        assert ours.max() <= budget, f"max: {ours.max():.3e}, budget {budget:.3e}"


def check(q, k, spec, positions=None, backend="auto", **kwargs):
    """Rotate, compare with the reference, and see that nothing else happened."""
    extra = [v for v in kwargs.values() if isinstance(v, torch.Tensor)]
    before = snapshot(q, k, positions, *extra)
    q2, k2 = rf.apply_rope(q, k, spec, positions, backend=backend, **kwargs)
    assert_unchanged(before)
    want_q, want_k = reference.apply_rope(q, k, spec, positions, **kwargs)
    for x, y, want in ((q, q2, want_q), (k, k2, want_k)):
        if x is None:
            assert y is None
            continue
        assert (y.dtype, y.device, y.shape) == (x.dtype, x.device, x.shape)
        assert y.stride() == torch.empty_like(x).stride()
        assert_within_rotation_budget(y, want, spec, positions)
    return q2, k2
