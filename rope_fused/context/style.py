"""How the pictures look: one style, and one colour for each method wherever it appears."""

from __future__ import annotations

from pathlib import Path

from ..files import replacing

STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "#fbfbfc",
    "axes.edgecolor": "#c9ccd1",
    "axes.labelcolor": "#3c4043",
    "axes.titlecolor": "#202124",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "font.size": 10,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}

_METHODS = {
    "none": "#9aa0a6",
    "linear": "#e08e45",
    "ntk": "#8a79b8",
    "dynamic": "#b26a9b",
    "by_parts": "#4aa3a2",
    "yarn": "#14639e",
    "longrope": "#c0392b",
    "llama3": "#6b8e23",
}
_OTHERS = ("#c0392b", "#2e7d32", "#795548", "#455a64", "#ad1457", "#00838f")


def colors(names) -> dict[str, str]:
    """{name: colour}; methods have theirs, other names take what is left."""
    taken = [_METHODS[name] for name in names if name in _METHODS]
    left = iter([c for c in (*_OTHERS, *_METHODS.values()) if c not in taken] * 8)
    return {name: _METHODS[name] if name in _METHODS else next(left) for name in names}


def save(figure, file, dpi=130) -> None:
    """Write a figure of matplotlib to ``file``, in the format of its suffix; without one, a PNG."""
    with replacing(file) as path:
        figure.savefig(path, dpi=dpi, format=Path(file).suffix[1:] or "png")
