"""What the search changes: factors per pair and a temperature; how they vary, as pure functions.

LongRoPE (Ding et al., arXiv:2402.13753, section 3.2 and algorithm 1) divides the frequency of every
pair by a factor of its own, lambda_i, which does not fall from one pair to the next, and leaves the
first n-hat tokens alone. LongRoPE2 (Shang et al., arXiv:2502.20082, algorithms 1 and 2) searches
only from a critical pair upwards; the pairs below follow by NTK scaling.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from random import Random

from ..spec import RopeSpec

# LongRoPE's candidates for n-hat, the number of first tokens that turn as before.
N_STARTS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
_TEMPERATURE_STEP = 0.005


@dataclasses.dataclass(frozen=True)
class Genome:
    """One candidate: inv_freq_i = rope_theta ** (-2 i / D) / factors[i], and what goes with it.

    factors      lambda of every pair, non-decreasing
    temperature  the attention factor: multiplies cos and sin of q and of k
    n_start      tokens at positions below it turn with the original frequencies (n-hat)
    critical     LongRoPE2's critical pair; None where every pair is free
    """

    factors: tuple[float, ...]
    temperature: float
    n_start: int = 0
    critical: int | None = None

    def as_json(self) -> dict:
        """As data that JSON can hold; :meth:`from_json` reads it back, every bit."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data) -> Genome:
        """The genome that :meth:`as_json` wrote."""
        return cls(**{**data, "factors": tuple(data["factors"])})


@dataclasses.dataclass(frozen=True)
class Space:
    """The model's rotary embedding, the extension asked for, and what may vary.

    base          the plain spec that the model was trained with
    original      tokens it was trained to read
    factor        s: how much longer the window shall be
    largest       of any factor; None: 1.25 s, LongRoPE's (with ``critical``: 2 s, LongRoPE2's)
    step          factors are drawn from multiples of it
    n_starts      n-hat is one of these
    temperature   that of every candidate: a number, "yarn" (0.1 ln s + 1) or "su" (sqrt(1 + ln s /
                  ln original)); "search": it varies too. YaRN itself always has its own.
    critical      vary the pairs from a critical one upwards only, between s and 2 s (LongRoPE2)
    """

    base: RopeSpec
    original: int
    factor: float
    largest: float | None = None
    step: float = 0.01
    n_starts: tuple[int, ...] = (0,)
    temperature: float | str = "yarn"
    critical: bool = False

    def __post_init__(self):
        if not self.factor > 1:
            raise ValueError(f"factor must be > 1, got {self.factor!r}")
        if self.largest is None:
            largest = self.factor * (2.0 if self.critical else 1.25)
            object.__setattr__(self, "largest", largest)
        if self.largest < self.factor:
            raise ValueError(f"largest must be >= factor {self.factor}, got {self.largest!r}")
        if not self.n_starts or any(n < 0 for n in self.n_starts):
            raise ValueError(f"n_starts must be numbers >= 0, got {self.n_starts!r}")
        policies = ("yarn", "su", "search")
        if isinstance(self.temperature, str) and self.temperature not in policies:
            raise ValueError(
                f"temperature must be a number or one of {policies}, got {self.temperature!r}"
            )

    @property
    def pairs(self) -> int:
        """The number of factors."""
        return self.base.rotary_dim // 2

    @property
    def start_temperature(self) -> float:
        """The attention factor of the first candidates."""
        s = self.factor
        if self.temperature == "su":
            return math.sqrt(1 + math.log(s) / math.log(self.original))
        if isinstance(self.temperature, str):
            return 0.1 * math.log(s) + 1
        return float(self.temperature)

    def critical_pair(self, periods: float = 1.0) -> int:
        """The first pair that does not turn ``periods`` times within the original window.

        ceil(D / 2 log_theta(L / (2 pi periods))): LongRoPE2's theoretical critical dimension.
        """
        turns = self.original / (2 * math.pi * periods)
        found = math.ceil(self.pairs * math.log(turns) / math.log(self.base.rope_theta))
        return min(max(found, 1), self.pairs - 1)

    def seeds(self) -> dict[str, Genome]:
        """YaRN with its temperature, NTK and position interpolation, as genomes."""
        original = {"original_max_position_embeddings": self.original}
        shape = {"head_dim": self.base.rotary_dim, "rope_theta": self.base.rope_theta}
        yarn = RopeSpec.yarn(factor=self.factor, **original, **shape)
        ntk = RopeSpec.ntk(factor=self.factor, **shape)
        plain = RopeSpec.default(**shape).inv_freq()
        factors = {
            "yarn": (plain / yarn.inv_freq()).tolist(),
            "ntk": (plain / ntk.inv_freq()).tolist(),
            "pi": [self.factor] * self.pairs,
        }
        temperatures = {"yarn": yarn.attention_factor}
        # A quotient may be an ulp below the one before it.
        return {
            name: Genome(
                tuple(itertools.accumulate(row, max)),
                temperatures.get(name, self.start_temperature),
            )
            for name, row in factors.items()
        }

    def block(self, genome: Genome) -> dict:
        """The ``rope_parameters`` of transformers that mean ``genome`` past the original window.

        Up to that window the frequencies are the original ones, as with LongRoPE's models. What
        the format cannot say, n-hat, must be 0.
        """
        if genome.n_start:
            raise ValueError(f"n_start must be 0 in rope_parameters, got {genome.n_start}")
        block = {
            "rope_type": "longrope",
            "rope_theta": self.base.rope_theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original,
            "short_factor": [1.0] * self.pairs,
            "long_factor": list(genome.factors),
            "attention_factor": genome.temperature,
        }
        if self.base.rotary_dim != self.base.head_dim:
            block["partial_rotary_factor"] = self.base.rotary_dim / self.base.head_dim
        return block

    def spec(self, genome: Genome) -> RopeSpec:
        """The RopeSpec of ``genome``."""
        return dataclasses.replace(
            self.base,
            rope_type="longrope",
            parameters=tuple(
                {
                    "short_factor": (1.0,) * self.pairs,
                    "long_factor": genome.factors,
                    "original_max_position_embeddings": self.original,
                    "factor": self.factor,
                    "attention_factor": genome.temperature,
                    "n_start": genome.n_start,
                }.items()
            ),
            hf_parameters=(),
            notes=(),
        )


