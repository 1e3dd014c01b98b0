"""Pictures of a search: the factors found beside those of PI, NTK and YaRN, and how it went.

Needs matplotlib.
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .style import STYLE, colors, save

_SEEDS = {"pi": ("linear", "PI"), "ntk": ("ntk", "NTK"), "yarn": ("yarn", "YaRN")}


def draw(space, found, searches, file, *, title="Factors found"):
    """Two panels: the factor of every pair, and the best fitness after every evaluation.

    Args:
        space: the search's :class:`~rope_fused.context.genome.Space`.
        found: {label: Genome}.
        searches: {label: (evaluations up to an entry, best fitness up to it)}, both lists.
        file: the picture to write, in the format of its suffix.
    """
    shades = dict(zip(found, _found_colors(len(found)), strict=True))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
        pairs = range(space.pairs)
        for name, genome in space.seeds().items():
            key, label = _SEEDS[name]
            left.plot(pairs, genome.factors, color=colors([key])[key], lw=1.8, label=label)
        for name, genome in found.items():
            left.plot(
                pairs, genome.factors, color=shades[name], lw=2.2, marker="o", ms=4,
                label=f"{name}, temperature {genome.temperature:.3f}",
            )  # fmt: skip
        left.axvline(space.critical_pair(), color="#9aa0a6", lw=1, ls=(0, (4, 3)))
        left.annotate(
            f"no full turn in {space.original:,}\ntokens from here on",
            (space.critical_pair(), left.get_ylim()[0]),
            xytext=(6, 4), textcoords="offset points", va="bottom", fontsize=8.5, color="#5f6368",
        )  # fmt: skip
        left.set_title(title)
        left.set_xlabel("pair (fast to slow)")
        left.set_ylabel("factor λ: the frequency is divided by it")
        for name, (spent, best) in searches.items():
            right.step(spent, best, where="post", lw=2, color=shades.get(name), label=name)
        right.set_title("Search")
        right.set_xlabel("model evaluations (forward and backward: 3)")
        right.set_ylabel("best perplexity on the search's windows")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, file)
        plt.close(figure)


def _found_colors(count):
    shades = ("#c0392b", "#2e7d32", "#795548", "#ad1457")
    return [shades[n % len(shades)] for n in range(count)]
