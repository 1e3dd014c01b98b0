"""Plants the faults of faults/, one at a time, and sees that the suite notices each of them.

    python tests/mutations.py [--only REGEX] [--jobs 2] [--list]

Works on copies of this tree in a temporary folder. First the tests that the faults name must pass;
then, with the fault, each must fail, and by a number that is wrong rather than by an error. Only
C++ that changed is compiled, without optimisation; the CUDA kernels run on the host (emulated.py).
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
ARTEFACTS = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
REPORT = "ROPE_FUSED_MUTATIONS"  # where the tests' outcomes go
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
            # A fault of the same length, written in the same second, would go unnoticed.
            | {"PYTHONDONTWRITEBYTECODE": "1"}
            | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def build(self):
        done = self.run(
            "setup.py", "--quiet", "build_ext", "--inplace", DEBUG="1", ROPE_FUSED_CUDA="0"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return sorted((self.folder / "rope_fused").glob("*.so"))

    def test(self, tests, emulated) -> dict[str, str]:
        """{test: its outcome}; RuntimeError where pytest did not get so far."""
        report = self.folder / "outcomes.json"
        report.unlink(missing_ok=True)
        plugins = ["-p", "mutations", "-p", "no:cacheprovider", *(["-p", "emulated"] * emulated)]
        options = ["-q", f"--seed={SEED}", *plugins]
        done = self.run("-m", "pytest", *options, *tests, **{REPORT: str(report)})
        if done.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
        return json.loads(report.read_text())

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
        try:
            found = tree.test(fault.tests, on_emulation(fault))
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return f"the tests did not run: {error}"
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
        survivors = plant(faults, Path(folder), args.jobs)
    minutes = (time.monotonic() - start) / 60
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = (used.ru_utime + used.ru_stime) / 60
    caught = len(faults) - len(survivors)
    print(f"{caught} of {len(faults)} faults were noticed, in {minutes:.1f} minutes", end=" ")
    print(f"({work:.1f} of one core)")
    sys.exit(bool(survivors))


def plant(faults, folder, jobs) -> dict[Fault, str]:
    """{fault: why} of those that nobody noticed. The first tree, where the C++ is compiled, takes
    that first, the others the rest."""
    first = Tree(folder / "0")
    kernels = first.build()
    kept = [shutil.copy(file, folder) for file in kernels]
    trees = [first, *(Tree(folder / str(n), kept) for n in range(1, jobs))]
    sound(faults, trees[-1])
    compiled, rest = ([f for f in faults if native(f) == yes] for yes in (True, False))
    lock, survivors = threading.Lock(), {}

    def work(tree):
        while True:
            with lock:
                queue = compiled if compiled and tree is first else rest
                if not queue:
                    return
                fault = queue.pop(0)
            start = time.monotonic()
            reason = survived(fault, tree)
            if native(fault):
                for file in kept:
                    shutil.copy(file, tree.folder / "rope_fused")
            with lock:
                verdict = f"NOT NOTICED: {reason}" if reason else "noticed"
                seconds = time.monotonic() - start
                print(f"{seconds:5.0f} s  {fault.file}: {fault.what}: {verdict}", flush=True)
                if reason:
                    survivors[fault] = reason

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(work, tree) for tree in trees]:
            done.result()
    return survivors


if __name__ == "__main__":
    main()
