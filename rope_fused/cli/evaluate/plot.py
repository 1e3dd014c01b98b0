"""Pictures of results: curves of several methods in one, or the heat-map of one."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from ...report import UserError
from ..arguments import out_picture, require
from .session import read_json


def require_matplotlib():
    require("a picture", "demo", "matplotlib")


class Plot:
    """Draw results: perplexity or accuracy against length, or the needle heat-map."""

    @staticmethod
    def add_arguments(parser):
        add = parser.add_argument
        add(
            "results",
            nargs="+",
            metavar="[LABEL=]FILE",
            help="what the other tasks wrote, of one kind; those of one label share a line",
        )
        add(
            "--out",
            type=out_picture,
            required=True,
            metavar="FILE",
            help="the picture",
        )
        add("--title", help="instead of the usual one")

    @staticmethod
    def run(args):
        require_matplotlib()
        labels, results = [], []
        for argument in args.results:
            label, equals, file = argument.rpartition("=")
            labels.append(label if equals else Path(file).stem)
            results.append(_result(file))
        draw(results, labels, args.out, args.title)
        print(f"Written: {args.out}")


class Harness:
    """Where the tasks for lm-evaluation-harness are, and how to call them."""

    @staticmethod
    def add_arguments(parser):
        pass

    @staticmethod
    def run(args):
        from ...context import harness

        names = sorted(f"rope_fused_{f.stem}" for f in harness.folder().glob("[a-z]*.yaml"))
        print(
            f"lm_eval --model hf --model_args pretrained=DIR,max_length=8192 \\\n"
            f"    --include_path {harness.folder()} \\\n"
            f"    --tasks {','.join(names)} \\\n"
            """    --metadata '{"max_seq_lengths": [4096, 8192], "trials": 10, "seed": 0}'"""
        )


def draw(results, labels, file, title=None):
    """Write the picture of ``results``, which are of one kind, to ``file``."""
    from ...context import pictures

    kinds = {_kind(result) for result in results}
    if len(kinds) > 1:
        raise UserError(f"results must be of one kind, got {' and '.join(sorted(kinds))}")
    (kind,) = kinds
    options = {"title": title} if title else {}
    if kind == "needle":
        if len(results) > 1:
            raise UserError("results: a heat-map shows one result")
        pictures.heat_map(results[0]["cells"], file, **options)
        return
    curves = {}
    for result, label in zip(results, labels, strict=True):
        for name, points in _curves(kind, result, label):
            curves.setdefault(name, {}).update(points)
    originals = {result["original"] for result in results if "original" in result}
    options |= {"original": originals.pop()} if len(originals) == 1 else {}
    if kind == "perplexity":
        pictures.perplexity_curves(curves, file, **options)
    else:
        usual = "RULER-style tasks" if kind == "ruler" else "Passkey retrieval"
        pictures.accuracy_curves(curves, file, **{"title": usual} | options)


def _result(file):
    """A result file that can be drawn."""
    result = read_json(file)
    try:
        kind = _kind(result)
        if kind == "needle":
            rows = [[cell[n] for n in ("length", "depth", "accuracy")] for cell in result["cells"]]
        else:
            rows = [point for _, points in _curves(kind, result, "") for point in points.items()]
        rows.append([result.get("original", 0)])
        if len(rows) < 2 or any(math.isnan(number) for row in rows for number in row):
            raise ValueError
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise UserError(f"{file} is no result of rope-fused evaluate") from error
    return result


def _kind(result):
    if "curves" in result or ("perplexity" in result and "window" in result.get("settings", {})):
        return "perplexity"
    if result.get("task") == "needle" and result["cells"][0]["depth"] is not None:
        return "needle"
    if "cells" in result:
        return "passkey"
    if result.get("task") == "ruler":
        return "ruler"
    raise ValueError(f"no kind of result: {result.get('task')!r}")


def _curves(kind, result, label):
    """(label, {length: number}) of each line that a result has."""
    if kind == "perplexity":
        if "curves" not in result:
            yield label, {result["settings"]["window"]: result["perplexity"]}
            return
        for name, curve in result["curves"].items():
            points = {int(window): one["perplexity"] for window, one in curve.items()}
            yield (f"{label}: {name}" if label and len(label) else name), points
        return
    tasks = result["tasks"].items() if kind == "ruler" else [("", result)]
    for name, task in tasks:
        scores = {}
        for cell in task["cells"]:
            scores.setdefault(cell["length"], []).append(cell["accuracy"])
        points = {length: statistics.fmean(found) for length, found in scores.items()}
        yield (f"{label}: {name}" if name else label), points
