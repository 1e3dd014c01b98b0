"""LongRoPE's evolutionary search: generations that can be killed, on one process or on many."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from random import Random

import torch.distributed as dist

from .genome import Genome, Space, cross, fill, first_generation, mutate
from .progress import Checkpoint


@dataclasses.dataclass(frozen=True)
class Evolution:
    """Sizes of the search; the defaults are the paper's (arXiv:2402.13753, appendix).

    population    P, genomes of the first generation, and of every later one
    mutations     N1, new genomes by mutation in a generation
    crossovers    N2, new genomes by crossover
    parents       k, the fittest that the new ones are made from
    probability   p, of a gene to mutate
    evaluations   of the model, all in all: 64 + 40 generations of 32
    """

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32
    probability: float = 0.3
    evaluations: int = 64 + 40 * 32

    @classmethod
    def within(cls, evaluations: int) -> Evolution:
        """The paper's sizes, or smaller ones where they would not leave room for 16 generations."""
        share = min(1.0, evaluations / (64 + 16 * 32))
        new = max(1, round(16 * share))
        return cls(max(3, 4 * new), new, new, max(2, 2 * new), evaluations=evaluations)

    def __post_init__(self):
        for name in ("population", "mutations", "crossovers", "parents", "evaluations"):
            if getattr(self, name) < (1 if name in ("population", "parents", "evaluations") else 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not self.mutations + self.crossovers:
            raise ValueError("mutations and crossovers must not both be 0")


def evolve(
    fitness: Callable[[Genome], float],
    space: Space,
    evolution: Evolution | None = None,
    *,
    seed: int = 0,
    extra: tuple[Genome, ...] = (),
    checkpoint: Checkpoint | None = None,
    bar=None,
) -> dict[Genome, float]:
    """Search for the fittest genome (lowest ``fitness``).

    Every generation is made of the ``parents`` fittest genomes of the one before and of their
    children. No genome is evaluated twice. Where torch.distributed is initialised, each process
    evaluates its share of a generation, and all of them go on with the same fitnesses, so that the
    result does not depend on how many there are.

    Args:
        fitness: the perplexity of a genome; anything not finite counts as infinite.
        extra: genomes of the first generation besides YaRN, NTK and position interpolation: a
            search by gradient can seed this one.
        checkpoint: what the search goes on from, and saves to after every generation; the
            caller makes it and removes it.
        bar: something with ``update(n)``, told of n evaluations.

    Returns:
        The fitness of every genome that was evaluated, in the order of their evaluation.
    """
    evolution = evolution or Evolution()
    rng = Random(seed)
    state = dict(checkpoint.state) if checkpoint is not None else {}
    if state:
        known = {Genome.from_json(g): f for g, f in state["known"]}
        population = [Genome.from_json(g) for g in state["population"]]
        version, internal, gauss = state["rng"]
        rng.setstate((version, tuple(internal), gauss))
        if bar is not None:
            bar.update(len(known))
    else:
        known, population = {}, first_generation(space, evolution.population, rng, extra)
    while True:
        fresh = [g for g in population if g not in known]
        fresh = fresh[: evolution.evaluations - len(known)]
        known.update(zip(fresh, _shared(fitness, fresh), strict=True))
        if bar is not None:
            bar.update(len(fresh))
            bar.set_postfix(best=f"{min(known.values()):.4f}")
        population = [g for g in population if g in known]
        done = len(known) >= evolution.evaluations
        if not done:
            parents = sorted(population, key=known.__getitem__)[: evolution.parents]
            children = _children(parents, space, evolution, rng, known)
            population = parents + children
            done = not children  # a space so small that it has been seen in full
        if checkpoint is not None:
            checkpoint.save(
                {
                    "known": [[g.as_json(), f] for g, f in known.items()],
                    "population": [g.as_json() for g in population],
                    "rng": rng.getstate(),
                }
            )
        if done:
            return known


def best(known: dict[Genome, float]) -> Genome:
    """The fittest genome; of equals the one that was found first."""
    return min(known, key=known.__getitem__)


def history(known: dict[Genome, float]) -> list[float]:
    """The fitness of the best genome after every evaluation."""
    found, least = [], math.inf
    for value in known.values():
        least = min(least, value)
        found.append(least)
    return found


def _children(parents, space, evolution, rng, known):
    def mutant(_):
        return mutate(rng.choice(parents), space, rng, evolution.probability)

    def child(_):
        return cross(rng.choice(parents), rng.choice(parents), space, rng)

    mutants = fill({}, evolution.mutations, mutant, known)
    both = dict.fromkeys(mutants)
    both = fill(both, len(mutants) + evolution.crossovers, child, known)
    # Parents too much alike have no new children by crossover.
    return fill(dict.fromkeys(both), evolution.mutations + evolution.crossovers, mutant, known)


def _shared(fitness, genomes):
    """The fitness of every genome, computed by all processes together."""

    def value(genome):
        found = fitness(genome)
        return found if math.isfinite(found) else math.inf

    if not (dist.is_available() and dist.is_initialized()):
        return [value(g) for g in genomes]
    world = dist.get_world_size()
    parts = [None] * world
    dist.all_gather_object(parts, [value(g) for g in genomes[dist.get_rank() :: world]])
    return [parts[n % world][n // world] for n in range(len(genomes))]
