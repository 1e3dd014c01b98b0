"""Many calls, far positions, many elements: memory does not grow, references do not leak."""

import gc
import sys
import weakref

import pytest
import torch

import rope_fused as rf
from helpers import (
    assert_within_rotation_budget,
    make_longrope,
    make_qk,
    make_spec,
    randn,
)
from rope_fused import reference
from rope_fused.dispatch import native

# -- references --------------------------------------------------------------------------------


def every_way(number=0):
    """One call of each public function, forward and backward."""
    spec = make_longrope(16, original=8)
    q, k = (t.requires_grad_() for t in make_qk(seqlen=7))
    factor = torch.ones(8, requires_grad=True)
    out = rf.apply_rope(q, k, spec, attention_factor=factor, seq_lens=torch.tensor([7, 9]))
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    norm = torch.ones(16, requires_grad=True)
    out += rf.qkv_rope(x, weight, weight, spec=make_spec(), q_norm_weight=norm, k_norm_weight=norm)
    out += (rf.rerotate(k, None, make_spec(), spec),)
    cos, sin = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    out += rf.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    sum(y.sum() for y in out if y is not None).backward()
    with torch.no_grad():
        rf.apply_rope(q, k, spec, out=(torch.empty_like(q), torch.empty_like(k)))


def test_arguments_are_let_go():
    """Nothing holds a tensor after the call that it was given to, nor is its count of references
    another one."""
    spec = make_spec()
    q, k = make_qk()
    options = {
        "positions": torch.arange(9),
        "inv_freq": spec.inv_freq(),
        "attention_factor": torch.ones(8),
        "q_scale": torch.ones(9),
        "seq_lens": torch.tensor([9, 9]),
    }
    rf.apply_rope(q, k, spec, **options)
    values = [q, k, spec, *options.values()]
    before = [sys.getrefcount(v) for v in values]
    for _ in range(50):
        rf.apply_rope(q, k, spec, **options)
        with pytest.raises(ValueError):
            rf.apply_rope(q, k, spec, **options | {"positions": torch.arange(8)})
        with pytest.raises(ValueError):  # refused inside the kernel
            rf.apply_rope(q, k, spec, inv_freq=torch.full((8,), torch.nan))
    gc.collect()
    assert [sys.getrefcount(v) for v in values] == before
    seen = [weakref.ref(t) for t in (q, k, *options.values())]
    del q, k, options, values
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)


def test_no_object_is_left_behind():
    """Calls leave as many objects as there were: no tensor, no parameter of a kernel, no frame."""

    def count():
        gc.collect()
        kinds = [type(x) for x in gc.get_objects()]
        return len(kinds), sum(issubclass(kind, torch.Tensor) for kind in kinds)

    for _ in range(3):
        every_way()
    before = count()
    for _ in range(40):
        every_way()
    after = count()
    assert after[1] == before[1], "tensors"
    assert after[0] - before[0] < 40, "objects"


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow():
    """10 000 calls of everything: what the last 8 000 added is less than a byte for each."""
    for number in range(2000):
        every_way(number)
    gc.collect()
    before = resident()
    for number in range(8000):
        every_way(number)
    gc.collect()
    grown = resident() - before
    assert grown < 1 << 20, f"{grown / 8000:.0f} bytes for each call"


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.skipif(getattr(native, "_OutputBuffer", None) is None, reason="no cache of outputs")
def test_memory_of_large_outputs_does_not_grow():
    """Outputs of changing sizes, some held for a while: the cache keeps to its share of memory."""
    held, spec = [], make_spec(128)
    before = resident()
    for number in range(60):
        q = torch.empty(1, 2048 + 64 * (number % 7), 64, 128).zero_()
        held.append(rf.apply_rope(q, None, spec)[0])
        held = held[-2:]
    total = held[0].numel() * 4
    assert resident() - before < 12 * total


# -- sizes -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.no_poison
def test_more_than_31_bits_of_elements():
    """Forward, backward and in place, in 4 GiB of bfloat16: rows beyond the 2**31st element, of a
    batch and of packed sequences."""
    heads, dim = 64, 128
    tokens = 2**31 // (heads * dim) + 5
    spec = make_spec(dim)
    x = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16)
    x[-4:] = randn(4, heads, dim)
    rows = x[-4:].clone()
    ends = torch.tensor([0, tokens - 2, tokens])
    positions = torch.tensor([tokens - 4, tokens - 3, 0, 1])
    with torch.no_grad():
        rf.apply_rope(x, None, spec, layout="thd", cu_seqlens=ends, out=(x, None))
    want, _ = reference.apply_rope(rows, None, spec, positions, layout="thd")
    assert_within_rotation_budget(x[-4:], want, spec, positions)
    assert not x[:-4].any()
    # A gradient is the opposite rotation. No more than two of the large ones are there at a time.
    rows = x[-4:].clone()
    del x
    leaf = torch.zeros((), dtype=torch.bfloat16).expand(1, tokens, heads, dim).requires_grad_()
    y, _ = rf.apply_rope(leaf, None, spec)
    last = y[:, -4:].clone()
    assert not last.any()
    del y
    (grad,) = torch.autograd.grad(last, leaf, rows[None])
    positions = torch.arange(tokens - 4, tokens)
    want, _ = reference.apply_rope(rows, None, spec, positions, layout="thd", conjugate=True)
    assert_within_rotation_budget(grad[0, -4:], want, spec, positions)
    assert not grad[:, :-4].any()


@pytest.mark.slow
@pytest.mark.no_poison
def test_views_that_reach_beyond_31_bits():
    """Tables, gradients of factors and norms, over rows that lie 2**31 elements apart."""
    far = 2**31 + 64
    room = torch.empty(far + 4096, dtype=torch.bfloat16)  # pages that nobody touches take none
    x = room.as_strided((2, 5, 3, 16), (far, 64, 16, 1))
    x.copy_(randn(2, 5, 3, 16))
    near = x.clone()
    spec, cos, sin = make_spec(), randn(2, 5, 16), randn(2, 5, 16)
    cos, sin = cos.bfloat16(), sin.bfloat16()

    def all_of(x):
        x = x.detach().requires_grad_()
        factor = torch.ones(8, dtype=torch.float64, requires_grad=True)
        q, k = rf.apply_rope(x, x[:, :, :1], spec, attention_factor=factor)
        a, _ = rf.apply_rotary_pos_emb(x, None, cos, sin, unsqueeze_dim=2)
        total = (q.float() ** 2).sum() + (k.float() ** 2).sum() + (a.float() ** 2).sum()
        return (q, k, a, *torch.autograd.grad(total, (x, factor)))

    for got, want in zip(all_of(x), all_of(near), strict=True):
        assert torch.equal(got, want)


@pytest.mark.slow
def test_a_million_tokens():
    """Every position up to 2**20, of a sequence that is longer than its model was made for."""
    tokens, spec = 2**20, make_longrope(16, original=1 << 17)
    q = randn(1, tokens, 1, 16, dtype=torch.float32)
    got, _ = rf.apply_rope(q, None, spec)
    some = torch.cat((torch.arange(0, tokens, 61), torch.arange(tokens - 9, tokens)))
    options = {"seq_lens": torch.tensor([tokens])}
    want, _ = reference.apply_rope(q[:, some], None, spec, some, **options)
    assert_within_rotation_budget(got[:, some], want, spec, some)
