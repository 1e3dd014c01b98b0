"""How the pictures of benchmarks look: light and dark, and a colour for everybody compared."""

from __future__ import annotations

from ...context.style import STYLE

_DARK = STYLE | {
    "figure.facecolor": "#0d1117",
    "savefig.facecolor": "#0d1117",
    "axes.facecolor": "#11161d",
    "axes.edgecolor": "#3d444d",
    "axes.labelcolor": "#c9d1d9",
    "axes.titlecolor": "#f0f6fc",
    "text.color": "#e6edf3",
    "grid.color": "#262c36",
    "xtick.color": "#9198a1",
    "ytick.color": "#9198a1",
}
THEMES = {"": STYLE, "-dark": _DARK}  # by what is added to the name of the file

LIMIT = "#9aa0a6"
_OTHERS = ("#3a9a6b", "#c2528b", "#b8a13a", "#5bb5c5", "#a0603c")
_FIXED = {
    **dict.fromkeys(("clone", "copy", "linear"), LIMIT),
    "hf-eager": "#e08e45",
    "hf-compile": "#8a79b8",
    "liger": _OTHERS[0],
    "flash-attn": _OTHERS[1],
    "torch-onnx": _OTHERS[2],
    "transformer-engine": _OTHERS[3],
    "unsloth": _OTHERS[4],
}


def colors(names, dark=False) -> dict[str, str]:
    """{name: colour}, the same name always in the same one."""
    fixed = _FIXED | {"rope_fused": "#58a6ff" if dark else "#14639e"}
    return {name: fixed.get(name, _OTHERS[sum(name.encode()) % len(_OTHERS)]) for name in names}
