"""apply_rope against the float64 reference: every layout, stride, dtype, position and table."""

import concurrent.futures
import dataclasses
import os
import signal
import time

import numpy
import pytest
import torch

import rope_fused as rf
from helpers import (
    DTYPES,
    assert_close_to,
    assert_same_bits,
    assert_within_rotation_budget,
    check,
    half_ulp,
    make_longrope,
    make_qk,
    make_spec,
    pair_magnitude,
    randn,
    rotation_slack,
    threads,
)
from rope_fused import reference


@dataclasses.dataclass
class Case:
    """Sizes of q and k, and the spec's options."""

    id: str
    layout: str = "bshd"
    batch: int = 2
    seqlen: int = 9
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    spec: dict = dataclasses.field(default_factory=dict)

    def qk(self, **kwargs):
        return make_qk(
            self.layout, self.batch, self.seqlen, self.heads, self.kv_heads, self.head_dim, **kwargs
        )

    def make_spec(self):
        return make_spec(self.head_dim, **self.spec)


CASES = [
    Case("bshd"),
    Case("bhsd", layout="bhsd"),
    Case("thd", layout="thd", batch=1, seqlen=13),
    Case("equal-heads", heads=3, kv_heads=3),
    Case("one-kv-head", heads=8, kv_heads=1),
    Case("interleaved", spec={"interleaved": True}),
    Case("interleaved-bhsd", layout="bhsd", spec={"interleaved": True}),
    Case("partial-half", spec={"partial_rotary_factor": 0.5}),
    Case("partial-interleaved", spec={"partial_rotary_factor": 0.5, "interleaved": True}),
    Case("offset", spec={"partial_rotary_factor": 0.25, "rotary_offset": 12}),
    Case(
        "offset-interleaved",
        layout="bhsd",
        spec={"partial_rotary_factor": 0.25, "rotary_offset": 6, "interleaved": True},
    ),
    Case("odd-offset", spec={"partial_rotary_factor": 0.5, "rotary_offset": 3}),
    Case("d2", head_dim=2),
    Case("d6", head_dim=6, seqlen=5),
    Case("d64", head_dim=64, seqlen=3),
    Case("d80", head_dim=80, seqlen=7, spec={"partial_rotary_factor": 0.4}),
    Case("d96", head_dim=96, seqlen=7, layout="bhsd"),
    Case("d128", head_dim=128, seqlen=17, heads=5, kv_heads=1),
    Case("d128-interleaved", head_dim=128, seqlen=5, spec={"interleaved": True}),
    Case("d256", head_dim=256, seqlen=3, spec={"partial_rotary_factor": 0.25}),
    Case("d512-at-end", head_dim=512, seqlen=2, heads=2, kv_heads=1,
         spec={"partial_rotary_factor": 0.125, "rotary_offset": 448}),
    Case("long", batch=1, seqlen=257, heads=2, kv_heads=1),
    Case("length-1", seqlen=1),
    Case("batch-1-length-2", batch=1, seqlen=2),
]  # fmt: skip


