"""What pip gets: the sdist, the wheels made from it, and the build's refusals."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARTEFACTS = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
OURS = ("ROPE_FUSED_", "CXX", "NVCC", "LDFLAGS", "DEBUG", "PYTHONPATH")

HAS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

# A rotation by hand, in whatever rope_fused is first on the path; says where it came from.
ROTATE = """
import math, torch
import rope_fused as rf
spec = rf.RopeSpec.default(head_dim=2, rope_theta=1e4)
q = torch.tensor([1.0, 0.0]).repeat(1, 3, 1, 1)
rotated, none = rf.apply_rope(q, None, spec)
for token in range(3):
    expected = torch.tensor([math.cos(token), math.sin(token)], dtype=torch.float64)
    bound = 2**-21 + 2**-25  # of a rotation in float32, and of rounding to it once
    assert (rotated[0, token, 0] - expected).abs().max() <= bound
assert none is None
print(rf.__file__)
print(rf.backends()["cpu"])
"""


def run(*command, cwd, **environment):
    """The finished command, in an environment where only `environment` steers our build."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def pip(*arguments, cwd, **environment):
    done = run("-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the checkout as git would give it, so that builds leave no trace in this one."""
    copy = tmp_path_factory.mktemp("tree") / "rope_fused"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ARTEFACTS))
    return copy


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    """The folder that the sdist unpacks to."""
    out = tmp_path_factory.mktemp("s dist")  # a space: the build quotes its paths
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    done = run("-c", build, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = out.glob("*.tar.gz")
    shutil.unpack_archive(archive, out)
    return out / archive.name.removesuffix(".tar.gz")


def wheel_from(source, out, **environment):
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def pure_wheel(sdist, tmp_path_factory):
    return wheel_from(sdist, tmp_path_factory.mktemp("pure"), ROPE_FUSED_PURE="1")


def installed(wheel, folder):
    """(where rope_fused came from, what it says of the cpu backend) with the wheel in `folder`."""
    pip("install", "--no-deps", "--target", str(folder / "site"), str(wheel), cwd=folder)
    # -S: the finder of an editable rope_fused would offer that one's modules where this has none.
    paths = [folder / "site", *{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    done = run("-S", "-c", ROTATE, cwd=folder, PYTHONPATH=os.pathsep.join(map(str, paths)))
    assert done.returncode == 0, done.stderr
    file, cpu = done.stdout.splitlines()
    assert Path(file).is_relative_to(folder / "site")
    return cpu


def assert_tests_pass(site, sdist, folder):
    """Some of the sdist's tests, away from its package, on the one that was installed."""
    shutil.copytree(sdist / "tests", folder / "tests")
    shutil.copy(sdist / "pyproject.toml", folder)
    paths = [site, *{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    files = ["tests/test_rotate.py", "tests/test_factors.py", "tests/test_spec.py"]
    command = ["-S", "-m", "pytest", "-q", "-k", "not triton", "-m", "not slow", *files]
    done = run(*command, cwd=folder, PYTHONPATH=os.pathsep.join(map(str, paths)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def files_of(folder, *patterns):
    return {str(file.relative_to(folder)) for pattern in patterns for file in folder.glob(pattern)}


def test_sdist_is_complete(tree, sdist):
    sources = files_of(tree, "csrc/**/*.*", "rope_fused/**/*.py", "triton_kernels/**/*.py")
    sources |= files_of(tree, "rope_fused/**/*.yaml")
    sources |= files_of(tree, "tests/**/*.*", "bench/**/*.*", "docs/**/*.*", ".ci/*")
    sources |= {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", ".clang-format"}
    sources |= {"MANIFEST.in", "CHANGELOG.md", "CONTRIBUTING.md", ".gitignore"}
    assert {"csrc/bindings_cpu.cpp", "csrc/rotate.h", "csrc/cpu/kernels.cpp"} <= sources
    found = {str(file.relative_to(sdist)) for file in sdist.rglob("*") if file.is_file()}
    assert sources - found == set()
    # And nothing else, but for what setuptools writes down.
    made = {"PKG-INFO", "setup.cfg", *files_of(sdist, "rope_fused.egg-info/*")}
    assert found - sources == made


def test_pure_wheel_holds_the_package_and_nothing_else(tree, pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as archive:
        names = set(archive.namelist())
        (top_level,) = [name for name in names if name.endswith(".dist-info/top_level.txt")]
        (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
        assert archive.read(top_level).decode().split() == ["rope_fused"]
        assert "rope-fused = rope_fused.cli:main" in archive.read(entry_points).decode()
    info = top_level.split("/")[0]
    assert f"{info}/licenses/LICENSE" in names
    modules = files_of(tree, "rope_fused/**/*.py") | files_of(tree, "rope_fused/**/*.yaml")
    modules |= {f"rope_fused/{name}" for name in files_of(tree, "triton_kernels/**/*.py")}
    assert {name for name in names if not name.startswith(f"{info}/")} == modules


def test_what_is_required(pure_wheel):
    """torch and NumPy alone; everything else is an extra, named by those who need it."""
    with zipfile.ZipFile(pure_wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    required = metadata.get_all("Requires-Dist")
    assert [r for r in required if "extra ==" not in r] == ["torch>=2.11", "numpy"]
    extras = {"triton", "context", "demo", "train", "dev"}
    assert {*metadata.get_all("Provides-Extra")} == extras
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# rope_fused")


def test_pip_has_no_complaint():
    done = run("-m", "pip", "check", cwd=ROOT)
    ours = [line for line in done.stdout.splitlines() if "rope" in line.lower()]
    assert "No module named pip" in done.stderr or not ours, done.stdout


def test_pure_wheel_works_through_the_reference(pure_wheel, tmp_path):
    cpu = installed(pure_wheel, tmp_path)
    assert cpu != "ready"
    assert "not built" in cpu


@pytest.mark.slow
@pytest.mark.parametrize("nvcc", [False, pytest.param(True, marks=HAS_NVCC)], ids=["cpu", "cuda"])
def test_compiled_wheel_works(nvcc, sdist, tmp_path):
    """The sdist, compiled, installed and run elsewhere, has the kernels of this machine."""
    out = tmp_path / "wheel"
    out.mkdir()
    wheel = wheel_from(sdist, out, **({} if nvcc else {"ROPE_FUSED_CUDA": "0"}))
    assert "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        compiled = [name for name in archive.namelist() if name.endswith(".so")]
        tops = {name.split("/")[0].split("-")[0] for name in archive.namelist()}
    modules = ["rope_fused/_cpu", *(["rope_fused/_cuda"] if nvcc else [])]
    assert sorted(name.split(".")[0] for name in compiled) == modules
    assert tops == {"rope_fused"}
    assert installed(wheel, tmp_path) == "ready"
    if not nvcc:
        assert_tests_pass(tmp_path / "site", sdist, tmp_path)


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"CXX": "/no/such/c++"}, "No such file or directory: '/no/such/c++'"),
        ({"CXX": "c++ -include no-such-header.h"}, "no-such-header.h"),
        ({"CXX": "false"}, "false"),
    ],
)
def test_a_missing_compiler_is_one_clear_line(tree, environment, complaint):
    done = run("setup.py", "--quiet", "build_ext", cwd=tree, **environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert complaint in line
    assert "ROPE_FUSED_PURE=1" in line


@pytest.mark.parametrize(
    ("nvcc", "complaint"),
    [("/no/such/nvcc", "nvcc cannot be used"), ("false", "nvcc 12.8 or newer is needed")],
)
def test_cuda_where_it_cannot_be_built(tree, nvcc, complaint):
    """Asked for, an error in one line; otherwise left out, and why is kept for doctor."""
    done = run("setup.py", "--quiet", "build_ext", cwd=tree, ROPE_FUSED_CUDA="1", NVCC=nvcc)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ROPE_FUSED_CUDA=1: ") and complaint in line

    show = "import setup; print(setup.find_nvcc())"
    environment = {"NVCC": nvcc, "ROPE_FUSED_PURE": "1"}
    done = run(
        "-c", f"import sys; sys.argv = ['setup.py', '--version']; {show}", cwd=tree, **environment
    )
    assert complaint in done.stdout and done.stdout.splitlines()[-1].startswith("(None, ")


def test_cuda_left_out(tree):
    show = "import setup; print(setup.find_nvcc()[1])"
    environment = {"ROPE_FUSED_CUDA": "0", "ROPE_FUSED_PURE": "1"}
    done = run(
        "-c", f"import sys; sys.argv = ['setup.py', '--version']; {show}", cwd=tree, **environment
    )
    assert done.stdout.splitlines()[-1] == "left out with ROPE_FUSED_CUDA=0"


def test_version_is_the_same_everywhere(sdist):
    import rope_fused

    assert sdist.name == f"rope_fused-{rope_fused.__version__}"
