"""Say what a model's configuration means for its rotary embedding, pair by pair.

Prints a table and draws a picture: wavelengths, factors, what is extrapolated, interpolated or in
the ramp, the attention factor, the error of float32 angles, and how other software reads the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ... import __version__, configs, report
from ...spec import RopeSpec
from ..arguments import out_picture, require
from . import numbers, table

_FILES = ("config.json", "params.json")
_PAIRS = {None: None, "half": False, "interleaved": True}
_METHODS = ("default", "linear", "ntk", "dynamic", "ntk_by_parts", "llama3", "yarn")
_OUT = "inspect.png"


def _length(text):
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_arguments(parser):
    parser.add_argument(
        "config", help="config.json, Mistral's params.json, or a folder with one", type=Path
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="OTHER",
        help="other configurations, or methods for this model: "
        f"{', '.join(_METHODS)}, or one with its factor, such as yarn:8",
    )
    parser.add_argument("--layer-type", help="one kind of layer alone", metavar="NAME")
    parser.add_argument(
        "--seq-len",
        type=_length,
        metavar="N",
        help="the length that makes a dynamic method's table",
    )
    parser.add_argument(
        "--pairs",
        choices=("half", "interleaved"),
        help="how an unknown model pairs dimensions: (j, j + rotary_dim / 2) or (2 j, 2 j + 1)",
    )
    parser.add_argument(
        "--out",
        type=out_picture,
        metavar="FILE",
        help=f"gets the picture, in the format of its suffix (default: {_OUT}; with --json none)",
    )
    parser.add_argument(
        "--decay",
        type=out_picture,
        metavar="FILE",
        help="gets attention score against distance, a picture",
    )
    parser.add_argument(
        "--rotation",
        type=out_picture,
        metavar="FILE",
        help="gets the turns of each pair over the window, and what training covered",
    )


def run(args):
    config = _read(args.config)
    model_type, specs = _specs(args.config, config, args.layer_type, args.pairs)
    mistral = "model_type" not in config
    described = {
        kind: numbers.numbers(spec, model_type, args.seq_len, mistral=mistral)
        for kind, spec in specs.items()
    }
    compared, others = {}, {}
    for other in args.compare:
        compared |= _others(other, next(iter(specs.values())), args.pairs)
    for name, spec in compared.items():
        others[name] = numbers.numbers(spec, None, args.seq_len)
        del others[name]["readers"]  # nobody else reads a file that is not there
    title = str(args.config)
    if args.json:
        print(
            json.dumps(_document(title, model_type, described, others), indent=1, allow_nan=False)
        )
    elif others:
        print(table.compared(title, {**_labelled(described), **others}))
    else:
        parts = (
            table.text(f"{title}, {kind}" if kind else title, n) for kind, n in described.items()
        )
        print("\n\n\n".join(parts))
    if args.out is not None or not args.json:
        _draw(args, _labelled(described), others)
    if args.decay is not None or args.rotation is not None:
        _draw_window(args, _labelled(specs), compared)


def _labelled(described) -> dict:
    """{how a picture or a column names it: numbers, or spec}."""
    return {kind or "this model": n for kind, n in described.items()}


def _document(title, model_type, described, others) -> dict:
    """The JSON: the numbers at the top, or under layer_types where layers rotate differently."""
    document = {"rope_fused": __version__, "config": title, "model_type": model_type}
    if len(described) == 1:
        document |= next(iter(described.values()))
    else:
        document["layer_types"] = described
    if others:
        document["compare"] = others
    return document


def _draw(args, own, others):
    try:
        from . import picture
    except ImportError as error:
        message = f"needs matplotlib ({error}): pip install 'rope_fused[demo]'"
        if args.out is not None:
            raise report.UserError(f"--out: {message}") from error
        print(f"\nNo picture: that {message}")
        return
    out = Path(_OUT) if args.out is None else args.out
    path = args.config.resolve()
    picture.draw(own, others, out, path.name if path.name not in _FILES else path.parent.name)
    if not args.json:
        print(f"\nWritten: {out}")


def _draw_window(args, own, others):
    require("the picture", "demo", "matplotlib")
    from ...context import pictures

    first = next(iter(own.values()))
    original, longest = numbers.lengths(first)
    length = args.seq_len or longest
    if length is None or length < 2:
        raise report.UserError(
            "--decay, --rotation: need --seq-len N, which the file does not tell"
        )
    if args.decay is not None:
        pictures.decay(own | others, args.decay, length=length)
    if args.rotation is not None:
        pictures.rotations(first, args.rotation, length=length, original=original)
    if not args.json:
        print(*(f"Written: {out}" for out in (args.decay, args.rotation) if out), sep="\n")


# ------------------------------------------------------------------------------ what is inspected


def _specs(path, config, layer_type, pairs) -> tuple[str | None, dict[str | None, RopeSpec]]:
    """(model_type, {kind of layer: spec}) of a file; {None: ...} where all layers are alike."""
    try:
        specs = configs.layer_specs(config, layer_type, interleaved=_PAIRS[pairs])
    except (ValueError, TypeError) as error:
        hint = "interleaved= be passed (and rotary_offset= and axes= unless they are 0 and 1)"
        raise report.UserError(f"{path}: {str(error).replace(hint, '--pairs be given')}") from error
    if len(set(specs.values())) == 1:
        specs = {layer_type: next(iter(specs.values()))}
    return configs.model_type(config), specs


def _read(path: Path):
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise report.UserError(f"{path} has neither {' nor '.join(_FILES)}")
        path = found[0]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise report.UserError(f"{path}: no such file or folder") from None
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise report.UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise report.UserError(f"{path} must hold an object, got {type(config).__name__}")
    return config


def _others(other: str, spec: RopeSpec, pairs) -> dict[str, RopeSpec]:
    """What one argument of --compare names: a file, or a method for the inspected model."""
    if Path(other).exists():
        _, found = _specs(other, _read(Path(other)), None, pairs)
        return {f"{other}, {kind}" if kind else other: theirs for kind, theirs in found.items()}
    method, _, factor = other.partition(":")
    if method not in _METHODS:
        raise report.UserError(
            f"--compare: {other} is neither a file or folder nor one of {', '.join(_METHODS)}"
        )
    try:
        return {other: _extended(spec, method, factor)}
    except ValueError as error:
        raise report.UserError(f"--compare: {other}: {error}") from error


def _extended(spec: RopeSpec, method: str, factor: str) -> RopeSpec:
    """The model of ``spec``, its window extended by another method, with its usual parameters."""
    original, longest = numbers.lengths(spec)
    own, given = dict(spec.parameters).get("factor"), {}
    if original is None and longest and own:  # linear and ntk do not tell
        original = longest / own
    if method != "default":
        if not factor and original and longest and longest > original:
            factor = longest / original
        factor = factor or own
        if not factor:
            raise ValueError(f"needs a factor, as in {method}:4")
        given["factor"] = float(factor)
    if method in ("ntk_by_parts", "llama3", "yarn", "dynamic") and original is None:
        raise ValueError("needs a configuration that gives max_position_embeddings")
    if method in ("ntk_by_parts", "llama3", "yarn"):
        given["original_max_position_embeddings"] = original
    if method == "llama3":
        given |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if method == "dynamic":
        given["max_position_embeddings"] = original
    return RopeSpec(
        method,
        spec.head_dim,
        spec.rotary_dim,
        spec.rope_theta,
        tuple(given.items()),
        interleaved=spec.interleaved,
        rotary_offset=spec.rotary_offset,
        axis_map=spec.axis_map,
        max_position_embeddings=original,
    )
