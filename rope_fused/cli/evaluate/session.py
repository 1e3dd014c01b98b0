"""One evaluation: model, checkpoint and result file; what it writes and what it prints."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from ... import __version__
from ...files import beside
from ...report import UserError
from ..arguments import add_model, model_settings, open_model, out_file, require

_TOKENS_PER_CALL = 16384


def add_common(parser, *, out="result.json"):
    """Options of every task that runs a model."""
    add_model(parser, batch=None)
    parser.add_argument(
        "--out",
        type=out_file,
        default=out,
        metavar="FILE",
        help="the result, as JSON (default: %(default)s); FILE.partial holds an unfinished run",
    )


class Session:
    """The model of a command line, and its run's settings, checkpoint and result.

    ``settings`` are what the result depends on: they guard the checkpoint and are written down.
    ``longest``: tokens of the longest sequence to come.
    """

    def __init__(self, args, longest):
        args.batch = args.batch or max(1, _TOKENS_PER_CALL // longest)
        require("evaluate", "context", "transformers", "tqdm")
        self.args = args
        self.model, self.tokenizer = open_model(args)
        self.settings = {"command": f"evaluate {args.task}", "rope_fused": __version__}
        self.settings |= model_settings(args, self.model)

    def read_text(self, file):
        """A text file, and a note of its contents in the settings."""
        from ...context.progress import fingerprint

        text = read_text(file)
        self.settings.setdefault("text", []).append(fingerprint(text))
        return text

    def tokens(self, files):
        """Each file as token ids."""
        from ...context.loading import encode

        with errors_of("--tokenizer"):
            return [encode(self.tokenizer, self.read_text(file), self.model) for file in files]

    @contextlib.contextmanager
    def running(self, total, unit, **settings):
        """(checkpoint, progress bar) for a run with these further settings."""
        from ...context.progress import Checkpoint, bar

        self.settings |= settings
        self.checkpoint = Checkpoint(beside(self.args.out, ".partial"), self.settings)
        with bar(total, self.args.task, unit) as progress:
            yield self.checkpoint, progress

    def finish(self, result, metrics, samples):
        """Write the result, forget the checkpoint, and print the numbers in one line.

        metrics  {name: (value, whether higher is better)}, for lm-evaluation-harness's schema
        """
        from ...context.progress import write_json
        from ...context.schema import harness_results

        task = self.args.task if self.args.task != "ruler" else "ruler_style"
        harness = harness_results(f"rope_fused_{task}", metrics, samples, self.settings)
        write_json(self.args.out, result | {"settings": self.settings} | harness)
        self.checkpoint.remove()
        shown = ", ".join(
            f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in result.items()
            if isinstance(value, float | int) and not isinstance(value, bool)
        )
        print(f"{self.args.task}: {shown}\nWritten: {self.args.out}")


def read_text(file) -> str:
    """A text file in UTF-8."""
    try:
        return Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text: {file} is not UTF-8 at byte {error.start}") from error


def read_json(file) -> dict:
    """A result file."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error


@contextlib.contextmanager
def errors_of(option=None):
    """Bad values, which the context modules name, become one line for the user."""
    import torch

    try:
        yield
    except ValueError as error:
        raise UserError(f"{option}: {error}" if option else str(error)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory, a smaller --batch may do: {error}") from error
