"""How the pictures of the commands look."""

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
"""For matplotlib.pyplot.rc_context."""
