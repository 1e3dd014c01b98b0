"""Interleaved timing: the variants of a case run in turn, in both orders, once they agree."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

TOLERANCE = (
    0.03  # how far the medians of the two orders may lie apart before a measurement is repeated
)
ATTEMPTS = 2
WARMUP = 2


class Variant(NamedTuple):
    """One way to do the work: `call` does it once, `check` raises if its result is wrong."""

    call: Callable[[], object]
    check: Callable[[object], None]


class Missing(NamedTuple):
    """A variant that cannot run here, and why."""

    reason: str


class Target(NamedTuple):
    """A ratio that we hold ourselves to: at most `must`, better `aim`; at least, for a speed-up."""

    impl: str
    other: str
    must: float
    aim: float
    speedup: bool = False

    def ratio(self, timings) -> float:
        """time of impl / time of other; for a speed-up the inverse."""
        ratio = timings[self.impl].seconds / timings[self.other].seconds
        return 1 / ratio if self.speedup else ratio

    def meets(self, ratio, bound) -> bool:
        return ratio >= bound if self.speedup else ratio <= bound


@dataclass(frozen=True, kw_only=True)
class Case:
    """Variants that do the same work on the same data. Subclasses name and build them."""

    op: str
    dtype: torch.dtype
    seqlen: int
    quick: bool = False  # belongs to the quick run

    rounds = 31
    blocks = 1  # of rounds; the time of a variant is the least of their medians
    limit = None  # the variant that sets the scale: a copy of the bytes, the bare product

    @property
    def shape(self) -> str:
        raise NotImplementedError

    @property
    def impls(self) -> tuple[str, ...]:
        """The names of all variants, whether or not they can run here."""
        raise NotImplementedError

    @property
    def targets(self) -> tuple[Target, ...]:
        return ()

    def build(self) -> dict[str, Variant | Missing]:
        """Data and variants, by name. Called with gradients enabled, used without."""
        raise NotImplementedError

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self):
        return f"{self.op} {self.shape} {self.dtype_name} seqlen {self.seqlen}"


@dataclass(frozen=True)
class Timing:
    """Seconds of each call, [block][round]; even rounds ran in one order, odd ones in the other."""

    blocks: tuple[tuple[float, ...], ...]

    @property
    def rounds(self) -> list[float]:
        return [seconds for block in self.blocks for seconds in block]

    @property
    def seconds(self) -> float:
        return min(map(statistics.median, self.blocks))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the block that `seconds` is the median of."""
        block = min(self.blocks, key=statistics.median)
        first, _, third = statistics.quantiles(block, n=4, method="inclusive")
        return first, third

    @property
    def disagreement(self) -> float:
        """How much longer one order took than the other."""
        orders = [min(statistics.median(b[start::2]) for b in self.blocks) for start in (0, 1)]
        return max(orders) / min(orders) - 1


def run(
    case: Case, quick: bool = False, timed: bool = True
) -> dict[str, Timing | Missing | Exception | None]:
    """Build a case, check every variant, time those that pass. None: passed, and not timed."""
    torch.manual_seed(0)
    outcomes, calls = {}, {}
    for name, variant in case.build().items():
        outcomes[name] = variant
        if isinstance(variant, Missing):
            continue
        try:
            with torch.no_grad():
                variant.check(variant.call())
        except Exception as error:  # a baseline that fails must not take the others with it
            outcomes[name] = error
        else:
            outcomes[name] = None
            calls[name] = variant.call
    if timed and calls:
        rounds, blocks = (7, 1) if quick else (case.rounds, case.blocks)
        outcomes |= race(calls, rounds, blocks, attempts=1 if quick else ATTEMPTS)
    return outcomes


def race(calls, rounds: int, blocks: int, attempts: int = ATTEMPTS) -> dict[str, Timing]:
    """Time the calls in turn. Of several attempts, the one whose two orders agree best."""
    best, least = {}, float("inf")
    for _ in range(attempts):
        timings = _race_once(calls, rounds, blocks)
        worst = max(timing.disagreement for timing in timings.values())
        if worst < least:
            best, least = timings, worst
        if least <= TOLERANCE:
            break
    return best


@torch.no_grad()
def _race_once(calls, rounds, blocks):
    names = list(calls)
    times = {name: [[] for _ in range(blocks)] for name in names}
    for name in names * WARMUP:
        calls[name]()
    gc.collect()
    gc.disable()
    try:
        for block in range(blocks):
            for i in range(rounds):
                # Everyone is first, and last, equally often.
                turn = i // 2 % len(names)
                order = names[turn:] + names[:turn]
                for name in reversed(order) if i % 2 else order:
                    times[name][block].append(_seconds(calls[name]))
    finally:
        gc.enable()
    return {name: Timing(tuple(map(tuple, lists))) for name, lists in times.items()}


def _seconds(call) -> float:
    start = time.perf_counter()
    result = call()
    stop = time.perf_counter()
    del result  # giving memory back is nobody's time
    return stop - start


# -- equal results -----------------------------------------------------------------------------


def sample_tokens(seqlen: int, count: int = 256) -> torch.Tensor:
    """Indices of evenly spread tokens, the first and the last among them."""
    return torch.linspace(0, seqlen - 1, min(seqlen, count), dtype=torch.float64).round().long()


def assert_rounded(actual, truth, roundings: int, beyond: float = 0.0) -> None:
    """actual is `truth` (float64) up to so many roundings to its own dtype, by root mean square.

    A rounding moves a number by at most u = eps / 2 of itself, up or down. Roundings that follow
    each other are independent, so their squares add up: sqrt(roundings) u of the root mean square,
    which neither rotations nor norms enlarge. `beyond`: further errors, relative to the same.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    budget = roundings**0.5 * torch.finfo(actual.dtype).eps / 2 + beyond
    error = ((actual.double() - truth).square().mean() / truth.square().mean()).sqrt().item()
    assert error <= budget, f"relative error {error:.3e} (root mean square), budget {budget:.3e}"


def assert_copied(actual, original) -> None:
    assert torch.equal(actual, original), "a copy differs from the original"
