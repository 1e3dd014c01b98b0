"""A case's rounds shared out over processes of its own.

Where torch's allocator finds memory differs from process to process, and with it the page faults
that a call meets: rounds of one process have that in common, however many they are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection

import torch

from . import baselines, harness
from .harness import Case, Measured, Outcome, Timing


class Died(Exception):
    """A process ended without a result."""


def run(case: Case, *, quick=False, only=None) -> dict[str, Outcome]:
    """As :func:`harness.run`, in as many processes as the case is to have; quick: in this one.

    Raises:
        Refused: a variant of ours failed its check.
        Died: a process was killed; memory may have run out.
    """
    if quick or case.processes == 1:
        return harness.run(case, quick=quick, only=only)
    parts = [_elsewhere(case, only) for _ in range(case.processes)]
    return {name: _together(case, [part[name] for part in parts]) for name in parts[0]}


def _together(case, outcomes):
    """What was measured in all of them; else why it was not."""
    for outcome in outcomes:
        if not isinstance(outcome, Measured):
            return outcome
    blocks = [block for outcome in outcomes for block in outcome.timing.blocks]
    peak = max(outcome.peak_bytes for outcome in outcomes)
    timing = Timing(tuple(blocks), case.least)
    return outcomes[0]._replace(timing=timing, peak_bytes=peak)


def _elsewhere(case, only):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, case, only, torch.get_num_threads())
    process = context.Process(target=_measure, args=arguments, daemon=True)
    # Inherited: Ctrl-C is for this process, which ends the other.
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, heard)
    theirs.close()  # the child's copy is now the last one: should it die, ours is at its end
    try:
        outcome = ours.recv()
    except EOFError:
        process.join()
        raise Died(f"its process ended with status {process.exitcode}") from None
    finally:
        ours.close()
        process.kill()
        process.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _measure(answers: connection.Connection, case, only, threads):
    """In the process: send the outcomes, or what was raised."""
    multiprocessing.set_start_method(None, force=True)  # as in a process that nobody spawned
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    baselines.quiet()
    torch.set_num_threads(threads)
    try:
        outcome = harness.run(case, only=only)
    except Exception as error:
        outcome = error
    answers.send(outcome)


def _end_with_the_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
