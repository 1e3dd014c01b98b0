"""The lab's own pictures: perplexity against temperature, and the fine-tunes beside each other."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ...context.methods import LABELS
from ...context.style import STYLE, colors, save


def temperature(table, factor, file):
    """Perplexity against attention factor: ``table`` is {temperature: perplexity}."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        points = sorted((float(t), value) for t, value in table.items())
        axes.plot(*zip(*points, strict=True), color=colors(["yarn"])["yarn"], marker="o", lw=2)
        rule = 0.1 * math.log(factor) + 1
        axes.axvline(rule, color="#9aa0a6", lw=1.2, ls=(0, (4, 3)))
        axes.annotate(
            f"0.1 ln {factor} + 1", (rule, axes.get_ylim()[1]), xytext=(6, -4),
            textcoords="offset points", va="top", color="#5f6368",
        )  # fmt: skip
        axes.set_title(f"Temperature, NTK-by-parts at {factor}x")
        axes.set_xlabel("attention factor")
        axes.set_ylabel("perplexity")
        save(figure, file)
        plt.close(figure)


def tuning(table, factor, file):
    """Left the losses of the fine-tunes, smoothed; right the perplexities they led to."""
    shades = colors(list(table))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2)
        )
        for name, cell in table.items():
            smooth = _smoothed(cell["losses"])
            left.plot(range(1, len(smooth) + 1), smooth, color=shades[name], label=LABELS[name])
        left.set_title("Loss of the fine-tune")
        left.set_xlabel("step")
        left.set_ylabel("loss (nats per byte), smoothed")
        left.legend()
        order = sorted(table, key=lambda name: -table[name]["long"])
        values = [table[name]["long"] for name in order]
        bars = right.barh([LABELS[n] for n in order], values, color=[shades[n] for n in order])
        right.bar_label(bars, fmt="%.2f", padding=4)
        right.margins(x=0.14)
        right.grid(axis="y", visible=False)
        right.set_title(f"Perplexity at {factor}x afterwards")
        right.set_xlabel("perplexity (lower is better)")
        save(figure, file)
        plt.close(figure)


def _smoothed(losses, keep=0.8):
    found, mean = [], losses[0]
    for loss in losses:
        mean = keep * mean + (1 - keep) * loss
        found.append(mean)
    return found
