"""rerotate: cached keys moved between tables, against rotating them afresh."""

import pytest
import torch

import rope_fused as rf
from helpers import (
    DTYPES,
    assert_close_to,
    assert_same_bits,
    assert_unchanged,
    half_ulp,
    make_longrope,
    make_spec,
    pair_magnitude,
    randn,
    rotation_slack,
    shape_of,
    snapshot,
)
from rope_fused import reference

DEFAULT = make_spec(rope_theta=5e5)
SCALED = {"head_dim": 16, "factor": 4.0, "original_max_position_embeddings": 8}
YARN = rf.RopeSpec.yarn(rope_theta=5e5, **SCALED)
MSCALES = rf.RopeSpec.yarn(
    rope_theta=5e5, **SCALED, attention_factor=[1 + 0.125 * j for j in range(8)]
)
LLAMA3 = rf.RopeSpec.llama3(rope_theta=1e4, **SCALED, low_freq_factor=1.0, high_freq_factor=4.0)
START = make_longrope(n_start=3)
OTHER_START = make_longrope(original=4, n_start=5)
DYNAMIC = rf.RopeSpec.dynamic(head_dim=16, rope_theta=1e4, factor=2.0, max_position_embeddings=4)
DYNAMIC_YARN = rf.RopeSpec.dynamic_yarn(
    head_dim=16, rope_theta=1e4, original_max_position_embeddings=4
)
STILL = rf.RopeSpec.of("none", head_dim=16, rope_theta=1e4)
# name: (from_spec, its lengths, to_spec, its lengths); batches of two sequences of nine tokens
MOVES = {
    "default-yarn": (DEFAULT, None, YARN, None),
    "yarn-llama3": (YARN, None, LLAMA3, None),
    "per-pair": (MSCALES, None, YARN, None),
    "to-nothing": (YARN, None, STILL, None),
    "short-long": (make_longrope(), [8, 8], make_longrope(), [9, 9]),
    "long-short": (make_longrope(), [9, 9], make_longrope(), [8, 8]),
    "mixed": (make_longrope(), [8, 9], make_longrope(), [9, 9]),
    "start": (START, [8, 8], START, [9, 9]),
    "two-starts": (START, [8, 9], OTHER_START, [4, 5]),
    "start-static": (START, [8, 9], YARN, None),
    "static-start": (YARN, None, START, [9, 8]),
    "grown": (DYNAMIC, [4, 7], DYNAMIC, [9, 9]),
    "dynamic-other": (DYNAMIC, [9, 6], DYNAMIC_YARN, [12, 9]),
    "dynamic-switch": (DYNAMIC, [9, 6], START, [8, 9]),
    "switch-dynamic": (START, [8, 9], DYNAMIC_YARN, [12, 9]),
}


def lengths(values, device):
    return None if values is None else torch.tensor(values, device=device)


def moved(name, k, positions, device, **options):
    from_spec, old, to_spec, new = MOVES[name]
    return rf.rerotate(
        k,
        positions,
        from_spec,
        to_spec,
        from_seq_lens=lengths(old, device),
        to_seq_lens=lengths(new, device),
        **options,
    )


