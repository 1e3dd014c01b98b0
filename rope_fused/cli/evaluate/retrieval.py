"""Tasks that ask what a long text hides: passkey, needle, and RULER-style keys and variables."""

from __future__ import annotations

import statistics

from ...context.schema import accuracy
from ...report import UserError, columns
from ..arguments import at_least, listed
from .session import Session, add_common, errors_of


def _add_questions(parser, out, trials):
    add_common(parser, out=out)
    add = parser.add_argument
    add(
        "--lengths",
        type=listed(int),
        required=True,
        metavar="A,B,...",
        help="tokens of prompt and answer together",
    )
    add(
        "--depths",
        type=listed(float),
        metavar="A,B,...",
        help="where it is hidden: shares, 0 (start) to 1 (end), or, with one above 1, percent",
    )
    add("--trials", type=at_least(1), default=trials, metavar="N", help="of each kind")
    add("--seed", type=int, default=0, help="of the prompts (default: 0)")
    add("--nll", action="store_true", help="also the NLL of the right answers: twice the time")


def _depths(args, usual=None):
    depths = args.depths or usual
    if depths is None:
        return None
    if max(depths) > 1:
        depths = [depth / 100 for depth in depths]
    if not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"--depths: must be from 0 to 1, or to 100 percent, got {args.depths}")
    return depths


def _ask(session, tasks, depths, haystack=None):
    """{name: result} of some {name: Task}, one after another, in one checkpoint."""
    from ...context.prompts import sentences_of
    from ...context.retrieval import retrieve

    args = session.args
    settings = {"lengths": args.lengths, "depths": depths, "trials": args.trials}
    settings |= {"seed": args.seed, "nll": args.nll, "tasks": list(tasks)}
    if haystack is not None:
        haystack = sentences_of(session.read_text(haystack))
        if not haystack:
            raise UserError(f"--text: {args.text} has no sentences")
    total = len(tasks) * len(args.lengths) * len(depths or [None]) * args.trials
    with session.running(total, "prompt", **settings) as (checkpoint, bar):
        return {
            name: retrieve(
                session.model,
                session.tokenizer,
                task,
                args.lengths,
                depths=depths,
                trials=args.trials,
                seed=args.seed,
                batch_size=args.batch,
                haystack=haystack,
                with_nll=args.nll,
                checkpoint=checkpoint.part(name),
                bar=bar,
            )
            for name, task in tasks.items()
        }


def _print(cells):
    """Accuracy by length, over depths."""
    lengths = sorted({cell["length"] for cell in cells})
    rows = [("tokens", "accuracy")]
    for length in lengths:
        scores = [cell["accuracy"] for cell in cells if cell["length"] == length]
        rows.append((length, f"{100 * statistics.fmean(scores):.1f} %"))
    print(columns(rows, ">"))


class Passkey:
    """Whether the model finds a number in a long text (passkey retrieval)."""

    @staticmethod
    def add_arguments(parser):
        _add_questions(parser, "passkey.json", trials=10)
        parser.add_argument(
            "--prompt",
            choices=("auto", "full", "brief"),
            default="auto",
            help="full: with the introduction that published numbers have; brief: without it; auto "
            "(default): full, if every length has room for it",
        )

    @staticmethod
    def run(args):
        from ...context import prompts

        depths = _depths(args)
        chosen = {"full": prompts.PASSKEY, "brief": prompts.PASSKEY_BRIEF}
        with errors_of():
            session = Session(args, max(args.lengths))
            kind, note = args.prompt, ""
            if kind == "auto":
                try:
                    lowest = min(args.lengths), (depths or [None])[0], 0, args.seed
                    prompts.make_prompt(prompts.PASSKEY, session.tokenizer, *lowest)
                    kind = "full"
                except prompts.TooShortError as error:
                    kind, note = "brief", f"The prompt is without its introduction: {error}"
            found = _ask(session, {kind: chosen[kind]}, depths)
        if note:
            print(note)
        result = {"prompt": kind} | found[kind]
        _print(result["cells"])
        session.finish(result, {"accuracy": accuracy(result["trials"])}, len(result["trials"]))


class Needle:
    """Whether the model finds a sentence, over lengths and depths (needle in a haystack)."""

    @staticmethod
    def add_arguments(parser):
        _add_questions(parser, "needle.json", trials=3)
        parser.add_argument("--text", metavar="FILE", help="the haystack (default: five sentences)")

    @staticmethod
    def run(args):
        from ...context import prompts

        depths = _depths(args, [step / 10 for step in range(11)])
        with errors_of():
            session = Session(args, max(args.lengths))
            result = _ask(session, {"needle": prompts.NEEDLE}, depths, args.text)["needle"]
        _print(result["cells"])
        session.finish(result, {"accuracy": accuracy(result["trials"])}, len(result["trials"]))


class Ruler:
    """Several keys, values and queries, and variables to follow, in the manner of RULER."""

    @staticmethod
    def add_arguments(parser):
        _add_questions(parser, "ruler.json", trials=10)
        parser.add_argument(
            "--tasks",
            type=listed(str),
            metavar="A,B,...",
            help="niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking "
            "(default: all)",
        )
        parser.add_argument("--text", metavar="FILE", help="the haystack (default: five sentences)")

    @staticmethod
    def run(args):
        from ...context import prompts

        names = args.tasks or list(prompts.RULER)
        for name in names:
            if name not in prompts.RULER:
                raise UserError(f"--tasks: {name} is none of {', '.join(prompts.RULER)}")
        with errors_of():
            session = Session(args, max(args.lengths))
            tasks = {name: prompts.RULER[name] for name in names}
            found = _ask(session, tasks, _depths(args), args.text)
        rows = [("task", *args.lengths)]
        for name, result in found.items():
            by_length = {n: [] for n in args.lengths}
            for cell in result["cells"]:
                by_length[cell["length"]].append(cell["accuracy"])
            shown = [f"{100 * statistics.fmean(scores):.1f} %" for scores in by_length.values()]
            rows.append((name, *shown))
        print(columns(rows, "<>"))
        trials = [trial for result in found.values() for trial in result["trials"]]
        metrics = {"accuracy": accuracy(trials)}
        metrics |= {name: accuracy(result["trials"]) for name, result in found.items()}
        result = {"task": "ruler", "accuracy": metrics["accuracy"][0], "tasks": found}
        session.finish(result, metrics, len(trials))
