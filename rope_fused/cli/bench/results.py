"""What comes out of a run: JSON with machine, versions, commit, settings, written as it grows."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from ... import backends
from ...context.progress import Checkpoint, write_json
from ...files import beside
from ...legal import LARGEST
from ...report import UserError
from . import roofline
from .harness import ATTEMPTS, TOLERANCE, WARMUP, Case, Failed, Measured, Missing, Wrong

_PACKAGES = ("rope_fused", "torch", "transformers", "triton", "numpy") + (
    "liger_kernel",
    "flash_attn",
    "transformer_engine",
    "unsloth",
)


class Run:
    """The results of a run so far. With a file, they are in FILE.partial after every case, and in
    FILE when all cases are done: a run that was killed goes on where it was.

    Raises:
        MismatchError: FILE.partial is of a run with other settings, versions or machine.
    """

    def __init__(self, settings: dict, out: Path | None = None):
        self.out = out
        head = {
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "settings": settings,
        }
        self.checkpoint = Checkpoint(None if out is None else beside(out, ".partial"), head)
        lists = ("results", "targets", "missing", "left_out", "done")
        self.document = self.checkpoint.state or head | {name: [] for name in lists}
        self.resumed = len(self.document["done"])

    def has(self, case: Case) -> bool:
        return str(case) in self.document["done"]

    def add(self, case: Case, outcomes: dict) -> None:
        """The outcomes of a case."""
        self.document["results"] += rows(case, outcomes)
        self.document["targets"] += targets(case, outcomes)
        for impl, outcome in outcomes.items():
            if isinstance(outcome, Missing | Wrong | Failed):
                kind = type(outcome).__name__.lower()
                entry = {"op": case.op, "impl": impl, "kind": kind, "reason": outcome.reason}
                if entry not in self.document["missing"]:
                    self.document["missing"].append(entry)
        self._done(case)

    def leave_out(self, case: Case, reason: str) -> None:
        self.document["left_out"].append({"case": str(case), "reason": reason})
        self._done(case)

    def _done(self, case):
        self.document["done"].append(str(case))
        self.checkpoint.save(self.document)

    def finish(self) -> dict:
        """Write FILE, remove FILE.partial; the whole document."""
        self.document.pop("done")
        if self.out is not None:
            write_json(self.out, self.document)
            self.checkpoint.remove()
        return self.document


def read(path: Path) -> dict:
    """A file of results, every one of which can be compared and drawn.

    Raises:
        UserError: it is none, or holds a time that cannot be.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        for row in document["results"]:
            _check(row)
        for part in ("machine", "versions", "settings"):
            if not isinstance(document.setdefault(part, {}), dict):
                raise TypeError(f"{part} must be an object")
    except KeyError as error:
        raise UserError(f"{path} is no result of rope-fused bench: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no result of rope-fused bench: {error}") from None
    return document


def _check(row):
    """Raise what is wrong with a result; what an older run did not write down may be missing."""
    for name in ("op", "impl", "shape", "dtype"):
        if not isinstance(row[name], str):
            raise TypeError(f"{name} must be a string, got {row[name]!r}")
    for name in ("variant", "limit"):
        if not isinstance(row.get(name), str | None):
            raise TypeError(f"{name} must be a string, got {row[name]!r}")
    row.setdefault("limit", None)
    if not isinstance(row["seqlen"], int) or row["seqlen"] < 1:
        raise ValueError(f"seqlen must be a number of tokens, got {row['seqlen']!r}")
    times = row["median_us"], *row.setdefault("quartiles_us", [row["median_us"]] * 2)
    if len(times) != 3 or not all(_is_number(time) and time > 0 for time in times):
        raise ValueError(f"median_us and both quartiles_us must be times above 0, got {times}")
    rounds = row.get("rounds") or [1]
    for count in rounds if isinstance(rounds, list) else [rounds]:
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"rounds must be whole numbers above 0, got {count!r}")
    medians = row.setdefault("medians_us", [])
    if not isinstance(medians, list) or not all(_is_number(m) and m > 0 for m in medians):
        raise ValueError(f"medians_us must be times above 0, got {medians!r}")
    for name in ("spread", "orders_disagree", "of_limit", "peak_bytes"):
        if row.setdefault(name, None) is not None and not (
            _is_number(row[name]) and row[name] >= 0
        ):
            raise ValueError(f"{name} must be a number from 0 on, got {row[name]!r}")


