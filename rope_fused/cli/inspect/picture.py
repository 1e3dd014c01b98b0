"""The picture of `rope-fused inspect`: what became of every pair, and how others read the file."""

from __future__ import annotations

import math
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from ...context.style import STYLE, save
from .table import verdict

_COLORS = ("#14639e", "#e08e45", "#3a9679", "#8a79b8", "#c6506b", "#7a8790", "#b29a34", "#4aa3c7")
_GREY = "#9aa0a6"
_INK = "#3c4043"
_ZONES = {
    "extrapolated": ("#e4f1e8", "extrapolated\n(kept)"),
    "ramp": ("#fdf3dd", "ramp"),
    "interpolated": ("#e8e8f6", "interpolated\n(slowed)"),
}
_VERDICTS = {"same": "#3a9679", "differs": "#c0392b", "cannot": "#7a8790"}
_STRANGE = [
    {"color": "#c0392b", "linewidth": 1.3, "linestyle": style}
    for style in ((0, (2, 1.5)), "-.", ":")
]
_INDENT = 0.36  # of what a reader makes of the file
_LINES = 22  # of text that fit beside the plots


def draw(own: dict[str, dict], others: dict[str, dict], file, title: str) -> None:
    """Write the picture to ``file``, a PNG.

    Args:
        own: {kind of layer: numbers} of the model.
        others: {label: numbers} to compare with.
        title: of the picture.
    """
    named = {**own, **others}
    curves, first = _curves(named), next(iter(own.values()))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11.5, 6.6), layout="constrained")
        left, right = figure.add_gridspec(1, 2, width_ratios=(1.35, 1), wspace=0.05)
        upper, lower = left.subgridspec(2, 1, height_ratios=(1.5, 1)).subplots(sharex=True)
        error, words = right.subgridspec(2, 1, height_ratios=(1, 1.5)).subplots()
        strangers = [] if others else _strangers(own)
        _wavelengths(upper, curves, first, strangers)
        _factors(lower, curves, first, strangers)
        _errors(error, curves)
        if others:
            _table(words, named)
        else:
            _readers(words, own)
        figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color="#202124")
        save(figure, file, dpi=110)
        plt.close(figure)


def _curves(named) -> list[tuple[str, str, dict, dict]]:
    """(label, colour, the table, all numbers) of each line to draw."""
    curves = []
    for label, n in named.items():
        for name, table in n["tables"].items():
            several = len(n["tables"]) > 1
            label_here = (name if len(named) == 1 else f"{label}, {name}") if several else label
            curves.append((label_here, _COLORS[len(curves) % len(_COLORS)], table, n))
    return curves


def _strangers(own) -> list[tuple[str, list[float], list[float]]]:
    """(reader, wavelengths, factors) as those read the file who get other frequencies."""
    found = []
    for n in own.values():
        table = list(n["tables"].values())[-1]
        for reading in n["readers"]:
            if reading["inv_freq"] is None:
                continue
            rows = zip(table["inv_freq"], reading["inv_freq"], table["factor"], strict=True)
            factors = [math.nan if not b else f * a / b for a, b, f in rows]
            waves = [math.nan if not b else 2 * math.pi / b for b in reading["inv_freq"]]
            found.append((_short(reading["reader"]), waves, factors))
    return found


def _short(reader: str) -> str:
    return reader.split(" (")[0]


def _shade(axes, curves, n, words):
    """Colour what became of the pairs of the model's own table, the last of its tables."""
    own = [table for _, _, table, numbers in curves if numbers is n][-1]
    zones = own["zone"]
    axes.set_xlim(-0.5, len(zones) - 0.5)
    if len(set(zones)) == 1:
        return
    start = 0
    for pair in range(1, len(zones) + 1):
        if pair < len(zones) and zones[pair] == zones[start]:
            continue
        color, name = _ZONES.get(zones[start], ("none", ""))
        axes.axvspan(start - 0.5, pair - 0.5, color=color, linewidth=0, zorder=0)
        if words and (pair - start) * 11 > len(zones):
            middle = (start + pair - 1) / 2
            axes.text(middle, 0.97, name, transform=axes.get_xaxis_transform(), ha="center",
                      va="top", fontsize=8.5, color="#5f6368")  # fmt: skip
        start = pair


def _wavelengths(axes, curves, n, strangers):
    _shade(axes, curves, n, words=True)
    shown = [w for _, _, table, _ in curves for w in table["wavelength"] if w is not None]
    pairs = len(curves[0][2]["wavelength"])
    thetas = {(numbers["rope_theta"], numbers["rotary_dim"]) for _, _, _, numbers in curves}
    if len(thetas) == 1 and any(f not in (None, 1) for c in curves for f in c[2]["factor"]):
        ((theta, dim),) = thetas
        unscaled = [2 * math.pi * theta ** (2 * i / dim) for i in range(pairs)]
        axes.plot(unscaled, color=_GREY, linestyle=(0, (4, 3)), label="before scaling")
    for label, color, table, _ in curves:
        axes.plot(_gaps(table["wavelength"]), color=color, linewidth=2.2, label=label)
    for i, (reader, waves, _) in enumerate(strangers):
        axes.plot(waves, label=f"as {reader} reads it", **_STRANGE[i % len(_STRANGE)])
    axes.set_yscale("log")
    for length, name in ((n["trained_length"], "trained on"), (n["longest_length"], "made for")):
        if length is None or (name == "made for" and length == n["trained_length"]):
            continue
        axes.axhline(length, color=_INK, linewidth=1, linestyle=":")
        shown.append(length)
        axes.text(0.01, length, f"{name} {length:,} tokens", transform=axes.get_yaxis_transform(),
                  va="bottom", fontsize=8.5, color=_INK)  # fmt: skip
    if shown:
        axes.set_ylim(min(shown) / 2, max(shown) * 30)
    axes.set_ylabel("wavelength (tokens)")
    axes.set_title(_headline(n))
    axes.legend(loc="lower right", fontsize=9)


