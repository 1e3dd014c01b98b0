"""The fused projection: every way to tile it against the reference, and when it is chosen."""

import dataclasses

import pytest
import torch

import projections
import rope_fused as rf
from helpers import assert_unchanged, snapshot
from problems import Case
from projections import EVERYTHING

pytest.importorskip("triton")
STATE = rf.backends()["triton"]
if STATE not in ("ready", "interpreted"):
    pytest.skip(f"Triton: {STATE}", allow_module_level=True)

from rope_fused.triton_kernels import configs, plan  # noqa: E402

from rope_fused import triton_backend  # noqa: E402

DTYPES = (torch.float16, torch.float32)


@dataclasses.dataclass
class Call(projections.Call):
    """Run by the Triton kernel."""

    def tile(self):
        """None in the interpreter, which fuses whatever it can; on a GPU the default tile."""
        device = plan.device_of(self.x.device)
        return None if STATE == "interpreted" else tile_for(self, device.arch)

    def plan(self, outputs, tile=None):
        return plan.plan_projection(
            self.x, self.weights, self.biases, outputs, self.head_dim, self.rotation,
            tile or self.tile(),
        )  # fmt: skip

    def fuse(self, outputs, tile=None):
        return triton_backend.project_fused(
            self.x, self.weights, self.biases, outputs, self.head_dim, self.rotation,
            tile or self.tile(),
        )  # fmt: skip

    def run(self, tile=None, descriptors=None):
        """(q, k, v, z_q, z_k) of the fused kernel."""
        operands = [*self.weights, *self.biases, *self.rotation]
        before = snapshot(self.x, *(t for t in operands if torch.is_tensor(t)))
        outputs = self.outputs()
        planned = self.plan(outputs, tile)
        assert planned is not None
        assert descriptors is None or planned.tile.descriptors == descriptors
        self.fuse(outputs, tile)
        assert_unchanged(before)
        return outputs


def tile_for(call, arch=90, **changes):
    head = configs.head_view(call.head_dim, 2 * call.rotation.pairs, call.offset, call.interleaved)
    problem = configs.problem_of(call.x, call.weights, call.head_dim, call.rotation)
    return configs.default_tile(arch, problem, head)._replace(**changes)


def takes_descriptors(device):
    return plan.device_of(device).arch >= 90


# -- what it computes --------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_dims(head_dim, interleaved, device):
    """Every head dim, by descriptors and by pointers; one at random with everything there is."""
    options = EVERYTHING if torch.rand(()) < 0.5 else {"positions": "int32"}
    dtype = DTYPES[int(torch.randint(0, 2, ()))]
    call = Call(head_dim, dtype=dtype, interleaved=interleaved, device=device.type, **options)
    for descriptors in (True, False) if takes_descriptors(device) else (False,):
        call.check(call.run(tile_for(call, descriptors=descriptors), descriptors))


