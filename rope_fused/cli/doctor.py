"""Say what is installed and which backends work; --model: whether a model rotates as it should."""

import json
from pathlib import Path

from .. import __version__, report

_PURE = """
Nothing is compiled: every call runs through the reference, which is correct, computes in float64
and is slow. Installing rope_fused again with a C++ compiler, and without ROPE_FUSED_PURE, brings
the kernels."""


def add_arguments(parser):
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="examine this model instead: a folder as save_pretrained writes it, with safetensors; "
        "no code in it is run",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="with --model: perplexity of its end, at two context lengths"
    )
    parser.add_argument(
        "--lengths",
        metavar="A,B",
        help="with --text: these lengths, in tokens (default: the original length of the model, "
        "and the one it is extended to)",
    )


def run(args):
    if args.model is None:
        for name in ("text", "lengths"):
            if getattr(args, name) is not None:
                raise report.UserError(f"--{name} needs --model")
        print(json.dumps(facts(), indent=2) if args.json else text(facts()))
        return
    found = examine(args.model, args.text, args.lengths)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)


def examine(folder, text=None, lengths=None):
    """The DoctorReport of the model in a folder."""
    if text is None and lengths is not None:
        raise report.UserError("--lengths needs --text")
    if lengths is not None:
        try:
            short, long = (int(length) for length in lengths.split(","))
        except ValueError:
            raise report.UserError(f"--lengths must be two numbers A,B, got {lengths!r}") from None
        lengths = short, long
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise report.UserError(f"there is no config.json in {folder}")
    if not any(folder.glob("*.safetensors")):
        raise report.UserError(f"there are no safetensors in {folder}; other formats can run code")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise report.UserError("transformers is not installed") from None
    from ..context.loading import UNREADABLE
    from ..integrations.doctor import doctor

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = json.loads(file.read_text())
        model = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, dtype="auto", **options
        )
        ids = None
        if text is not None:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            ids = tokenizer(Path(text).read_text(), return_tensors="pt").input_ids[0]
    except UNREADABLE as error:
        raise report.UserError(f"{folder} cannot be loaded: {error}") from error
    try:
        return doctor(model, ids, config=config, lengths=lengths)
    except ValueError as error:
        raise report.UserError(str(error)) from error


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