def _headline(n) -> str:
    words = n["rope_type"]
    if n["parameters"].get("factor"):
        words += f" × {n['parameters']['factor']:g}"
    words += f", base {n['rope_theta']:,.15g}, {n['rotary_dim']} of {n['head_dim']} dimensions turn"
    return words


def _factors(axes, curves, n, strangers):
    _shade(axes, curves, n, words=False)
    shown = []
    for _, color, table, _ in curves:
        factors = _gaps(table["factor"])
        axes.plot(factors, color=color, linewidth=2.2)
        shown += [f for f in table["factor"] if f is not None]
    for i, (_, _, factors) in enumerate(strangers):
        axes.plot(factors, **_STRANGE[i % len(_STRANGE)])
        shown += [f for f in factors if f == f]
    low, high = min(shown, default=1), max(shown, default=1)
    if high > 1.5:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(min(low, 1) / 1.2, high * 1.4)
    else:
        axes.set_ylim(min(low, 1) - 0.1, high + 0.1)
    axes.set_ylabel("factor")
    axes.set_xlabel("pair of dimensions")


def _errors(axes, curves):
    ends = set()
    for _, color, table, _ in curves:
        if table["float32_angle_error"] is not None:
            ends.add(table["longest_length"])
            values = [error or math.nan for error in table["float32_angle_error"]]
            axes.plot(values, color=color, linewidth=1.4)
    axes.set_yscale("log")
    at = " and ".join(f"{end:,}" for end in sorted(ends)) if len(ends) < 3 else "the longest length"
    axes.set_title(f"Error of float32 angles up to {at}" if ends else "", fontsize=11)
    axes.set_ylabel("radians")
    axes.set_xlabel("pair of dimensions")


def _readers(axes, own):
    axes.axis("off")
    kind, n = next(
        ((k, n) for k, n in own.items() if any(r["verdict"] != "same" for r in n["readers"])),
        next(iter(own.items())),
    )
    alike = all(other["readers"] == n["readers"] for other in own.values())
    axes.set_title("How others read the same file" + ("" if alike else f", {kind}"), fontsize=11)
    ours = list(n["tables"].values())[-1]["attention_factor"]
    lines = []  # (indent, words, colour)
    for reading in n["readers"]:
        said = textwrap.wrap(verdict(reading, ours), 42)
        color = _VERDICTS[reading["verdict"]]
        lines += [(_INDENT, line, color) for line in said]
        lines[-len(said)] = (_INDENT, said[0], color, _short(reading["reader"]))
        for rule in reading["rules"]:
            lines += [(0.03, line, "#5f6368") for line in textwrap.wrap(rule, 58)]
    lines += [(0, line, _INK) for line in ("", *_applied(n))]
    count = max(_LINES, len(lines))
    size = 9 * _LINES / count
    for i, (x, words, color, *reader) in enumerate(lines):
        y = 1 - i / count
        _say(axes, x, y, words, size * (0.93 if x == 0.03 else 1), color)
        for name in reader:
            _say(axes, 0, y, name, size, _INK, fontweight="bold")


def _say(axes, x, y, words, size, color, **style):
    """Text that the layout of the axes takes no notice of."""
    text = axes.text(x, y, words, fontsize=size, va="top", color=color, **style)
    text.set_in_layout(False)


def _applied(n) -> list[str]:
    """The factors beside the frequencies, and where they apply."""
    factor = list(n["tables"].values())[-1]["attention_factor"]
    lines = []
    if isinstance(factor, float) and factor != 1:
        lines.append(f"attention factor {factor:.6g} on q and k: logits × {factor * factor:.4g}")
    if n["softmax_multiplier"] != 1:
        lines.append(f"softmax scale × {n['softmax_multiplier']:.6g}")
    if n["q_temperature"] is not None:
        lines.append("each query has a factor that grows with its position")
    lines.append(f"cached keys: {n['cache_class']}")
    return lines


def _table(axes, named):
    """Of several specifications: what the curves do not say."""
    axes.axis("off")
    axes.set_title("Beside the frequencies")
    header = ("", "attention factor", "logits ×", "cache")
    rows = []
    for label, n in named.items():
        factor = list(n["tables"].values())[-1]["attention_factor"]
        per_pair = not isinstance(factor, float | int)
        rows.append(
            (
                textwrap.shorten(label, 24, placeholder="…"),
                "per pair" if per_pair else f"{factor:.5g}",
                "" if per_pair else f"{factor * factor * n['softmax_multiplier']:.5g}",
                n["cache_class"],
            )
        )
    for i, row in enumerate((header, *rows)):
        for x, cell in zip((0, 0.38, 0.69, 0.87), row, strict=True):
            weight = "bold" if i == 0 or x == 0 else "normal"
            _say(axes, x, 1 - i / 14, cell, 9, _INK, fontweight=weight)


def _gaps(values):
    return [float("nan") if value is None else value for value in values]
