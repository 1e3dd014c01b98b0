"""The demo's picture: both loss curves, and the time of projection and rotary against length."""

from __future__ import annotations

import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from ...context.style import STYLE, save
from .comparison import COMPILED, EAGER, FUSED, LINEAR, largest_difference

_COLORS = {EAGER: "#e08e45", COMPILED: "#8a79b8", FUSED: "#14639e", LINEAR: "#9aa0a6"}


def draw(results, file):
    """Write the picture of ``results`` to ``file``, a PNG."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.add_gridspec(1, 2, wspace=0.06)
        rows = left.subgridspec(2, 1, height_ratios=(3.2, 1), hspace=0.04)
        upper, lower = rows.subplots(sharex=True)
        _losses(upper, lower, results)
        _times(figure.add_subplot(right), results)
        save(figure, file)
        plt.close(figure)


def _losses(upper, lower, results):
    theirs, ours = results["losses"][EAGER], results["losses"][FUSED]
    steps = range(1, len(ours) + 1)
    upper.plot(steps, theirs, color=_COLORS[EAGER], linewidth=5, alpha=0.55, label=EAGER)
    upper.plot(steps, ours, color=_COLORS[FUSED], linewidth=1.5, label="rope_fused.patch(model)")
    millions = results["model"]["millions"]
    upper.set_title(f"Training loss, one seed ({millions:.1f} M parameters)")
    upper.set_ylabel("loss (nats per token)")
    upper.legend(loc="upper right")
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    lower.plot(steps, apart, ".", color=_COLORS[FUSED], markersize=4)
    largest, _ = largest_difference(results)
    if largest:
        lower.set_yscale("log")
        lower.set_ylim(min(filter(None, apart)) / 6, largest * 40)
        lower.yaxis.set_major_locator(ticker.LogLocator(numticks=3))
        lower.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        lower.set_yticks([0])
    note = f"at most {largest:.0e}" if largest else "the same bit for bit"
    lower.text(0.02, 0.8, note, transform=lower.transAxes, color=_COLORS[FUSED], va="center")
    lower.set_ylabel("relative\ndifference")
    lower.set_xlabel("step")


def _times(axes, results):
    lengths = [int(length) for length in results["layer_seconds"]]
    labels = {FUSED: "rope_fused.qkv_rope", LINEAR: "the three projections alone"}
    for name in (EAGER, COMPILED, FUSED, LINEAR):
        rows = [times.get(name) for times in results["layer_seconds"].values()]
        if rows[0] is None:
            continue
        # Per token, since all of them grow with the length: a difference is then a distance.
        costs = [statistics.median(r) / n * 1e6 for r, n in zip(rows, lengths, strict=True)]
        style = {"linestyle": (0, (4, 3)), "marker": ""} if name == LINEAR else {"marker": "o"}
        axes.plot(
            lengths,
            costs,
            color=_COLORS[name],
            label=labels.get(name, name),
            linewidth=2.2,
            markersize=5.5,
            **style,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.margins(x=0.06)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.22)  # room for the legend
    axes.legend(loc="upper right", ncols=2)
    facts, arguments = results["facts"], results["arguments"]
    axes.set_title("Projection + rotary embedding, forward")
    axes.set_ylabel("µs per token (median)")
    axes.set_xlabel(
        f"tokens in the sequence\n{results['model']['layer']}, {arguments['dtype']}; "
        f"{facts['processor']}, {facts['threads']} threads"
    )
