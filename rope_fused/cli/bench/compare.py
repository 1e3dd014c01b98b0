"""Two runs side by side: what became slower or faster by more than the measurements may be off.

A median of n rounds whose quartiles lie 2 q apart is off by about 1.25 sigma / sqrt(n), where sigma
= q / 0.674. The ratio of two such medians is off by both; by how far the two orders of each
measurement disagree, which is what rounds in a row have in common; and by how far the medians of
its processes do. A change is called one if it is more than ``threshold`` and more than
``DEVIATIONS`` of these.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from ...report import columns
from .table import key, title

THRESHOLD = 0.05
# A run has hundreds of results, and its quartiles know sigma only roughly. Of normal times with a
# sigma of 5 %, 31 rounds go beyond in one comparison out of 6 000, 7 rounds in one out of 230.
DEVIATIONS = 4.0


class Change(NamedTuple):
    """A result in both runs. ratio: new time / old time. noise: by how much it may be off."""

    new: dict
    ratio: float
    noise: float
    threshold: float

    @property
    def verdict(self) -> str:
        """slower, faster or same; unclear where a change of ``threshold`` would be less than half
        of the noise, which is two deviations, or where the noise hides a larger one."""
        change = abs(self.ratio - 1)
        if change > max(self.threshold, self.noise):
            return "slower" if self.ratio > 1 else "faster"
        return "same" if max(change, self.noise / 2) <= self.threshold else "unclear"


def changes(old: dict, new: dict, threshold=THRESHOLD) -> list[Change]:
    """Every result that both documents have; of what one has twice, the last."""
    before, after = _by_key(old), _by_key(new)
    found = []
    for name, row in after.items():
        if name in before:
            was = before[name]
            noise = DEVIATIONS * math.hypot(uncertainty(was), uncertainty(row))
            found.append(Change(row, row["median_us"] / was["median_us"], noise, threshold))
    return found


def _by_key(document):
    return {key(row): row for row in document["results"]}


def uncertainty(row) -> float:
    """The standard error of a median, relative to it."""
    rounds = row.get("rounds") or [1]
    if isinstance(rounds, list):
        rounds = max(rounds) if row.get("least") else sum(rounds)
    sigma = (row.get("spread") or 0.0) / 0.674
    orders = (row.get("orders_disagree") or 0.0) / 2
    medians = row.get("medians_us") or []
    apart = statistics.stdev(medians) / row["median_us"] if len(medians) > 1 else 0.0
    within = 1.253 * sigma / math.sqrt(rounds)
    between = 1.253 * apart / math.sqrt(max(1, len(medians)))
    return math.hypot(within, orders / DEVIATIONS, between)


def text(found: list[Change], old: dict, new: dict) -> str:
    """What changed, regressions first, and how much of the rest can be told."""
    parts = []
    for part in ("machine", "versions", "settings"):
        differing = sorted(
            name
            for name in old.get(part, {}).keys() | new.get(part, {}).keys()
            if old.get(part, {}).get(name) != new.get(part, {}).get(name)
        )
        if differing:
            parts.append(f"The runs differ in their {part}: {', '.join(differing)}")
    for verdict, heading in (
        ("slower", "Regressions"),
        ("faster", "Faster"),
        ("unclear", "Unclear"),
    ):
        chosen = [change for change in found if change.verdict == verdict]
        if chosen:
            chosen.sort(key=lambda change: -abs(change.ratio - 1))
            rows = [
                (c.new["impl"], title(c.new), f"{c.ratio:.3f} x", f"+-{c.noise:.1%}")
                for c in chosen
            ]
            parts.append(f"{heading}: new time / old time\n{columns(rows, '<<>', indent=2)}")
    before, after = _by_key(old), _by_key(new)
    for heading, one, other in (("Only in OLD", before, after), ("Only in NEW", after, before)):
        rows = [(row["impl"], title(row)) for name, row in one.items() if name not in other]
        if rows:
            parts.append(f"{heading}\n{columns(rows, indent=2)}")
    same = sum(change.verdict == "same" for change in found)
    only = len(before.keys() ^ after.keys())
    parts.append(
        f"{same} of {len(found)} results are the same within {found[0].threshold:.0%} or the noise "
        f"of the measurements; {only} are in one run only."
    )
    return "\n\n".join(parts)
