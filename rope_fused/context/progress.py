"""Long runs that can be killed: files that are always whole, checkpoints, bars with time left."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path

import torch

from ..files import replacing


class MismatchError(OSError):
    """A checkpoint on disk belongs to a run with other settings; the message says which differ."""


def write_json(file, value) -> None:
    """Write ``value`` to ``file``, which at any moment holds the old text or the new, in full.

    Floats keep every bit: JSON holds the shortest decimal number that reads back as the same
    float64.
    """
    with replacing(file) as path, open(path, "w", encoding="utf-8") as out:
        json.dump(value, out, indent=1)
        out.write("\n")


class Checkpoint:
    """The state of a run, kept in a file until the run is done.

    ::

        checkpoint = Checkpoint(f"{out}.partial", {"command": "search", "seed": 0, ...})
        state = checkpoint.state or {"generation": 0, ...}   # {} where nothing was kept
        while ...:
            ...
            checkpoint.save(state)                           # atomic: a kill leaves one before
        write_json(out, result)
        checkpoint.remove()

    Args:
        file: where the state is kept; None keeps it nowhere, for runs that need not resume.
        settings: everything the result depends on, as data that JSON can hold: a run resumes only
            where each of them is the same. See :func:`fingerprint` for files and tensors.

    Raises:
        MismatchError: ``file`` holds the state of other settings, or something else altogether.
    """

    SHARE = 0.05
    """Of the time of a run, at most that goes into writing: disks may take a second to be sure."""

    def __init__(self, file, settings: dict):
        self.file = None if file is None else Path(file)
        self.written, self.cost = -math.inf, 0.0  # when the last write ended, how long it took
        self.settings = json.loads(json.dumps(settings))  # as it reads back: tuples are lists
        self.state: dict = {}
        if self.file is None or not self.file.exists():
            return
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            theirs, state = kept["settings"], kept["state"]
        except (ValueError, KeyError, TypeError):
            raise MismatchError(
                f"{self.file} is no checkpoint of a run: remove it, or name another file"
            ) from None
        if theirs != self.settings:
            names = sorted({*theirs, *self.settings})
            differ = [n for n in names if theirs.get(n) != self.settings.get(n)]
            what = "; ".join(
                f"{n} was {_brief(theirs.get(n))}, is {_brief(self.settings.get(n))}"
                for n in differ
            )
            raise MismatchError(
                f"{self.file} is of another run ({what}): remove it, or name another file"
            )
        self.state = state

    def save(self, state: dict) -> None:
        """Keep ``state`` instead of what was kept before.

        In the file, too, if the last write is long enough ago for :attr:`SHARE`; the first save
        always writes.
        """
        self.state = state
        start = time.monotonic()
        if self.file is None or (start - self.written) * self.SHARE < self.cost:
            return
        write_json(self.file, {"settings": self.settings, "state": state})
        self.written = time.monotonic()
        self.cost = self.written - start

    def part(self, name: str) -> _Part:
        """A checkpoint of the same file for one of several runs, which ``name`` tells apart."""
        return _Part(self, name)

    def remove(self) -> None:
        """Forget the state: the run is done and its result written."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


@dataclasses.dataclass
class _Part:
    """The state of one of several runs that share a Checkpoint; for who saves, a Checkpoint."""

    whole: Checkpoint
    name: str

    @property
    def state(self) -> dict:
        return self.whole.state.get(self.name, {})

    def save(self, state: dict) -> None:
        self.whole.save(self.whole.state | {self.name: state})


def fingerprint(*parts) -> str:
    """16 hex digits that stand for ``parts``: bytes, strings, tensors, or data that JSON can hold.

    Tensors count with dtype, shape and every bit.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            held = part.detach().cpu().contiguous()
            digest.update(f"{held.dtype}{tuple(held.shape)}".encode())
            digest.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, bytes | bytearray):
            digest.update(part)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def bar(total, description, unit, initial=0):
    """A progress bar on stderr, with the time left; nothing where stderr is no terminal.

    Returns:
        tqdm's bar: ``update(n)``, ``set_postfix(...)``, a context manager.
    """
    from tqdm import tqdm

    return tqdm(
        total=total, desc=description, unit=unit, initial=initial, disable=None, dynamic_ncols=True
    )


def _brief(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
