"""The Triton kernels: what they read and write, how the interpreter rounds, where they run."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import rope_fused as rf
from helpers import assert_same_bits, make_qk, make_spec, randn
from problems import leaf, uniform

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
phase = pytest.importorskip("rope_fused.triton_kernels.phase")

STATE = rf.backends()["triton"]
interpreted = pytest.mark.skipif(STATE != "interpreted", reason="hooks Triton's interpreter")


# -- traffic -----------------------------------------------------------------------------------


class Traffic:
    """Counts the bytes that interpreted kernels load and store, by the masks of their accesses."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.loaded = self.stored = 0
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder, ptrs, mask, *rest):
            self.loaded += self.bytes(ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):
            self.stored += self.bytes(ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    @staticmethod
    def bytes(ptrs, mask):
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        return size * int(np.broadcast_to(mask.data, ptrs.data.shape).sum())


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


TRAFFIC = {
    "bshd": ({}, {}),
    "bhsd": ({}, {"layout": "bhsd"}),
    "interleaved": ({"interleaved": True}, {}),
    "partial": ({"partial_rotary_factor": 0.5}, {}),
}


@interpreted
@pytest.mark.parametrize("direction", ["rotate", "un-rotate"])
@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic(name, direction, monkeypatch):
    """q and k are read once and written once; angles cost next to nothing: at most 1.02 times the
    least possible, positions included."""
    spec_options, options = TRAFFIC[name]
    spec = make_spec(128, **spec_options)
    layout = options.get("layout", "bshd")
    q, k = (leaf(t) for t in make_qk(layout, 1, 23, 32, 8, 128, dtype=torch.bfloat16))
    positions = torch.randint(0, 2**20, (23,))
    out = rf.apply_rope(q, k, spec, positions, backend="triton", **options)
    grads = [torch.randn_like(y) for y in out]
    traffic = Traffic(monkeypatch)
    if direction == "rotate":
        rf.apply_rope(q, k, spec, positions, backend="triton", **options)
    else:
        torch.autograd.grad(out, (q, k), grads)
    least = size(q, k)
    ratio = (traffic.loaded + traffic.stored) / (2 * least + size(positions))
    print(f"{name}, {direction}: {ratio:.4f} of the least possible traffic")
    assert traffic.stored == least
    assert traffic.loaded >= least + size(positions)
    assert ratio <= 1.02


@interpreted
def test_traffic_in_place(monkeypatch):
    """Dimensions that are not rotated are not touched."""
    q, k = make_qk("bshd", 1, 16, 32, 8, 128, dtype=torch.bfloat16)
    traffic = Traffic(monkeypatch)
    with torch.no_grad():
        spec = make_spec(128, partial_rotary_factor=0.25)
        rf.apply_rope(q, k, spec, backend="triton", out=(q, k))
    assert traffic.stored == size(q, k) // 4
    assert traffic.loaded <= 1.1 * size(q, k) // 4  # a quarter of the rows beside whole tables


@interpreted
@pytest.mark.parametrize("norm", [False, True], ids=["factors", "norm"])
def test_traffic_of_the_backward_with_reductions(norm, monkeypatch):
    """Gradients and inputs are read once, gradients written once. Beside it sums and norm weights,
    which the caches hold: every tile reads them anew, hence the wider bound."""
    spec = make_spec(128)
    q, k = (leaf(t) for t in make_qk("bshd", 1, 32, 32, 8, 128, dtype=torch.bfloat16))
    if norm:
        from rope_fused import ops

        rotation = ops.Rotation(
            spec.rows(), spec.turns(), spec.scale_rows(), backend="triton",
            q_norm=leaf(randn(128)), k_norm=leaf(randn(128)),
        )  # fmt: skip
        out = ops.rotate(q, k, rotation)
    else:
        out = rf.apply_rope(q, k, spec, inv_freq=uniform(64), backend="triton")
    grads = [torch.randn_like(y) for y in out]
    traffic = Traffic(monkeypatch)
    torch.autograd.grad(out, (q, k), grads)
    ratio = (traffic.loaded + traffic.stored) / (3 * size(q, k))
    print(f"backward with reductions: {ratio:.4f} of the least possible traffic")
    assert ratio <= (1.2 if norm else 1.1)


# -- rounding ----------------------------------------------------------------------------------


@triton.jit
def convert(x, floats, values, back, nearest):
    """bfloat16 x to float32 and back; float32 to bfloat16."""
    at = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    value = phase.widen(tl.load(x + at), tl.float32)
    tl.store(values + at, value)
    tl.store(back + at, phase.narrow(value, tl.bfloat16))
    tl.store(nearest + at, phase.narrow(tl.load(floats + at), tl.bfloat16))


@interpreted
def test_conversions_round_as_hardware_does():
    """Every bfloat16 number survives, and float32 goes to the nearest one, ties to even."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    floats = torch.randint(-(2**31), 2**31, (2**16,)).int().view(torch.float32)
    ties = (torch.randint(-(2**15), 2**15, (2**16,)).int() << 16 | 0x8000).view(torch.float32)
    for wide in (floats, ties):
        values = torch.empty(2**16)
        back, nearest = (torch.empty(2**16, dtype=torch.bfloat16) for _ in range(2))
        convert[(16,)](x, wide, values, back, nearest)
        number = ~x.isnan()
        assert_same_bits(values[number], x.float()[number])
        assert_same_bits(back[number], x[number])
        assert back[~number].isnan().all()
        number = ~wide.isnan()
        assert_same_bits(nearest[number], wide.bfloat16()[number])
        assert nearest[~number].isnan().all()


# -- where they run ----------------------------------------------------------------------------


def state(before="", **environment):
    """What backends() says of Triton in a fresh process."""
    code = f"{before}\nimport rope_fused as rf; print(rf.backends()['triton'])"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_backends_says():
    assert state() == ("ready" if torch.cuda.is_available() else "no CUDA device")
    assert state(TRITON_INTERPRET="1") == "interpreted"
    assert state("import sys; sys.modules['triton'] = None").startswith("not installed (")


def test_wrong_device():
    q, k = make_qk(device="meta")
    if STATE == "ready":
        with pytest.raises(ValueError, match="'triton' .* takes cuda tensors"):
            rf.apply_rope(q.to("cpu"), None, make_spec(), backend="triton")
    elif STATE == "no CUDA device":
        with pytest.raises(RuntimeError, match="no CUDA device"):
            rf.apply_rope(q, k, make_spec(), backend="triton")


def test_more_dimensions_than_a_tile_holds(backend, device):
    """A kernel asked for by name refuses; "auto" goes on to the reference."""
    if backend != "triton":
        pytest.skip("of the Triton kernels")
    spec = make_spec(4096)
    q = randn(1, 2, 1, 4096, device=device)
    with pytest.raises(ValueError, match="at most 2048 dimensions, got 4096"):
        rf.apply_rope(q, None, spec, backend=backend)
    wide = make_spec(4096, partial_rotary_factor=0.5)
    want, _ = rf.apply_rope(q, None, wide, backend="reference")
    got, _ = rf.apply_rope(q, None, wide, backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_auto_is_triton_on_cuda():
    q, k = (t.cuda() for t in make_qk(dtype=torch.bfloat16))
    spec = make_spec()
    for a, b in zip(
        rf.apply_rope(q, k, spec), rf.apply_rope(q, k, spec, backend="triton"), strict=True
    ):
        assert_same_bits(a, b)


@pytest.mark.gpu
def test_graph_capture():
    """A captured call replays on new values, and gives what the eager call gives."""
    spec = make_spec(128)
    q, k = (t.cuda() for t in make_qk("bshd", 2, 300, 8, 2, 128, dtype=torch.bfloat16))
    positions = torch.arange(300, device="cuda")
    rf.apply_rope(q, k, spec, positions)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rf.apply_rope(q, k, spec, positions)
    for shift in (0, 12345):
        positions.add_(shift)
        q.normal_(), k.normal_()
        graph.replay()
        for a, b in zip(out, rf.apply_rope(q, k, spec, positions), strict=True):
            assert_same_bits(a, b)
