"""apply_rope against the reference: positions, axes of them, packed sequences, their tables."""

import pytest
import torch

import rope_fused as rf
from helpers import (
    assert_same_bits,
    assert_within_rotation_budget,
    check,
    make_longrope,
    make_qk,
    make_spec,
    rotation_slack,
    same_bits,
)
from rope_fused import reference

POSITIONS = {
    "shifted": lambda n: torch.arange(100, 100 + n),
    "repeated": lambda n: torch.full((n,), 7),
    "descending": lambda n: torch.arange(n - 1, -1, -1),
    "negative": lambda n: torch.arange(-n, 0),
    "mixed-signs": lambda n: torch.arange(n) * 1000 - 4000,
    "random": lambda n: torch.randint(0, 2**20, (n,)),
    "int32-limits": lambda n: torch.tensor([2**31 - 1, -(2**31), 2**31 - 2, 0])[
        torch.arange(n) % 4
    ],
}


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name, integer, backend, device):
    positions = POSITIONS[name](9).to(device, integer)
    spec = make_spec()
    for dtype in (torch.float32, torch.float64):
        q, k = make_qk(dtype=dtype, device=device)
        check(q, k, spec, positions, backend=backend)
        check(q, k, spec, positions[None], backend=backend)
        both = torch.stack((positions, positions.flip(0)))
        check(q, k, spec, both, backend=backend)
        check(q, k, spec, both.t().contiguous().t(), backend=backend)
        check(q.transpose(1, 2), k.transpose(1, 2), spec, both, layout="bhsd", backend=backend)
        check(q[0], k[0], spec, positions, layout="thd", backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_positions_beyond_32_bits(dtype, backend, device):
    """The phase is exact in its 64 bits: the error is that of the rounded frequency alone."""
    positions = torch.tensor(
        [2**31, -(2**31) - 1, 2**32, 2**32 + 1, 2**40 + 3, -(2**44) - 5, 2**45]
    )
    q, k = make_qk(seqlen=7, dtype=dtype, device=device)
    check(q, k, make_spec(rope_theta=5e5), positions.to(device), backend=backend)


def test_every_int64_position_is_legal(backend, device):
    positions = torch.tensor([2**63 - 1, -(2**63), 2**62 + 1], device=device)
    q, k = make_qk(seqlen=3, device=device)
    q2, _ = rf.apply_rope(q, k, make_spec(), positions, backend=backend)
    before, after = (torch.hypot(*x.double().chunk(2, -1)) for x in (q, q2))
    # Whatever the angle, a rotation keeps a pair's length: two results, each within its budget.
    torch.testing.assert_close(after, before, rtol=2**-23 + 2**-20, atol=0)


def test_default_positions_count_from_zero(backend, device):
    q, k = make_qk(device=device)
    spec = make_spec()
    explicit = rf.apply_rope(q, k, spec, torch.arange(9, device=device), backend=backend)
    for a, b in zip(rf.apply_rope(q, k, spec, backend=backend), explicit, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("interleaved_axes", [False, True])
def test_position_axes(interleaved_axes, backend, device):
    """Multimodal positions: an axis of its own for each pair."""
    spec = make_spec(16, mrope_section=(2, 3, 3), mrope_interleaved=interleaved_axes)
    assert spec.axes == 3
    for dtype in (torch.float32, torch.float64):
        q, k = make_qk(dtype=dtype, device=device)
        positions = torch.randint(0, 500, (3, 2, 9), device=device)
        check(q, k, spec, positions, backend=backend)
        check(q, k, spec, positions[:, :1], backend=backend)
        check(q, k, spec, positions[:, 0], backend=backend)
        # Text tokens, the same position on every axis: ordinary rotary embedding, bit for bit.
        text = torch.arange(9, device=device)
        got = rf.apply_rope(q, k, spec, text.expand(3, 9), backend=backend)
        plain = rf.apply_rope(q, k, make_spec(16), text, backend=backend)
        for a, b in zip(got, plain, strict=True):
            assert_same_bits(a, b)


def test_rotation_by_relative_position(backend, device):
    """q . k depends on the distance of their positions alone (float64: to its rounding)."""
    spec = make_spec(32, rope_theta=5e5)
    q, k = make_qk(heads=2, kv_heads=2, head_dim=32, dtype=torch.float64, device=device)
    scores = []
    for shift in (0, 1, 12345, 2**30):
        positions = torch.arange(9, device=device) + shift
        q2, k2 = rf.apply_rope(q, k, spec, positions, backend=backend)
        scores.append(torch.einsum("bshd,bthd->bhst", q2, k2))
    size = torch.einsum("bshd,bthd->bhst", q.abs(), k.abs()).max().item()
    for other in scores[1:]:
        # Each rotation within its slack of the pair's length, at most sqrt(2) times the products.
        budget = 4 * (rotation_slack(torch.float64, 2**30 + 9) + 2.0**-48) * size
        assert (other - scores[0]).abs().max() <= budget


# -- packed batches and tables per sequence ----------------------------------------------------

PACKED = {
    "three": [0, 4, 5, 13],
    "one": [0, 13],
    "empty-first": [0, 0, 6, 13],
    "empty-middle": [0, 6, 6, 6, 13],
    "empty-last": [0, 6, 13, 13],
    "single-tokens": list(range(14)),
}


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("name", PACKED)
def test_cu_seqlens(name, integer, backend, device):
    ends = PACKED[name]
    cu_seqlens = torch.tensor(ends, dtype=integer, device=device)
    q, k = make_qk("thd", 1, 13, device=device)
    apart = {"short_mscale": 1.25, "long_mscale": 1.5}  # each table its own attention factor
    for spec in (make_spec(), make_longrope(original=5), make_longrope(original=5, **apart)):
        q2, k2 = check(q, k, spec, layout="thd", cu_seqlens=cu_seqlens, backend=backend)
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            alone = rf.apply_rope(q[start:end], k[start:end], spec, layout="thd", backend=backend)
            assert_same_bits(q2[start:end], alone[0])
            assert_same_bits(k2[start:end], alone[1])


def test_cu_seqlens_with_positions(backend, device):
    """Positions win over the boundaries: the shard of a context-parallel rank, say."""
    cu_seqlens = torch.tensor([0, 4, 13], device=device)
    q, k = make_qk("thd", 1, 13, device=device)
    positions = torch.randint(0, 1000, (13,), device=device)
    check(q, k, make_spec(), positions, layout="thd", cu_seqlens=cu_seqlens, backend=backend)
    spec = make_longrope(original=500)
    check(q, k, spec, positions, layout="thd", cu_seqlens=cu_seqlens, backend=backend)


def test_no_sequences(backend, device):
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
    q, k = make_qk("thd", 1, 0, device=device)
    check(q, k, make_spec(), layout="thd", cu_seqlens=cu_seqlens, backend=backend)


@pytest.mark.parametrize("lengths", [[8, 9], [9, 8], [9, 9], [8, 8], [3, 4000]])
def test_seq_lens_choose_the_table(lengths, backend, device):
    """L itself is short, L + 1 is long; each sequence for itself."""
    spec = make_longrope(original=8)
    q, k = make_qk(device=device)
    seq_lens = torch.tensor(lengths, device=device)
    q2, k2 = check(q, k, spec, seq_lens=seq_lens, backend=backend)
    check(q, k, spec, seq_lens=seq_lens.int(), backend=backend)
    for row, length in enumerate(lengths):
        alone = rf.RopeSpec.default(head_dim=16, rope_theta=1e4)
        want, _ = reference.apply_rope(
            q[row : row + 1],
            None,
            alone,
            inv_freq=spec.rows()[int(length > 8)].to(device),
            attention_factor=spec.scale_rows()[int(length > 8)].to(device),
        )
        assert_within_rotation_budget(q2[row : row + 1], want, spec)


def test_length_found_from_positions(backend, device):
    spec = make_longrope(original=8)
    q, k = make_qk(seqlen=4, device=device)
    positions = torch.tensor([[4, 5, 6, 7], [8, 7, 6, 5]], device=device)
    q2, _ = check(q, k, spec, positions, backend=backend)
    pinned, _ = rf.apply_rope(
        q, k, spec, positions, seq_lens=torch.tensor([8, 9], device=device), backend=backend
    )
    assert_same_bits(q2, pinned)
    swapped, _ = rf.apply_rope(
        q, k, spec, positions, seq_lens=torch.tensor([9, 8], device=device), backend=backend
    )
    assert not same_bits(q2[0], swapped[0]) and not same_bits(q2[1], swapped[1])


def test_mixed_packed_batch_equals_each_alone(backend, device):
    """Short and long sequences in one call, and each as a batch of its own: bit for bit."""
    spec = make_longrope(original=8)
    for layout in ("thd", "bshd"):
        ends = [0, 8, 17, 18, 30]
        q, k = make_qk("thd", 1, 30, device=device)
        if layout == "bshd":
            q, k = q[None], k[None]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        q2, _ = check(q, k, spec, layout=layout, cu_seqlens=cu_seqlens, backend=backend)
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            piece = q[..., start:end, :, :] if layout == "bshd" else q[start:end]
            alone, _ = rf.apply_rope(piece, None, spec, layout=layout, backend=backend)
            assert_same_bits(q2[..., start:end, :, :] if layout == "bshd" else q2[start:end], alone)


def test_batch_row_equals_itself_alone(backend, device):
    q, k = make_qk(batch=3, device=device, dtype=torch.bfloat16)
    spec = make_longrope(original=6)
    positions = torch.stack([torch.arange(9) - 4, torch.arange(9), torch.arange(9) + 1000])
    positions = positions.to(device)
    q2, k2 = rf.apply_rope(q, k, spec, positions, backend=backend)
    for row in range(3):
        here = slice(row, row + 1)
        alone = rf.apply_rope(q[here], k[here], spec, positions[here], backend=backend)
        assert_same_bits(q2[here], alone[0])
        assert_same_bits(k2[here], alone[1])


@pytest.mark.parametrize("conjugate", [False, True], ids=["forward", "conjugate"])
def test_first_tokens_keep_the_base_frequencies(conjugate, backend, device):
    """LongRoPE's n-hat: positions below it use a third table, in short and in long sequences."""
    spec = make_longrope(original=8, n_start=3)
    assert spec.rows().shape[0] == 3
    q, k = make_qk(device=device)
    options = {"conjugate": conjugate, "backend": backend}
    check(q, k, spec, **options)
    check(q, k, spec, seq_lens=torch.tensor([8, 9], device=device), **options)
    positions = torch.randint(-5, 8, (2, 9), device=device)
    check(q, k, spec, positions, **options)
    cu_seqlens = torch.tensor([0, 2, 9], device=device)
    check(q[:1], k[:1], spec, cu_seqlens=cu_seqlens, **options)


def test_dynamic_tables(backend, device):
    spec = rf.RopeSpec.dynamic(head_dim=16, rope_theta=1e4, factor=2.0, max_position_embeddings=8)
    for dtype in (torch.float32, torch.float64):
        q, k = make_qk(dtype=dtype, device=device)
        for lengths in ([9, 9], [4, 8], [9, 64]):
            check(q, k, spec, seq_lens=torch.tensor(lengths, device=device), backend=backend)