# -- operators -----------------------------------------------------------------------------------


def mutate(genome: Genome, space: Space, rng: Random, probability: float = 0.3) -> Genome:
    """``genome`` with each gene redrawn with ``probability``; the factors stay in order.

    A factor moves to a random multiple of ``space.step`` between its neighbours, the first one from
    1, the last one up to ``space.largest``. At least one gene is redrawn.
    """
    if space.critical:
        genome = _from_critical(genome, space)
    first = genome.critical or 0
    least = space.factor if space.critical else 1.0
    factors = list(genome.factors)
    free = range(first, space.pairs)
    chosen = [i for i in free if rng.random() < probability] or [rng.choice(free)]
    rng.shuffle(chosen)  # a factor has to leave room before its neighbour can move
    for i in chosen:
        low = factors[i - 1] if i > first else least
        high = factors[i + 1] if i + 1 < space.pairs else space.largest
        factors[i] = _between(low, high, space.step, rng)
    changes = {"factors": tuple(factors)}
    if rng.random() < probability:
        changes["n_start"] = rng.choice(space.n_starts)
    if space.temperature == "search" and rng.random() < probability:
        steps = rng.choice([n for n in range(-10, 11) if n])
        moved = round(genome.temperature / _TEMPERATURE_STEP + steps) * _TEMPERATURE_STEP
        changes["temperature"] = round(max(moved, _TEMPERATURE_STEP), 6)
    child = dataclasses.replace(genome, **changes)
    return _from_critical(child, space) if space.critical else child


def cross(one: Genome, other: Genome, space: Space, rng: Random) -> Genome:
    """A child that has each gene from either parent; its factors are then put in order.

    (The released code of LongRoPE stops at the first gene that gives a valid child.)
    """
    if space.critical:
        one, other = _from_critical(one, space), _from_critical(other, space)
    first, second = ((one, other), (other, one))[rng.random() < 0.5]
    factors = [rng.choice(pair) for pair in zip(one.factors, other.factors, strict=True)]
    child = Genome(
        tuple(sorted(factors)),
        first.temperature,
        second.n_start,
        rng.choice((one, other)).critical,
    )
    return _from_critical(child, space) if space.critical else child


def first_generation(space: Space, size: int, rng: Random, extra=()) -> list[Genome]:
    """``extra``, then YaRN, NTK and position interpolation, then mutations of them all.

    With ``space.critical`` the mutations are of LongRoPE2's initial candidates: for every critical
    pair from that of ten periods to that of one, a common factor from [s, 2 s] above it.
    """
    seeds = [*extra, *space.seeds().values()]
    found = dict.fromkeys(seeds[:size])
    sources = seeds
    if space.critical:
        highest = space.critical_pair()
        sources = [
            _ntk_below((rng.uniform(space.factor, space.largest),) * space.pairs, pair, space)
            for pair in range(min(space.critical_pair(10), highest), highest + 1)
        ]
        found.update(dict.fromkeys(sources[: max(0, size - len(found))]))
    return fill(found, size, lambda n: mutate(sources[n % len(sources)], space, rng))


def fill(found: dict, size: int, make, known=()) -> list[Genome]:
    """``found`` and new genomes of ``make(n)``, up to ``size``, all different from ``known``.

    Fewer where a small space has no more to give.
    """
    for n in range(50 * size):
        if len(found) >= size:
            break
        child = make(n)
        if child not in found and child not in known:
            found[child] = None
    return list(found)


def _between(low, high, step, rng):
    """A random multiple of ``step`` in [low, high]; ``low`` or ``high`` where there is none."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if first > last:
        return rng.choice((low, high))
    return min(max(round(rng.randint(first, last) * step, 10), low), high)


def _from_critical(genome, space):
    """``genome`` as LongRoPE2 has it: above the critical pair [s, 2 s], NTK scaling below."""
    pair = space.critical_pair() if genome.critical is None else genome.critical
    clipped = tuple(min(max(x, space.factor), space.largest) for x in genome.factors)
    return _ntk_below(clipped, pair, space, genome)


def _ntk_below(factors, pair, space, genome=None):
    # The base that gives pair its factor gives every pair below it factors[pair] ** (i / pair).
    below = tuple(factors[pair] ** (i / pair) for i in range(pair))
    genome = genome or Genome((), space.start_temperature)
    return dataclasses.replace(genome, factors=below + factors[pair:], critical=pair)
