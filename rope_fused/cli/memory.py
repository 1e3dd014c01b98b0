"""The most memory that a call holds at once, as torch's CPU allocator sees it."""

from __future__ import annotations

import contextlib
import os
import sys

import torch

from ..dispatch import native


def peak(function) -> int:
    """The most bytes that torch's CPU allocator had lent at one time while ``function`` ran."""
    function()  # what is made once and kept is not the function's own
    cpu = [torch.profiler.ProfilerActivity.CPU]
    allocator = native.torch_allocates() if native else contextlib.nullcontext()
    with (
        allocator,
        _without_stderr(),
        torch.profiler.profile(activities=cpu, profile_memory=True) as profile,
    ):
        held = function()
    del held
    # torch shows the sum of an operator's requests, but their order only here.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@contextlib.contextmanager
def _without_stderr():
    """Drop what native code writes to stderr: the profiler tells there when it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
