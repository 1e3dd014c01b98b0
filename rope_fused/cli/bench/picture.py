"""The pictures of a run: time and share of the limit by sequence length, memory, speed-ups."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from ...context.style import save
from . import style
from .table import cases

OURS = "rope_fused"
_SWEPT = ("rotate", "unrotate", "projection")
# Ways to call us, and parts of a product, that would only crowd a picture.
_ASIDE = ("rope_fused-", "linear-three", "linear+rotate", "hf-compile-max")
_LIMITS = {
    "clone": {"linestyle": (0, (4, 3))},
    "copy": {"linestyle": (0, (1, 2))},
    "linear": {"linestyle": (0, (4, 3))},
}
_MOST_BARS = 11
_TITLES = {
    "rotate": "Rotating q and k",
    "unrotate": "Turning gradients back",
    "projection": "Projection and rotation",
}


def draw(document, file) -> list[Path]:
    """Write FILE.png and FILE-dark.png beside FILE.json; their paths, none with nothing to draw."""
    written, rows = [], document["results"]
    if not (sweeps(rows) or speedups(rows)):
        return written
    for suffix, theme in style.THEMES.items():
        with plt.rc_context(theme):
            figure = _figure(document, dark=bool(suffix))
            path = Path(file).with_suffix("")
            path = path.with_name(f"{path.name}{suffix}.png")
            save(figure, path, dpi=100)
            plt.close(figure)
            written.append(path)
    return written


def sweeps(rows) -> dict[str, dict[str, list[dict]]]:
    """{op: {impl: rows by sequence length}}: of each op the plain shape that has most lengths."""
    found = {}
    for op in _SWEPT:
        groups = {}
        for row in rows:
            if row["op"] == op and not row.get("variant"):
                groups.setdefault((row["shape"], row["dtype"]), []).append(row)
        # bfloat16 first where lengths are equally many: the order of the dtypes' names.
        chosen = max(groups, key=lambda g: (_lengths(groups[g]), g[1] == "bfloat16"), default=None)
        if chosen is None or _lengths(groups[chosen]) < 2:
            continue
        found[op] = {}
        for row in sorted(groups[chosen], key=lambda row: row["seqlen"]):
            if not row["impl"].startswith(_ASIDE):
                found[op].setdefault(row["impl"], []).append(row)
    return found


def speedups(rows) -> list[tuple[str, str, float]]:
    """(case, baseline, its time / ours): of each op and variant the first shape, of projections all
    shapes, at the longest length."""
    longest = {}
    for of_case in cases(rows).values():
        first, ours = of_case[0], any(row["impl"] == OURS for row in of_case)
        shape = first["shape"] if "projection" in first["op"] else None
        name = (first["op"], first.get("variant", ""), shape)
        held = longest.get(name, of_case)
        same = all(held[0][key] == first[key] for key in ("shape", "dtype"))
        if ours and same and not name[1].endswith("in cache"):
            longest[name] = max(held, of_case, key=lambda r: r[0]["seqlen"])
    found = []
    for of_case in list(longest.values())[:_MOST_BARS]:
        times = {row["impl"]: row["median_us"] for row in of_case}
        for impl, time in times.items():
            if impl not in _LIMITS and not impl.startswith((*_ASIDE, OURS)):
                found.append((_caption(of_case[0]), impl, time / times[OURS]))
    return found


def _caption(row):
    """A case in few words."""
    parts = (row["shape"], row.get("variant"), "" if row["seqlen"] == 1 else _short(row["seqlen"]))
    dtype = "" if row["dtype"] == "bfloat16" else f" {row['dtype']}"
    return f"{row['op']}{dtype}\n{', '.join(part for part in parts if part)}"


def _lengths(rows):
    return len({row["seqlen"] for row in rows})


def _figure(document, dark):
    rows = document["results"]
    swept, bars = sweeps(rows), speedups(rows)
    names = list(dict.fromkeys(row["impl"] for row in rows if not row["impl"].startswith(_ASIDE)))
    colors = style.colors(names, dark)
    groups = list(dict.fromkeys(case for case, *_ in bars))
    height = 0.9 + 0.17 * len(bars) + 0.15 * len(groups)
    heights = [2.9] * len(swept) + [height] * bool(bars)
    figure = plt.figure(figsize=(13, sum(heights) + 1.1), layout="constrained")
    grid = figure.add_gridspec(max(1, len(heights)), 3, height_ratios=heights or [1])
    for at, (op, impls) in enumerate(swept.items()):
        for column, panel in enumerate((_times, _shares, _memory)):
            panel(figure.add_subplot(grid[at, column]), op, impls, colors)
    if bars:
        _bars(figure.add_subplot(grid[len(heights) - 1, :]), bars, groups, colors)
    _legend(figure, names, colors)
    figure.supxlabel(_where(document), fontsize=9)
    return figure


def _legend(figure, names, colors):
    handles = [
        plt.Line2D([], [], color=colors[name], **_line(name) | {"marker": ""}, label=name)
        for name in names
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(8, max(1, len(handles))))


def _where(document):
    """What was measured with what, in a line."""
    machine, settings = document["machine"], document["settings"]
    where = f"{machine.get('processor')}, {settings.get('threads')} threads"
    where = machine.get("gpu") if settings.get("device") == "cuda" else where
    kind = "quick run, " if settings.get("quick") else ""
    return f"{kind}{where}; medians; torch {document['versions'].get('torch')}"


def _times(axes, op, impls, colors):
    for impl, rows in impls.items():
        lengths = [row["seqlen"] for row in rows]
        per_token = [row["median_us"] / row["seqlen"] * 1e3 for row in rows]
        low = [row["quartiles_us"][0] / row["seqlen"] * 1e3 for row in rows]
        high = [row["quartiles_us"][1] / row["seqlen"] * 1e3 for row in rows]
        axes.fill_between(lengths, low, high, color=colors[impl], alpha=0.18, linewidth=0)
        axes.plot(lengths, per_token, color=colors[impl], **_line(impl))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(
        ticker.FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(_TITLES[op])
    axes.set_ylabel("ns per token")
    _length_axis(axes, impls)


def _shares(axes, op, impls, colors):
    limit = next(iter(impls.values()))[0]["limit"]
    for impl, rows in impls.items():
        rows = [row for row in rows if row["of_limit"] is not None]
        if rows and impl != limit:
            shares = [100 * row["of_limit"] for row in rows]
            axes.plot([r["seqlen"] for r in rows], shares, color=colors[impl], **_line(impl))
    axes.axhline(100, color=style.LIMIT, linestyle=(0, (4, 3)), linewidth=1.5)
    axes.set_ylim(bottom=0)
    words = {"clone": "a copy of the same bytes", "linear": "the projection alone"}
    axes.set_title(f"Beside {words.get(limit, limit)}")
    axes.set_ylabel("speed, %")
    _length_axis(axes, impls)


def _memory(axes, op, impls, colors):
    for impl, rows in impls.items():
        rows = [row for row in rows if row.get("peak_bytes")]
        bytes_ = [row["peak_bytes"] / row["seqlen"] / 1024 for row in rows]
        axes.plot([row["seqlen"] for row in rows], bytes_, color=colors[impl], **_line(impl))
    axes.set_ylim(bottom=0)
    axes.set_title("Peak memory")
    axes.set_ylabel("KiB per token")
    _length_axis(axes, impls)


def _line(impl):
    """How the line of a variant looks: limits are dashed or dotted, ours is thick."""
    options = _LIMITS.get(impl, {"marker": "o", "markersize": 4.5})
    width, order = (2.8, 3) if impl == OURS else (1.8, 2)
    return {"linewidth": width, "zorder": order} | options


def _length_axis(axes, impls):
    rows = next(iter(impls.values()))
    lengths = sorted({row["seqlen"] for of_impl in impls.values() for row in of_impl})
    step = -(-len(lengths) // 7)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths[::step], [_short(n) for n in lengths[::step]])
    axes.minorticks_off()
    axes.margins(x=0.05)
    axes.set_xlabel(f"tokens ({rows[0]['shape']}, {rows[0]['dtype']})")


def _short(length):
    for unit, name in ((1 << 20, " M"), (1 << 10, " k")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def _bars(axes, bars, groups, colors):
    at, ticks = 0.0, []
    for group in groups:
        start = at
        for case, impl, ratio in bars:
            if case == group:
                axes.barh(at, ratio, color=colors[impl], height=0.85)
                axes.text(ratio, at, f" {ratio:.2f}", va="center", fontsize=8)
                at += 1
        ticks.append(((start + at - 1) / 2, group))
        at += 0.8
    axes.axvline(1, color=style.LIMIT, linewidth=1.2)
    if max(ratio for _, _, ratio in bars) > 4:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    else:  # bars that begin near 1 would make 8 % look like everything
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title("Time of others / time of rope_fused")
