"""The fused projection of Hopper: tiles, rings of stages, turns of warpgroups, and its fragments.

Runs on an H100 or H200, and in tests/test_cuda.py on emulated threads, where copies and products
happen as late as they may."""

import ast
import ctypes
import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch

import projections
from helpers import assert_same_bits, assert_unchanged, snapshot, usable_backends
from projections import EVERYTHING
from rope_fused import dispatch, ops

pytestmark = pytest.mark.gpu  # or emulated
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@pytest.fixture(autouse=True)
def hopper(device):
    if "cuda" not in usable_backends(device):
        pytest.skip("no CUDA kernels for this device")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the fused projection is for sm_90")


def kernels():
    from rope_fused import cuda_backend

    return cuda_backend


@dataclasses.dataclass
class Call(projections.Call):
    """Run by the fused kernel."""

    d_model: int = 72
    dtype: torch.dtype = torch.bfloat16

    def fuse(self, outputs):
        return kernels().project_fused(
            self.x, self.weights, self.biases, outputs, self.head_dim, self.rotation, always=True
        )

    def run(self):
        operands = [*self.weights, *self.biases, *self.rotation]
        before = snapshot(self.x, *(t for t in operands if torch.is_tensor(t)))
        outputs = self.outputs()
        assert self.fuse(outputs)
        assert_unchanged(before)
        return outputs


def either(options):
    return options[int(torch.randint(0, len(options), ()))]


# -- what it computes --------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, interleaved, device):
    """Every head dim, by the kernel for one table and by that for all the rest."""
    for options in ({"bias": True, "positions": "int64"}, EVERYTHING):
        Call(
            head_dim, dtype=either(DTYPES), interleaved=interleaved, device=device.type, **options
        ).check_run()


