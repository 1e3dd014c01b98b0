"""Build rope_fused: a C++ extension compiled by ninja, its CPU kernels once per instruction set.

ROPE_FUSED_PURE=1       compile nothing; only the C++ kernels are then missing
ROPE_FUSED_CUDA=1       fail where the CUDA kernels cannot be built
DEBUG=1                 -O0 -g instead of -O3
MAX_JOBS=4              compile at most four files at a time
CXX, CXXFLAGS, LDFLAGS  the compiler, and flags to put before ours
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
ADVICE = "ROPE_FUSED_PURE=1 installs rope_fused without compiled kernels"

# Weakest first, and linked in this order: of an inline function that several objects hold, the
# linker keeps the first copy, so none made for AVX-512 is ever called on a machine without it.
INSTRUCTION_SETS = {
    "baseline": [],
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4"],
}
PYTHON_H = f"-isystem{sysconfig.get_path('include')}"


def flag(name):
    return os.environ.get(name, "0") not in ("", "0")


def words(name):
    return shlex.split(os.environ.get(name, ""))


def find_compiler():
    """The C++ compiler as a command, and the instruction sets it can compile for."""
    cxx = words("CXX") or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]
    probe = [*cxx, "-std=c++17", "-fopenmp", PYTHON_H, "-include", "Python.h", "-include", "omp.h"]

    def complaint(flags):
        command = [*probe, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except OSError as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            return error.stderr.strip().split("\n")[0] or str(error)

    if problem := complaint([]):
        needs = "a C++17 compiler with OpenMP and Python's headers"
        raise CompileError(f"rope_fused needs {needs} ({problem}); {ADVICE}")
    return cxx, [isa for isa, flags in INSTRUCTION_SETS.items() if not complaint(flags)]


def ninja_file(target):
    """The build.ninja that makes rope_fused._cpu at `target`; the compiler lists the headers."""
    cxx, isas = find_compiler()
    import pybind11

    common = [*words("CXXFLAGS"), *(["-O0", "-g"] if flag("DEBUG") else ["-O3"]), "-std=c++17"]
    common += ["-fopenmp", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
    defines = [f"-DROPE_FUSED_COMPILER_FLAGS={json.dumps(shlex.join(common))}"]
    defines += [f"-DROPE_FUSED_HAVE_{isa.upper()}" for isa in isas if isa != "baseline"]

    def shell(*command):
        return shlex.join(command).replace("$", "$$")

    def path(name):
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    compiling = shell(*cxx, *common, *defines, f"-I{ROOT / 'csrc'}")
    linking = shell(*cxx, "-shared", "-fopenmp", *words("LDFLAGS"))
    lines = [f"rule compile\n  command = {compiling} $flags -MMD -MF $out.d -c $in -o $out"]
    lines += ["  description = compile $out\n  depfile = $out.d\n  deps = gcc"]
    lines += [f"rule link\n  command = {linking} $in -o $out\n  description = link $out"]
    objects = []

    def add(name, source, *flags):
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: compile {path(ROOT / 'csrc' / source)}")
        lines.append(f"  flags = {shell(*flags)}")

    add("bindings_cpu", "bindings_cpu.cpp", f"-isystem{pybind11.get_include()}", PYTHON_H)
    add("dispatch", "cpu/dispatch.cpp")
    for isa in isas:
        add(f"kernels.{isa}", "cpu/kernels.cpp", *INSTRUCTION_SETS[isa], f"-DROPE_FUSED_ISA={isa}")
    return "\n".join([*lines, f"build {path(target)}: link {' '.join(objects)}", ""])


class NinjaBuild(build_ext):
    """Compile with ninja: in parallel, and only what changed since the last time."""

    def build_extension(self, ext):
        folder = Path(self.build_temp)
        if self.editable_mode:  # setuptools offers a temporary folder, which forgets the objects
            folder = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        for parent in (folder, target.parent):
            parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(target))
        try:
            from ninja import BIN_DIR
        except ImportError:
            BIN_DIR = ""  # then the system's
        jobs = [f"-j{n}" for n in words("MAX_JOBS")]
        try:
            subprocess.run([os.path.join(BIN_DIR, "ninja"), "-C", str(folder), *jobs], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the C++ build failed ({error}); {ADVICE}") from error


if flag("ROPE_FUSED_CUDA"):
    raise SystemExit("ROPE_FUSED_CUDA=1: this version of rope_fused has no CUDA sources")

sources = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*.cpp"))
setup(
    # The folder is top level, the import name is not: `triton_kernels` is another project's.
    packages=[*find_packages(include=["rope_fused", "rope_fused.*"]), "rope_fused.triton_kernels"],
    package_dir={"rope_fused": "rope_fused", "rope_fused.triton_kernels": "triton_kernels"},
    ext_modules=[] if flag("ROPE_FUSED_PURE") else [Extension("rope_fused._cpu", sources)],
    cmdclass={"build_ext": NinjaBuild},
)
