"""What only the CUDA kernels can get wrong: groups of lanes, slices of heads, tiles and chunks.

Runs on a GPU, and in tests/test_cuda.py on emulated threads."""

import math
import shutil

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
    randn,
    usable_backends,
)
from problems import leaf, uniform
from rope_fused import composite, dispatch, ops, reference

pytestmark = pytest.mark.gpu  # or emulated


@pytest.fixture(autouse=True)
def cuda(device):
    if "cuda" not in usable_backends(device):
        pytest.skip("no CUDA kernels for this device")


def kernels():
    from rope_fused import cuda_backend

    return cuda_backend


@pytest.mark.parametrize("heads", [1, 3, 4, 5, 40, 130])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_few_tokens_share_their_heads(tokens, heads, device):
    """A token's heads are cut into slices, q's and k's alike, ragged ones too."""
    for dtype in (torch.bfloat16, torch.float32):
        q, k = make_qk("bshd", 1, tokens, heads, max(1, heads // 3), 64, dtype=dtype, device=device)
        check(q, k, make_spec(64), backend="cuda")


@pytest.mark.parametrize("head_dim", [24, 72, 136, 264, 520, 1032, 2048])
@pytest.mark.parametrize("norm", ["head", "all"])
@pytest.mark.parametrize("step", [1, 2], ids=["dense", "every-second"])
def test_norm_over_any_number_of_lanes(step, norm, head_dim, device):
    """Sums over lanes of one warp and of several, some idle; the heads of one group, too."""
    dtype = torch.bfloat16 if head_dim > 1024 else torch.float32
    heads = 3
    q, k = (
        randn(1, 3, n, head_dim * step, dtype=dtype, device=device)[..., ::step] for n in (heads, 2)
    )
    rotary = (head_dim // 4) * 2
    spec = make_spec(head_dim, partial_rotary_factor=rotary / head_dim)
    size = [n * head_dim if norm == "all" else head_dim for n in (heads, 2)]
    weights = [uniform(n, device=device).detach() for n in size]
    rotation = ops.Rotation(
        spec.rows().to(device), spec.turns().to(device), spec.scale_rows().to(device),
        q_norm=weights[0], k_norm=weights[1], norm_all=norm == "all", backend="cuda",
    )  # fmt: skip
    got = dispatch.rotate(q, k, rotation)
    want = dispatch.rotate(q.double(), k.double(), rotation._replace(backend="reference"))
    for a, b in zip(got, want, strict=True):
        # A sum of n squares is off by at most n units, half of it in its root, and three products.
        units = (head_dim * heads / 2 + 8) * 2.0**-24
        size = torch.hypot(b, b.flip(-1)).amax(-1, keepdim=True)
        slack = torch.finfo(dtype).eps / 2 * b.abs() + (units + 2.0**-21) * size
        assert ((a.double() - b).abs() <= slack).all()


def test_a_head_too_long_is_refused(device):
    # 2048 is the limit, and in two ragged parts one column too many.
    ragged = make_spec(2048, partial_rotary_factor=1026 / 2048)
    assert ragged.rotary_dim == 1026
    with pytest.raises(ValueError, match="2048 dimensions, 1026 of them rotated, is too long"):
        rf.apply_rope(randn(1, 1, 1, 2048, device=device), None, ragged, backend="cuda")
    q = randn(1, 1, 1, 4096, device=device)
    with pytest.raises(ValueError, match="at most 2048 dimensions, got 4096"):
        rf.apply_rope(q, None, make_spec(4096, partial_rotary_factor=0.25), backend="cuda")


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_around_the_outputs_is_written(dtype, layout, device):
    """Outputs that are slices of a larger room, the rest of which keeps its bits."""
    q, k = make_qk(layout, 2, 5, 3, 1, 64, dtype=dtype, device=device)
    spec = make_spec(64, partial_rotary_factor=0.5, rotary_offset=16)
    for room in (16, 1):  # elements before and behind: vectors fit, and do not
        outs, rooms, before = [], [], []
        for x in (q, k):
            space = randn(*x.shape[:-1], x.shape[-1] + 2 * room, dtype=dtype, device=device)
            rooms.append(space)
            outs.append(space[..., room:-room])
            before.append(space.clone())
        with torch.no_grad():
            rf.apply_rope(q, k, spec, layout=layout, backend="cuda", out=tuple(outs))
        for x, out, space, old in zip((q, k), outs, rooms, before, strict=True):
            want, _ = reference.apply_rope(x, None, spec, layout=layout)
            assert_within_rotation_budget(out, want, spec)
            assert_same_bits(space[..., :room], old[..., :room])
            assert_same_bits(space[..., -room:], old[..., -room:])


# -- reductions --------------------------------------------------------------------------------


def backward_problem(device, dtype, norm, seqlen=37, tables=False):
    """Gradients and inputs, and a rotation with everything that has a gradient."""
    spec = make_longrope(32) if tables else make_spec(32)
    q, k = make_qk("bshd", 2, seqlen, 4, 2, 32, dtype=dtype, device=device)
    dq, dk = make_qk("bshd", 2, seqlen, 4, 2, 32, dtype=dtype, device=device)
    rows = len(spec.rows())
    index = torch.randint(0, rows, (2, seqlen), dtype=torch.int32, device=device)
    sizes = [n * 32 if norm == "all" else 32 for n in (4, 2)]
    q_norm, k_norm = (uniform(n, device=device).detach() if norm else None for n in sizes)
    rotation = ops.Rotation(
        spec.rows().to(device), spec.turns().to(device), spec.scale_rows().to(device),
        positions=torch.randint(-100, 100, (2, seqlen), device=device),
        table_index=index if tables else None,
        token_scale=uniform(2, seqlen, device=device).detach(),
        q_norm=q_norm, k_norm=None if norm == "q" else k_norm,
        norm_all=norm == "all", backend="cuda",
    )  # fmt: skip
    return dq, dk, q, k, rotation


@pytest.mark.parametrize("tables", [False, True], ids=["one-table", "tables"])
@pytest.mark.parametrize("norm", [None, "head", "all", "q"])
@pytest.mark.parametrize("tiles", [1, 4])
def test_tiles_and_chunks(tiles, norm, tables, device, monkeypatch):
    """Sums over tiles of tokens and chunks of them, rows of the tables changing from token to
    token, against the formulas in float64; and the same bits however often."""
    monkeypatch.setattr(kernels(), "_TILE", 1)
    monkeypatch.setattr(kernels(), "_CHUNK", 3)
    dq, dk, q, k, rotation = backward_problem(device, torch.float64, norm, tables=tables)
    width = 2 * rotation.pairs
    width += sum(0 if w is None else w.numel() for w in (rotation.q_norm, rotation.k_norm))
    monkeypatch.setattr(kernels(), "_WORKSPACE", width * math.ceil(2 * 37 / tiles))

    got = dispatch.rotate_backward(dq, dk, None, q, k, rotation, False)
    again = dispatch.rotate_backward(dq, dk, None, q, k, rotation, False)
    for a, b in zip(got, again, strict=True):
        assert_same_bits(a, b)
    first, second, factors = composite.rotate_backward(
        dispatch.rotate, dq, dk, q, k, rotation._replace(backend="reference")
    )
    for a, b in zip(got, (first, second, *factors), strict=True):
        if b is None:
            assert a.numel() == 0
            continue
        # No sum has more than 2 * 37 * 6 * 32 terms, each a dozen products of numbers below 100.
        terms = 2 * 37 * 6 * 32
        torch.testing.assert_close(a, b, rtol=terms * 2.0**-52, atol=terms * 100 * 2.0**-52)


def test_float32_sums_of_many_tokens(device):
    """Over tokens they are added in float64: 3000 of them lose nothing."""
    spec = make_spec(16)
    q = randn(1, 3000, 2, 16, device=device)
    inv_freq = leaf(spec.inv_freq().to(device))
    out, _ = rf.apply_rope(leaf(q), None, spec, inv_freq=inv_freq, backend="cuda")
    g = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, inv_freq, g)
    wide = leaf(spec.inv_freq().to(device))
    want_out, _ = reference.apply_rope(q, None, spec, inv_freq=wide)
    (want,) = torch.autograd.grad(want_out, wide, g.double())
    # Each token's sum of two heads is within a few units of its size.
    sizes = torch.hypot(*q.double().chunk(2, -1)) * torch.hypot(*g.double().chunk(2, -1))
    bound = (torch.arange(3000, device=device)[:, None] * sizes.sum(2)[0]).sum(0)
    assert ((got - want).abs() <= bound * (2.0**-21 + 8 * 2.0**-24)).all()


# -- launches ----------------------------------------------------------------------------------


def test_first_use_inside_a_capture_raises(device, monkeypatch, tmp_path):
    """A kernel that was never loaded cannot be captured; one that was, can."""
    if device.type != "cpu":
        pytest.skip("which kernels are loaded depends on the tests before")
    import emulated

    fresh = emulated.load(shutil.copy(emulated.build(), tmp_path))
    monkeypatch.setattr(kernels(), "_cuda", fresh)
    q, k = make_qk()

    def call():
        return rf.apply_rope(q, k, make_spec(), backend="cuda")

    with emulated.capture(fresh), pytest.raises(RuntimeError, match="inside a graph capture"):
        call()
    call()
    with emulated.capture(fresh):
        call()


def test_graph_capture(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    q, k = make_qk("bshd", 2, 33, 4, 2, 64, dtype=torch.bfloat16, device=device)
    spec = make_spec(64)
    rf.apply_rope(q, k, spec, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rf.apply_rope(q, k, spec, backend="cuda")
    q.normal_(), k.normal_()
    graph.replay()
    for a, b in zip(out, rf.apply_rope(q, k, spec, backend="cuda"), strict=True):
        assert_same_bits(a, b)
