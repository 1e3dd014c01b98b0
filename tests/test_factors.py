"""apply_rope against the reference: frequencies, attention factor and q_scale given as tensors."""

import dataclasses

import pytest
import torch

import rope_fused as rf
from helpers import (
    DTYPES,
    assert_same_bits,
    assert_within_rotation_budget,
    check,
    make_longrope,
    make_qk,
    make_spec,
    randn,
)


@pytest.mark.parametrize("conjugate", [False, True], ids=["forward", "conjugate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_overrides(dtype, conjugate, backend, device):
    q, k = make_qk(dtype=dtype, device=device)
    common = {"backend": backend, "conjugate": conjugate}
    for partial in (1.0, 0.5):
        spec = make_spec(16, partial_rotary_factor=partial, interleaved=partial < 1)
        pairs = spec.rotary_dim // 2
        inv_freq = torch.rand(pairs, dtype=torch.float64, device=device)
        factors = 0.5 + torch.rand(pairs, dtype=torch.float64, device=device)
        q_scale = randn(2, 9, device=device)
        check(q, k, spec, attention_factor=1.25, **common)
        check(q, k, spec, attention_factor=torch.tensor(0.75, device=device), **common)
        check(q, k, spec, attention_factor=factors, **common)
        check(q, k, spec, attention_factor=factors.float(), **common)
        check(q, k, spec, attention_factor=-factors, **common)
        check(q, k, spec, attention_factor=0.0, **common)
        check(q, k, spec, inv_freq=inv_freq, **common)
        check(q, k, spec, inv_freq=inv_freq.float(), **common)
        check(q, k, spec, inv_freq=-3 * inv_freq, **common)
        check(q, k, spec, inv_freq=inv_freq[None], **common)
        check(q, k, spec, q_scale=q_scale, **common)
        check(q, k, spec, q_scale=q_scale[:1], **common)
        check(q, k, spec, q_scale=q_scale[0], **common)
        check(q, k, spec, q_scale=q_scale.double(), **common)
        check(
            q, k, spec, inv_freq=inv_freq, attention_factor=factors, q_scale=q_scale, **common
        )  # fmt: skip


def test_overrides_per_table(backend, device):
    spec = make_longrope(original=8)
    q, k = make_qk(device=device)
    seq_lens = torch.tensor([8, 9], device=device)
    rows = torch.rand(2, 8, dtype=torch.float64, device=device)
    check(q, k, spec, seq_lens=seq_lens, inv_freq=rows, backend=backend)
    check(q, k, spec, seq_lens=seq_lens, inv_freq=rows[0], backend=backend)
    check(q, k, spec, seq_lens=seq_lens, attention_factor=1.5, backend=backend)
    check(q, k, spec, seq_lens=seq_lens, attention_factor=rows[1], backend=backend)


def test_attention_factor_scales_only_what_rotates(backend, device):
    spec = make_spec(16, partial_rotary_factor=0.5)
    q, k = make_qk(dtype=torch.bfloat16, device=device)
    q2, k2 = rf.apply_rope(q, k, spec, attention_factor=3.0, backend=backend)
    plain, _ = rf.apply_rope(q.double(), k.double(), spec, backend=backend)
    assert_within_rotation_budget(q2[..., :8], 3 * plain[..., :8], make_spec(8))
    assert_same_bits(q2[..., 8:], q[..., 8:])
    assert_same_bits(k2[..., 8:], k[..., 8:])


def test_q_scale_leaves_k_alone(backend, device):
    q, k = make_qk(device=device)
    spec = make_spec(16, partial_rotary_factor=0.5)
    scale = 2.0 ** torch.randint(-3, 4, (9,), device=device)  # powers of two: exact
    q2, k2 = rf.apply_rope(q, k, spec, q_scale=scale, backend=backend)
    plain_q, plain_k = rf.apply_rope(q, k, spec, backend=backend)
    assert_same_bits(k2, plain_k)
    assert_same_bits(q2, plain_q * scale[:, None, None])


def test_yarn_temperature(backend, device):
    spec = rf.RopeSpec.yarn(
        head_dim=16, rope_theta=1e4, factor=4.0, original_max_position_embeddings=8
    )
    assert spec.attention_factor > 1
    q, k = make_qk(device=device, dtype=torch.bfloat16)
    check(q, k, spec, backend=backend)
    check(q, k, spec, backend=backend, conjugate=True)


@pytest.mark.parametrize("offset", [0, 1])
def test_q_temperature_of_the_spec(offset, backend, device):
    """Ministral (0) and Llama-4 (1): a factor on all of q that grows with the position."""
    spec = make_spec(16, partial_rotary_factor=0.5)
    spec = dataclasses.replace(spec, q_temperature=(0.1, 4, offset))
    q, k = make_qk(device=device)
    for positions in (None, torch.arange(9, device=device) + 1000):
        q2, k2 = check(q, k, spec, positions, backend=backend)
        scale = spec.q_scale(torch.arange(9, device=device) if positions is None else positions)
        plain = dataclasses.replace(spec, q_temperature=None)
        same_q, same_k = rf.apply_rope(q, k, plain, positions, q_scale=scale, backend=backend)
        assert_same_bits(q2, same_q)
        assert_same_bits(k2, same_k)
    cu_seqlens = torch.tensor([0, 5, 9], device=device)
    check(q[0], k[0], spec, layout="thd", cu_seqlens=cu_seqlens, backend=backend)
