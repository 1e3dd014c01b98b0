"""The machine code of the Triton kernels for sm_80, sm_90 and sm_100, compiled without a GPU."""

import random

import pytest

pytest.importorskip("triton")

import sass  # noqa: E402


def check(kernels):
    assert kernels
    for kernel in kernels:
        print(
            f"{kernel.case}, sm_{kernel.sm}: {kernel.registers} registers, {kernel.shared} bytes "
            f"shared, loads {kernel.loads}, stores {kernel.stores}"
        )
    for kernel in kernels:
        assert kernel.spills == 0 and not kernel.has("STL") and not kernel.has("LDL"), kernel
        if kernel.case.startswith("rotate") and kernel.case not in NARROW:
            # Whatever is narrower reads positions and factors, never q or k.
            assert set(kernel.stores) == {"128"}, kernel
            assert kernel.loads["128"] >= sum(kernel.stores.values()), kernel


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
