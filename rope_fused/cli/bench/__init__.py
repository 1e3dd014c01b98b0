"""Measure this package beside everything one would use instead, and draw the pictures.

Every variant must first give equal results; then all of a case run in turn, round after round, in
both orders. --plot, --compare, --accuracy and --roofline do what they say instead.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

from ...files import is_stream, writable
from ...report import UserError
from ..arguments import above_zero, at_least, chosen_device, number, require

_OUT = Path("bench.json")
_GPU_MINUTES = 9.0  # of an --all run, so that it fits into ten with what comes before and after


def add_arguments(parser):
    what = parser.add_mutually_exclusive_group()
    add = what.add_argument
    add("--quick", action="store_true", help="what matters most, once: under three minutes")
    add("--all", action="store_true", help="everything (the default)")
    add("--plot", type=Path, nargs="+", metavar="FILE", help="draw files of results beside them")
    add("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="name what became slower")
    add("--accuracy", action="store_true", help="errors of angles and of q . k by position")
    add("--roofline", nargs="*", metavar="GPU", help="where fusing can win, and how much at most")
    add = parser.add_argument
    add("--shapes", nargs="+", metavar="NAME", help="models, or HEADS+KV_HEADSxHEAD_DIM[@D_MODEL]")
    add("--ops", nargs="+", metavar="OP", help="rotate, unrotate, projection, block, ...")
    add("--seqlens", nargs="+", type=at_least(1), metavar="N", help="sequence lengths")
    add("--dtypes", nargs="+", choices=("bfloat16", "float32", "float16"), help="of the tensors")
    add("--impls", nargs="+", metavar="NAME", help="these variants only, and the limit")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    add("--threads", type=at_least(1), metavar="N", help="of torch (default: as torch is set)")
    add("--minutes", type=above_zero, metavar="N", help="start no case after this time")
    add("--threshold", type=number, default=0.05, help="least change of --compare (default: 0.05)")
    add(
        "--out", type=Path, metavar="FILE", help=f"results (default: {_OUT}); of --plot, the folder"
    )


def run(args):
    if args.plot:
        _plot(args.plot, args.out)
    elif args.compare:
        _compare(*args.compare, args.threshold)
    elif args.roofline is not None:
        print(roofline_table(args.roofline))
    elif args.accuracy:
        from . import accuracy

        accuracy.run(writable(args.out or "accuracy.json"), args.device)
    else:
        out = writable(args.out or _OUT)
        document = measure(args, out)
        from . import table

        print(table.text(document))
        print(f"\nWritten: {', '.join(map(str, [out, *draw(out, document)]))}")


def roofline_table(names) -> str:
    """The cost model's table for the named GPUs, or for all."""
    from . import roofline

    for name in names:
        if name not in roofline.GPUS:
            raise UserError(f"--roofline: {name!r} is none of {', '.join(roofline.GPUS)}")
    return roofline.table(tuple(names) or tuple(roofline.GPUS))


def _compare(old_file, new_file, threshold):
    """Print what changed; raise UserError, which makes the exit status 1, when something became
    slower."""
    from . import compare, results

    old, new = results.read(old_file), results.read(new_file)
    found = compare.changes(old, new, threshold)
    if not found:
        raise UserError(f"{old_file} and {new_file} have no result in common")
    print(compare.text(found, old, new))
    slower = sum(change.verdict == "slower" for change in found)
    if slower:
        raise UserError(f"{slower} of {len(found)} results became slower")


def _plot(files, folder):
    """Draw each file, beside it or in a folder."""
    from . import accuracy, results

    require("a picture", "demo", "matplotlib")
    documents = {file: accuracy.read(file) or results.read(file) for file in files}
    written, empty = [], []
    for file, document in documents.items():
        beside = folder / file.name if folder else file
        drawn = (accuracy.draw if "errors" in document else draw)(beside, document)
        written += drawn
        empty += [] if drawn else [str(file)]
    if written:
        print(f"Written: {', '.join(map(str, written))}")
    if empty:
        raise UserError(f"there is nothing to draw in {', '.join(empty)}")


def draw(file, document) -> list[Path]:
    """The pictures of results beside their file, light and dark; none without matplotlib."""
    if is_stream(file):
        return []
    try:
        require("a picture", "demo", "matplotlib")
    except UserError as error:
        print(error, file=sys.stderr)
        return []
    from . import picture

    return picture.draw(document, file)


def choose(args, device):
    """The cases that the arguments ask for."""
    from . import shapes, suite

    for option, names in (("ops", suite.OPS), ("impls", suite.IMPLS)):
        for name in getattr(args, option) or ():
            if name not in names:
                raise UserError(f"--{option}: {name!r} is none of {', '.join(names)}")
    if not (args.shapes or args.seqlens or args.dtypes):
        cases = suite.quick(device) if args.quick else suite.everything(device)
        cases = [case for case in cases if not args.ops or case.op in args.ops]
        if cases:
            return cases
    return suite.grid(
        device,
        shapes.select(args.shapes or ["Llama-3-8B"]),
        args.ops or ("rotate", "unrotate", "projection"),
        [suite.DTYPES[name] for name in args.dtypes or ("bfloat16",)],
        args.seqlens or ((4096,) if args.quick else suite.SWEEP),
    )


def measure(args, out) -> dict:
    """Run the cases, and write the results as they come; the whole document."""
    require("bench", "demo", "tqdm")
    import torch
    from tqdm import tqdm

    from . import baselines, results, suite

    baselines.quiet()
    device = chosen_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = choose(args, device)
    selection = ("shapes", "ops", "seqlens", "dtypes", "impls")
    settings = results.settings(args.quick, device, **{n: getattr(args, n) for n in selection})
    record = results.Run(settings, out)
    if record.resumed:
        print(f"{out}.partial: {record.resumed} cases were done before", file=sys.stderr)
    minutes = args.minutes or (_GPU_MINUTES if device == "cuda" and not args.quick else None)
    start = time.monotonic()
    left = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left"
    with tqdm(total=sum(case.effort for case in cases), bar_format=left) as progress:
        for number, case in enumerate(cases, 1):
            progress.set_description(f"[{number}/{len(cases)}] {case}")
            late = minutes and time.monotonic() - start > 60 * minutes
            if record.has(case):
                progress.total -= case.effort
                continue
            if case.needs > (free := suite.memory(device)):
                gigabytes = f"{case.needs / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
                record.leave_out(case, f"needs about {gigabytes}")
            elif late:
                record.leave_out(case, f"no time left after {minutes:g} minutes (--minutes)")
            else:
                _measure_one(record, case, args)
            progress.update(case.effort)
    return record.finish()


def _measure_one(record, case, args):
    import torch

    from . import harness, processes

    if args.impls and hasattr(case, "asked"):
        case = dataclasses.replace(case, asked=tuple(args.impls))
    try:
        outcomes = processes.run(case, quick=args.quick, only=args.impls)
    except harness.Refused as error:
        raise UserError(f"a wrong result, so nothing is timed: {error}") from error
    except torch.OutOfMemoryError as error:
        record.leave_out(case, f"out of memory: {str(error).splitlines()[0]}")
    except processes.Died as error:
        record.leave_out(case, str(error))
    else:
        record.add(case, outcomes)
    finally:
        if case.device == "cuda":
            torch.cuda.empty_cache()