def assert_moved(moved, before, afresh, spec, positions):
    """One rounding beside the one that `before` (float64 truth) had when it was cached.

    Neither table's frequencies are whole fractions of a turn, and the reference rounds their
    difference to float64, by at most 2**-54 as frequencies are below 1.
    """
    lengths = pair_magnitude(afresh, spec)
    relative = pair_magnitude(half_ulp(before, moved.dtype), spec) / pair_magnitude(before, spec)
    largest = positions.abs().max().item()
    slack = 3 * rotation_slack(moved.dtype, largest) + 2.0**-54 * largest
    assert_close_to(moved, afresh, (slack + relative) * lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_equals_rotating_afresh(name, dtype, backend, device):
    from_spec, old, to_spec, new = MOVES[name]
    plain = randn(2, 9, 3, 16, dtype=dtype, device=device)
    positions = torch.stack((torch.arange(9), torch.arange(9).flip(0))).to(device)
    options = {"seq_lens": lengths(old, device)}
    cached, _ = rf.apply_rope(plain, None, from_spec, positions, backend=backend, **options)
    before, _ = reference.apply_rope(plain, None, from_spec, positions, **options)
    afresh, _ = reference.apply_rope(plain, None, to_spec, positions, seq_lens=lengths(new, device))
    kept = snapshot(cached, positions)
    got = moved(name, cached, positions, device, backend=backend)
    assert_unchanged(kept)
    assert (got.dtype, got.stride()) == (dtype, cached.stride())
    assert_moved(got, before, afresh, to_spec, positions)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_rounding_at_far_positions(interleaved, dtype, backend, device):
    """Against the rotation by both phases in float64: half an ulp, and the slack of one rotation.

    A difference of two tables of cosines in float32 would be off by hundredths here.
    """
    options = {"interleaved": interleaved, "head_dim": 32, "rotary_offset": 8}
    options |= {"partial_rotary_factor": 0.5, "rope_theta": 1e6}
    from_spec = rf.RopeSpec.default(**options)
    to_spec = rf.RopeSpec.yarn(**options, factor=4.0, original_max_position_embeddings=1 << 15)
    positions = torch.tensor([0, 1, 131071, 1 << 20, 2**31 - 1, -(2**31) + 1, 7])
    positions = positions.to(device)
    k = randn(1, 7, 2, 32, dtype=dtype, device=device)
    want, _ = reference.apply_rope(k.double(), None, from_spec, positions, conjugate=True)
    want, _ = reference.apply_rope(want, None, to_spec, positions)
    got = rf.rerotate(k, positions, from_spec, to_spec, backend=backend)
    slack = rotation_slack(dtype, 2 * 2**31) + 2.0**-54 * 2**31
    assert_close_to(got, want, slack * pair_magnitude(want, to_spec))


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
def test_layouts_and_packed_sequences(layout, backend, device):
    """Each sequence alone, bit for bit, short and long ones side by side."""
    spec = make_longrope(original=8, n_start=2)
    batch = 1 if layout == "thd" else 3
    k = randn(*shape_of(layout, batch, 12, 2, 16), dtype=torch.bfloat16, device=device)
    old = torch.tensor([8, 9, 8], device=device)
    new = torch.tensor([9, 8, 8], device=device)
    options = {"layout": layout, "backend": backend}
    if layout == "thd":
        cu_seqlens = torch.tensor([0, 4, 5, 12], device=device)
        got = rf.rerotate(
            k, None, spec, spec, cu_seqlens=cu_seqlens, from_seq_lens=old, to_seq_lens=new,
            **options,
        )  # fmt: skip
        parts = [slice(0, 4), slice(4, 5), slice(5, 12)]
    else:
        got = rf.rerotate(k, None, spec, spec, from_seq_lens=old, to_seq_lens=new, **options)
        parts = [slice(row, row + 1) for row in range(3)]
    for i, part in enumerate(parts):
        ones = {"from_seq_lens": old[i : i + 1], "to_seq_lens": new[i : i + 1]}
        assert_same_bits(got[part], rf.rerotate(k[part], None, spec, spec, **ones, **options))
    assert not torch.equal(got[parts[0]], k[parts[0]])
    assert_same_bits(got[parts[2]], k[parts[2]])  # the same table: no turn at all


def test_position_axes(backend, device):
    section = {"head_dim": 16, "mrope_section": (2, 3, 3)}
    from_spec = rf.RopeSpec.default(rope_theta=1e4, **section)
    to_spec = rf.RopeSpec.linear(rope_theta=1e6, factor=2.0, **section)
    positions = torch.randint(0, 500, (3, 2, 9), device=device)
    plain = randn(2, 9, 2, 16, device=device)
    cached, _ = rf.apply_rope(plain, None, from_spec, positions, backend=backend)
    before, _ = reference.apply_rope(plain, None, from_spec, positions)
    afresh, _ = reference.apply_rope(plain, None, to_spec, positions)
    got = rf.rerotate(cached, positions, from_spec, to_spec, backend=backend)
    assert_moved(got, before, afresh, to_spec, positions)


@pytest.mark.parametrize("name", ["per-pair", "two-starts", "grown"])
def test_differentiable(name, backend, device):
    k = randn(2, 6, 1, 16, dtype=torch.float64, device=device, requires_grad=True)

    def call(k):
        return moved(name, k, None, device, backend=backend)

    assert torch.autograd.gradcheck(call, (k,), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (k,), fast_mode=True)


def test_there_and_back(backend, device):
    """The way back undoes the way there, to the rounding of both (float64)."""
    k = randn(2, 9, 3, 16, dtype=torch.float64, device=device)
    there = rf.rerotate(k, None, YARN, LLAMA3, backend=backend)
    back = rf.rerotate(there, None, LLAMA3, YARN, backend=backend)
    assert_close_to(back, k, 4 * rotation_slack(torch.float64, 9) * pair_magnitude(k, YARN))


def test_in_place(backend, device):
    """`out` may be the cache itself."""
    cache = randn(2, 9, 3, 16, dtype=torch.bfloat16, device=device)
    want = rf.rerotate(cache, None, DEFAULT, YARN, backend=backend)
    got = rf.rerotate(cache, None, DEFAULT, YARN, out=cache, backend=backend)
    assert got is cache
    assert_same_bits(cache, want)


def test_under_compile(device):
    def call(k):
        return rf.rerotate(k, None, DEFAULT, YARN)

    k = randn(1, 5, 2, 16, device=device)
    assert_same_bits(torch.compile(call, fullgraph=True, backend="eager")(k), call(k))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"k": torch.ones(2, 9, 3, 8)}, "k must be of the spec's head_dim 16"),
        ({"k": [1.0]}, "k must be a tensor"),
        ({"layout": "sbhd"}, "layout must be one of"),
        ({"backend": "tpu"}, "backend must be one of"),
        ({"positions": torch.arange(8)}, "positions must be"),
        ({"from_spec": "yarn"}, "from_spec must be a RopeSpec"),
        ({"to_spec": None}, "to_spec must be a RopeSpec"),
        ({"to_spec": make_spec(32)}, "to_spec must have from_spec's head_dim 16, got 32"),
        (
            {"to_spec": make_spec(partial_rotary_factor=0.5)},
            "to_spec must have from_spec's rotary_dim 16, got 8",
        ),
        ({"to_spec": make_spec(interleaved=True)}, "to_spec must have from_spec's interleaved"),
        ({"to_spec": make_spec(mrope_section=(2, 3, 3))}, "to_spec must have .* axis_map None"),
        ({"from_spec": DYNAMIC}, "from_seq_lens must be given"),
        ({"to_spec": DYNAMIC}, "to_seq_lens must be given"),
        ({"to_seq_lens": torch.tensor([1])}, r"to_seq_lens must be \[2\], one length per"),
        ({"from_seq_lens": [8, 8]}, "from_seq_lens must be an int32 or int64 tensor"),
        ({"out": torch.ones(2, 9, 3, 8)}, r"out: k must be \[2, 9, 3, 16\]"),
    ],
)  # fmt: skip
def test_refusals(changed, named):
    call = {"k": torch.ones(2, 9, 3, 16), "positions": None, "from_spec": DEFAULT, "to_spec": YARN}
    with pytest.raises((ValueError, TypeError), match=named):
        rf.rerotate(**call | changed)
