"""Mistakes: each is refused by the name of the argument, before anything is computed or written."""

import dataclasses

import pytest
import torch

import rope_fused as rf
from helpers import (
    assert_unchanged,
    make_longrope,
    make_qk,
    make_spec,
    randn,
    snapshot,
    usable_backends,
)
from rope_fused import dispatch


@dataclasses.dataclass
class Mistake:
    """What to change in a call that is right, and a word the message must contain."""

    id: str
    names: str
    change: dict
    of_value: bool = False  # checked on the CPU alone: elsewhere it would wait for the device


def long(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


DYNAMIC = rf.RopeSpec.dynamic(head_dim=16, rope_theta=1e4, factor=2.0, max_position_embeddings=8)
AXES = make_spec(16, mrope_section=(2, 3, 3))

# The call that is right: q [2, 9, 4, 16], k [2, 9, 2, 16], a default spec.
ROPE = [
    Mistake("q-not-a-tensor", "q", {"q": [[1.0]]}),
    Mistake("q-integers", "q", {"q": torch.ones(2, 9, 4, 16, dtype=torch.int64)}),
    Mistake("q-complex", "q", {"q": torch.ones(2, 9, 4, 16, dtype=torch.complex64)}),
    Mistake("q-3-dimensions", "q", {"q": torch.ones(9, 4, 16)}),
    Mistake("q-5-dimensions", "q", {"q": torch.ones(1, 2, 9, 4, 16)}),
    Mistake("q-4-dimensions-thd", "q", {"layout": "thd"}),
    Mistake("q-head-dim", "q", {"q": torch.ones(2, 9, 4, 18)}),
    Mistake("k-head-dim", "k", {"k": torch.ones(2, 9, 4, 8)}),
    Mistake("k-batch", "k", {"k": torch.ones(3, 9, 2, 16)}),
    Mistake("k-seqlen", "k", {"k": torch.ones(2, 8, 2, 16)}),
    Mistake("k-dimensions", "k", {"k": torch.ones(9, 2, 16)}),
    Mistake("k-dtype", "k", {"k": torch.ones(2, 9, 2, 16, dtype=torch.bfloat16)}),
    Mistake("k-device", "k", {"k": meta(2, 9, 2, 16)}),
    Mistake("k-not-a-tensor", "k", {"k": 1.0}),
    Mistake("spec-none", "spec", {"spec": None}),
    Mistake("spec-dict", "spec", {"spec": {"rope_type": "default"}}),
    Mistake("spec-of-other-head", "head_dim", {"spec": make_spec(32)}),
    Mistake("positions-float", "positions", {"positions": torch.arange(9.0)}),
    Mistake("positions-bool", "positions", {"positions": torch.ones(9, dtype=torch.bool)}),
    Mistake("positions-int16", "positions", {"positions": torch.arange(9, dtype=torch.int16)}),
    Mistake("positions-list", "positions", {"positions": list(range(9))}),
    Mistake("positions-0-d", "positions", {"positions": torch.tensor(3)}),
    Mistake("positions-length", "positions", {"positions": torch.arange(8)}),
    Mistake("positions-batch", "positions", {"positions": torch.zeros(3, 9, dtype=torch.int64)}),
    Mistake("positions-axes", "positions", {"positions": torch.zeros(3, 2, 9, dtype=torch.int64)}),
    Mistake("positions-device", "positions", {"positions": meta(9, dtype=torch.int64)}),
    Mistake("axes-missing", "positions", {"spec": AXES, "positions": torch.arange(9)}),
    Mistake(
        "axes-wrong",
        "positions",
        {"spec": AXES, "positions": torch.zeros(2, 2, 9, dtype=torch.int64)},
    ),
    Mistake("cu_seqlens-with-batch", "cu_seqlens", {"cu_seqlens": long(0, 9)}),
    Mistake("seq_lens-count", "seq_lens", {"seq_lens": long(9)}),
    Mistake("seq_lens-shape", "seq_lens", {"seq_lens": long(9, 9)[None]}),
    Mistake("seq_lens-float", "seq_lens", {"seq_lens": torch.tensor([9.0, 9.0])}),
    Mistake("seq_lens-device", "seq_lens", {"seq_lens": meta(2, dtype=torch.int64)}),
    Mistake("seq_lens-missing", "seq_lens", {"spec": DYNAMIC}),
    Mistake("inv_freq-length", "inv_freq", {"inv_freq": torch.ones(16)}),
    Mistake("inv_freq-tables", "inv_freq", {"inv_freq": torch.ones(2, 8)}),
    Mistake(
        "inv_freq-table-missing",
        "inv_freq",
        {"inv_freq": torch.ones(1, 8), "spec": make_longrope(16)},
    ),
    Mistake("inv_freq-integers", "inv_freq", {"inv_freq": long(*[1] * 8)}),
    Mistake("inv_freq-device", "inv_freq", {"inv_freq": meta(8)}),
    Mistake("inv_freq-not-a-tensor", "inv_freq", {"inv_freq": [1.0] * 8}),
    Mistake("inv_freq-nan", "inv_freq", {"inv_freq": torch.full((8,), torch.nan)}, of_value=True),
    Mistake("inv_freq-inf", "inv_freq", {"inv_freq": torch.full((8,), torch.inf)}, of_value=True),
    Mistake("attention_factor-length", "attention_factor", {"attention_factor": torch.ones(7)}),
    Mistake("attention_factor-text", "attention_factor", {"attention_factor": "1.0"}),
    Mistake("attention_factor-device", "attention_factor", {"attention_factor": meta(8)}),
    Mistake("attention_factor-nan", "attention_factor", {"attention_factor": float("nan")}),
    Mistake("attention_factor-inf", "attention_factor", {"attention_factor": float("inf")}),
    Mistake(
        "attention_factor-nan-tensor",
        "attention_factor",
        {"attention_factor": torch.full((8,), torch.nan)},
        of_value=True,
    ),
    Mistake("q_scale-length", "q_scale", {"q_scale": torch.ones(8)}),
    Mistake("q_scale-batch", "q_scale", {"q_scale": torch.ones(3, 9)}),
    Mistake("q_scale-number", "q_scale", {"q_scale": "2"}),
    Mistake("q_scale-device", "q_scale", {"q_scale": meta(9)}),
    Mistake("q_scale-nan", "q_scale", {"q_scale": torch.full((9,), torch.nan)}, of_value=True),
    Mistake("layout-unknown", "layout", {"layout": "sbhd"}),
    Mistake("layout-none", "layout", {"layout": None}),
    Mistake("precision-unknown", "precision", {"precision": "fast"}),
    Mistake("backend-unknown", "backend", {"backend": "tpu"}),
    Mistake("backend-none", "backend", {"backend": None}),
]

# The call that is right: q [13, 4, 16], k [13, 2, 16], packed.
PACKED = [
    Mistake("start", "cu_seqlens", {"cu_seqlens": long(1, 13)}, of_value=True),
    Mistake("end-early", "cu_seqlens", {"cu_seqlens": long(0, 5, 12)}, of_value=True),
    Mistake("end-late", "cu_seqlens", {"cu_seqlens": long(0, 5, 14)}, of_value=True),
    Mistake("unsorted", "cu_seqlens", {"cu_seqlens": long(0, 8, 5, 13)}, of_value=True),
    Mistake("negative", "cu_seqlens", {"cu_seqlens": long(0, -1, 13)}, of_value=True),
    Mistake("float", "cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 13.0])}),
    Mistake("2-d", "cu_seqlens", {"cu_seqlens": long(0, 13)[None]}),
    Mistake("empty", "cu_seqlens", {"cu_seqlens": long()}),
    Mistake("list", "cu_seqlens", {"cu_seqlens": [0, 13]}),
    Mistake("device", "cu_seqlens", {"cu_seqlens": meta(2, dtype=torch.int64)}),
    Mistake("positions-length", "positions", {"positions": torch.arange(12)}),
    Mistake("positions-batch", "positions", {"positions": torch.zeros(2, 13, dtype=torch.int64)}),
    Mistake("seq_lens-count", "seq_lens", {"cu_seqlens": long(0, 5, 13), "seq_lens": long(13)}),
]

# The call that is right: x [2, 9, 48], q_weight [64, 48], k_weight and v_weight [32, 48].
PROJECTION = [
    Mistake("x-integers", "x", {"x": torch.ones(2, 9, 48, dtype=torch.int64)}),
    Mistake("x-not-a-tensor", "x", {"x": None}),
    Mistake("x-1-dimension", "x", {"x": torch.ones(48)}),
    Mistake("x-4-dimensions", "x", {"x": torch.ones(1, 2, 9, 48)}),
    Mistake("x-d_model", "q_weight", {"x": torch.ones(2, 9, 47)}),
    Mistake("q_weight-rows", "q_weight", {"q_weight": torch.ones(63, 48)}),
    Mistake("q_weight-columns", "q_weight", {"q_weight": torch.ones(64, 47)}),
    Mistake("q_weight-3-dimensions", "q_weight", {"q_weight": torch.ones(4, 16, 48)}),
    Mistake("q_weight-device", "q_weight", {"q_weight": meta(64, 48)}),
    Mistake("k_weight-rows", "k_weight", {"k_weight": torch.ones(33, 48)}),
    Mistake("k_weight-dtype", "k_weight", {"k_weight": torch.ones(32, 48, dtype=torch.bfloat16)}),
    Mistake("k_weight-missing", "k_weight", {"k_weight": None}),
    Mistake("v_weight-rows", "v_weight", {"v_weight": torch.ones(8, 48)}),
    Mistake("v_weight-columns", "v_weight", {"v_weight": torch.ones(32, 49)}),
    Mistake("v_weight-dtype", "v_weight", {"v_weight": torch.ones(32, 48, dtype=torch.float64)}),
    Mistake("q_bias-length", "q_bias", {"q_bias": torch.ones(63)}),
    Mistake("k_bias-dimensions", "k_bias", {"k_bias": torch.ones(1, 32)}),
    Mistake("v_bias-device", "v_bias", {"v_bias": meta(32)}),
    Mistake("v_bias-without-v", "v_bias", {"v_weight": None, "v_bias": torch.ones(32)}),
    Mistake("q_norm-length", "q_norm_weight", {"q_norm_weight": torch.ones(15)}),
    Mistake("k_norm-integers", "k_norm_weight", {"k_norm_weight": long(*[1] * 16)}),
    Mistake("norm-scope-unknown", "norm_scope", {"norm_scope": "token"}),
    Mistake(
        "norm-all-length",
        "q_norm_weight",
        {"q_norm_weight": torch.ones(16), "norm_scope": "all"},
    ),
    Mistake("norm_eps-negative", "norm_eps", {"q_norm_weight": torch.ones(16), "norm_eps": -1e-6}),
    Mistake("norm_eps-nan", "norm_eps", {"q_norm_weight": torch.ones(16), "norm_eps": torch.nan}),
    Mistake("norm-in-hf", "q_norm_weight", {"q_norm_weight": torch.ones(16), "precision": "hf"}),
    Mistake("spec-none", "spec", {"spec": None}),
    Mistake("positions-float", "positions", {"positions": torch.arange(9.0)}),
    Mistake("positions-length", "positions", {"positions": torch.arange(10)}),
    Mistake("cu_seqlens-with-batch", "cu_seqlens", {"cu_seqlens": long(0, 9)}),
    Mistake("seq_lens-missing", "seq_lens", {"spec": DYNAMIC}),
    Mistake("inv_freq-length", "inv_freq", {"inv_freq": torch.ones(16)}),
    Mistake("q_scale-length", "q_scale", {"q_scale": torch.ones(10)}),
    Mistake("precision-unknown", "precision", {"precision": "exactly"}),
    Mistake("backend-unknown", "backend", {"backend": "tpu"}),
]


def refuse(function, call, mistake, device, backend):
    if mistake.of_value and device.type != "cpu":
        pytest.skip("values are checked on the CPU only")

    def place(value):
        on_device = torch.is_tensor(value) and value.device.type != "meta"
        return value.to(device) if on_device else value

    call = {"backend": backend} | call | mistake.change
    call = {key: place(value) for key, value in call.items()}
    tensors = [v for v in call.values() if torch.is_tensor(v) and v.device.type != "meta"]
    before = snapshot(*tensors)
    # The name of the argument, not a part of another one.
    with pytest.raises((ValueError, TypeError), match=rf"(?<![\w]){mistake.names}(?![\w])"):
        function(**call)
    assert_unchanged(before)
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.requires_grad_()
    with pytest.raises((ValueError, TypeError), match=mistake.names):
        function(**call)


@pytest.mark.parametrize("mistake", ROPE, ids=lambda m: m.id)
def test_apply_rope(mistake, backend, device):
    q, k = make_qk(device=device)
    refuse(rf.apply_rope, {"q": q, "k": k, "spec": make_spec()}, mistake, device, backend)


@pytest.mark.parametrize("mistake", PACKED, ids=lambda m: m.id)
def test_packed(mistake, backend, device):
    q, k = make_qk("thd", 1, 13, device=device)
    call = {"q": q, "k": k, "spec": make_spec(), "layout": "thd"}
    refuse(rf.apply_rope, call, mistake, device, backend)


@pytest.mark.parametrize("mistake", PROJECTION, ids=lambda m: m.id)
def test_qkv_rope(mistake, backend, device):
    call = {
        "x": randn(2, 9, 48, device=device),
        "q_weight": randn(64, 48, device=device),
        "k_weight": randn(32, 48, device=device),
        "v_weight": randn(32, 48, device=device),
        "spec": make_spec(),
    }
    refuse(rf.qkv_rope, call, mistake, device, backend)


def test_the_calls_that_are_right(backend, device):
    """What the mistakes above change: without the change nothing is refused."""
    q, k = make_qk(device=device)
    rf.apply_rope(q=q, k=k, spec=make_spec(), backend=backend)
    q, k = make_qk("thd", 1, 13, device=device)
    rf.apply_rope(q=q, k=k, spec=make_spec(), layout="thd", backend=backend)
    x, q_weight, k_weight = (randn(*s, device=device) for s in ((2, 9, 48), (64, 48), (32, 48)))
    rf.qkv_rope(x, q_weight, k_weight, k_weight, spec=make_spec(), backend=backend)


def test_a_backend_asks_for_no_other(monkeypatch):
    """What is not installed may not be looked for under torch.compile: the graph would break."""

    def refuse():
        raise AssertionError("asked for")

    for name in ("_triton_state", "_cuda_state"):
        monkeypatch.setattr(dispatch, name, refuse)
    q, k = make_qk()
    for name in ("auto", "reference", *(["cpu"] if dispatch.native is not None else [])):
        rf.apply_rope(q, k, make_spec(), backend=name)


def test_odd_rotary_dim():
    with pytest.raises(ValueError, match="rotary_dim"):
        make_spec(15)
    with pytest.raises(ValueError, match="rotary"):
        make_spec(16, partial_rotary_factor=0.4375)  # 7 dimensions
    with pytest.raises(ValueError, match="rotary_offset"):
        make_spec(16, partial_rotary_factor=0.5, rotary_offset=9)


def test_backend_that_is_not_there(device):
    """RuntimeError: the call is right, the machine is not; a wrong device is a ValueError."""
    q, k = make_qk(device=device)
    usable = {*usable_backends(device), "reference"}
    for name in rf.backends().keys() - usable:
        with pytest.raises((ValueError, RuntimeError), match="backend"):
            rf.apply_rope(q, k, make_spec(), backend=name)


TABLES = [
    Mistake("cos-integers", "cos", {"cos": torch.ones(2, 9, 16, dtype=torch.int64)}),
    Mistake("cos-wide", "cos", {"cos": torch.ones(2, 9, 18), "sin": torch.ones(2, 9, 18)}),
    Mistake("cos-seqlen", "cos", {"cos": torch.ones(2, 8, 16), "sin": torch.ones(2, 8, 16)}),
    Mistake("cos-batch", "cos", {"cos": torch.ones(3, 9, 16), "sin": torch.ones(3, 9, 16)}),
    Mistake("cos-2-d", "cos", {"cos": torch.ones(9, 16), "sin": torch.ones(9, 16)}),
    Mistake("sin-shape", "sin", {"sin": torch.ones(2, 9, 8)}),
    Mistake("sin-device", "sin", {"sin": meta(2, 9, 16)}),
    Mistake("unsqueeze_dim", "unsqueeze_dim", {"unsqueeze_dim": 5}),
    Mistake("q-integers", "q", {"q": torch.ones(2, 4, 9, 16, dtype=torch.int64)}),
    Mistake("k-head-dim", "k", {"k": torch.ones(2, 2, 9, 8)}),
]


@pytest.mark.parametrize("mistake", TABLES, ids=lambda m: m.id)
def test_apply_rotary_pos_emb(mistake, device):
    q, k = make_qk("bhsd", device=device)
    cos, sin = (torch.ones(2, 9, 16, device=device) for _ in range(2))
    call = {"q": q, "k": k, "cos": cos, "sin": sin}

    def function(backend, **call):
        return rf.apply_rotary_pos_emb(**call)

    refuse(function, call, mistake, device, None)


# -- out= --------------------------------------------------------------------------------------


def _out_call(device, **kwargs):
    call = {
        "x": randn(2, 9, 48, device=device, **kwargs),
        "q_weight": randn(64, 48, device=device),
        "k_weight": randn(32, 48, device=device),
        "v_weight": randn(32, 48, device=device),
        "spec": make_spec(),
    }
    out = tuple(torch.zeros(2, 9, n, 16, device=device) for n in (4, 2, 2))
    return call, out


def test_out_needs_no_grad(backend, device):
    call, out = _out_call(device, requires_grad=True)
    before = snapshot(*out)
    with pytest.raises((ValueError, TypeError), match="out"):
        rf.qkv_rope(**call, out=out, backend=backend)
    assert_unchanged(before)


def test_out_of_a_rotation_needs_no_grad(backend, device):
    q, k = make_qk(device=device, requires_grad=True)
    out = torch.zeros(2, 9, 4, 16, device=device), torch.zeros(2, 9, 2, 16, device=device)
    before = snapshot(*out)
    with pytest.raises((ValueError, TypeError), match="out"):
        rf.apply_rope(q, k, make_spec(), out=out, backend=backend)
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="out"):
        rf.apply_rope(q, k, make_spec(), out=out[::-1], backend=backend)
    assert_unchanged(before)


def test_out_is_no_part_of_a_graph(backend, device):
    """What autograd knows a tensor to be may not be replaced behind its back."""
    q, _ = make_qk(device=device)
    out = torch.zeros(2, 9, 4, 16, device=device, requires_grad=True)
    before = snapshot(out)
    for target in (out, out * 2):
        with pytest.raises(ValueError, match="out"):
            rf.apply_rope(q, None, make_spec(), out=(target, None), backend=backend)
    assert_unchanged(before)


@pytest.mark.parametrize("what", ["shape", "dtype", "device", "count", "type"])
def test_out_of_the_wrong_kind(what, backend, device):
    call, out = _out_call(device)
    wrong = {
        "shape": lambda: (out[0][:, :8], *out[1:]),
        "dtype": lambda: (out[0].double(), *out[1:]),
        "device": lambda: (out[0].to("meta"), *out[1:]),
        "count": lambda: out[:2],
        "type": lambda: out[0],
    }[what]()
    before = snapshot(*out)
    with torch.no_grad(), pytest.raises((ValueError, TypeError), match="out"):
        rf.qkv_rope(**call, out=wrong, backend=backend)
    assert_unchanged(before)
