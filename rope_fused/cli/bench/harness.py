"""Interleaved timing: the variants of a case run in turn, in both orders, once they agree."""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import timers
from .shapes import Model

# How far the medians of the two orders may lie apart before a measurement is repeated.
TOLERANCE = 0.03
ATTEMPTS = 2
WARMUP = 2
OURS = "rope_fused"  # every variant of this package has a name that starts so


class Variant(NamedTuple):
    """One way to do the work.

    bind      takes a set of inputs and returns what does the work on it once: () -> result
    check     raises AssertionError if a result is wrong
    in_place  whether the work overwrites its inputs
    """

    bind: Callable[[object], Callable[[], object]]
    check: Callable[[object], None]
    in_place: bool = False


class Missing(NamedTuple):
    """A variant that cannot run here, and why."""

    reason: str


class Wrong(NamedTuple):
    """A variant of somebody else's that gives another result: not timed."""

    reason: str


class Failed(NamedTuple):
    """A variant of somebody else's that raises instead of giving a result."""

    reason: str


class Refused(Exception):
    """A variant of ours gives a wrong result: nothing of its case is timed."""


class Target(NamedTuple):
    """A ratio that we hold ourselves to: time of ``impl`` / time of ``other``, at most ``must``,
    better ``aim``; with ``speedup`` the inverse, at least."""

    impl: str
    other: str
    must: float
    aim: float
    speedup: bool = False

    def ratio(self, seconds) -> float:
        """From {variant: seconds}."""
        ratio = seconds[self.impl] / seconds[self.other]
        return 1 / ratio if self.speedup else ratio

    def meets(self, ratio, bound) -> bool:
        return ratio >= bound if self.speedup else ratio <= bound


@dataclass(frozen=True, kw_only=True)
class Case:
    """Variants that do the same work on the same data. Subclasses name, make and check them."""

    op: str
    model: Model
    dtype: torch.dtype = torch.bfloat16
    seqlen: int = 4096
    device: str = "cpu"
    warm: bool = False  # the same buffers in every call: what caches hold stays there
    autotune: bool = False  # torch.compile in its max-autotune mode too, on a GPU

    limit = None  # the variant that sets the scale: a copy of the bytes, the bare product
    least = False  # the time of a variant is the least of its processes' medians, not that of all
    autocapture = True  # whether a CUDA graph can hold the calls

    @property
    def processes(self) -> int:
        """How many share the rounds: on a GPU memory is everywhere the same."""
        return 3 if self.device == "cpu" else 1

    @property
    def rounds(self) -> int:
        return 31 if self.device == "cuda" or self.seqlen <= 16384 else 7

    @property
    def variant(self) -> str:
        """What sets this case apart from others of the same op and model, in words."""
        return "in cache" if self.warm else ""

    @property
    def targets(self) -> tuple[Target, ...]:
        return ()

    @property
    def set_bytes(self) -> int:
        """The bytes that one call reads and writes."""
        raise NotImplementedError

    @property
    def needs(self) -> int:
        """The bytes that measuring it holds at the same time, roughly."""
        raise NotImplementedError

    @property
    def effort(self) -> float:
        """How long it takes, in no particular unit: for the time left."""
        return 1.0 + self.set_bytes * self.rounds / 4e9

    def make(self):
        """One set of inputs."""
        raise NotImplementedError

    def variants(self, inputs) -> dict[str, Variant | Missing]:
        """By name; they are checked on ``inputs``. Called with gradients enabled."""
        raise NotImplementedError

    def cost(self, impl):
        """What the cost model (roofline.py) says of a variant, or None."""
        return None

    @property
    def compile_modes(self) -> dict[str, str | None]:
        """{variant: mode of torch.compile}."""
        modes = {"hf-compile": None}
        if self.autotune and self.device == "cuda":
            # Without CUDA graphs of its own: ours are captured around it.
            modes["hf-compile-max-autotune"] = "max-autotune-no-cudagraphs"
        return modes

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self):
        variant = f", {self.variant}" if self.variant else ""
        return f"{self.op} {self.model.name} {self.dtype_name} seqlen {self.seqlen}{variant}"


