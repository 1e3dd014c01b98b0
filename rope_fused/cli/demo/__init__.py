"""Train a transformer twice, as it is and patched, and compare loss, time and memory.

A small Llama of transformers (grouped queries, YaRN) learns to write Python from the sources of the
standard library. Then the projection and rotary embedding of one of its layers are measured alone.
Everything is printed as ratios, and kept as a picture and as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ... import report
from .. import doctor
from ..arguments import above_zero, at_least, out_folder, require
from . import comparison

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TRAINING_SECONDS = 120.0
_TIMING_SECONDS = 40.0


def add_arguments(parser):
    def add(name, help, **options):
        if options.get("default") is not None:
            help += " (default: %(default)s)"
        parser.add_argument(name, help=help, **options)

    add("--dtype", "of weights and activations", choices=_DTYPES, default="float32")
    add(
        "--precision",
        "exact: fused projection, 64-bit angles; hf: transformers' own bits",
        choices=("exact", "hf"),
        default="exact",
    )
    add("--text", "learn from this file, not from Python's standard library", metavar="FILE")
    add("--model", "train this local checkpoint of transformers, with its tokenizer", metavar="DIR")
    add(
        "--steps",
        f"train so long (default: 120, or what fits in {_TRAINING_SECONDS:.0f} s)",
        type=at_least(1),
        metavar="N",
    )
    add("--batch", "sequences per step", type=at_least(1), default=2, metavar="N")
    add("--seqlen", "tokens per sequence", type=at_least(2), default=512, metavar="N")
    add("--layers", "of the demo's own model", type=at_least(1), default=6, metavar="N")
    add("--lr", "learning rate (default: 1e-3; with --model 2e-5)", type=above_zero)
    add("--seed", "of weights and batches", type=int, default=0)
    add(
        "--lengths",
        "sequence lengths at which the layer is measured (default: 512 to 8192)",
        type=at_least(1),
        nargs="+",
        default=None,
        metavar="N",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out of the comparison"
    )
    add("--out", "gets demo.png and demo.json", type=out_folder, default="demo", metavar="DIR")


def run(args):
    require("the demo", "demo", "transformers", "matplotlib", "tqdm")
    results = measure(args)
    print(comparison.text(results))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    from . import picture

    picture.draw(results, args.out / "demo.png")
    print(f"\nWritten: {args.out / 'demo.png'}, {args.out / 'demo.json'}")


def measure(args) -> dict:
    """Train and time; everything that was measured, as data that JSON can hold."""
    import transformers
    from tqdm import tqdm

    from . import layer, training

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.model is not None and not Path(args.model).is_dir():
        raise report.UserError(f"--model: {args.model} is not a folder")
    ids = training.tokens(training.read_text(args.text), args.model)
    if ids.numel() < args.seqlen:
        raise report.UserError(f"--text: needs {args.seqlen} tokens, has {ids.numel()}")
    plain, patched, patch_report = training.prepare(
        args.model, _DTYPES[args.dtype], args.layers, args.seed, args.precision
    )
    one = layer.Layer(plain.model, args.precision)
    millions = sum(p.numel() for p in plain.model.parameters()) / 1e6
    batch, seqlen = args.batch, args.seqlen
    source = args.text or "the Python standard library"
    print(
        f"{type(plain.model).__name__}, {millions:.1f} M parameters, {args.dtype}; "
        f"{batch} x {seqlen} tokens a step, of {ids.numel():,} in {source}\n{patch_report}\n"
        f"backend cpu: {report.facts()['backends']['cpu']}\n",
        flush=True,
    )
    with tqdm(total=args.steps or 120, desc="training both", unit="step") as progress:
        training.train(
            [plain, patched],
            ids,
            steps=progress.total,
            seconds=None if args.steps else _TRAINING_SECONDS,
            batch=batch,
            seqlen=seqlen,
            lr=args.lr or (1e-3 if args.model is None else 2e-5),
            seed=args.seed,
            progress=progress,
        )
        progress.total = progress.n

    lengths = args.lengths or [512, 1024, 2048, 4096, 8192]
    with tqdm(total=len(lengths) + 2, desc="projection + rotary", unit="part") as progress:
        peaks = layer.peaks(one, max(lengths))
        progress.update()
        compiled, note = None, "left out by --no-compile"
        if not args.no_compile:
            compiled, note = layer.compiled(one)
        progress.update()
        times = layer.forward_times(one, compiled, lengths, _TIMING_SECONDS, progress)
    return {
        "facts": doctor.facts(),
        "arguments": {
            name: value for name, value in vars(args).items() if name not in ("run", "out")
        },
        "model": {"class": type(plain.model).__name__, "millions": millions, "layer": one.shape},
        "levels": patch_report.levels,
        "losses": {r.name: r.losses for r in (plain, patched)},
        "step_seconds": {r.name: r.seconds[training.WARM_UP :] for r in (plain, patched)},
        "layer_peak_bytes": peaks,
        "layer_seconds": {str(length): times[length] for length in lengths},
        "compile": note,
    }
