"""Command line options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import importlib
import math
import os
from pathlib import Path

from ..files import writable
from ..report import UserError

_PICTURES = ("png", "pdf", "svg", "jpg", "jpeg", "webp", "tif", "tiff", "eps")


def at_least(least):
    """A type for whole numbers from ``least`` on."""

    def whole(text):
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return whole


def number(text) -> float:
    """A type for finite numbers from 0 on."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number from 0 on, got {text}")
    return value


def above_zero(text) -> float:
    """A type for finite numbers above 0."""
    if not (value := number(text)):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def listed(kind):
    """A type for values separated by commas; each is a ``kind``."""

    def values(text):
        found = [kind(part) for part in text.split(",") if part.strip()]
        if not found:
            raise argparse.ArgumentTypeError("must have at least one value, got none")
        return found

    values.__name__ = f"list of {kind.__name__}"  # argparse says "invalid ... value"
    return values


def out_file(text) -> Path:
    """A type for files to write, said no to before there is anything to write."""
    try:
        if text.endswith(os.sep):
            raise IsADirectoryError(f"{text} is a folder, not a file")
        return writable(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(_reason(error)) from error


def out_picture(text) -> Path:
    """A type for pictures to write, in the format of the suffix; without one, a PNG."""
    found = out_file(text)
    if found.suffix and found.suffix[1:].lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(
            f"must end in one of {', '.join(f'.{name}' for name in _PICTURES)}, got {text}"
        )
    return found


def out_folder(text) -> Path:
    """A type for folders to write into, which may not be there yet."""
    if (found := Path(text)).exists() and not found.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    return found


def _reason(error):
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def require(what, extra, *names):
    """Import the packages ``names``, or say which ``rope_fused[extra]`` the command needs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"{what} needs {name} ({error}): pip install 'rope_fused[{extra}]'"
            ) from error


def process() -> tuple[int, int]:
    """(rank, processes) under torchrun, where each takes a GPU of its own; (0, 1) elsewhere."""
    import torch

    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def chosen_device(name) -> str:
    """``name``, or a GPU if there is one; a UserError where torch cannot compute."""
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without
        raise UserError(f"--device {device}: {error}") from error
    return device


def add_model(parser, batch=8):
    """Options for a checkpoint and how it runs; :func:`open_model` reads them.

    ``batch``: the default of --batch; None where the command fits it to the length of sequences.
    """
    add = parser.add_argument
    add(
        "--model", required=True, metavar="DIR", help="a checkpoint of transformers, in safetensors"
    )
    add(
        "--tokenizer",
        metavar="DIR",
        help="where the tokenizer is, if not with the model; 'bytes' for a model that reads bytes",
    )
    add(
        "--rope",
        metavar="JSON",
        help="a rope_parameters block of transformers, or a file of one, instead of the model's",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
        default="auto",
        help="of weights and activations (default: as saved)",
    )
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    usual = "%(default)s" if batch else "what makes 16384 tokens"
    add(
        "--batch",
        type=at_least(1),
        default=batch,
        metavar="N",
        help=f"sequences per call of the model (default: {usual})",
    )
    add("--patch", action="store_true", help="run the model through rope_fused.patch")


def open_model(args):
    """(model, tokenizer) of the options of :func:`add_model`; what is wrong is a UserError."""
    import torch
    import transformers

    from .. import patch
    from ..context import loading

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = chosen_device(args.device)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        rope = None if args.rope is None else loading.read_rope(args.rope)
        model, tokenizer = loading.load(
            args.model, rope=rope, tokenizer=args.tokenizer, dtype=dtype, device=device
        )
    except ValueError as error:
        raise UserError(f"--rope: {error}") from error
    except RuntimeError as error:
        raise UserError(f"--device {device}: {error}") from error
    if args.patch:
        report = patch(model)
        left = [name for name, level in report.levels.items() if level is None]
        if left:
            where = f"{type(model).__name__} {left[0]}".rstrip()
            raise UserError(f"--patch leaves {where} alone: {report.reasons[left[0]]}")
    return model, tokenizer


def model_settings(args, model) -> dict:
    """What of the options of :func:`add_model` decides a result, for a Checkpoint and a result.

    Folders count by their contents (:func:`rope_fused.context.loading.identity`), not by name.
    """
    import torch
    import transformers

    from ..context import loading

    tokenizer = args.tokenizer or args.model
    return {
        "model": loading.identity(args.model),
        "tokenizer": "bytes" if args.tokenizer == "bytes" else loading.identity(tokenizer),
        "rope_parameters": getattr(model.config.get_text_config(), "rope_parameters", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch": args.batch,
        "patch": args.patch,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