@dataclass(frozen=True)
class Timing:
    """Seconds of each call, [block][round]: a block is what one process measured. Even rounds ran
    in one order, odd ones in the other. ``least``: the time is the least of the blocks' medians,
    not the median of all rounds."""

    blocks: tuple[tuple[float, ...], ...]
    least: bool = False

    @property
    def rounds(self) -> list[float]:
        return [seconds for block in self.blocks for seconds in block]

    @property
    def medians(self) -> list[float]:
        """Of each block."""
        return list(map(statistics.median, self.blocks))

    @property
    def _decisive(self) -> list[float]:
        """The rounds whose median is the time."""
        return list(min(self.blocks, key=statistics.median)) if self.least else self.rounds

    @property
    def seconds(self) -> float:
        return statistics.median(self._decisive)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the rounds that ``seconds`` is the median of."""
        rounds = self._decisive
        if len(rounds) < 2:
            return rounds[0], rounds[0]
        first, _, third = statistics.quantiles(rounds, n=4, method="inclusive")
        return first, third

    @property
    def disagreement(self) -> float:
        """How much longer one order took than the other: the mean of the blocks."""
        pairs = [[statistics.median(b[i::2]) for i in (0, 1)] for b in self.blocks if len(b) > 1]
        if not pairs:
            return 0.0
        ratio = statistics.geometric_mean(odd / even for even, odd in pairs)
        return max(ratio, 1 / ratio) - 1


class Measured(NamedTuple):
    """What was measured of a variant."""

    timing: Timing
    method: str  # "wall", "events" or "graph": see timers.py
    sets: int  # of inputs, used in turn
    peak_bytes: int | None = None
    launches: int | None = None
    host_seconds: float | None = None


Outcome = Measured | Missing | Wrong | Failed | None  # None: checked and not timed


def run(case: Case, *, quick=False, timed=True, only=None) -> dict[str, Outcome]:
    """Make a case, check every variant, and time those that pass: a process's share of the rounds.

    Args: quick: 7 rounds, once. timed: False: check only. only: names of variants, others are left
        out; the limit stays.

    Raises:
        Refused: a variant of ours failed its check.
    """
    torch.manual_seed(0)
    inputs = case.make()
    outcomes: dict[str, Outcome] = {}
    usable: dict[str, Variant] = {}
    for name, variant in case.variants(inputs).items():
        if only and name not in only and name != case.limit:
            continue
        if isinstance(variant, Missing):
            outcomes[name] = variant
            continue
        try:
            own = copy.deepcopy(inputs) if variant.in_place else inputs
            call = variant.bind(own)
            with torch.no_grad():
                variant.check(call())
        except Exception as error:  # a baseline that fails must not take the others with it
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if name.startswith(OURS):
                raise Refused(f"{case}: {name}: {reason}") from error
            kind = Wrong if isinstance(error, AssertionError) else Failed
            outcomes[name] = kind(reason)
        else:
            outcomes[name] = None
            usable[name] = variant
    if timed and usable:
        outcomes |= _time(case, inputs, usable, quick)
    return outcomes


def _time(case, inputs, variants, quick):
    """{name: Measured} of the variants."""
    sets = 1 if case.warm else timers.sets(case.set_bytes, case.device)
    shared = [inputs, *(copy.deepcopy(inputs) for _ in range(sets - 1))]
    calls = {}
    for name, variant in variants.items():
        own = copy.deepcopy(shared) if variant.in_place else shared
        calls[name] = [variant.bind(one) for one in own]
    with torch.no_grad():
        peaks = {name: timers.peak(of_name[0], case.device) for name, of_name in calls.items()}
        with contextlib.ExitStack() as held:
            large = case.set_bytes > timers.LARGE
            method, measures = timers.timed(
                calls, case.device, capture=case.autocapture and not large, held=held
            )
            rounds = 7 if quick else -(-case.rounds // case.processes)
            timings = race(measures, rounds, attempts=1 if quick else ATTEMPTS)
        extras = {
            name: timers.launches_and_host(of_name, case.device) for name, of_name in calls.items()
        }
    return {
        name: Measured(timings[name], method, sets, peaks[name], *extras[name]) for name in calls
    }


def race(measures, rounds: int, attempts: int = ATTEMPTS) -> dict[str, Timing]:
    """Take turns: {name: () -> seconds of one call}. Of several attempts, the one whose two orders
    agree best."""
    best, least = {}, float("inf")
    for _ in range(attempts):
        timings = _race_once(measures, rounds)
        worst = max(timing.disagreement for timing in timings.values())
        if worst < least:
            best, least = timings, worst
        if least <= TOLERANCE:
            break
    return best


def _race_once(measures, rounds):
    names = list(measures)
    times = {name: [] for name in names}
    for name in names * WARMUP:
        measures[name]()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            # Everyone is first, and last, equally often.
            turn = i // 2 % len(names)
            order = names[turn:] + names[:turn]
            for name in reversed(order) if i % 2 else order:
                times[name].append(measures[name]())
    finally:
        gc.enable()
    return {name: Timing((tuple(rounds),)) for name, rounds in times.items()}


# -- equal results -----------------------------------------------------------------------------


def sample_tokens(seqlen: int, count: int = 256) -> torch.Tensor:
    """Indices of evenly spread tokens, the first and the last among them."""
    return torch.linspace(0, seqlen - 1, min(seqlen, count), dtype=torch.float64).round().long()


def relative_error(actual, truth) -> float:
    """Root mean square of the difference, relative to that of ``truth``, float64."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    return ((actual.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


def assert_rounded(actual, truth, roundings: int, beyond: float = 0.0) -> None:
    """actual is `truth` (float64) up to so many roundings to its own dtype, by root mean square.

    A rounding moves a number by at most u = eps / 2 of itself, up or down. Roundings that follow
    each other are independent, so their squares add up: sqrt(roundings) u of the root mean square,
    which neither rotations nor norms enlarge. `beyond`: further errors, relative to the same.
    """
    budget = roundings**0.5 * torch.finfo(actual.dtype).eps / 2 + beyond
    error = relative_error(actual, truth)
    assert error <= budget, f"relative error {error:.3e} (root mean square), budget {budget:.3e}"


def assert_copied(actual, original) -> None:
    assert torch.equal(actual, original), "a copy differs from the original"
