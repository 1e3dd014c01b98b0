"""Search the factors that stretch a model's window best, by evolution or by gradient.

The result is a rope_parameters block of transformers; its picture lies beside it. Under torchrun
the processes share the candidates. A search that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib

from .. import __version__
from ..files import beside
from ..report import UserError, columns
from .arguments import (
    above_zero,
    add_model,
    at_least,
    model_settings,
    open_model,
    out_file,
    process,
    require,
)


def add_arguments(parser):
    add_model(parser)
    add = parser.add_argument
    add("--text", required=True, metavar="FILE", help="UTF-8, unlike what the test will be")
    add(
        "--factor",
        type=above_zero,
        required=True,
        metavar="S",
        help="how much longer the window gets",
    )
    add("--window", type=at_least(2), required=True, metavar="N", help="tokens of a window")
    add(
        "--evaluations", type=at_least(1), default=None, metavar="N",
        help="forward passes to judge candidates by, all in all (default: 1344, LongRoPE's; by "
        "gradient a fifth of that)",
    )  # fmt: skip
    add(
        "--method", choices=("evolution", "gradient", "seeded"), default="evolution",
        help="gradient: a descent from YaRN, three evaluations a step; seeded: both in turns, "
        "a descent first and last (default: evolution)",
    )  # fmt: skip
    add(
        "--strategy", choices=("longrope", "longrope2"), default="longrope",
        help="longrope2: only from a critical pair on, the others by NTK (default: longrope)",
    )  # fmt: skip
    add(
        "--fitness", choices=("perplexity", "needle"),
        help="needle: of a number at the other end of the window (default with longrope2)",
    )  # fmt: skip
    add(
        "--temperature", default="yarn", metavar="T",
        help="of all candidates but YaRN: a number, yarn, su, or search (default: yarn)",
    )  # fmt: skip
    add(
        "--samples", type=at_least(1), default=5, metavar="N",
        help="windows of the text that candidates are judged by (default: 5, LongRoPE's)",
    )  # fmt: skip
    add(
        "--original", type=at_least(2), metavar="N",
        help="window of the training (default: original_max_position_embeddings, else "
        "max_position_embeddings)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="of the evolution (default: 0)")
    add(
        "--out", type=out_file, default="search.json", metavar="FILE",
        help="the result, as JSON (default: %(default)s), and FILE.png; FILE.partial holds an "
        "unfinished search",
    )  # fmt: skip


def run(args):
    require("search", "context", "transformers", "tqdm")
    require("the picture", "demo", "matplotlib")
    with _processes() as first:
        try:
            result, space, settings = _search(args, quiet=not first)
        except ValueError as error:
            raise UserError(str(error)) from error
        if first:
            _write(args, result, space, settings)


@contextlib.contextmanager
def _processes():
    """Join the other processes of torchrun, if any; whether this is the first of them."""
    import torch.distributed as dist

    rank, world = process()
    if world == 1:
        yield True
        return
    dist.init_process_group("gloo")
    try:
        yield rank == 0
    finally:
        dist.destroy_process_group()


def _search(args, quiet):
    from ..context import fitness, search
    from ..context.loading import encode
    from ..context.progress import bar, fingerprint
    from .evaluate.session import read_text

    args.evaluations = args.evaluations or search.usual_evaluations(args.method)
    if args.fitness is None:
        args.fitness = "needle" if args.strategy == "longrope2" else "perplexity"
    model, tokenizer = open_model(args)
    text = read_text(args.text)
    tokens = encode(tokenizer, text, model)
    space = search.space_of(
        model,
        args.factor,
        original=args.original,
        temperature=_temperature(args.temperature),
        critical=args.strategy == "longrope2",
    )
    if args.fitness == "needle":
        windows = fitness.needle_windows(tokenizer, tokens, args.window, args.samples, args.seed)
    else:
        windows = fitness.text_windows(tokens, args.window, args.samples)
    settings = {"command": "search", "rope_fused": __version__, "text": fingerprint(text)}
    settings |= model_settings(args, model)
    for name in ("window", "evaluations", "method", "strategy", "fitness", "samples", "seed"):
        settings[name] = getattr(args, name)
    settings |= {"factor": space.factor, "original": space.original}
    settings |= {"temperature": space.temperature}
    checkpoint = search.shared_checkpoint(_partial(args), settings)
    shown = contextlib.nullcontext() if quiet else bar(args.evaluations, "search", "evaluation")
    with shown as progress:
        result = search.search(
            model,
            tokens,
            space,
            windows,
            window=args.window,
            evaluations=args.evaluations,
            method=args.method,
            seed=args.seed,
            batch_size=args.batch,
            checkpoint=checkpoint,
            bar=progress,
        )
    return result, space, settings


def _write(args, result, space, settings):
    from ..context import evolution, search_pictures
    from ..context.progress import write_json

    known = result.known
    seeds = {name: known.get(genome) for name, genome in space.seeds().items()}
    data = {
        "rope_parameters": result.block,
        "perplexity": result.perplexity,
        "evaluations": result.evaluations,
        "yarn_perplexity": result.yarn,
        "fitness": {"best": min(known.values())} | seeds,
        "history": evolution.history(known),
        "settings": settings,
    }
    write_json(args.out, data)
    picture = beside(args.out, ".png")
    label = {"evolution": "evolution", "gradient": "gradient", "seeded": "gradient and evolution"}
    label = label[args.method]
    if picture is not None:
        search_pictures.draw(
            space, {label: result.genome}, {label: (result.spent, data["history"])}, picture
        )
        _partial(args).unlink(missing_ok=True)
    rows = [("pair", "factor", "YaRN", "NTK", "PI")]
    seeds = space.seeds()
    for i, found in enumerate(result.genome.factors):
        others = (f"{seeds[name].factors[i]:.3f}" for name in ("yarn", "ntk", "pi"))
        rows.append((i, f"{found:.3f}", *others))
    print(columns(rows, ">"))
    print(f"temperature (attention_factor) {result.genome.temperature:.4f}")
    written = ", ".join(str(path) for path in (args.out, picture) if path)
    print(
        f"search: perplexity {result.perplexity:.6g}, with YaRN {result.yarn:.6g}, "
        f"{result.evaluations} evaluations\nWritten: {written}"
    )


def _temperature(text):
    if text in ("yarn", "su", "search"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"--temperature: must be yarn, su, search or a number > 0, got {text!r}")
    return value


def _partial(args):
    return beside(args.out, ".partial")
