"""Plants the faults of faults/, one at a time, and sees that the suite notices each of them.

    python tests/mutations.py [--only REGEX] [--jobs 2] [--list]

Works on copies of this tree in a temporary folder. First the tests that the faults name must pass;
then, with the fault, each must fail, and by a number that is wrong rather than by an error. Only
C++ that changed is compiled, without optimisation and for the oldest processors, since the source
is one; the CUDA kernels run on the host (emulated.py).
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
ARTEFACTS = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
REPORT = "ROPE_FUSED_MUTATIONS"  # where the tests' outcomes go
COMPILER = """#!/bin/sh
case "$*" in *-march=*) echo "baseline only" >&2; exit 1;; esac
exec $CXX_BEHIND "$@"
"""
PATIENCE = 900  # seconds for the tests of a fault
SEED = 20251101  # of the tests: what is caught once is caught again


# -- a plugin of pytest: what failed, and how --------------------------------------------------


def pytest_configure(config):
    if REPORT in os.environ:
        config.pluginmanager.register(_Outcomes(os.environ[REPORT]))


class _Outcomes:
    """Writes {test: "passed" | "number" | "the name of another error"}."""

    def __init__(self, file):
        self.file, self.found = file, {}

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is None or call.excinfo.errisinstance(pytest.skip.Exception):
            self.found.setdefault(item.nodeid, "passed")
        else:
            self.found[item.nodeid] = _kind(call.excinfo.type)

    def pytest_sessionfinish(self):
        Path(self.file).write_text(json.dumps(self.found))


def _kind(error):
    from torch.autograd.gradcheck import GradcheckError

    numbers = (AssertionError, GradcheckError, pytest.fail.Exception)  # the last: did not raise
    return "number" if issubclass(error, numbers) else error.__name__


# -- copies of the tree ------------------------------------------------------------------------


class Tree:
    """A copy of the checkout, in which tests run on its own package and its own kernels."""

    def __init__(self, folder, kernels=None):
        self.folder = Path(folder)
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*ARTEFACTS))
        # An editable install would offer the checkout's own kernels under this name.
        (self.folder / "rope_fused/triton_kernels").symlink_to("../triton_kernels")
        for file in kernels or ():
            shutil.copy(file, self.folder / "rope_fused")

    def run(self, *command, timeout=900, **environment):
        paths = [self.folder, self.folder / "tests", os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=self.folder,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, map(str, paths)))}
            | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def build(self):
        compiler = self.folder / "c++"
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        options = {"CXX": str(compiler), "CXX_BEHIND": os.environ.get("CXX", "c++")}
        options |= {"DEBUG": "1", "ROPE_FUSED_CUDA": "0"}
        done = self.run("setup.py", "--quiet", "build_ext", "--inplace", **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted((self.folder / "rope_fused").glob("*.so"))

    def test(self, tests, emulated) -> dict[str, str]:
        """{test: its outcome}; RuntimeError where pytest did not get so far.

        In a fork, which has imported what takes long.
        """
        report, said = self.folder / "outcomes.json", self.folder / "said.txt"
        report.unlink(missing_ok=True)
        plugins = ["-p", "mutations", "-p", "no:cacheprovider", *(["-p", "emulated"] * emulated)]
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                self._enter(said, report)
                pytest.main(["-q", f"--seed={SEED}", *plugins, *tests])
            os._exit(0)
        end = time.monotonic() + PATIENCE
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            time.sleep(0.05)
        if not report.exists():
            raise RuntimeError(said.read_text()[-3000:])
        return json.loads(report.read_text())

    def _enter(self, said, report):
        """Make this process one that was started in this tree."""
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(self.folder)
        paths = [str(self.folder), str(self.folder / "tests")]
        sys.path[:] = paths + [path for path in sys.path if path != str(ROOT / "tests")]
        sys.argv = ["pytest"]
        sys.dont_write_bytecode = True  # a fault of the same length and second would go unnoticed
        os.environ |= {"PYTHONPATH": os.pathsep.join(paths), REPORT: str(report)}

    @contextlib.contextmanager
    def planted(self, fault: Fault):
        file = self.folder / fault.file
        text = file.read_text()
        file.write_text(text.replace(fault.old, fault.new))
        try:
            yield
        finally:
            file.write_text(text)


# -- faults ------------------------------------------------------------------------------------


def native(fault):
    """Whether rope_fused._cpu must be compiled anew."""
    return fault.file.startswith("csrc/") and not on_emulation(fault)


def on_emulation(fault):
    return fault.file.startswith("csrc/cuda/")


def complaints(faults):
    """What is wrong with the list itself."""
    for fault in faults:
        count = (ROOT / fault.file).read_text().count(fault.old)
        if count != 1:
            yield f"{fault.file}: {count} times {fault.old!r}"


def survived(fault, tree) -> str:
    """Why a fault does not count as noticed, or ""."""
    with tree.planted(fault):
        if native(fault):
            tree.build()
        found = tree.test(fault.tests, on_emulation(fault))
    for test in fault.tests:
        kinds = {kind for name, kind in found.items() if f"{name}[".startswith(f"{test}[")}
        if kinds - {"passed", "number"}:
            return f"{test} failed by {', '.join(sorted(kinds - {'passed', 'number'}))}"
        if "number" not in kinds:
            return f"{test} passed"
    return ""


def sound(faults, tree):
    """Stops unless the tests pass where nothing was planted."""
    where = "import rope_fused.triton_kernels as t; print(t.__file__, t.__spec__.parent)"
    assert str(tree.folder) in tree.run("-c", where).stdout, "the tests would run on another tree"
    for emulated in (False, True):
        tests = sorted({t for f in faults if on_emulation(f) == emulated for t in f.tests})
        found = tree.test(tests, emulated) if tests else {}
        failed = {name: kind for name, kind in found.items() if kind != "passed"}
        assert not failed, f"these fail without a fault: {failed}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="of the faults whose file or words match")
    parser.add_argument("--jobs", type=int, default=2, help="trees that are tested side by side")
    parser.add_argument(
        "--unchecked", action="store_true", help="take it that the tests pass without a fault"
    )
    parser.add_argument("--list", action="store_true", help="show the faults")
    args = parser.parse_args()
    faults = [f for f in FAULTS if re.search(args.only, f"{f.file}: {f.what}")]
    if args.list:
        for fault in faults:
            print(f"{fault.file}: {fault.what}", *fault.tests, sep="\n    ")
        return
    if wrong := list(complaints(faults)):
        sys.exit("\n".join(wrong))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rope_fused-mutations-") as folder:
        print(f"{len(faults)} faults", flush=True)
        survivors = plant(faults, Path(folder), args.jobs, checked=not args.unchecked)
    minutes = (time.monotonic() - start) / 60
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = (used.ru_utime + used.ru_stime) / 60
    caught = len(faults) - len(survivors)
    print(f"{caught} of {len(faults)} faults were noticed, in {minutes:.1f} minutes", end=" ")
    print(f"({work:.1f} of one core)")
    sys.exit(bool(survivors))


def plant(faults, folder, jobs, checked) -> dict[Fault, str]:
    """{fault: why} of those that nobody noticed. The first tree, where the C++ is compiled, takes
    that first, the others the rest."""
    warm()
    first = Tree(folder / "0")
    kept = [shutil.copy(file, folder) for file in first.build()]
    trees = [first, *(Tree(folder / str(n), kept) for n in range(1, jobs))]
    if checked:
        sound(faults, trees[-1])
    compiled = [fault for fault in faults if native(fault)]
    rest = sorted((f for f in faults if not native(f)), key=on_emulation)
    context = multiprocessing.get_context("fork")
    taken, found = context.Value("i", 0), context.SimpleQueue()

    def work(tree):
        todo = compiled if tree is first else []
        while True:
            if not todo:
                with taken.get_lock():
                    todo, taken.value = rest[taken.value :][:1], taken.value + 1
                if not todo:
                    return
            fault, start = todo.pop(0), time.monotonic()
            try:
                reason = survived(fault, tree)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if native(fault):
                for file in kept:
                    shutil.copy(file, tree.folder / "rope_fused")
            found.put((fault, reason, time.monotonic() - start))

    workers = [context.Process(target=work, args=(tree,)) for tree in trees]
    for worker in workers:
        worker.start()
    survivors = {}
    for _ in faults:
        fault, reason, seconds = found.get()
        verdict = f"NOT NOTICED: {reason}" if reason else "noticed"
        print(f"{seconds:5.0f} s  {fault.file}: {fault.what}: {verdict}", flush=True)
        if reason:
            survivors[fault] = reason
    for worker in workers:
        worker.join()
    return survivors


def warm():
    """Import what every test imports, once; nothing of ours, which the faults are in."""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive"}  # as in conftest.py
    for name in ("torch", "torch.autograd.gradcheck", "hypothesis", "mpmath", "triton"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.llama.modeling_llama")
    assert "rope_fused" not in sys.modules


if __name__ == "__main__":
    main()
