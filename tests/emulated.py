"""The CUDA kernels on the host: csrc/cuda compiled by a C++ compiler against tests/emulation, where
every thread of every block runs and barriers and shuffles mean what they mean on a GPU.

    pytest -p emulated tests -k cuda     any test of backend="cuda", on CPU tensors

As a plugin it makes "cuda" one of the backends that take CPU tensors, and keeps the tests of that
backend alone: all of them, or with --emulated N as many as the seed draws.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import random
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("rotate.cu", "backward.cu", "tables.cu", "project.cu")
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Itests/emulation -Icsrc -Wall"
# A vector access of an address that is not its multiple traps here as it would on a GPU.
KERNEL_FLAGS = "-O1 -fsanitize=alignment -fsanitize-undefined-trap-on-error"
DEFINES = ['-DROPE_FUSED_CUDA_ARCHITECTURES="the host"', '-DROPE_FUSED_CUDA_COMPILER="c++"']


def build():
    """The compiled module; only what has changed is made anew."""
    import pybind11

    files = sorted(f for f in (ROOT / "csrc").rglob("*") if f.is_file())
    files += sorted(f for f in (ROOT / "tests/emulation").rglob("*") if f.is_file())
    known = b"".join(f.read_bytes() for f in (*files, Path(__file__)))
    folder = ROOT / "build/emulation" / hashlib.sha256(known).hexdigest()[:16]
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    python = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    jobs = {"csrc/bindings_cuda.cpp": ["-O0", *python], "tests/emulation/control.cpp": ["-O1"]}
    for name in KERNELS:
        jobs[f"csrc/cuda/{name}"] = shlex.split(KERNEL_FLAGS)

    headers = b"".join(f.read_bytes() for f in files if f.suffix not in (".cpp", ".cu"))

    def compile_one(job):
        source, flags = job
        key = hashlib.sha256(headers + (ROOT / source).read_bytes() + repr(flags).encode())
        made = folder.parent / f"{Path(source).name}.{key.hexdigest()[:16]}.o"
        if made.exists():
            return made
        out = made.with_suffix(f".{os.getpid()}.o")
        command = [
            *cxx,
            *shlex.split(FLAGS),
            *DEFINES,
            *flags,
            "-x",
            "c++",
            "-c",
            source,
            "-o",
            out,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out.rename(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs.items()))
    made = folder / f"{module.name}.{os.getpid()}"
    subprocess.run([*cxx, "-shared", *objects, "-o", made], check=True)
    made.rename(module)
    return module


def load(file):
    """A module of its own: pybind11 keeps one for each name."""
    name = f"{Path(file).resolve().parent.name}._cuda"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install():
    """Make backend="cuda" take CPU tensors and run the emulated kernels."""
    import rope_fused

    rope_fused._cuda = sys.modules["rope_fused._cuda"] = load(build())
    from rope_fused import cuda_backend, dispatch

    def launch(q, kernel, *operands, **options):
        kernel(*operands, device=0, stream=0, **options)

    cuda_backend._launch = launch
    cuda_backend._gpu = lambda device: "emulated"
    cuda_backend._pays = lambda *problem: True
    dispatch._cuda_state = lambda: "interpreted"


@contextlib.contextmanager
def capture(module):
    """Streams say that a graph is being captured."""
    switch = ctypes.CDLL(module.__file__).emulate_capture
    switch(True)
    try:
        yield
    finally:
        switch(False)


# -- the plugin --------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--emulated", type=int, default=None, help="how many tests the seed draws")


def pytest_configure(config):
    install()


# Files that test nothing but these kernels.
OWN = ("test_cuda_kernels", "test_cuda_projection")
# Processes of their own, a thread's stack in a fork, gigabytes: nothing that the kernels decide.
SKIPPED = ("test_in_a_forked_child", "31_bits")


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        params = getattr(item, "callspec", None) and item.callspec.params
        here = (params or {}).get("backend") == "cuda" or item.path.stem in OWN
        return here and not any(name in item.name for name in SKIPPED)

    kept = [item for item in items if wanted(item)]
    number = config.getoption("--emulated")
    if number is not None and number < len(kept):
        kept = random.Random(config.getoption("--seed")).sample(kept, number)
    items[:] = kept
