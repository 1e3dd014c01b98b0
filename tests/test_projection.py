"""qkv_rope against the float64 reference, with the same-dtype eager formula as the budget."""

import pytest
import torch
import torch.nn.functional as F

import rope_fused as rf
from helpers import (
    assert_same_bits,
    assert_unchanged,
    assert_within_projection_budget,
    half_ulp,
    make_longrope,
    randn,
    snapshot,
    threads,
)
from problems import Case, eager, reordering
from rope_fused import reference

CASES = [
    Case("plain"),
    Case("tokens", rows=(13,)),
    Case("one-token", rows=(1, 1)),
    Case("one-packed-token", rows=(1,)),
    Case("ragged-rows", rows=(1, 67), d_model=40),
    Case("many-rows", rows=(3, 131), heads=2, kv_heads=1),
    Case("odd-model-dim", rows=(2, 5), d_model=37),
    Case("equal-heads", kv_heads=4),
    Case("many-q-heads", heads=8, kv_heads=1),
    Case("bias", bias=True),
    Case("no-v", v=False),
    Case("no-v-bias", v=False, bias=True),
    Case("qk-norm", norm="head"),
    Case("qk-norm-tokens", rows=(13,), norm="head"),
    Case("qk-norm-bias", norm="head", bias=True),
    Case("qk-norm-float32-weight", norm="head", norm_dtype=torch.float32),
    Case("norm-all", norm="all"),
    Case("norm-all-float32-weight", norm="all", norm_dtype=torch.float32),
    Case("norm-partial", norm="head", spec={"partial_rotary_factor": 0.5}),
    Case("partial", spec={"partial_rotary_factor": 0.5}),
    Case("offset", spec={"partial_rotary_factor": 0.5, "rotary_offset": 8}),
    Case("interleaved", spec={"interleaved": True}),
    Case("interleaved-norm", norm="head", spec={"interleaved": True}),
    Case("d64", head_dim=64, heads=2, kv_heads=1),
    Case("d80", head_dim=80, heads=2, kv_heads=1),
    Case("d96", head_dim=96, heads=2, kv_heads=1, norm="head"),
    Case("d128", head_dim=128, heads=2, kv_heads=1, d_model=256),
    Case("d256", head_dim=256, heads=2, kv_heads=1, spec={"partial_rotary_factor": 0.25}),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(x, weights, options, backend):
    tensors = [v for v in options.values() if isinstance(v, torch.Tensor)]
    before = snapshot(x, *weights, *tensors)
    got = rf.qkv_rope(x, *weights, backend=backend, **options)
    assert_unchanged(before)
    want = reference.qkv_rope(x, *weights, **options)
    same_dtype = eager(x, *weights, **options)
    head_dim = options["spec"].head_dim
    for i, name in enumerate("qkv"):
        if want[i] is None:
            assert got[i] is None
            continue
        assert got[i].dtype == x.dtype and got[i].device == x.device
        assert got[i].shape == (*x.shape[:-1], weights[i].shape[0] // head_dim, head_dim)
        bias, norm = (options.get(f"{name}_{what}") for what in ("bias", "norm_weight"))
        slack = reordering(x, weights[i], bias, norm, options)
        assert_within_projection_budget(got[i], want[i], same_dtype[i], slack)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_matches_reference(case, dtype, backend, device):
    x, weights, options = case.operands(dtype, device)
    check(x, weights, options, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [None, "head", "all"])
def test_slices_of_one_packed_weight(norm, dtype, backend, device):
    case = Case("packed", norm=norm, bias=True)
    x, weights, options = case.operands(dtype, device)
    packed = torch.cat(weights)
    bias = torch.cat([options[f"{name}_bias"] for name in "qkv"])
    sizes = [w.shape[0] for w in weights]
    for name, piece in zip("qkv", bias.split(sizes), strict=True):
        options[f"{name}_bias"] = piece
    check(x, packed.split(sizes), options, backend)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_slices_in_another_order(order, backend, device):
    """Slices of one weight that do not lie as q, k, v must not be taken for a packed q, k, v."""
    x, weights, options = Case("packed", kv_heads=4).operands(torch.float32, device)
    slices = torch.cat([weights[i] for i in order]).chunk(3)
    check(x, [slices[order.index(i)] for i in range(3)], options, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides(dtype, backend, device):
    x, weights, options = Case("strided").operands(dtype, device)
    room = torch.full((2, 9, 100), torch.nan, dtype=dtype, device=device)
    room[..., 7:55] = x
    transposed = [w.t().contiguous().t() for w in weights]
    for strided in (
        room[..., 7:55],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x[:1].expand_as(x),
    ):
        check(strided, weights, options, backend)
        check(strided, transposed, options, backend)


def test_positions_and_sequences(backend, device):
    x, weights, options = Case("tokens", rows=(13,)).operands(torch.float32, device)
    for cu_seqlens in ([0, 4, 4, 13], [0, 13], [0, 1, 13]):
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        check(x, weights, options | {"cu_seqlens": cu_seqlens}, backend)
    positions = torch.randint(0, 100, (13,), device=device)
    check(x, weights, options | {"positions": positions}, backend)

    x, weights, options = Case("batch").operands(torch.float32, device)
    for shape in ((9,), (1, 9), (2, 9)):
        positions = torch.randint(-50, 100, shape, dtype=torch.int32, device=device)
        check(x, weights, options | {"positions": positions}, backend)


@pytest.mark.parametrize("norm", [None, "head"])
def test_equals_linear_then_apply_rope(norm, backend, device):
    """Everything that apply_rope takes means the same here (float64, to its rounding)."""
    x, weights, options = Case("both", norm=norm).operands(torch.float64, device)
    spec = make_longrope(16, original=8, partial_rotary_factor=1.0)
    options["spec"] = spec
    options["inv_freq"] = torch.rand(2, 8, dtype=torch.float64, device=device)
    options["attention_factor"] = 0.5 + torch.rand(8, dtype=torch.float64, device=device)
    options["q_scale"] = randn(2, 9, device=device)
    options["seq_lens"] = torch.tensor([8, 9], device=device)
    got = rf.qkv_rope(x, *weights, backend=backend, **options)
    want = reference.qkv_rope(x, *weights, **options)
    norms = options.get("q_norm_weight"), options.get("k_norm_weight"), None
    for y, y64, weight, norm_weight in zip(got, want, weights, norms, strict=True):
        slack = reordering(x, weight, None, norm_weight, options)
        assert (y - y64).abs().max() <= slack + half_ulp(y64, torch.float64).max()


def test_zero_centred_norm_weight(backend, device):
    """Gemma's norm is a weight of 1 + w: nothing to configure."""
    x, weights, options = Case("gemma", norm="head").operands(torch.bfloat16, device)
    stored = {n: options[n].float() * 0.1 for n in ("q_norm_weight", "k_norm_weight")}
    check(x, weights, options | {n: 1 + w for n, w in stored.items()}, backend)


def test_norm_of_q_alone(backend, device):
    x, weights, options = Case("q-norm", norm="head").operands(torch.float32, device)
    del options["k_norm_weight"]
    check(x, weights, options, backend)


def test_empty(backend, device):
    for rows in ((0,), (0, 5), (2, 0)):
        x, weights, options = Case("empty", rows=rows, norm="head").operands(torch.float32, device)
        q, k, v = rf.qkv_rope(x, *weights, backend=backend, **options)
        assert q.shape == (*rows, 4, 16) and k.shape == v.shape == (*rows, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [None, "head"])
def test_out(norm, dtype, backend, device):
    x, weights, options = Case("out", norm=norm).operands(dtype, device)
    with torch.no_grad():
        want = rf.qkv_rope(x, *weights, backend=backend, **options)
        out = tuple(torch.full_like(y, torch.nan) for y in want)
        got = rf.qkv_rope(x, *weights, backend=backend, out=out, **options)
    for given, returned, expected in zip(out, got, want, strict=True):
        assert returned.data_ptr() == given.data_ptr()
        assert_same_bits(given, expected)


def test_out_without_v(backend, device):
    x, weights, options = Case("out", v=False).operands(torch.float32, device)
    with torch.no_grad():
        want = rf.qkv_rope(x, *weights, backend=backend, **options)
        out = (torch.full_like(want[0], torch.nan), torch.full_like(want[1], torch.nan), None)
        rf.qkv_rope(x, *weights, backend=backend, out=out, **options)
    assert_same_bits(out[0], want[0])
    assert_same_bits(out[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_v_is_the_plain_projection(dtype, backend, device):
    """Neither normed, rotated nor scaled."""
    x, weights, options = Case("v", norm="head", d_model=256).operands(dtype, device)
    options |= {"attention_factor": 3.0, "q_scale": torch.full((9,), 5.0, device=device)}
    _, _, v = rf.qkv_rope(x, *weights, backend=backend, **options)
    plain = F.linear(x, weights[2]).view_as(v)
    want = F.linear(x.double(), weights[2].double()).view_as(v)
    slack = reordering(x, weights[2], None, None, {})
    assert_within_projection_budget(v, want, plain, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_thread_count_changes_only_the_gemm(dtype, backend, device):
    """With a norm weight and large rows; the GEMM itself is the BLAS library's to order."""
    case = Case("threads", rows=(2, 150), d_model=64, norm="head", head_dim=64)
    x, weights, options = case.operands(dtype, device)
    for number in (1, 2):
        with threads(number):
            check(x, weights, options, backend)


def test_out_in_any_strides(device):
    """Outputs whose heads do not lie behind each other cannot take a product, but its copy."""
    x, weights, options = Case("out").operands(torch.float32, device)
    with torch.no_grad():
        want = rf.qkv_rope(x, *weights, **options)
        out = tuple(torch.full_like(y, torch.nan).transpose(-1, -2).clone().mT for y in want)
        rf.qkv_rope(x, *weights, out=out, **options)
    for given, expected in zip(out, want, strict=True):
        assert_same_bits(given, expected)


@pytest.mark.skipif(rf.backends()["cpu"] != "ready", reason="the CPU kernels are not built")
@pytest.mark.parametrize("packed", [False, True], ids=["bshd", "tokens"])
def test_row_blocks(packed, monkeypatch):
    """Projected and rotated block by block: every token keeps its position, table and scale."""
    from rope_fused import native

    spec = make_longrope(64, original=8)
    x, *weights = (randn(*s).bfloat16() for s in ((2, 37, 4096), (128, 4096), (64, 4096)))
    options = {"spec": spec, "q_norm_weight": randn(64), "q_scale": randn(1, 37)}
    if packed:
        x = x[0]
    else:
        options["positions"] = torch.stack((torch.arange(37), torch.arange(37) + 3))
        options["seq_lens"] = torch.tensor([5, 37])
    whole = rf.qkv_rope(x, *weights, **options)
    monkeypatch.setattr(native, "_BLOCK_ROWS", 8)
    blocks = rf.qkv_rope(x, *weights, **options)
    for a, b in zip(whole[:2], blocks[:2], strict=True):
        # Other row counts may add in another order: one rounding of the products apart, at most.
        assert (a.double() - b.double()).norm() <= 2**-8 * a.double().norm()
