"""The CUDA backend without a GPU: kernels on emulated threads, their machine code, refusals."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rope_fused as rf
from helpers import make_qk, make_spec

ROOT = Path(__file__).resolve().parents[1]
STATE = rf.backends()["cuda"]
SUITE = ("rotate", "positions", "factors", "accuracy", "gradients", "hf_precision", "projection")

built = pytest.mark.skipif(STATE.startswith("not built"), reason=f"CUDA kernels are {STATE}")


# -- on emulated threads -----------------------------------------------------------------------


def emulate(request, files, *options):
    """Run tests of backend="cuda" in a process where the kernels are compiled for the host."""
    if sys.platform != "linux":
        pytest.skip("the threads are coroutines of glibc")
    paths = [f"tests/test_{name}.py" for name in files]
    seed = f"--seed={request.config.getoption('--seed')}"
    command = [sys.executable, "-m", "pytest", "-p", "emulated", "-q"]
    done = subprocess.run(
        [*command, seed, *options, *paths],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout[-500:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_emulated_kernels(request):
    """Whole grids against the reference: groups of lanes, slices, tiles, chunks, captures; the
    pipeline of the fused projection."""
    emulate(request, ["cuda_kernels", "cuda_projection"], "-m", "not slow")


def test_emulated_suite(request):
    """Tests that every backend passes, as many as the seed draws."""
    emulate(request, SUITE, "-m", "not gpu", "--emulated=120")


@pytest.mark.slow
def test_whole_emulated_suite(request):
    emulate(request, SUITE, "-m", "not gpu")
    emulate(request, ["cuda_projection"], "-m", "slow")


# -- machine code ------------------------------------------------------------------------------


def machine_code(*architectures):
    pytest.importorskip("triton")  # brings cuobjdump
    import sass
    from rope_fused import _cuda

    for sm in architectures:
        kernels = [k for k in sass.built(_cuda.__file__, sm) if k.case.split("_")[0] in ELEMENTWISE]
        assert len(kernels) == 2 * 2 * 10 + 10 + 2
        yield from kernels


# Each for three dtypes by three accesses and float64; those with a norm and without, twice.
ELEMENTWISE = ("rotate", "backward", "tables", "fold")
VECTORS = ("AccessE0", "AccessE1")  # half-split, interleaved


def check(kernels):
    for kernel in kernels:
        print(f"{kernel.case}, sm_{kernel.sm}: {kernel.registers} registers, {kernel.loads}")
        assert kernel.spills == 0 and not kernel.has("STL") and not kernel.has("LDL"), kernel
        if any(word in kernel.case for word in VECTORS):
            heads = 1 if kernel.case.startswith("backward") else 4  # in flight
            assert kernel.loads["128"] >= 2 * heads, kernel
            assert kernel.stores["128"] >= 2 * heads, kernel
            if not kernel.case.startswith("backward"):  # which also writes the sums of a token
                assert set(kernel.stores) == {"128"}, kernel


@built
def test_machine_code(request):
    """No spills, no local memory, 16-byte accesses; one architecture, which the seed draws."""
    draw = random.Random(request.config.getoption("--seed"))
    check(machine_code(draw.choice(["80", "90a", "100"])))


@built
@pytest.mark.slow
def test_all_machine_code():
    check(machine_code("80", "90a", "100"))


# What a thread of the projection has: the pairs of its tile, at most 144 sums (csrc/cuda/tile.cuh).
def pairs_of(case):
    head_dim = int(re.search(r"Li(\d+)E", case)[1])
    columns = 128 if head_dim == 64 else head_dim
    return 288 // columns * columns // 4


def turns_between(kernel, pairs):
    """Whether behind the products, and before the last store of what they gave, so many pairs are
    rotated: each takes the upper half of a product of integers, its conversion to an angle, the
    polynomials' fused products and sums and those of the rotation."""
    lines = kernel.sass.splitlines()
    products = [n for n, line in enumerate(lines) if "HGMMA" in line]
    stores = [n for n, line in enumerate(lines) if "UTMASTG" in line]
    if not products or not stores or products[-1] > stores[-1]:
        return False
    between = "\n".join(lines[products[-1] : stores[-1]])
    need = {r"IMAD\.(?:HI|WIDE)\.U32": 1, r"I2FP?\.\S*": 1, "FFMA": 3 + 4 + 2}
    counts = {name: len(re.findall(rf"\b{name}(?=\s|\.)", between)) for name in need}
    print(f"{kernel.case}: {kernel.registers} registers, {pairs} pairs, {counts}")
    return all(counts[name] >= number * pairs for name, number in need.items())


