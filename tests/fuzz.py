"""Random calls of the public functions against the reference, forward and backward, and calls with
one mistake, which must be refused by name.

A number draws a call, and is all that it takes to repeat it:

    python tests/fuzz.py --minutes 10 [--seed N] [--backend cpu] [--log bench/results/fuzz.jsonl]
    python tests/fuzz.py --only NUMBER [--illegal] [--backend triton]
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARE = 6  # illegal calls for each ten legal ones: they take less time


def legal_or_not(illegal):
    """The module that makes calls of this kind."""
    from fuzzing import illegal as wrong
    from fuzzing import legal as right

    return wrong if illegal else right


def attempt(number, backend, illegal) -> str | None:
    """Make one call; what is wrong with it, and how to repeat it, or None."""
    from fuzzing.calls import INTERPRETED

    module = legal_or_not(illegal)
    try:
        module.run(number, backend)
        return None
    except Exception:
        options = "" if backend == "auto" else f" --backend {backend}"
        lines = [traceback.format_exc()]
        try:
            call = module.make(number, small=backend in INTERPRETED)
            lines.append(module.describe(call, number, options))
        except Exception:  # of the drawing itself
            kind = " --illegal" if illegal else ""
            lines.append(f"python tests/fuzz.py --only {number}{kind}{options}")
        return "\n".join(lines)


def several(seed, minutes, backend) -> dict:
    """Calls for some minutes: how many of each kind there were, and how many went wrong."""
    counts = {"legal": 0, "illegal": 0, "differences": 0}
    first, end = seed * 10**6, time.monotonic() + 60 * minutes
    while not counts["legal"] or time.monotonic() < end:
        total = counts["legal"] + counts["illegal"]
        kind = "illegal" if total % (10 + SHARE) < SHARE else "legal"
        wrong = attempt(first + counts[kind], backend, kind == "illegal")
        if wrong:
            counts["differences"] += 1
            print(wrong, flush=True)
        counts[kind] += 1
    return counts


def machine() -> str:
    """The processor, and what else decides which code runs."""
    import torch

    from rope_fused.dispatch import native

    name = platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.partition(": ")[2].strip() for line in file if "model name" in line]
        name = (models or [name])[0]
    isa = native._cpu.isa if native else "pure"
    if native and "-fsanitize" in native._cpu.flags:
        isa += " sanitized"
    return f"{name}, {isa}, Python {platform.python_version()}, torch {torch.__version__}"


def commit() -> str:
    """The commit that was tested, marked where the tree differs from it."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":!bench/results")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--backend", default="auto", help="auto (default), cpu, triton, reference")
    parser.add_argument("--log", type=Path, help="add a line about this run to this file")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this call alone")
    parser.add_argument("--illegal", action="store_true", help="with --only: an illegal call")
    args = parser.parse_args()
    # Read when the kernels are defined: on CPU tensors they run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    torch.set_num_threads(1)
    if args.only is not None:
        wrong = attempt(args.only, args.backend, args.illegal)
        sys.exit(wrong and f"{wrong}")
    tested = commit()
    start = time.monotonic()
    counts = several(args.seed, args.minutes, args.backend)
    line = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": tested,
        "machine": machine(),
        "backend": args.backend,
        "seed": args.seed,
        "seconds": round(time.monotonic() - start),
        **counts,
    }
    if args.log is not None:
        with args.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    sys.exit(counts["differences"] > 0)


if __name__ == "__main__":
    main()
