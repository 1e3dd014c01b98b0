"""The machine code of the Triton kernels for sm_80, sm_90 and sm_100, compiled without a GPU."""

import random

import pytest

triton = pytest.importorskip("triton")

import sass  # noqa: E402


def check(kernels):
    assert kernels
    for kernel in kernels:
        print(
            f"{kernel.case}, sm_{kernel.sm}: {kernel.registers} registers, {kernel.shared} bytes "
            f"shared, loads {kernel.loads}, stores {kernel.stores}"
        )
    for kernel in kernels:
        if (kernel.case, kernel.sm) not in SPILLED:
            assert kernel.spills == 0 and not kernel.has("STL") and not kernel.has("LDL"), kernel
        if kernel.case.startswith("rotate") and kernel.case not in NARROW:
            # Whatever is narrower reads positions and factors, never q or k.
            assert set(kernel.stores) == {"128"}, kernel
            assert kernel.loads["128"] >= sum(kernel.stores.values()), kernel
        if kernel.case.startswith("project"):
            check_projection(kernel)


def check_projection(kernel):
    """Tensor cores where the dtype has them; tensor descriptors, else 128-bit accesses; shared
    memory that the architecture has."""
    products = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    for sm, name in products.items():
        expected = kernel.sm == sm and "float32" not in kernel.case
        assert bool(kernel.has(name)) == expected, (name, kernel)
    described = kernel.sm >= 90 and "pointers" not in kernel.case
    for name in ("UTMALDG", "UTMASTG"):
        assert bool(kernel.has(name)) == described, (name, kernel)
    assert bool(kernel.has("LDGSTS")) != described, kernel
    if not described:
        assert set(kernel.stores) == {"128"}, kernel
    limit = {80: 163, 90: 227, 100: 227}[kernel.sm] << 10
    assert kernel.shared <= limit, kernel
    if kernel.case == "project bfloat16" and kernel.sm == 90:
        # What configs.default_tile counts on: two programs fit into a multiprocessor.
        assert 2 * 32 * kernel.warps * kernel.registers <= 1 << 16, kernel
        assert 2 * (kernel.shared + 1024) <= 228 << 10, kernel


# One register, by the compiler of older versions.
SPILLED = set() if triton.__version__ >= "3.9" else {("rotate one kv head", 80)}

# A tile of q or k, or what is rotated of it, has less than 16 bytes for each thread.
NARROW = {"rotate one kv head", "rotate one token", "rotate head_dim 512, last 64"}


def test_some_kernels(request):
    """One case of each kernel, on one architecture; `test_every_kernel` has them all."""
    draw = random.Random(request.config.getoption("--seed"))
    cases = [draw.choice(names) for names in by_kernel().values()]
    sm = draw.choice(sass.ARCHITECTURES)
    options = [f"--only={name}" for name in cases]
    check(sass.kernels("--exact", *options, "--sm", str(sm)))


@pytest.mark.slow
@pytest.mark.parametrize("sm", sass.ARCHITECTURES)
def test_every_kernel(sm):
    check(sass.kernels("--sm", str(sm)))


def by_kernel():
    groups = {}
    for name in sass.names():
        groups.setdefault(name.split()[0], []).append(name)
    return groups
