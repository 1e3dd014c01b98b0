"""What comes out of a run: tables, and JSON with machine, versions, commit and settings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import rope_fused as rf

from .harness import ATTEMPTS, TOLERANCE, WARMUP, Case, Missing, Timing

MARK = "!"


class Results:
    """Outcomes of the cases that were run, in their order."""

    def __init__(self):
        self.outcomes: dict[Case, dict] = {}

    def rows(self):
        """One dict for each variant that was timed."""
        for case, outcomes in self.outcomes.items():
            timings = _timings(outcomes)
            limit = timings.get(case.limit)
            for impl, timing in timings.items():
                first, third = timing.quartiles
                yield {
                    "op": case.op,
                    "impl": impl,
                    "shape": case.shape,
                    "dtype": case.dtype_name,
                    "seqlen": case.seqlen,
                    "median_us": timing.seconds * 1e6,
                    "quartiles_us": [first * 1e6, third * 1e6],
                    "rounds": [len(block) for block in timing.blocks],
                    "limit": case.limit,
                    "of_limit": limit.seconds / timing.seconds if limit else None,
                    "orders_disagree": timing.disagreement,
                    "marked": timing.disagreement > TOLERANCE,
                }

    def write_json(self, path: Path, settings: dict) -> None:
        content = {
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "settings": settings,
            "results": list(self.rows()),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")

    def lines(self):
        """The tables, line by line."""
        if not any(map(_timings, self.outcomes.values())):
            return
        for case, outcomes in self.outcomes.items():
            yield from _case_lines(case, outcomes)
        yield from _target_lines(self.outcomes)
        yield ""
        yield (
            f"Medians; +-: half the distance of the quartiles. {MARK}: the two orders of the "
            f"variants disagree by more than {TOLERANCE:.0%}."
        )
        yield from _missing_lines(self.outcomes)


def _timings(outcomes) -> dict[str, Timing]:
    return {impl: t for impl, t in outcomes.items() if isinstance(t, Timing)}


def _case_lines(case, outcomes):
    timings = _timings(outcomes)
    if not timings:
        return
    limit = timings.get(case.limit)
    yield ""
    yield str(case)
    for impl in case.impls:
        if impl not in timings:
            continue
        timing = timings[impl]
        first, third = timing.quartiles
        spread = (third - first) / 2 / timing.seconds
        ratio = f"{timing.seconds / limit.seconds:8.3f} x {case.limit}" if limit else ""
        mark = MARK if timing.disagreement > TOLERANCE else ""
        yield f"  {impl:20}{timing.seconds * 1e3:11.3f} ms +-{spread:6.1%} {mark:1} {ratio}"


def _target_lines(outcomes):
    heading = f"  {'Targets':36}{'measured':>9}{'must':>9}{'aim':>8}"
    for case, of_case in outcomes.items():
        timings = _timings(of_case)
        targets = [t for t in case.targets if {t.impl, t.other} <= timings.keys()]
        if not targets:
            continue
        if heading:
            yield from ("", heading)
            heading = None
        yield str(case)
        for target in targets:
            name = f"{target.impl} / {target.other}"
            name = f"speed-up over {target.other}" if target.speedup else name
            unsure = any(timings[i].disagreement > TOLERANCE for i in (target.impl, target.other))
            ratio = target.ratio(timings)
            met = "aim met" if target.meets(ratio, target.aim) else "met"
            met = met if target.meets(ratio, target.must) else "NOT MET"
            mark = MARK if unsure else ""
            yield f"  {name:36}{ratio:9.3f} {mark:1}{target.must:7.2f} {target.aim:7.2f}  {met}"


def _missing_lines(outcomes):
    missing = {}
    for case, of_case in outcomes.items():
        for impl, outcome in of_case.items():
            if isinstance(outcome, Missing):
                missing.setdefault((case.op, outcome.reason), {})[impl] = None
    for (op, reason), impls in missing.items():
        yield f"Missing from {op}: {', '.join(impls)} ({reason})"


# -- where it ran ------------------------------------------------------------------------------


def machine() -> dict:
    """Processor, cores, memory and what else moves these times."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _after_colon("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _after_colon("/proc/meminfo", "MemTotal"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in ("rope_fused", "torch", "transformers", "triton", "pytest-benchmark"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict | None:
    """Of the checkout that the benchmarks lie in, or None."""

    def git(*arguments):
        where = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=where, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def settings(quick: bool) -> dict:
    return {
        "quick": quick,
        "threads": torch.get_num_threads(),
        "warmup": WARMUP,
        "attempts": 1 if quick else ATTEMPTS,
        "tolerance": TOLERANCE,
        "backends": rf.backends(),
    }


def _read(path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _after_colon(path, key) -> str | None:
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
