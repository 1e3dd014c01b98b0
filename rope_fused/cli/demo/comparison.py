"""What the demo's measurements say: tables of ratios, and plainly who is ahead."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from ... import report

EAGER, COMPILED, FUSED, LINEAR = "transformers", "torch.compile", "rope_fused", "projections alone"
LAST = 10  # steps whose mean is the loss at the end


class Ratio(NamedTuple):
    """rope_fused over another, in each round of a measurement: the quartiles."""

    low: float
    value: float
    high: float

    @property
    def verdict(self) -> str:
        """Ahead, behind, or even, where the middle half of the rounds has both."""
        if self.low <= 1 <= self.high:
            return "even"
        return "ahead" if self.high < 1 else "behind"

    def __str__(self):
        spread = f" ({self.low:.2f} .. {self.high:.2f})" if self.low != self.high else ""
        return f"{self.value:.2f}{spread}"


def ratio(ours, theirs) -> Ratio:
    """How two series compare that were measured in turns, so that noise hits both of a pair."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(pairs) == 1:
        return Ratio(*pairs * 3)
    return Ratio(*statistics.quantiles(pairs, n=4, method="inclusive"))


def ratios(results) -> dict[str, dict[str, Ratio]]:
    """{what is compared: {where: Ratio}}: everything in which rope_fused can be ahead or behind."""
    steps, peaks = results["step_seconds"], results["layer_peak_bytes"]
    step = {"": ratio(steps[FUSED], steps[EAGER])} if steps[FUSED] else {}
    found = {f"time of a training step against {EAGER}": step}
    found[f"peak memory of projection + rotary against {EAGER}"] = {
        stage: ratio([peaks[FUSED][stage]], [theirs]) for stage, theirs in peaks[EAGER].items()
    }
    for name in (EAGER, COMPILED):
        found[f"time of projection + rotary against {name}"] = {
            f"{length} tokens": ratio(times[FUSED], times[name])
            for length, times in results["layer_seconds"].items()
            if name in times
        }
    return found


def largest_difference(results) -> tuple[float, int]:
    """(the largest relative difference of the two loss curves, the step where it is, from 1)."""
    theirs, ours = results["losses"][EAGER], results["losses"][FUSED]
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(apart), apart.index(max(apart)) + 1


def text(results) -> str:
    """Everything, for people to read."""
    parts = [_training(results), _layer(results), _verdicts(ratios(results))]
    return "\n\n".join(["", *parts])


def _training(results):
    losses, steps, peaks = (results[k] for k in ("losses", "step_seconds", "layer_peak_bytes"))
    rows = [("training, and one layer alone", EAGER, FUSED, "ratio (middle half of the rounds)")]
    ends = [statistics.fmean(losses[name][-LAST:]) for name in (EAGER, FUSED)]
    what = f"loss, mean of steps {max(1, len(losses[FUSED]) - LAST + 1)} to {len(losses[FUSED])}"
    rows.append((what, *(f"{end:.5f}" for end in ends), f"{ends[1] / ends[0]:.7f}"))
    if steps[FUSED]:
        medians = [f"{statistics.median(steps[name]):.3f} s" for name in (EAGER, FUSED)]
        rows.append(("time of a step, median", *medians, ratio(steps[FUSED], steps[EAGER])))
    for stage, theirs in peaks[EAGER].items():
        ours = peaks[FUSED][stage]
        megabytes = [f"{n / 1e6:.1f} MB" for n in (theirs, ours)]
        rows.append((f"peak memory of the layer, {stage}", *megabytes, ratio([ours], [theirs])))
    apart, at = largest_difference(results)
    same = "the two loss curves are the same bit for bit"
    differ = f"largest relative difference of the two loss curves: {apart:.1e}, at step {at}"
    return f"{report.columns(rows, '<>><')}\n{differ if apart else same}"


def _layer(results):
    rows = results["layer_seconds"]
    names = [n for n in (FUSED, EAGER, COMPILED, LINEAR) if n in next(iter(rows.values()))]
    table = [("tokens", *names, *(f"/ {name}" for name in names[1:]))]
    for length, times in rows.items():
        medians = [f"{statistics.median(times[name]) * 1e3:.2f} ms" for name in names]
        quotients = [f"{ratio(times[FUSED], times[name]).value:.2f}" for name in names[1:]]
        table.append((length, *medians, *quotients))
    compiling = results["compile"]
    if isinstance(compiling, float):
        note = f"compiled once, for any length, in {compiling:.0f} s"
    else:
        note = f"not measured: {compiling}"
    return (
        f"projection + rotary of one layer ({results['model']['layer']}), forward, medians; "
        f"{FUSED} / the others\n"
        f"{report.columns(table, '>')}\n"
        f"{COMPILED}: {note}. {EAGER} and {COMPILED} are given cos and sin; {FUSED} makes them.\n"
        f"{LINEAR}: no rotary, the floor."
    )


def _verdicts(found):
    titles = {
        "ahead": "In our favour",
        "even": "No difference beyond the noise of this measurement",
        "behind": "NOT in our favour",
    }
    parts = []
    for verdict, title in titles.items():
        lines = []
        for what, cases in found.items():
            chosen = {where: r for where, r in cases.items() if r.verdict == verdict}
            listed = (f"{r.value:.2f} ({at})".removesuffix(" ()") for at, r in chosen.items())
            lines += [f"  {what}: {', '.join(listed)}"] if chosen else []
        parts += [f"{title}:", *lines] if lines else []
    return "\n".join(parts)
