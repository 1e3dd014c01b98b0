"""Extend the window of a small model trained here, by every method, and check the papers' claims.

Trains on the Python sources of this machine, compares the methods without training, searches,
fine-tunes, and writes one page with what held. Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import time
from pathlib import Path

from ...report import UserError
from ..arguments import out_folder, require


def add_arguments(parser):
    parser.add_argument(
        "--full",
        action="store_true",
        help="two seeds, searches of 1344 evaluations, 240 steps of fine-tuning; no time limit "
        "(default: one seed, 512, 60: under 20 minutes on two cores)",
    )
    parser.add_argument(
        "--out",
        type=out_folder,
        metavar="DIR",
        help="gets README.md, its pictures, and the models (default: lab; with --full lab-full)",
    )


def run(args):
    from .scale import FULL, USUAL

    require("the lab", "train", "transformers", "accelerate", "matplotlib", "tqdm")
    folder = args.out or Path("lab-full" if args.full else "lab")
    report(*conduct(FULL if args.full else USUAL, folder))


def conduct(scale, folder):
    """Run the experiment of all seeds in ``folder``; (file of the page, what it asserts)."""
    import transformers

    from . import page
    from .experiment import Experiment

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    experiments = [Experiment(scale, seed, folder / f"seed-{seed}") for seed in scale.seeds]
    plan = [(one, part) for one in experiments for part in one.PARTS if part not in one.results]
    done, total = 0, sum(one.PARTS[part] for one, part in plan)
    start = time.monotonic()
    for one, part in plan:
        left = f", about {_minutes(start, done, total)} left" if done else ""
        print(f"seed {one.seed}: {part.replace('_', ' ')}{left}", flush=True)
        one.run(part)
        done += one.PARTS[part]
    return folder / "README.md", page.write(experiments, folder)


def report(file, asserted):
    """Print what holds; a UserError if something does not."""
    for seed, check in asserted:
        numbers = ", ".join(f"{number:.3f}" for number in check.numbers)
        print(f"{'holds' if check.holds else 'FAILS'}  seed {seed}: {check.claim} ({numbers})")
    print(f"Written: {file}")
    failed = sum(not check.holds for _, check in asserted)
    if failed:
        raise UserError(f"{failed} of {len(asserted)} claims do not hold: see {file}")


def _minutes(start, done, total):
    seconds = (time.monotonic() - start) * (total - done) / done
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
