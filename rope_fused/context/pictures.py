"""The field's pictures: perplexity curves, passkey curves, needle heat-map, decay and rotation.

Every function writes one picture to a file, in the format of its suffix. Needs matplotlib.
"""

from __future__ import annotations

import contextlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import colors as scales
from matplotlib import ticker

from . import rotation
from .methods import LABELS
from .style import STYLE, colors, save

# Needle heat-maps are read in these colours since the first of them.
_HEAT = scales.LinearSegmentedColormap.from_list("recall", ["#F0496E", "#EBB839", "#0CD79F"])


def perplexity_curves(curves, file, *, original=None, title="Perplexity against length"):
    """Perplexity against window, one line per method.

    Args:
        curves: {method or label: {window: perplexity}}.
        file: the picture to write.
        original: the window of the weights, marked.
    """
    with _figure(file) as axes:
        _lines(axes, curves, original)
        # A method that breaks down goes through the roof; the others stay readable.
        values = [v for curve in curves.values() for v in curve.values() if np.isfinite(v)]
        if values and max(values) > 5 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
            axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_title(title)
        axes.set_xlabel("context window (tokens)")
        axes.set_ylabel("perplexity (lower is better)")


def accuracy_curves(curves, file, *, original=None, title="Passkey retrieval"):
    """Accuracy against length, one line per label: ``{label: {length: accuracy}}``."""
    with _figure(file) as axes:
        _lines(axes, curves, original)
        axes.set_ylim(-0.04, 1.04)
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        axes.set_title(title)
        axes.set_xlabel("length of the prompt (tokens)")
        axes.set_ylabel("accuracy")


def heat_map(cells, file, *, title="Needle in a haystack"):
    """Accuracy by length (across) and depth (down).

    Args:
        cells: what :func:`~rope_fused.context.retrieval.retrieve` returns under that name, with
            depths.
    """
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["accuracy"]
    size = (max(5.0, 1.8 + 0.75 * len(lengths)), max(3.2, 1.4 + 0.4 * len(depths)))
    with _figure(file, size) as axes:
        axes.grid(False)
        mesh = axes.pcolormesh(
            grid, cmap=_HEAT, vmin=0.0, vmax=1.0, edgecolors="white", linewidth=1.2
        )
        axes.invert_yaxis()
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [f"{n:,}" for n in lengths])
        axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{100 * d:.0f} %" for d in depths])
        if len(lengths) > 8:
            axes.tick_params(axis="x", labelrotation=45)
        axes.tick_params(length=0)
        for (row, column), value in np.ndenumerate(grid):
            if len(lengths) * len(depths) <= 150 and np.isfinite(value):
                axes.text(
                    column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center",
                    fontsize=8.5, color="#202124",
                )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("length of the prompt (tokens)")
        axes.set_ylabel("depth of the needle")
        bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label("accuracy")
        bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        bar.outline.set_visible(False)


def decay(specs, file, *, length, points=400):
    """Attention score of equal vectors against distance: ``specs`` is {label: RopeSpec}.

    Thin: at single distances; thick: the mean over their neighbourhood.
    """
    distances = torch.unique(torch.logspace(0, np.log10(length - 1), points).round().long())
    shades, at = colors(list(specs)), distances.numpy()
    with _figure(file) as axes:
        for name, spec in specs.items():
            curve = rotation.decay_curve(spec, distances).numpy()
            label = LABELS.get(name, name)
            axes.plot(at, curve, color=shades[name], lw=0.7, alpha=0.35)
            axes.plot(at, _smooth(at, curve), color=shades[name], lw=2, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.axhline(0, color="#9aa0a6", lw=0.8)
        axes.set_title("Attention score against distance")
        axes.set_xlabel("distance (tokens)")
        axes.set_ylabel("mean of cos over pairs × attention factor²")
        axes.legend()


def rotations(spec, file, *, length, original=None):
    """How far each pair turns over the window, and the pattern it sees.

    Left: cos of every pair over the positions. Right: turns in ``length`` tokens and, with
    ``original``, in the window of the training by the unscaled frequencies: a pair that turns
    further than it did there, and never round, meets angles it has not been trained on.
    """
    edges = torch.linspace(0, length, min(length, 480) + 1).round().long()
    _, sin = rotation.as_text(spec).cos_sin(edges, torch.float64, seq_len=length)
    # The mean of cos over a column, which is 0 for pairs that turn round inside it; samples would
    # show patterns there that do not exist.
    step = edges.diff()[:, None] * spec.inv_freq(seq_len=length)
    mean = torch.where(step > 0, sin.diff(dim=0) / step, 1.0)
    reach = rotation.turns(spec, length).numpy()
    pairs = np.arange(reach.size)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        left.grid(False)
        left.imshow(
            mean.T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, origin="upper",
            extent=(0, length, reach.size - 0.5, -0.5), interpolation="nearest",
        )  # fmt: skip
        left.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        left.set_title(f"cos by position and pair ({LABELS.get(spec.rope_type, spec.rope_type)})")
        left.set_xlabel("position")
        left.set_ylabel("pair")
        right.plot(
            pairs, reach, color="#14639e", lw=2, marker="o", ms=3.5, label=f"in {length:,} tokens"
        )
        if original is not None:
            seen = rotation.turns(rotation.unscaled(spec), original).numpy()
            right.plot(
                pairs, seen, color="#9aa0a6", lw=2, label=f"in training ({original:,} tokens)"
            )
            unseen = (reach > seen) & (seen < 1)
            if unseen.any():
                right.fill_between(
                    pairs, seen, reach.clip(max=1.0), where=unseen, color="#c0392b", alpha=0.25,
                    label="angles not trained on",
                )  # fmt: skip
        right.axhline(1, color="#c0392b", lw=1, ls=(0, (4, 3)))
        right.set_yscale("log")
        right.set_title("Turns of each pair over the window")
        right.set_xlabel("pair")
        right.set_ylabel("turns")
        right.legend()
        save(figure, file)
        plt.close(figure)


def _smooth(distances, values):
    """The mean of the values at all distances within a fifth of each."""
    near = np.abs(np.log(distances[:, None] / distances)) < np.log(1.2)
    return near @ values / near.sum(1)


@contextlib.contextmanager
def _figure(file, size=(7.2, 4.6)):
    """Axes in our style, written to ``file`` in the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        try:
            yield axes
            save(figure, file)
        finally:
            plt.close(figure)


def _lines(axes, curves, original):
    shades = colors(list(curves))
    lengths = sorted({length for curve in curves.values() for length in curve})
    for name, curve in curves.items():
        points = sorted(curve.items())
        axes.plot(
            *zip(*points, strict=True), color=shades[name], marker="o", ms=5, lw=2,
            label=LABELS.get(name, name),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    if original is not None and lengths[0] <= original <= lengths[-1]:
        axes.axvline(original, color="#9aa0a6", lw=1, ls=(0, (4, 3)))
        axes.text(
            original, 1.0, " trained length", color="#5f6368", fontsize=9, va="top",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.legend()
