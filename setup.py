"""Build rope_fused: C++ and CUDA by ninja, the CPU kernels once per instruction set.

ROPE_FUSED_PURE=1       compile nothing; only the C++ kernels are then missing
ROPE_FUSED_CUDA=1       fail where the CUDA kernels cannot be built; 0: leave them out
NVCC                    nvcc, if it is neither on PATH nor in $CUDA_HOME/bin
ROPE_FUSED_SANITIZE=1   with AddressSanitizer and UndefinedBehaviorSanitizer (make asan)
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
import tempfile
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

# GCC 12 turns a pair's products and sums into vfmaddsub there, in spite of -ffp-contract=off.
KERNEL_FLAGS = ["-fno-tree-slp-vectorize"]

# PTX of the last one serves later GPUs, whose driver compiles it.
ARCHITECTURES = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_100": "arch=compute_100,code=[sm_100,compute_100]",
}
# Flags of single sources: table rotations round every product as transformers does.
CUDA_FLAGS = {"tables.cu": ["--fmad=false"]}
# Sources for some architectures alone: the fused projection is written in instructions of Hopper.
CUDA_ARCHITECTURES = {"project.cu": ["sm_90a"]}


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


def find_nvcc():
    """(nvcc as a command, the first line of its version) or (None, why there is none)."""
    if os.environ.get("ROPE_FUSED_CUDA") == "0":
        return None, "left out with ROPE_FUSED_CUDA=0"
    home = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    nvcc = words("NVCC") or [shutil.which("nvcc") or shutil.which("nvcc", path=home)]
    if nvcc == [None]:
        return None, "no nvcc on PATH when it was installed"
    if cxx := words("CXX"):
        nvcc += ["-ccbin", cxx[0]]
    # The newest architecture and the host's compiler, without a kernel: too old, either fails here.
    probe = [*nvcc, "-gencode", ARCHITECTURES["sm_100"], "-x", "cu", "-c", os.devnull, "-o"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [*probe, os.path.join(folder, "probe.o")]
            subprocess.run(command, capture_output=True, text=True, check=True)
        done = subprocess.run([*nvcc, "--version"], capture_output=True, text=True, check=True)
    except OSError as error:
        return None, f"nvcc cannot be used ({error})"
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().split("\n")
        return None, f"nvcc 12.8 or newer is needed ({lines[0] or error})"
    release = [line for line in done.stdout.split("\n") if "release" in line]
    return nvcc, (release or [""])[0].rpartition("release ")[2]


class Ninja:
    """A build.ninja in the making: rules, objects, modules. The compilers list the headers."""

    def __init__(self):
        self.lines = []

    @staticmethod
    def shell(*command):
        return shlex.join(command).replace("$", "$$")

    @staticmethod
    def path(name):
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def rule(self, name, *command, compiles=False):
        what = "-MD -MF $out.d -c $in -o $out" if compiles else "$in -o $out"
        self.lines.append(f"rule {name}\n  command = {self.shell(*command)} $flags {what}")
        self.lines.append(f"  description = {name} $out")
        if compiles:
            self.lines.append("  depfile = $out.d\n  deps = gcc")

    def build(self, target, rule, inputs, *flags):
        inputs = " ".join(map(self.path, inputs))
        self.lines.append(f"build {self.path(target)}: {rule} {inputs}")
        self.lines.append(f"  flags = {self.shell(*flags)}")
        return target

    def text(self):
        return "\n".join([*self.lines, ""])


def optimised(*flags):
    return [*(["-O0", "-g"] if flag("DEBUG") else ["-O3"]), "-std=c++17", *flags]


def sanitizers():
    """Flags for the compiler and the linker. Whoever loads the module loads libasan before all."""
    if not flag("ROPE_FUSED_SANITIZE"):
        return []
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    return flags if flag("DEBUG") else [*flags, "-O1"]


def add_cpu(ninja, target, without_cuda):
    """rope_fused._cpu. `without_cuda`: why there is no rope_fused._cuda, for doctor to tell."""
    cxx, isas = find_compiler()
    import pybind11

    common = [*words("CXXFLAGS"), *optimised("-fopenmp", "-fPIC", "-ffp-contract=off")]
    common += ["-fvisibility=hidden", "-Wall", "-Wextra", *sanitizers()]
    defines = [f"-DROPE_FUSED_COMPILER_FLAGS={json.dumps(shlex.join(common))}"]
    defines += [f"-DROPE_FUSED_HAVE_{isa.upper()}" for isa in isas if isa != "baseline"]
    ninja.rule("compile", *cxx, *common, *defines, f"-I{ROOT / 'csrc'}", compiles=True)
    ninja.rule("link", *cxx, "-shared", "-fopenmp", *sanitizers(), *words("LDFLAGS"))
    pybind = [f"-isystem{pybind11.get_include()}", PYTHON_H]

    def add(name, source, *flags):
        return ninja.build(f"{name}.o", "compile", [ROOT / "csrc" / source], *flags)

    why = [f"-DROPE_FUSED_WITHOUT_CUDA={json.dumps(without_cuda)}"] if without_cuda else []
    objects = [add("bindings_cpu", "bindings_cpu.cpp", *pybind, *why)]
    objects.append(add("dispatch", "cpu/dispatch.cpp"))
    for isa in isas:
        flags = [*INSTRUCTION_SETS[isa], *KERNEL_FLAGS, f"-DROPE_FUSED_ISA={isa}"]
        objects.append(add(f"kernels.{isa}", "cpu/kernels.cpp", *flags))
    ninja.build(target, "link", objects)


def add_cuda(ninja, target, nvcc, version):
    """rope_fused._cuda: every csrc/cuda/*.cu, and bindings that only the host's compiler sees."""
    import pybind11

    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    names = json.dumps(", ".join(ARCHITECTURES))
    common = [*nvcc, *optimised(*host), f"-I{ROOT / 'csrc'}"]
    common += [f"-DROPE_FUSED_CUDA_ARCHITECTURES={names}"]
    ninja.rule("compile_host", *common, compiles=True)
    ninja.rule("compile_cuda", *common, compiles=True)
    # The runtime inside, and its symbols hidden: torch brings another copy of it.
    static = ["-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]
    ninja.rule("link_cuda", *nvcc, "-shared", "-nodlink", *static)
    source = ROOT / "csrc" / "bindings_cuda.cpp"
    flags = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    flags.append(f"-DROPE_FUSED_CUDA_COMPILER={json.dumps(f'nvcc {version}')}")
    objects = [ninja.build("bindings_cuda.o", "compile_host", [source], *flags)]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        flags = [*CUDA_FLAGS.get(source.name, [])]
        for name in CUDA_ARCHITECTURES.get(source.name, ARCHITECTURES):
            flags += ["-gencode", ARCHITECTURES[name]]
        objects.append(ninja.build(f"{source.stem}.cuda.o", "compile_cuda", [source], *flags))
    ninja.build(target, "link_cuda", objects)


class NinjaBuild(build_ext):
    """Compile with ninja: in parallel, and only what changed since the last time."""

    def run(self):
        self.nvcc, self.version = None, ""
        if self.extensions:
            self.nvcc, self.version = find_nvcc()
            if self.nvcc is None:
                if flag("ROPE_FUSED_CUDA"):
                    raise CompileError(f"ROPE_FUSED_CUDA=1: {self.version}")
                self.extensions = [e for e in self.extensions if e.name != CUDA_MODULE]
        super().run()

    def build_extensions(self):
        folder = Path(self.build_temp)
        if self.editable_mode:  # setuptools offers a temporary folder, which forgets the objects
            folder = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        ninja = Ninja()
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            if ext.name == CUDA_MODULE:
                add_cuda(ninja, target, self.nvcc, self.version)
            else:
                add_cpu(ninja, target, "" if self.nvcc else self.version)
        (folder / "build.ninja").write_text(ninja.text())
        try:
            from ninja import BIN_DIR
        except ImportError:
            BIN_DIR = ""  # then the system's
        jobs = [f"-j{n}" for n in words("MAX_JOBS")]
        try:
            subprocess.run([os.path.join(BIN_DIR, "ninja"), "-C", str(folder), *jobs], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            advice = f"ROPE_FUSED_CUDA=0 leaves out the CUDA kernels, {ADVICE}"
            raise CompileError(f"the build failed ({error}); {advice}") from error


CUDA_MODULE = "rope_fused._cuda"


def sources(*patterns):
    csrc = ROOT / "csrc"
    return sorted(str(file.relative_to(ROOT)) for one in patterns for file in csrc.glob(one))


modules = [
    Extension("rope_fused._cpu", sources("bindings_cpu.cpp", "cpu/*.cpp")),
    Extension(CUDA_MODULE, sources("bindings_cuda.cpp", "cuda/*.cu")),
]
setup(
    # The folder is top level, the import name is not: `triton_kernels` is another project's.
    packages=[*find_packages(include=["rope_fused", "rope_fused.*"]), "rope_fused.triton_kernels"],
    package_dir={"rope_fused": "rope_fused", "rope_fused.triton_kernels": "triton_kernels"},
    ext_modules=[] if flag("ROPE_FUSED_PURE") else modules,
    cmdclass={"build_ext": NinjaBuild},
)
