"""Measure a context window: perplexity, passkey, needle, RULER-style tasks, and their pictures.

Any causal language model of transformers in a local folder, and any text. Long runs keep their
state beside the result and go on from there when they are started again.
"""

from __future__ import annotations

from . import compare, plot, retrieval, text

_TASKS = {
    "perplexity": text.Perplexity,
    "longppl": text.KeyTokens,
    "passkey": retrieval.Passkey,
    "needle": retrieval.Needle,
    "ruler": retrieval.Ruler,
    "compare": compare.Compare,
    "plot": plot.Plot,
    "harness": plot.Harness,
}


def add_arguments(parser):
    tasks = parser.add_subparsers(dest="task", metavar="task", required=True)
    for name, task in _TASKS.items():
        summary = task.__doc__.splitlines()[0]
        sub = tasks.add_parser(name, help=summary.rstrip("."), description=summary)
        task.add_arguments(sub)


def run(args):
    _TASKS[args.task].run(args)