@pytest.mark.parametrize("conjugate", [False, True], ids=["forward", "conjugate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_matches_reference(case, dtype, conjugate, backend, device):
    q, k = case.qk(dtype=dtype, device=device)
    check(q, k, case.make_spec(), layout=case.layout, conjugate=conjugate, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_matches_an_independent_formula(dtype, backend, device):
    """A rotation is a product with e^(i t): no line shared with the library or its reference."""
    spec = make_spec(64, rope_theta=5e5)
    x, _ = make_qk(head_dim=64, dtype=dtype, device=device)
    positions = torch.randint(0, 2048, (x.shape[1],), device=device)
    angle = positions[:, None].double() * spec.inv_freq().to(device)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    z = torch.complex(*x.double().chunk(2, dim=-1)) * turn
    y, none = rf.apply_rope(x, None, spec, positions, backend=backend)
    assert none is None
    want = torch.cat((z.real, z.imag), -1)
    # The angle is rounded here: below 2048 radians to half an ulp, 2**-43.
    slack = rotation_slack(dtype, 2048) + 2.0**-43
    assert_close_to(y, want, slack * pair_magnitude(want, spec))


def _packed_head(x):
    """x as one slice of a wider packed projection: [.., q heads | k heads | v heads, head_dim]."""
    room = torch.full((*x.shape[:-2], x.shape[-2] + 5, x.shape[-1]), torch.nan).to(x)
    room[..., 2 : 2 + x.shape[-2], :] = x
    return room[..., 2 : 2 + x.shape[-2], :]


def _every_second(x):
    """x with two elements between neighbours of the head dimension."""
    room = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan).to(x)
    room[..., ::2] = x
    return room[..., ::2]


def _misaligned(x):
    """x dense, but starting one element past an aligned address."""
    room = torch.full((x.numel() + 1,), torch.nan).to(x)
    room[1:] = x.flatten()
    return room[1:].view(x.shape)


STRIDES = {
    "slice-of-packed": _packed_head,
    "every-second": _every_second,
    "misaligned": _misaligned,
    "transposed-01": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed-12": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed-23": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded-batch": lambda x: x[:1].expand_as(x),
    "expanded-heads": lambda x: x[:, :, :1].expand_as(x),
    "expanded-dims": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides, layout, dtype, interleaved, backend, device):
    q, k = make_qk(layout, dtype=dtype, device=device)
    spec = make_spec(16, interleaved=interleaved)
    q, k = STRIDES[strides](q), STRIDES[strides](k)
    check(q, k, spec, layout=layout, backend=backend)
    # One of the two alone, so that neither is read with the other's strides.
    check(q, k.contiguous(), spec, layout=layout, backend=backend)


def test_outputs_are_new_tensors(backend, device):
    q, k = make_qk(device=device)
    q2, k2 = rf.apply_rope(q, k, make_spec(), backend=backend)
    pointers = {t.untyped_storage().data_ptr() for t in (q, k, q2, k2)}
    assert len(pointers) == 4


@pytest.mark.parametrize("strides", ["dense", "slice-of-packed", "every-second"])
def test_out(strides, backend, device):
    """Written in place of new tensors; the inputs themselves are allowed, and overwritten then."""
    q, k = make_qk(dtype=torch.bfloat16, device=device)
    spec = make_spec(16, partial_rotary_factor=0.5)
    place = STRIDES.get(strides, torch.clone)
    with torch.no_grad():
        want = rf.apply_rope(q, k, spec, backend=backend)
        out = place(torch.full_like(q, torch.nan)), place(torch.full_like(k, torch.nan))
        got = rf.apply_rope(q, k, spec, out=out, backend=backend)
        in_place = place(q), place(k)
        rf.apply_rope(*in_place, spec, out=in_place, backend=backend)
    for given, returned, itself, expected in zip(out, got, in_place, want, strict=True):
        assert returned.data_ptr() == given.data_ptr()
        assert_same_bits(given, expected)
        assert_same_bits(itself, expected)


def test_offsets_beyond_31_bits(backend, device):
    """Rows that lie 2**31 elements apart; only the pages that are touched exist."""
    if device.type != "cpu":
        pytest.skip("allocates the whole room elsewhere")
    room = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    x = room.as_strided((2, 3, 2, 16), (2**31, 64, 16, 1))
    x.copy_(randn(2, 3, 2, 16))
    check(x, x[:, :, :1], make_spec(), backend=backend)


@pytest.mark.slow
def test_results_beyond_31_bits(backend, device):
    """More than 2**31 dense elements: the last rows, where a 32-bit offset has wrapped."""
    if backend == "reference":
        pytest.skip("float64 copies of it do not fit")
    if backend == "triton" and device.type == "cpu":
        pytest.skip("takes hours in the interpreter; test_offsets_beyond_31_bits does not")
    heads, dim = 64, 128
    tokens = 2**31 // (heads * dim) + 3
    x = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16, device=device)
    x[-3:] = randn(3, heads, dim, device=device)
    spec = make_spec(dim)
    y, _ = rf.apply_rope(x, None, spec, layout="thd", backend=backend)
    positions = torch.arange(tokens - 3, tokens, device=device)
    want, _ = reference.apply_rope(x[-3:], None, spec, positions, layout="thd")
    assert_within_rotation_budget(y[-3:], want, spec, positions)
    assert not y[:-3].any()


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_nan_and_inf_stay_in_their_pair(interleaved, dtype, backend, device):
    spec = make_spec(16, interleaved=interleaved, partial_rotary_factor=0.5, rotary_offset=4)
    q, k = make_qk(dtype=dtype, device=device)
    clean, _ = rf.apply_rope(q, k, spec, backend=backend)
    for value in (torch.nan, torch.inf, -torch.inf):
        for at in range(16):
            dirty = q.clone()
            dirty[0, 3, 1, at] = value
            got, _ = rf.apply_rope(dirty, k, spec, backend=backend)
            inside = 4 <= at < 12
            partner = at
            if inside:
                partner = 4 + ((at - 4) ^ 1 if interleaved else (at - 4 + 4) % 8)
            touched = torch.zeros_like(q, dtype=torch.bool)
            touched[0, 3, 1, [at, partner]] = True
            assert not got[touched].isfinite().any()
            assert_same_bits(got[~touched], clean[~touched])
            want, _ = reference.apply_rope(dirty, None, spec)
            assert_within_rotation_budget(got, want, spec)


def test_unrotated_dimensions_are_copies(backend, device):
    """Bit for bit: signed zeros, subnormals and NaN payloads included."""
    q, k = make_qk(dtype=torch.float16, device=device, head_dim=32)
    bits = torch.randint(-(2**15), 2**15, q.shape, dtype=torch.int16, device=device)
    q = bits.view(torch.float16)
    for layout in ("bshd", "bhsd"):
        spec = make_spec(32, partial_rotary_factor=0.25, rotary_offset=7)
        x = q if layout == "bshd" else q.transpose(1, 2)
        y, _ = rf.apply_rope(x, None, spec, layout=layout, backend=backend)
        kept = [*range(7), *range(15, 32)]
        quiet = ~(x[..., kept].isnan() & ((x[..., kept].view(torch.int16) & 0x200) == 0))
        assert_same_bits(
            torch.where(quiet, y[..., kept], 0), torch.where(quiet, x[..., kept], 0)
        )  # a signalling NaN may come back quiet


def test_half_precision_overflows_to_infinity(backend, device):
    spec = make_spec(16)
    q = torch.full((1, 64, 2, 16), 60000.0, dtype=torch.float16, device=device)
    q2, _ = check(q, None, spec, backend=backend)  # 60000 * sqrt(2) does not fit, 60000 does
    assert q2.isinf().any() and q2.isfinite().any() and not q2.isnan().any()


def test_half_precision_subnormals(backend, device):
    for dtype in (torch.float16, torch.bfloat16):
        tiny = torch.finfo(dtype).tiny if dtype == torch.float16 else 2.0**-100
        q = (randn(2, 9, 4, 16, device=device) * tiny).to(dtype)
        check(q, None, make_spec(16), backend=backend)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@pytest.mark.parametrize("empty", ["batch", "seqlen", "heads", "kv_heads"])
def test_empty(empty, layout, backend, device):
    if layout == "thd" and empty == "batch":
        pytest.skip("packed tokens have no batch")
    sizes = {"batch": 1, "seqlen": 3, "heads": 2, "kv_heads": 2} | {empty: 0}
    q, k = make_qk(layout, head_dim=16, device=device, **sizes)
    check(q, k, make_spec(), layout=layout, backend=backend)
    check(q, None, make_spec(), layout=layout, backend=backend)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
def test_without_k(layout, backend, device):
    q, k = make_qk(layout, device=device)
    spec = make_spec()
    q2, none = check(q, None, spec, layout=layout, backend=backend)
    assert none is None
    both, _ = rf.apply_rope(q, k, spec, layout=layout, backend=backend)
    assert_same_bits(q2, both)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_thread_count_changes_no_bit(dtype, backend, device):
    q, k = make_qk("bshd", 2, 301, 6, 3, 64, dtype=dtype, device=device)
    spec = make_longrope(64, original=300)
    results = []
    for number in (1, 2, 3):
        with threads(number):
            results.append(rf.apply_rope(q, k, spec, backend=backend))
    for q2, k2 in results[1:]:
        assert_same_bits(q2, results[0][0])
        assert_same_bits(k2, results[0][1])


def test_layouts_agree_bit_for_bit(backend, device):
    q, k = make_qk(batch=1, dtype=torch.bfloat16, device=device)
    spec = make_spec()
    q_bshd, _ = rf.apply_rope(q, k, spec, backend=backend)
    q_bhsd, _ = rf.apply_rope(
        q.transpose(1, 2), k.transpose(1, 2), spec, layout="bhsd", backend=backend
    )
    q_thd, _ = rf.apply_rope(q[0], k[0], spec, layout="thd", backend=backend)
    assert_same_bits(q_bshd, q_bhsd.transpose(1, 2))
    assert_same_bits(q_bshd[0], q_thd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_conjugate_undoes_the_rotation(interleaved, dtype, backend, device):
    spec = make_spec(16, interleaved=interleaved, partial_rotary_factor=0.5)
    q, k = make_qk(dtype=dtype, device=device)
    positions = torch.randint(-(2**20), 2**20, (2, 9), device=device)
    there = rf.apply_rope(q, k, spec, positions, backend=backend)
    back = rf.apply_rope(*there, spec, positions, conjugate=True, backend=backend)
    for start, middle, end in zip((q, k), there, back, strict=True):
        want, _ = reference.apply_rope(middle, None, spec, positions, conjugate=True)
        assert_within_rotation_budget(end, want, spec, positions)
        # Two rotations, each off by at most its budget and one rounding.
        size = pair_magnitude(start.double(), spec)
        budget = 2 * (rotation_slack(dtype, 2**20) * size + 2 * half_ulp(size, dtype))
        assert ((end - start).abs() <= budget).all()


def test_calls_from_several_threads(backend, device):
    """The kernels let go of the interpreter lock: calls run side by side, with nothing shared."""
    spec = make_longrope(64, original=300)
    inputs = [make_qk("bshd", 1, 290 + i, 4, 2, 64, device=device) for i in range(12)]

    def rotate(qk):
        return rf.apply_rope(*qk, spec, backend=backend)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(rotate, inputs))
    for got, qk in zip(together, inputs, strict=True):
        for a, b in zip(got, rotate(qk), strict=True):
            assert_same_bits(a, b)


@pytest.mark.no_poison
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_child(backend, device):
    """A DataLoader's worker lacks the parent's OpenMP threads and must not wait for them."""
    if backend != "cpu":
        pytest.skip("torch's own kernels hang there, and CUDA refuses")
    q, _ = make_qk("bshd", 1, 512, 8, 1, 64, device=device)
    spec = make_spec(64)
    want = rf.apply_rope(q, None, spec, backend=backend)[0].numpy()
    child = os.fork()
    if child == 0:
        got, _ = rf.apply_rope(q, None, spec, backend=backend)
        os._exit(0 if numpy.array_equal(got.numpy(), want) else 1)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError("the child waits for threads that it does not have")
    assert status == 0
