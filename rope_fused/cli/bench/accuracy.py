"""Errors of the angle and of q . k by position, of every baseline and of this package.

One head of 128 dimensions, half-split pairs, base 500 000, a window of 64 tokens that ends just
below each position. Angles are those that a float32 tensor was rotated by; scores are products of
rotated q and k, relative to their norms, with the rounding of both. Everything against float64.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from ... import RopeSpec, apply_rope
from ...context.progress import write_json
from ...context.style import save
from ...files import is_stream
from ...report import UserError, columns
from ..arguments import chosen_device, require
from . import baselines, results, style
from .baselines import Problem

POSITIONS = tuple(1 << n for n in (12, 15, 17, 20, 24, 27, 31))
WINDOW = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(out: Path, device=None) -> None:
    """Measure, print the table, write the results and the pictures."""
    baselines.quiet()
    device = chosen_device(device)
    errors, missing = measure(device)
    document = {
        "machine": results.machine(),
        "versions": results.versions(),
        "commit": results.commit(),
        "settings": {"device": device, "window": WINDOW, "head_dim": 128, "rope_theta": 5e5},
        "errors": errors,
        "missing": missing,
    }
    write_json(out, document)
    print(text(document))
    try:
        require("a picture", "demo", "matplotlib")
        written = [] if is_stream(out) else draw(out, document)
    except UserError as error:
        written = []
        print(error)
    print(f"\nWritten: {', '.join(map(str, [out, *written]))}")


def read(file) -> dict | None:
    """The document in a file of this benchmark, or None if it is none."""
    try:
        document = json.loads(Path(file).read_text(encoding="utf-8"))
        for e in document["errors"]:
            angle = e["angle"] if e["dtype"] == "float32" else 0.0  # as far as it is drawn
            if not (e["impl"] and math.isfinite(angle + e["score"] + e["position"])):
                return None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return document


def measure(device="cpu", positions=POSITIONS) -> tuple[list[dict], list[dict]]:
    """([{impl, position, dtype, angle, score}], [{impl, reason}]); angle in radians, None but for
    float32."""
    spec = RopeSpec.default(head_dim=128, rope_theta=500000.0)
    errors, missing = [], []
    for impl, bind in _implementations(spec, device, missing).items():
        for end in positions:
            window = torch.arange(end - WINDOW, end, device=device)[None]
            for name, dtype in DTYPES.items():
                rotate = bind(Problem(spec, window, dtype))
                angle = _angle(rotate, spec, window) if dtype == torch.float32 else None
                score = _score(rotate, spec, window, dtype)
                entry = {"impl": impl, "position": end, "dtype": name}
                errors.append(entry | {"angle": angle, "score": score})
    return errors, missing


def _implementations(spec, device, missing):
    """{name: Problem -> ((q, k) -> (q2, k2)), bhsd}."""

    def ours(precision):
        def bind(problem):
            options = {"layout": "bhsd", "precision": precision}
            return lambda q, k: apply_rope(q, k, spec, problem.positions, **options)

        return bind

    found = {"rope_fused": ours("exact"), "rope_fused, precision hf": ours("hf")}
    problem = Problem(spec, torch.arange(WINDOW, device=device)[None], torch.float32)
    for rotary in baselines.rotaries({"hf-compile": None}):
        if reason := rotary.obstacle(problem):
            missing.append({"impl": rotary.name, "reason": reason})
        else:
            found[rotary.name] = rotary.bind
    return found


@torch.no_grad()
def _angle(rotate, spec, window):
    """The largest error of an angle: each pair (1, 0) becomes (cos, sin) of its own."""
    x = torch.zeros(1, 1, WINDOW, spec.head_dim, device=window.device)
    x[..., : spec.head_dim // 2] = 1
    cos, sin = rotate(x, x.clone())[0].double().chunk(2, -1)
    exact_cos, exact_sin = spec.cos_sin(window, torch.float64)
    across, along = sin * exact_cos - cos * exact_sin, cos * exact_cos + sin * exact_sin
    return torch.atan2(across, along).abs().max().item()


@torch.no_grad()
def _score(rotate, spec, window, dtype):
    """The largest error of q . k / (|q| |k|) over all pairs of tokens in the window."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, WINDOW, spec.head_dim)
    q, k = (torch.randn(shape, generator=generator).to(window.device, dtype) for _ in range(2))
    options = {"layout": "bhsd", "backend": "reference"}
    exact = apply_rope(q.double(), k.double(), spec, window, **options)
    norms = q.double().norm(dim=-1)[..., None] * k.double().norm(dim=-1)[..., None, :]
    actual = [t.double() for t in rotate(q.clone(), k.clone())]
    error = (actual[0] @ actual[1].mT - exact[0] @ exact[1].mT) / norms
    return error.abs().max().item()


def text(document) -> str:
    """One table."""
    errors = document["errors"]
    positions = sorted({e["position"] for e in errors})
    parts = []
    for heading, dtype, what in (
        ("error of the angle, radians, float32", "float32", "angle"),
        ("error of q . k / (|q| |k|), float32", "float32", "score"),
        ("error of q . k / (|q| |k|), bfloat16", "bfloat16", "score"),
    ):
        rows = [(heading, *(f"below {_power(p)}" for p in positions))]
        for impl in dict.fromkeys(e["impl"] for e in errors):
            of = {
                e["position"]: e[what] for e in errors if (e["impl"], e["dtype"]) == (impl, dtype)
            }
            rows.append((f"  {impl}", *(f"{of[p]:.1e}" for p in positions)))
        parts.append(columns(rows, "<>"))
    parts += [f"Missing: {m['impl']} ({m['reason']})" for m in document["missing"]]
    return "\n".join(parts)


def _power(number):
    return f"2^{number.bit_length() - 1}"


def draw(file, document) -> list[Path]:
    """Write FILE.png and FILE-dark.png beside FILE.json; their paths, none with nothing to draw."""
    if not document["errors"]:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for suffix, theme in style.THEMES.items():
        with plt.rc_context(theme):
            figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
            _curves(axes[0], document, "float32", "angle", bool(suffix))
            axes[0].set_title("Angle, float32")
            axes[0].set_ylabel("largest error, radians")
            _curves(axes[1], document, "bfloat16", "score", bool(suffix))
            axes[1].set_title("q · k, bfloat16")
            axes[1].set_ylabel("largest error, relative to |q| |k|")
            axes[1].legend()
            path = Path(file).with_suffix("")
            path = path.with_name(f"{path.name}{suffix}.png")
            save(figure, path, dpi=120)
            plt.close(figure)
            written.append(path)
    return written


def _curves(axes, document, dtype, what, dark):
    errors = [e for e in document["errors"] if e["dtype"] == dtype]
    names = list(dict.fromkeys(e["impl"] for e in errors))
    colors = style.colors(names, dark)
    for order, name in enumerate(names):
        of = [e for e in errors if e["impl"] == name]
        # Curves that coincide stay visible: later ones are thinner, and dashed.
        line = {"linewidth": 3.2 - 0.5 * order, "linestyle": "-" if order < 2 else (order, (5, 3))}
        axes.plot(
            [e["position"] for e in of],
            [max(e[what], 1e-9) for e in of],
            color=colors[name],
            marker="o",
            markersize=4,
            label=name,
            **line,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    positions = sorted({e["position"] for e in errors})
    axes.set_xticks(positions, [f"$2^{{{p.bit_length() - 1}}}$" for p in positions])
    axes.minorticks_off()
    axes.set_xlabel("position")
