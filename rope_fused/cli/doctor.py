"""Say what is installed here, which backends work and why the others do not."""

import json

from .. import __version__, report

_PURE = """
Nothing is compiled: every call runs through the reference, which is correct, computes in float64
and is slow. Installing rope_fused again with a C++ compiler, and without ROPE_FUSED_PURE, brings
the kernels."""


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args):
    print(json.dumps(facts(), indent=2) if args.json else text(facts()))


def facts() -> dict:
    """What is known about this installation."""
    return {"rope_fused": __version__, **report.facts()}


def text(facts) -> str:
    """The facts for people to read, and to put into a bug report."""
    general = {name: facts[name] for name in ("rope_fused", "python", "platform", "processor")}
    packages = {name: version or "not installed" for name, version in facts["packages"].items()}
    packages["torch"] += f", {facts['threads']} threads"
    kernels = facts["kernels"] or {"instruction_set": "none, not built"}
    environment = [
        (name, "not set" if entry["value"] is None else entry["value"], entry["meaning"])
        for name, entry in facts["environment"].items()
    ]
    sections = {
        "": general.items(),
        "packages": packages.items(),
        "C++ kernels": [(name.replace("_", " "), value) for name, value in kernels.items()],
        "backends": facts["backends"].items(),
        "environment": environment,
    }
    parts = [
        (f"{title}\n" if title else "") + report.columns(rows, indent=2 if title else 0)
        for title, rows in sections.items()
    ]
    return "\n\n".join(parts) + ("" if facts["kernels"] else f"\n{_PURE}")
