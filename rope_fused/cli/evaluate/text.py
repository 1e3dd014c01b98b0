"""Tasks that read a text: perplexity in windows, and that of the tokens which need the context."""

from __future__ import annotations

from ..arguments import at_least
from .session import Session, add_common, errors_of


def _add_text(parser):
    parser.add_argument(
        "--text",
        required=True,
        nargs="+",
        metavar="FILE",
        help="UTF-8; several files are documents apart from one another",
    )
    parser.add_argument(
        "--window", type=at_least(2), required=True, metavar="N", help="tokens the model sees"
    )


class Perplexity:
    """Perplexity of a text in sliding windows."""

    @staticmethod
    def add_arguments(parser):
        add_common(parser, out="perplexity.json")
        _add_text(parser)
        parser.add_argument(
            "--stride",
            type=at_least(1),
            metavar="N",
            help="tokens from window to window (default: half a window)",
        )
        parser.add_argument(
            "--truncated",
            action="store_true",
            help="only the first window of each document, as in YaRN's published table",
        )

    @staticmethod
    def run(args):
        from ...context.perplexity import perplexity, truncated_perplexity

        stride = args.stride or max(1, args.window // 2)
        with errors_of():
            session = Session(args, args.window)
            documents = session.tokens(args.text)
            options = {"batch_size": args.batch}
            if args.truncated:
                long = [d for d in documents if d.numel() >= args.window]
                total = len(long) * (args.window - 1)
                settings = {"window": args.window, "variant": "truncated"}
            else:
                total = sum(d.numel() - 1 for d in documents)
                settings = {"window": args.window, "stride": stride, "variant": "sliding"}
            with session.running(total, "token", **settings) as (checkpoint, bar):
                options |= {"checkpoint": checkpoint, "bar": bar}
                if args.truncated:
                    result = truncated_perplexity(session.model, documents, args.window, **options)
                else:
                    result = perplexity(session.model, documents, args.window, stride, **options)
        metrics = {"token_perplexity": (result["perplexity"], False), "nll": (result["nll"], False)}
        session.finish(result, metrics, result["tokens"])


class KeyTokens:
    """Perplexity of the tokens that need a long context (LongPPL)."""

    @staticmethod
    def add_arguments(parser):
        add_common(parser, out="longppl.json")
        _add_text(parser)
        add = parser.add_argument
        add("--stride", type=at_least(1), metavar="N", help="default: half a window")
        add(
            "--short",
            type=at_least(2),
            metavar="N",
            help="tokens of the short window (default: an eighth of the window)",
        )
        add("--judge", metavar="DIR", help="the model that picks the tokens (default: --model)")
        add(
            "--gain",
            type=float,
            default=2.0,
            help="least gain by the context, in nats (default: 2)",
        )
        add("--floor", type=float, default=-2.0, help="least ln p with the context (default: -2)")

    @staticmethod
    def run(args):
        from ...context import loading
        from ...context.long_perplexity import key_token_perplexity

        stride = args.stride or max(1, args.window // 2)
        short = args.short or max(2, args.window // 8)
        with errors_of():
            session = Session(args, args.window)
            documents = session.tokens(args.text)
            judge, judge_id = None, None
            if args.judge is not None:
                judge, reader = loading.load(
                    args.judge, dtype=session.model.dtype, device=session.model.device
                )
                if reader.get_vocab() != session.tokenizer.get_vocab():
                    raise ValueError("--judge must have the vocabulary of --model, got another")
                judge_id = loading.identity(args.judge)
            settings = {"window": args.window, "stride": stride, "short": short, "judge": judge_id}
            settings |= {"gain": args.gain, "floor": args.floor}
            total = sum(d.numel() - 1 for d in documents)
            with session.running(total, "token", **settings) as (checkpoint, bar):
                result = key_token_perplexity(
                    session.model,
                    documents,
                    args.window,
                    stride,
                    short=short,
                    judge=judge,
                    gain=args.gain,
                    floor=args.floor,
                    batch_size=args.batch,
                    checkpoint=checkpoint,
                    bar=bar,
                )
        metrics = {"longppl": (result["perplexity"], False)}
        session.finish(result, metrics, result["key_tokens"])