OPTIONS = {
    "plain": {},
    "q and k": {"heads": (2, 1, 0)},
    "many q heads": {"heads": (9, 1, 1), "head_dim": 32},
    "bias": {"bias": True},
    "bias of few": {"bias": True, "heads": (2, 2, 0)},
    "norm": {"norm": True},
    "keep": {"keep": True},
    "keep normed": {"keep": True, "norm": True, "bias": True},
    "int32 positions for all": {"positions": "int32"},
    "int64 positions": {"positions": "int64"},
    "position axes": {"positions": "axes"},
    "tables by index": {"tables": 3},
    "tables by index, interleaved": {"tables": 3, "interleaved": True, "positions": "axes"},
    "token_scale": {"token_scale": True},
    "conjugate": {"conjugate": True, "positions": "int64"},
    "partial": {"rotary_dim": 32, "norm": True},
    "partial, last slice": {"rotary_dim": 16, "offset": 48},
    "partial, interleaved": {"rotary_dim": 24, "offset": 10, "interleaved": True, "norm": True},
    "partial, padded": {"head_dim": 96, "rotary_dim": 24, "bias": True},
    "one token": {"shape": (1, 1)},
    "one token of each": {"shape": (5, 1), "token_scale": True},
    "tall": {"shape": (1, 150)},
    "odd d_model": {"d_model": 37},
    "deep": {"d_model": 200, "norm": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, device):
    dtype = DTYPES[int(torch.randint(0, 2, ()))]
    call = Call(**({"dtype": dtype, "device": device.type} | OPTIONS[name]))
    call.check(call.run())


@pytest.mark.parametrize("descriptors", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_tiles(parts, descriptors, device):
    """Tiles smaller than the product in every direction, more of them than programs, and bands
    that do not divide the rows."""
    if descriptors and not takes_descriptors(device):
        pytest.skip("for GPUs with tensor descriptors")
    call = Call(64, heads=(5, 3, 2), shape=(3, 21), positions="int64", device=device.type)
    tile = configs.Tile(16, 2, 16, 4, 2, parts, 1, 3, descriptors)
    call.check(call.run(tile, descriptors))


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_everything_at_once(dtype, head_dim, interleaved, device):
    shape = (2, 75)
    for options in (EVERYTHING, EVERYTHING | {"rotary_dim": head_dim // 2, "positions": "int64"}):
        call = Call(
            head_dim, (3, 2, 1), 100, shape, dtype, interleaved=interleaved,
            device=device.type, **options,
        )  # fmt: skip
        for arch in (80, 90, 100):
            call.check(call.run(tile_for(call, arch)))


def test_memory_around_the_outputs(device):
    """Outputs that are slices of larger memory: nothing beside them is written."""
    call = Call(80, heads=(3, 2, 1), shape=(2, 19), norm=True, device=device.type)
    for gap in (16, 3):  # of elements: what a descriptor takes, and what it does not
        outputs, rooms = call.outputs_with_gaps(gap)
        assert call.plan(outputs).tile.descriptors == (gap == 16 and takes_descriptors(device))
        assert call.fuse(outputs)
        call.check(outputs)
        assert all(r[..., -gap:].isnan().all() for r in rooms)


def test_without_descriptors_where_none_can_be(device):
    """Rows at unequal distances, or not at multiples of 16 bytes: pointers, and the same result."""
    call = Call(64, shape=(2, 9), d_model=64, device=device.type)
    call.check(call.run(descriptors=takes_descriptors(device)))
    x, weights = call.x, call.weights
    room = torch.full((2, 11, 64), torch.nan, dtype=x.dtype, device=device)
    room[:, :9] = x
    odd = torch.full((2, 9, 67), torch.nan, dtype=x.dtype, device=device)
    odd[..., 1:65] = x
    wide = [torch.full((w.shape[0], 67), torch.nan, dtype=x.dtype, device=device) for w in weights]
    for room_of, w in zip(wide, weights, strict=True):
        room_of[:, :64] = w
    tile = configs.Tile(128, 4, 128, 4, 2, parts=1, descriptors=False)
    want = call.run(tile, descriptors=False)
    for call.x, call.weights in (
        (room[:, :9], weights),
        (odd[..., 1:65], weights),
        (x[:1].expand_as(x), weights),
        (x, [w[:, :64] for w in wide]),
    ):
        got = call.run(descriptors=False)
        call.check(got)
    call.x, call.weights = odd[..., 1:65], weights
    for a, b in zip(call.run(tile), want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_keeps_what_the_backward_reads(device):
    """With a norm, ops.project gets the projections themselves beside the rotated ones."""
    x, weights, options = Case("keep", norm="head").operands(torch.float16, device)
    x.requires_grad_()
    q, k, v = rf.qkv_rope(x, *weights, backend="triton", **options)
    (q.float().sum() + k.float().sum() + v.float().sum()).backward()
    got, x.grad = x.grad, None
    outputs = rf.qkv_rope(x, *weights, backend="reference", **options)
    sum(y.float().sum() for y in outputs).backward()
    scale = x.grad.float().abs().max()
    # z is rounded to float16 before the backward reads it.
    assert (got.float() - x.grad.float()).abs().max() <= 16 * 2.0**-11 * scale


# -- when it is chosen -------------------------------------------------------------------------


def test_what_does_not_fit(device):
    call = Call(16, d_model=32, device=device.type)
    assert call.plan(call.outputs()) is not None
    strided = call.x.transpose(1, 2).contiguous().transpose(1, 2)
    for change in (
        {"x": call.x.double()},
        {"x": call.x[:, :0]},
        {"x": strided},
        {"weights": [w.t().contiguous().t() for w in call.weights]},
        {"rotation": call.rotation._replace(norm_all=True)},
        {"rotation": call.rotation._replace(rotary_offset=1)},
    ):
        other = dataclasses.replace(call)
        for name, value in change.items():
            setattr(other, name, value)
        assert other.plan(other.outputs()) is None, change


@pytest.mark.parametrize(
    ("head", "view"),
    [
        ((128, 128, 0, False), (2, 64)),
        ((96, 96, 0, False), (2, 48)),
        ((128, 64, 0, False), (4, 32)),
        ((64, 16, 48, False), (8, 8)),
        ((128, 64, 32, True), (1, 128)),
        ((80, 32, 0, False), None),  # slices of 32 do not fill 80
        ((96, 32, 0, False), None),  # three of them
        ((128, 64, 32, False), None),  # the slice lies across two
        ((128, 64, 3, True), None),
        ((512, 64, 448, True), None),  # wider than a tile
    ],
)
def test_heads_as_slabs(head, view):
    assert configs.head_view(*head) == view


def test_tf32_is_for_who_allows_it(device):
    call = Call(16, d_model=32, dtype=torch.float32, device=device.type)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            settings.fp32_precision = precision
            assert call.plan(call.outputs()).precision == precision
    finally:
        settings.fp32_precision = before
