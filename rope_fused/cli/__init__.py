"""The command rope-fused: a subcommand is a module of this package with add_arguments and run.

The first line of the module's docstring is its help. ``run(args)`` returns when the work is done,
and raises :class:`rope_fused.report.UserError` when it cannot be; it is the one that imports what
takes long to import.
"""

from __future__ import annotations

import argparse
import sys

from .. import __version__, interrupt
from ..report import UserError
from . import bench, demo, doctor, evaluate, extend, inspect, lab, search, tune

COMMANDS = {
    "bench": bench,
    "demo": demo,
    "doctor": doctor,
    "inspect": inspect,
    "evaluate": evaluate,
    "tune": tune,
    "search": search,
    "extend": extend,
    "lab": lab,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv=None) -> int:
    """Run a command line; return the exit status, which is 0 only when everything was done."""
    parser = _Parser(
        prog="rope-fused",
        description="Rotary position embedding, fused into the QK projection.",
    )
    parser.add_argument("--version", action="version", version=f"rope_fused {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0].rstrip(".")
        command = commands.add_parser(name, help=summary, description=f"{summary}.")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        interrupt.disarm()
        args.run(args)
    except (UserError, OSError) as error:
        print(f"rope-fused {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rope-fused {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0
