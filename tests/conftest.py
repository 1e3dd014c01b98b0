"""Options and fixtures: the device, the seed, two threads, and memory that starts as NaN."""

import os
import random
import sys

import pytest

# Read when the OpenMP runtime starts, with torch: threads of small calls sleep instead of spinning,
# which makes the suite several times faster wherever something else is running.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors live: cpu (default), cuda, ...")
    parser.addoption("--seed", type=int, default=None, help="seed of the random data")


def pytest_configure(config):
    # Read when the kernels are defined: on CPU tensors they run in Triton's interpreter.
    if torch.device(config.getoption("--device")).type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        quicken_interpreter()
    config.addinivalue_line("markers", "no_poison: leave torch.empty as it is")
    if config.getoption("--seed") is None:
        config.option.seed = int.from_bytes(os.urandom(4), "little")
    torch.set_num_threads(2)


def quicken_interpreter():
    """Triton's interpreter finds and replaces the functions of tl again whenever a kernel calls a
    function: 40 % of its time, though those that it replaced at the launch are still there."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:
        return
    call = InterpretedFunction.__call__

    def quick(self, *args, **kwargs):
        if self.fn.__module__.startswith("rope_fused."):
            return self.rewrite()(*args, **kwargs)
        return call(self, *args, **kwargs)

    InterpretedFunction.__call__ = quick


def pytest_report_header(config):
    return (
        f"device {config.getoption('--device')}; random data: --seed {config.getoption('--seed')}"
    )


# How many tests of a file run in Triton's interpreter unless the slow ones are asked for: some
# differentiate numerically, with dozens of launches each.
INTERPRETED = {"test_autograd": 3, "test_compile": 3}


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items):
    """Of the tests on interpreted kernels, the seed draws a few of each file; the rest is slow."""
    if torch.device(config.getoption("--device")).type != "cpu":
        return
    files = {}
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton":
            files.setdefault(item.path.stem, []).append(item)
    draw = random.Random(config.getoption("--seed"))
    for name, found in sorted(files.items()):
        draw.shuffle(found)
        for item in found[INTERPRETED.get(name, 8) :]:
            item.add_marker(pytest.mark.slow)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        from helpers import usable_backends

        metafunc.parametrize("backend", usable_backends(metafunc.config.getoption("--device")))


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(request.config.getoption("--seed"))


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """Memory that rope_fused asks for without initialising it starts as NaN, not as luck has it."""
    if request.node.get_closest_marker("no_poison"):
        return

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] == "rope_fused" and out.is_floating_point():
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return wrapper

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