OPTIONS = {
    "plain": {},
    "q and k": {"heads": (2, 1, 0)},
    "many q heads": {"heads": (9, 1, 1)},
    "an even number of tiles": {"heads": (2, 1, 1), "head_dim": 128},
    "bias": {"bias": True},
    "norm": {"norm": True, "head_dim": 128},
    "keep": {"keep": True},
    "keep normed": {"keep": True, "norm": True, "bias": True},
    "int32 positions for all": {"positions": "int32"},
    "int64 positions": {"positions": "int64"},
    "position axes": {"positions": "axes", "head_dim": 128},
    "tables by index": {"tables": 3},
    "token_scale": {"token_scale": True},
    "conjugate": {"conjugate": True, "positions": "int64"},
    "conjugate axes": {"conjugate": True, "positions": "axes"},
    "partial": {"rotary_dim": 32, "norm": True, "bias": True},
    "partial, last slice": {"rotary_dim": 16, "offset": 48, "token_scale": True},
    "partial, interleaved": {"rotary_dim": 24, "interleaved": True, "norm": True},
    "three quarters": {"head_dim": 128, "rotary_dim": 96, "bias": True},
    "partial of two boxes": {"head_dim": 96, "rotary_dim": 40, "offset": 56, "interleaved": True},
    "one token": {"shape": (1, 1)},
    "one token of each": {"shape": (5, 1), "token_scale": True},
    "one column": {"d_model": 8},
    "deep": {"d_model": 520, "norm": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, device):
    Call(**({"dtype": either(DTYPES), "device": device.type} | OPTIONS[name])).check_run()


@pytest.mark.parametrize(("d_model", "seqlen"), [(64, 620), (128, 620), (448, 210)])
def test_many_tiles_for_each_cluster(d_model, seqlen, device):
    """Fewer steps than stages in the ring, and more; both warpgroups come round several times, the
    last time one of them alone; rows do not fill the last tile, nor tiles of rows a band."""
    call = Call(64, (5, 3, 1), d_model, (2, seqlen), positions="int64", device=device.type)
    call.check_run()


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_everything_at_once(dtype, head_dim, interleaved, device):
    for options in (EVERYTHING, EVERYTHING | {"rotary_dim": 32, "positions": "int64"}):
        Call(
            head_dim, (5, 3, 2), 328, (3, 211), dtype, interleaved=interleaved,
            device=device.type, **options,
        ).check_run()  # fmt: skip


def test_memory_around_the_outputs(device):
    """Outputs that are slices of larger memory: nothing beside them is written."""
    call = Call(80, shape=(2, 19), norm=True, device=device.type)
    for gap, fits in ((16, True), (3, False)):  # elements behind each row
        outputs, rooms = call.outputs_with_gaps(gap)
        assert call.fuse(outputs) == fits
        if fits:
            call.check(outputs)
        assert all(r[..., -gap:].isnan().all() for r in rooms)


def test_strides(device):
    """Rows of x and of the weights with gaps between them, which hold NaN."""
    call = Call(64, shape=(2, 9), d_model=64, device=device.type)
    want = call.run()
    for name, tensors in (("x", [call.x]), ("weights", call.weights)):
        strided = []
        for t in tensors:
            room = torch.full((*t.shape[:-1], 80), torch.nan, dtype=t.dtype, device=device)
            room[..., 8:72] = t
            strided.append(room[..., 8:72])
        other = dataclasses.replace(call)
        other.x, other.weights, other.biases = call.x, call.weights, call.biases
        other.rotation = call.rotation
        setattr(other, name, strided[0] if name == "x" else strided)
        for a, b in zip(other.run(), want, strict=True):
            assert (a is None and b is None) or assert_same_bits(a, b) is None


def test_what_does_not_fit(device):
    """Nothing is done with it; `project` composes it of the library's product and a rotation."""
    call = Call(64, shape=(2, 9), d_model=64, device=device.type)
    wide = torch.zeros(2, 9, 67, dtype=call.dtype, device=device)
    wide[..., :64] = call.x
    for change in (
        {"x": call.x.float(), "weights": [w.float() for w in call.weights]},
        {"x": call.x[:, :0]},
        {"x": call.x.transpose(1, 2).contiguous().transpose(1, 2)},
        {"x": call.x[:1].expand_as(call.x)},
        {"x": wide[..., :64]},
        {"weights": [w.t().contiguous().t() for w in call.weights]},
        {"head_dim": 32},
        {"rotation": call.rotation._replace(norm_all=True)},
        {"rotation": Call(64, rotary_dim=32, offset=16, device=device.type).rotation},
        {"rotation": Call(64, rotary_dim=20, device=device.type).rotation},
    ):
        operands = {name: change.get(name, getattr(call, name)) for name in
                    ("x", "weights", "biases", "head_dim", "rotation")}  # fmt: skip
        outputs = [
            torch.empty(
                (*operands["x"].shape[:-1], w.shape[0] // operands["head_dim"],
                 operands["head_dim"]), dtype=operands["x"].dtype, device=device,
            ) for w in operands["weights"]
        ]  # fmt: skip
        fused = kernels().project_fused(
            operands["x"], operands["weights"], operands["biases"], (*outputs, None, None),
            operands["head_dim"], operands["rotation"], always=True,
        )  # fmt: skip
        assert fused is False, change


def test_project_takes_it_where_it_pays(device, monkeypatch):
    """ops.project runs it, or not, as the choice says; both ways within the budget."""
    call = Call(128, norm=True, keep=True, device=device.type)
    rotation = call.rotation._replace(backend="cuda")
    ran = []
    real = kernels()._launch
    monkeypatch.setattr(
        kernels(), "_launch", lambda q, kernel, *rest, **options: (
            ran.append(kernel.__name__), real(q, kernel, *rest, **options)
        ),
    )  # fmt: skip
    for pays, launches in ((True, ["project"]), (False, ["rotate"])):
        monkeypatch.setattr(kernels(), "_pays", lambda *problem, pays=pays: pays)
        ran.clear()
        got = dispatch.project(call.x, call.weights, call.biases, 128, rotation, True)
        assert ran == launches
        if pays:  # one rounding; else two
            call.check(got)
    assert isinstance(rotation, ops.Rotation)


# -- fragments ---------------------------------------------------------------------------------


def fragment(device):
    """[128 threads, 32 numbers] of (row, column), as the kernel sees a product of 64 columns."""
    if device.type == "cuda":
        pytest.skip("asks the kernels that are compiled for the host")
    find = ctypes.CDLL(kernels()._cuda.__file__).emulate_fragment
    found = torch.empty(128, 32, 2, dtype=torch.int32)
    for thread, i in itertools.product(range(128), range(32)):
        find(thread, i, ctypes.c_void_p(found[thread, i].data_ptr()))
    return found


def test_every_element_is_in_one_fragment(device):
    """And a thread's numbers are in rows r and r + 8, two by two in neighbouring columns, of every
    eighth: both members of a pair, and a fourth of each head."""
    found = fragment(device)
    assert len({tuple(at) for at in found.flatten(0, 1).tolist()}) == 64 * 64
    row, column = found.unbind(-1)
    assert (row == row[:, :1] + 8 * (torch.arange(32) // 2 % 2)).all()
    assert (column[:, 1::2] == column[:, ::2] + 1).all() and (column[:, ::2] % 2 == 0).all()
    assert (column[:, 4:] == column[:, :-4] + 8).all()


def test_fragments_are_those_of_cute(device):
    """The same mapping in CuTe: its own layout of wgmma's accumulators, by its own algebra."""
    pycute = pytest.importorskip("pycute", reason="pip install --no-deps nvidia-cutlass==4.2.0.0")
    import cutlass_library

    headers = Path(cutlass_library.__file__).parent / "source/include/cute/atom"
    text = (headers / "mma_traits_sm90_gmma.hpp").read_text()
    words = re.search(r"using CLayout_64xN\s*=\s*(Layout<.*?>);", text, re.DOTALL)[1]
    # Layout<Shape<..>, Stride<..>> -> ((..), (..)), Int<N/8> -> 64 // 8, _4 -> 4
    words = re.sub(r"Int<N/8>", "8", re.sub(r"\s+", "", words))
    words = re.sub(r"_(\d+)", r"\1", words.replace("Layout", "").replace("Shape", ""))
    shape, stride = ast.literal_eval(
        words.replace("Stride", "").replace("<", "(").replace(">", ")")
    )
    layout = pycute.Layout(shape, stride)  # (thread, number) -> row + 64 column
    found = fragment(device)
    for thread, i in itertools.product(range(128), range(32)):
        index = layout(thread, i)
        assert found[thread, i].tolist() == [index % 64, index // 64]
