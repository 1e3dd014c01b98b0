"""What the lab asserts: the orders that the papers report, on every seed."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ...context.methods import LABELS


class Check(NamedTuple):
    """A sentence, the numbers behind it in the order it claims, and whether they are."""

    claim: str
    numbers: tuple[float, ...]
    holds: bool


def checks(results, factors, margin=0.0) -> list[Check]:
    """What must hold of one seed's ``results`` (:class:`~.experiment.Experiment`).

    margin  every number must be larger than the one before it by this share of it
    """
    zero, last = results["zero_shot"], str(factors[-1])
    found = []
    for factor in map(str, factors[1:]):
        row = {name: cell["long"] for name, cell in zero[factor].items()}
        where = f"perplexity without training at {factor}x"
        found.append(_order(where, row, ("yarn", "by_parts", "ntk", "none"), margin))
        found.append(_order(where, row, ("longrope", "yarn"), margin))
    short = {name: cell["short"] for name, cell in zero[last].items()}
    where = f"perplexity of short texts under the factors for {last}x"
    found.append(_order(where, short, ("ntk", "yarn", "linear"), margin))
    if "tuning" in results:
        tuned = {name: cell["long"] for name, cell in results["tuning"].items()}
        best = sorted((n for n in tuned if n != "linear"), key=tuned.get)
        where = f"perplexity at {last}x after the same fine-tune: PI last"
        found.append(_order(where, tuned, (best[-1], "linear"), margin))
    return found


def _order(where, row, names, margin):
    numbers = tuple(row[name] for name in names)
    holds = all(b > a * (1 + margin) for a, b in itertools.pairwise(numbers))
    return Check(f"{where}: {' < '.join(LABELS[name] for name in names)}", numbers, holds)
