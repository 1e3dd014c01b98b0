"""Token by token or all at once: apply_rope gives a cached key the same bits in every method."""

import pytest
import torch

import rope_fused as rf
from helpers import DTYPES, assert_same_bits, make_longrope, make_qk, same_bits

HEAD = {"head_dim": 16, "rope_theta": 1e4}
SCALED = HEAD | {"factor": 4.0, "original_max_position_embeddings": 8}
LOW_HIGH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPECS = {
    "default": rf.RopeSpec.default(**HEAD),
    "none": rf.RopeSpec.of("none", **HEAD, q_temperature=(0.1, 4, 1)),
    "linear": rf.RopeSpec.linear(**HEAD, factor=4.0),
    "ntk": rf.RopeSpec.ntk(**HEAD, factor=4.0),
    "ntk_by_parts": rf.RopeSpec.ntk_by_parts(**SCALED),
    "llama3": rf.RopeSpec.llama3(**SCALED, **LOW_HIGH, q_temperature=(0.1, 4, 0)),
    "yarn": rf.RopeSpec.yarn(**SCALED, beta_fast=4.0),
    "proportional": rf.RopeSpec.proportional(**HEAD, partial_rotary_factor=0.5),
    "partial": rf.RopeSpec.linear(**HEAD, factor=4.0, partial_rotary_factor=0.5, rotary_offset=4),
    "interleaved": rf.RopeSpec.yarn(**SCALED, interleaved=True),
    "longrope": make_longrope(original=8),
    "longrope, n_start": make_longrope(original=8, n_start=3),
    "longrope, mscales": make_longrope(original=8, short_mscale=1.1, long_mscale=1.3),
    "longrope, per pair": make_longrope(original=8, attention_factor=[1 + j / 8 for j in range(8)]),
    "dynamic": rf.RopeSpec.dynamic(**HEAD, factor=2.0, max_position_embeddings=8),
    "dynamic_yarn": rf.RopeSpec.dynamic_yarn(**HEAD, original_max_position_embeddings=8),
}


def test_every_method_is_here():
    from rope_fused import scaling

    assert {spec.rope_type for spec in SPECS.values()} == set(scaling.METHODS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_decoding_is_prefill(name, dtype, backend, device):
    """With the admitted length pinned: short (L), just long (L + 1) and long, prompt or not."""
    spec = SPECS[name]
    q, k = make_qk(batch=2, seqlen=12, dtype=dtype, device=device)
    for admitted in ([8, 8], [8, 9], [64, 8]):
        options = {"seq_lens": torch.tensor(admitted, device=device), "backend": backend}
        want = rf.apply_rope(q, k, spec, **options)
        for prompt in (1, 5):
            steps = [(0, prompt), *((i, i + 1) for i in range(prompt, 12))]
            for start, end in steps:
                positions = torch.arange(start, end, device=device)
                part = [x[:, start:end] for x in (q, k)]
                done = rf.apply_rope(*part, spec, positions, **options)
                for got, whole in zip(done, want, strict=True):
                    assert_same_bits(got, whole[:, start:end], f"at {start}, {admitted}")


@pytest.mark.parametrize("name", [name for name in SPECS if name.startswith("longrope")])
def test_the_pin_matters(name, backend, device):
    """Unpinned, a sequence that grows past L changes its table, and the test above can fail."""
    spec = SPECS[name]
    q, _ = make_qk(batch=1, seqlen=9, device=device)
    whole, _ = rf.apply_rope(q, None, spec, backend=backend)
    positions = torch.arange(7, 8, device=device)
    alone, _ = rf.apply_rope(q[:, 7:8], None, spec, positions, backend=backend)
    assert not same_bits(alone, whole[:, 7:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in SPECS if not name.startswith("dynamic")])
def test_mixed_packed_batch_equals_each_alone(name, dtype, backend, device):
    """Lengths around L = 8 in one packed call, prompts and single decoded tokens among them."""
    spec = SPECS[name]
    lengths, tokens = [8, 9, 8, 30, 64, 3], [8, 9, 1, 30, 1, 3]
    ends = [0, *torch.tensor(tokens).cumsum(0).tolist()]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    starts = [n - t for n, t in zip(lengths, tokens, strict=True)]
    positions = torch.cat([torch.arange(s, n) for s, n in zip(starts, lengths, strict=True)])
    q, k = make_qk("thd", 1, ends[-1], dtype=dtype, device=device)
    options = {"layout": "thd", "backend": backend}
    whole = rf.apply_rope(q, k, spec, positions.to(device), cu_seqlens=cu_seqlens, **options)
    for i, length in enumerate(lengths):
        part = slice(ends[i], ends[i + 1])
        here = positions[part].to(device)
        found = rf.apply_rope(q[part], k[part], spec, here, **options)
        one = torch.tensor([0, tokens[i]], device=device)
        pin = torch.tensor([length], device=device)
        pinned = rf.apply_rope(
            q[part], k[part], spec, here, cu_seqlens=one, seq_lens=pin, **options
        )
        for y, a, b in zip(whole, found, pinned, strict=True):
            assert_same_bits(y[part], a)
            assert_same_bits(y[part], b)