def check_projection(names):
    """Products of warpgroups, TMA both ways, registers moved to who computes, no spills; and the
    rotation in between."""
    import sass
    from rope_fused import _cuda

    for kernel in sass.built(_cuda.__file__, "90a", names):
        assert kernel.spills == 0 and not kernel.has("STL") and not kernel.has("LDL"), kernel
        assert kernel.has("USETMAXREG") == 2, kernel  # to 24 for who loads, 240 for who computes
        assert kernel.has("HGMMA") and kernel.has("UTMALDG") and kernel.has("UTMASTG"), kernel
        assert turns_between(kernel, pairs_of(kernel.case)), kernel


@built
def test_machine_code_of_the_projection(request):
    """Two kernels that the seed draws, and what all of them take; and one that only rotates, which
    does not pass."""
    pytest.importorskip("triton")
    import sass
    from rope_fused import _cuda

    every = sass.resources(_cuda.__file__, "90a")
    own = {name: use for name, use in every.items() if "project_kernel" in name}
    assert len(own) == 2 * (2 * len(_cuda.projected_head_dims) - 1)
    for name, use in own.items():
        assert use["STACK"] == use["LOCAL"] == 0, name
        assert use["REG"] == 168, name  # for each of 384 threads when they start
    draw = random.Random(request.config.getoption("--seed"))
    check_projection(draw.sample(sorted(own), 2))
    name = draw.choice([name for name in every if "rotate_kernel" in name])
    (rotation,) = sass.built(_cuda.__file__, "90a", [name])
    assert not turns_between(rotation, 1)


@built
@pytest.mark.slow
def test_all_machine_code_of_the_projection():
    pytest.importorskip("triton")
    import sass
    from rope_fused import _cuda

    check_projection(
        [name for name in sass.resources(_cuda.__file__, "90a") if "project_kernel" in name]
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_machine_code_of_a_plain_product(tmp_path):
    """The same kernel with an epilogue that only stores does not pass for one that rotates."""
    pytest.importorskip("triton")
    import sass

    flags = "-O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -Itests/control -Icsrc"
    command = ["nvcc", *flags.split(), '-DROPE_FUSED_CUDA_ARCHITECTURES="sm_90a"']
    file = tmp_path / "plain.o"
    subprocess.run([*command, "-c", "csrc/cuda/project.cu", "-o", file], cwd=ROOT, check=True)
    kernels = sass.built(file, "90a")
    assert kernels
    for kernel in kernels:
        assert kernel.has("HGMMA") and kernel.has("UTMALDG") and kernel.has("UTMASTG"), kernel
        assert not turns_between(kernel, 1), kernel


# -- refusals ----------------------------------------------------------------------------------


@built
def test_what_backends_says():
    from rope_fused import _cuda

    assert _cuda.architectures == "sm_80, sm_90a, sm_100"
    if not torch.cuda.is_available():
        assert STATE == "built for sm_80, sm_90a, sm_100; no CUDA device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_it_says_what_to_do():
    q, k = make_qk()
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run here: .*use backend='auto'"):
        rf.apply_rope(q, k, make_spec(), backend="cuda")


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_itself_says_so_too():
    from rope_fused import _cuda, ops, parameters

    q, _ = make_qk()
    spec = make_spec()
    rotation = ops.Rotation(spec.rows(), spec.turns(), spec.scale_rows())
    shared, held = parameters.make_rotation(_cuda, q, rotation)
    rows = [parameters.make_rows(_cuda, q, q, None, "bshd", token_scaled=False)]
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU and its driver"):
        _cuda.rotate(shared, rows, device=0, stream=0)
    del held

    y = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    shared, held = parameters.make_rotation(_cuda, y, rotation._replace(layout="thd"))
    at = y.data_ptr()
    rows = [
        _cuda.ProjectedRows(
            weight=at, weight_step=64, bias=0, norm=0, y=at, y_step=64 * n, kept=0, kept_step=0,
            heads=n,
        )
        for n in (2, 1, 0)
    ]  # fmt: skip
    sizes = {"x": at, "x_step": 64, "tokens": 4, "d_model": 64}
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU and its driver"):
        _cuda.project(shared, rows, **sizes, device=0, stream=0)
    del held
