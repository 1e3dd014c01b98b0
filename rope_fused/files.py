"""Writing a file in one step, so that it is always whole; links, pipes and devices stay."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path


def writable(file) -> Path:
    """``file``, if it is something that :func:`replacing` can write to, or nothing yet.

    Raises:
        IsADirectoryError: it is a folder.
        OSError: it is a socket or a disk, a link in a circle, or below something that is no folder.
    """
    file = Path(file)
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return file
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{file} is a folder, not a file")
    if not (stat.S_ISREG(mode) or _is_pipe(mode)):
        raise OSError(f"{file} is neither a file nor a pipe")
    return file


def is_stream(file) -> bool:
    """Whether ``file`` is a pipe, a terminal or the like, or where this process prints to."""
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return False
    return _is_pipe(mode) or _descriptor(file) is not None


def beside(file, ending: str) -> Path | None:
    """The path of something that goes with ``file``: its name and ``ending``.

    None with a stream: what lies in the folder of a device is nobody's result.
    """
    return None if is_stream(file) else Path(f"{file}{ending}")


@contextlib.contextmanager
def replacing(file, *, shared=False):
    """A path to write to, which takes the place of ``file`` where the block ends without an error.

    So ``file`` holds at any moment the old content or the new, in full; of a link, what it leads to
    does. A pipe or a device is not replaced: it gets the content in the end. What a kill leaves at
    the path is written over the next time.

    Args:
        file: its folder is made if there is none.
        shared: other processes may write it at the same time; one of them comes last.

    Raises:
        OSError: as :func:`writable`, before the block.
    """
    if is_stream(writable(file)):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, Path(file).name)
            yield temporary
            _pour(temporary, file)
        return
    file = Path(os.path.realpath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".writing-{f'{os.getpid()}-' if shared else ''}{file.name}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def _is_pipe(mode):
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _descriptor(file):
    """1 or 2 where ``file``, /dev/stdout say, is what this process prints to."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(file), os.fstat(descriptor)):
                return descriptor
    return None


def _pour(source, stream):
    # Standard output goes on where it is: opened by its name, a file begins anew.
    descriptor = _descriptor(stream)
    if descriptor is not None:
        (sys.stdout if descriptor == 1 else sys.stderr).flush()
    target = os.open(stream, os.O_WRONLY) if descriptor is None else os.dup(descriptor)
    with open(source, "rb") as written, open(target, "wb") as out:
        shutil.copyfileobj(written, out)
