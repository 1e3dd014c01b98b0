"""Perplexity against length for several methods of stretching the window of one model."""

from __future__ import annotations

from pathlib import Path

from ...report import UserError, columns
from ..arguments import above_zero, at_least, listed, out_picture
from .session import Session, add_common, errors_of


class Compare:
    """Perplexity against length for several ways to stretch the window, without training."""

    @staticmethod
    def add_arguments(parser):
        add_common(parser, out="compare.json")
        add = parser.add_argument
        add("--text", required=True, nargs="+", metavar="FILE", help="UTF-8 documents")
        add("--windows", type=listed(int), required=True, metavar="A,B,...", help="in tokens")
        add(
            "--methods",
            type=listed(str),
            default=["none", "linear", "ntk", "by_parts", "yarn"],
            metavar="A,B,...",
            help="none, linear (PI), ntk, dynamic, by_parts, yarn, llama3, or files of "
            "rope_parameters (default: none,linear,ntk,by_parts,yarn)",
        )
        add("--factor", type=above_zero, help="default: the longest window over the model's own")
        add(
            "--original", type=at_least(2), metavar="N", help="window of the training (default: "
            "original_max_position_embeddings, else max_position_embeddings)",
        )  # fmt: skip
        add("--stride", type=at_least(1), metavar="N", help="default: half of each window")
        add("--plot", type=out_picture, metavar="FILE", help="also a picture (needs matplotlib)")

    @staticmethod
    def run(args):
        from ...context import loading, methods
        from ...context.perplexity import perplexity
        from ...context.swap import swapped
        from .plot import require_matplotlib

        if args.plot:
            require_matplotlib()
        with errors_of():
            session = Session(args, max(args.windows))
            config = session.model.config.get_text_config()
            original = args.original or loading.original_length(config)
            factor = args.factor or max(args.windows) / original
            if factor < 1:
                raise UserError(f"--factor: must be at least 1, got {factor:g}")
            blocks = {}
            for name in args.methods:
                if name in methods.NAMES:
                    blocks[name] = methods.block_of(name, config, factor, original)
                else:
                    blocks[Path(name).stem] = loading.read_rope(name)
            specs = {n: methods.spec_of(config, block, original) for n, block in blocks.items()}
            documents = session.tokens(args.text)
            settings = {"windows": args.windows, "stride": args.stride, "factor": factor}
            settings |= {"original": original, "methods": blocks}
            total = sum(d.numel() - 1 for d in documents) * len(args.windows) * len(specs)
            curves = {}
            with session.running(total, "token", **settings) as (checkpoint, bar):
                for name, spec in specs.items():
                    curves[name] = {}
                    for window in args.windows:
                        bar.set_postfix_str(f"{name} at {window}", refresh=False)
                        with swapped(session.model, spec):
                            curves[name][str(window)] = perplexity(
                                session.model,
                                documents,
                                window,
                                args.stride or max(1, window // 2),
                                batch_size=args.batch,
                                checkpoint=checkpoint.part(f"{name}/{window}"),
                                bar=bar,
                            )
        result = {"task": "compare", "factor": factor, "original": original, "curves": curves}
        rows = [("window", *(methods.LABELS.get(name, name) for name in specs))]
        for window in args.windows:
            found = [curves[name][str(window)]["perplexity"] for name in specs]
            rows.append((window, *(f"{value:.4g}" for value in found)))
        print(columns(rows, ">"))
        metrics = {
            f"{name}_{window}": (one["perplexity"], False)
            for name, curve in curves.items()
            for window, one in curve.items()
        }
        session.finish(result, metrics, len(documents))
        if args.plot:
            from . import plot

            plot.draw([result], [""], args.plot)
            print(f"Written: {args.plot}")
