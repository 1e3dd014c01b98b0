"""The results of a run for people to read."""

from __future__ import annotations

from ...report import columns

MARK = "!"
_KINDS = {"missing": "Missing", "failed": "Failed", "wrong": "Not timed, since it is WRONG"}


def text(document) -> str:
    """Tables of all cases, the targets, and what is missing."""
    parts = [_case(rows) for rows in cases(document["results"]).values()]
    parts += [_targets(document["targets"])] if document.get("targets") else []
    tolerance = document["settings"]["tolerance"]
    parts.append(
        f"Medians; +-: half the distance of the quartiles. {MARK}: the two orders of the variants "
        f"disagree by more than {tolerance:.0%}.\n"
        "of limit: time of a copy of the same bytes, or of the bare product, over the time."
    )
    missing = {}
    for entry in document.get("missing", ()):
        kind = _KINDS[entry["kind"]]
        missing.setdefault((kind, entry["impl"], entry["reason"]), []).append(entry["op"])
    lines = [
        f"{k}: {impl} ({reason}): {', '.join(ops)}" for (k, impl, reason), ops in missing.items()
    ]
    lines += [f"Left out: {e['case']} ({e['reason']})" for e in document.get("left_out", ())]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def cases(rows) -> dict[tuple, list[dict]]:
    """The rows by case."""
    found = {}
    for row in rows:
        found.setdefault(key(row)[:1] + key(row)[2:], []).append(row)
    return found


def key(row) -> tuple:
    """What identifies a result: (op, impl, shape, variant, dtype, seqlen)."""
    return (
        *(row[name] for name in ("op", "impl", "shape")),
        row.get("variant", ""),
        row["dtype"],
        row["seqlen"],
    )


def title(row) -> str:
    """The case of a row in words."""
    variant = f", {row['variant']}" if row.get("variant") else ""
    return f"{row['op']} {row['shape']} {row['dtype']} seqlen {row['seqlen']:,}{variant}"


def _case(rows):
    head = ["", "time", "", "", "of limit", "rate", "memory"]
    on_gpu = any(row.get("host_us") is not None for row in rows)
    predicted = any(row.get("predicted_us") is not None for row in rows)
    head += ["launches", "host"] if on_gpu else []
    head += ["predicted"] if predicted else []
    lines = [head]
    for row in rows:
        cells = [
            row["impl"],
            f"{row['median_us'] / 1e3:.3f} ms",
            f"+-{row['spread']:.1%}",
            MARK if row["marked"] else "",
            "" if row["of_limit"] is None else f"{row['of_limit']:.1%}",
            _rate(row),
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f} MB",
        ]
        cells += [row["launches"] or "", f"{row['host_us'] or 0:.1f} us"] if on_gpu else []
        cells += [f"{row['predicted_us'] or 0:.1f} us"] if predicted else []
        lines.append(cells)
    limit = f"; limit: {rows[0]['limit']}" if rows[0]["limit"] else ""
    return f"{title(rows[0])}{limit}\n{columns(lines, '<>', indent=2)}"


def _rate(row):
    """Bytes per second, or flops where those are what takes the time."""
    if not row["bytes"]:
        return ""
    if row["flops"] / row["bytes"] > 20:
        return f"{row['tflops_per_s'] * 1e3:,.0f} Gflop/s"
    return f"{row['gb_per_s']:,.1f} GB/s"


def _targets(targets):
    rows = [("targets", "", "measured", "", "must", "aim", "")]
    for t in targets:
        name = f"{t['impl']} / {t['other']}"
        name = f"speed-up over {t['other']}" if t["speedup"] else name
        met = "aim met" if t["aim_met"] else "met" if t["must_met"] else "NOT MET"
        mark = MARK if t["marked"] else ""
        numbers = (f"{t['ratio']:.3f}", mark, f"{t['must']:.2f}", f"{t['aim']:.2f}")
        rows.append((t["case"], name, *numbers, met))
    return columns(rows, "<<>")