def _is_number(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= LARGEST


def rows(case: Case, outcomes: dict) -> list[dict]:
    """One dict for each variant that was timed."""
    measured = {n: o for n, o in outcomes.items() if isinstance(o, Measured)}
    limit = measured.get(case.limit)
    gpu = roofline.gpu_named(torch.cuda.get_device_name()) if case.device == "cuda" else None
    found = []
    for impl, one in measured.items():
        timing = one.timing
        first, third = (seconds * 1e6 for seconds in timing.quartiles)
        cost = case.cost(impl)
        work = roofline.total(cost) if cost else None
        host = one.host_seconds
        model = case.model
        found.append(
            {
                "op": case.op,
                "impl": impl,
                "shape": model.name,
                "variant": case.variant,
                "dtype": case.dtype_name,
                "seqlen": case.seqlen,
                "batch": getattr(case, "batch", 1),
                "heads": model.heads,
                "kv_heads": model.kv_heads,
                "head_dim": model.head_dim,
                "d_model": model.d_model,
                "device": case.device,
                "median_us": timing.seconds * 1e6,
                "quartiles_us": [first, third],
                "spread": (third - first) / 2e6 / timing.seconds,
                "rounds": [len(block) for block in timing.blocks],
                "medians_us": [seconds * 1e6 for seconds in timing.medians],
                "least": timing.least,
                "orders_disagree": timing.disagreement,
                "marked": timing.disagreement > TOLERANCE,
                "limit": case.limit,
                "of_limit": limit.timing.seconds / timing.seconds if limit else None,
                "peak_bytes": one.peak_bytes,
                "launches": one.launches,
                "host_us": None if host is None else host * 1e6,
                "method": one.method,
                "sets": one.sets,
                "bytes": work and work.bytes,
                "flops": work and work.flops,
                "gb_per_s": work and work.bytes / timing.seconds / 1e9,
                "tflops_per_s": work and work.flops / timing.seconds / 1e12,
                "predicted_launches": len(cost) if cost else None,
                "predicted_us": gpu.seconds(cost, case.dtype) * 1e6 if gpu and cost else None,
            }
        )
    return found


def targets(case: Case, outcomes: dict) -> list[dict]:
    """The ratios that a case is held to, measured."""
    measured = {n: o.timing for n, o in outcomes.items() if isinstance(o, Measured)}
    seconds = {name: timing.seconds for name, timing in measured.items()}
    found = []
    for target in case.targets:
        pair = {target.impl, target.other}
        if pair <= measured.keys():
            ratio = target.ratio(seconds)
            marked = any(measured[name].disagreement > TOLERANCE for name in pair)
            met = [target.meets(ratio, bound) for bound in (target.must, target.aim)]
            entry = {"case": str(case), **target._asdict(), "ratio": ratio, "marked": marked}
            found.append(entry | {"must_met": met[0], "aim_met": met[1]})
    return found


# -- where it ran ------------------------------------------------------------------------------


def machine() -> dict:
    """Processor, cores, memory and what else moves these times."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _after_colon("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _after_colon("/proc/meminfo", "MemTotal"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu and gpu.name,
        "gpu_memory": gpu and gpu.total_memory,
        "cuda": torch.version.cuda,
    }


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict | None:
    """Of the checkout that this package is run from, or None."""

    def git(*arguments):
        command, where = ["git", *arguments], Path(__file__).parent
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # not merely installed below a checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"id": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def settings(quick: bool, device: str, **selection) -> dict:
    """How the run was done; a run is resumed only with the same."""
    return {
        "quick": quick,
        "device": device,
        "threads": torch.get_num_threads(),
        "warmup": WARMUP,
        "attempts": 1 if quick else ATTEMPTS,
        "tolerance": TOLERANCE,
        "backends": backends(),
        **selection,
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
