"""Fine-tune a model for a longer window by a published recipe, and measure before and after.

Stages follow one another, each from the weights of the one before, through transformers' Trainer
and rope_fused.patch. Stopped and started again, it goes on where it was. The folder gets a model
per stage, and a page with curves of perplexity and passkey accuracy before and after.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from ..report import UserError
from .arguments import (
    above_zero,
    add_model,
    at_least,
    listed,
    model_settings,
    open_model,
    out_folder,
    process,
    require,
)

# Their sources: rope_fused/context/presets.py, which imports what takes long.
_PRESETS = ("pi", "yarn", "yarn-mistral", "longrope", "longrope-mistral", "longrope2", "two-stages")


def add_arguments(parser):
    add_model(parser)
    add = parser.add_argument
    add("--text", required=True, metavar="FILE", help="UTF-8 to train on")
    add("--test", required=True, metavar="FILE", help="UTF-8 to measure with, before and after")
    add(
        "--preset", choices=_PRESETS, default="yarn",
        help="published stages and hyper-parameters (default: yarn); their sources are printed",
    )  # fmt: skip
    add(
        "--blocks", nargs="+", metavar="JSON",
        help="rope_parameters for each stage, or files of them, as rope-fused search writes them",
    )  # fmt: skip
    add("--factors", type=listed(float), metavar="A,B,...", help="stages of one's own: factors")
    add("--steps", type=listed(int), metavar="A,B,...", help="steps of each stage")
    add("--lr", type=above_zero, help="instead of the preset's learning rate")
    add("--sequences", type=at_least(1), metavar="N", help="of an optimizer step, over all GPUs")
    add(
        "--micro-batch", type=at_least(1), default=1, metavar="N",
        help="sequences of the full length in one pass (default: 1)",
    )  # fmt: skip
    add("--mixed", action="store_true", help="train on shorter sequences too, each length alike")
    add(
        "--original", type=at_least(2), metavar="N",
        help="window of the training (default: original_max_position_embeddings, else "
        "max_position_embeddings)",
    )  # fmt: skip
    add("--checkpointing", action="store_true", help="recompute activations: less memory")
    add("--trials", type=at_least(1), default=10, metavar="N", help="passkey prompts of a length")
    add("--seed", type=int, default=0, help="of the data (default: 0)")
    add("--out", type=out_folder, default="extended", metavar="DIR", help="(default: %(default)s)")


def run(args):
    require("extend", "train", "transformers", "accelerate", "matplotlib", "tqdm")
    try:
        _extend(args)
    except ValueError as error:
        raise UserError(str(error)) from error


def _extend(args):
    from .. import patch
    from ..context import extend, methods
    from ..context.loading import encode, read_rope
    from ..context.progress import bar
    from .evaluate.session import read_text

    if args.dtype not in ("auto", "float32"):
        raise UserError("--dtype: training keeps weights in float32; on a GPU it computes in bf16")
    rank, world = process()
    first = rank == 0
    preset, stages = _stages(args)
    before, tokenizer = open_model(args)
    train = encode(tokenizer, read_text(args.text), before)
    test = encode(tokenizer, read_text(args.test), before)
    config = before.config.get_text_config()
    original = args.original or methods.original_length(config)
    blocks = [read_rope(block) for block in args.blocks or ()]
    plans = extend.plans(
        config, stages, preset.method, original=original, blocks=blocks, mixed=args.mixed
    )
    extend.check(plans, train, args.micro_batch, world)
    if test.numel() < 2:
        raise UserError(f"--test: must have at least 2 tokens, got {test.numel()}")
    if first:
        print(f"{args.preset}: {preset.source}")
    settings = {"command": "extend", "preset": args.preset} | model_settings(args, before)
    settings |= {"plans": [_as_json(plan) for plan in plans], "seed": args.seed}
    _same_run(args.out, settings, first)
    total = sum(plan.stage.recipe.steps for plan in plans)
    done = [0, *(plan.stage.recipe.steps for plan in plans)]
    with bar(total, "extend", "step") as progress:

        def said(stage, step, steps, loss):
            progress.update(sum(done[:stage]) + step - progress.n)
            progress.set_postfix(stage=stage, loss=f"{loss:.3f}")

        folders = extend.extend(
            args.model,
            train,
            plans,
            args.out,
            prepare=functools.partial(_patched, patch),
            tokenizer=args.tokenizer,
            micro_batch=args.micro_batch,
            processes=world,
            seed=args.seed,
            device=before.device,
            autocast=before.device.type == "cuda",
            checkpointing=args.checkpointing,
            said=said if first else None,
        )
    if first:
        _report(args, before, tokenizer, test, plans, folders, original, settings)


def _stages(args):
    """The preset, and its stages with what the options change."""
    from ..context.presets import PRESETS

    preset = PRESETS[args.preset]
    stages = preset.stages
    if args.factors:
        last = len(stages) - 1
        stages = [
            dataclasses.replace(stages[min(n, last)], factor=factor, length=factor)
            for n, factor in enumerate(args.factors)
        ]
    steps = args.steps or [stage.recipe.steps for stage in stages]
    if len(steps) != len(stages) or min(steps) < 1:
        raise UserError(f"--steps: must be {len(stages)} numbers above 0, got {args.steps}")
    changed = []
    for stage, count in zip(stages, steps, strict=True):
        recipe = dataclasses.replace(
            stage.recipe,
            steps=count,
            learning_rate=args.lr or stage.recipe.learning_rate,
            warmup_steps=min(stage.recipe.warmup_steps, count // 2),
        )
        batch = args.sequences or stage.batch
        changed.append(dataclasses.replace(stage, recipe=recipe, batch=batch))
    return preset, changed


def _patched(patch, model):
    """Patch ``model``; what is left alone is said, and trains as transformers runs it."""
    report = patch(model)
    if any(level is None for level in report.levels.values()):
        print(report)


def _same_run(out, settings, first):
    """Refuse to go on in a folder that holds another run."""
    from ..context.progress import Checkpoint

    kept = Checkpoint(out / "run.json", settings)
    if first and not kept.state:
        kept.save({"started": True})


def _report(args, before, tokenizer, test, plans, folders, original, settings):
    """README.md, its pictures and report.json: perplexity and passkey, before and after."""
    from ..context import extend, loading, pictures
    from ..context.progress import Checkpoint, write_json
    from ..context.prompts import PASSKEY_BRIEF, TooShortError
    from ..context.retrieval import retrieve
    from ..context.swap import swapped
    from ..files import replacing

    last = plans[-1]
    windows = [original]
    while windows[-1] * 2 <= min(last.window, test.numel()):
        windows.append(windows[-1] * 2)
    checkpoint = Checkpoint(args.out / "report.partial", settings | {"windows": windows})
    own = before.config.get_text_config().rope_parameters
    subjects = {"before, as it was": (before, own), "before, stretched": (before, last.block)}
    for number, folder in enumerate(folders, 1):
        label = "after" if len(folders) == 1 else f"after stage {number}"
        subjects[label] = (folder, plans[number - 1].block)
    curves, recall = {}, {}
    for label, (model, block) in subjects.items():
        if isinstance(model, Path):
            model, _ = loading.load(model, device=before.device)
        spec = extend.methods.spec_of(model.config.get_text_config(), block)
        curves[label] = extend.curve(
            model, test, windows, block, batch_size=args.batch, checkpoint=checkpoint, name=label
        )
        try:
            with swapped(model, spec):
                found = retrieve(
                    model,
                    tokenizer,
                    PASSKEY_BRIEF,
                    windows,
                    trials=args.trials,
                    seed=args.seed,
                    batch_size=args.batch,
                    checkpoint=checkpoint.part(f"{label}: passkey"),
                )
        except TooShortError:
            continue
        recall[label] = {cell["length"]: cell["accuracy"] for cell in found["cells"]}
    pictures.perplexity_curves(
        curves, args.out / "perplexity.png", original=original, title="Before and after"
    )
    lines = [
        f"# {Path(args.model).resolve().name}, from {original:,} to {last.window:,} tokens",
        "",
        f"Recipe `{args.preset}`. {_steps(plans)}",
        "",
        _table("perplexity at", curves, "{:.3f}"),
        "",
        "![Perplexity against window](perplexity.png)",
    ]
    if recall:
        pictures.accuracy_curves(recall, args.out / "passkey.png", original=original)
        lines += ["", _table("passkey at", recall, "{:.0%}")]
        lines += ["", "![Passkey accuracy against length](passkey.png)"]
    with replacing(args.out / "README.md") as page:
        page.write_text("\n".join(lines) + "\n")
    write_json(
        args.out / "report.json",
        {"perplexity": curves, "passkey": recall, "settings": settings}
        | {"losses": [extend.losses_of(folder) for folder in folders]},
    )
    checkpoint.remove()
    print(_table("perplexity at", curves, "{:.3f}"))
    print(f"Written: {folders[-1]}, {args.out / 'README.md'}")


def _steps(plans):
    return " ".join(
        f"Stage {n}: {p.stage.recipe.steps} steps of {p.stage.batch} sequences of "
        f"{', '.join(map(str, p.lengths))} tokens, factor {p.stage.factor:g}, learning rate "
        f"{p.stage.recipe.learning_rate:g}."
        for n, p in enumerate(plans, 1)
    )


def _table(title, curves, form):
    columns = sorted({length for curve in curves.values() for length in curve})
    lines = [["model", *(f"{title} {length:,}" for length in columns)]]
    lines.append(["---"] * (len(columns) + 1))
    for label, curve in curves.items():
        lines.append([label, *(form.format(curve[length]) for length in columns)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _as_json(plan):
    return {
        "block": dict(plan.block),
        "lengths": list(plan.lengths),
        "batch": plan.stage.batch,
        **dataclasses.asdict(plan.stage.recipe),
    }
