"""What a specification says, for people to read in a terminal."""

from __future__ import annotations

import textwrap

from ...report import columns

_WIDTH = 96
_MANY = 8  # values that are shown of a list


def text(title: str, n: dict) -> str:
    """The numbers of one kind of layer: what it is, its pairs, its readers, its notes."""
    parts = [title, columns(_facts(n), indent=2), columns(_pairs(n), align=_align(n), indent=2)]
    parts += ["how others read the same file", _readers(n)]
    if n["notes"]:
        parts += ["notes", _listed(n["notes"])]
    return "\n\n".join(parts)


def compared(title: str, named: dict[str, dict]) -> str:
    """The factor of every pair, one column for each of several specifications."""
    tables = {}
    for name, n in named.items():
        for table, values in n["tables"].items():
            tables[name if len(n["tables"]) == 1 else f"{name}, {table}"] = values
    rows = [("pair", *tables)]
    for pair in range(max(len(values["factor"]) for values in tables.values())):
        cells = (
            _number(values["factor"][pair]) if pair < len(values["factor"]) else ""
            for values in tables.values()
        )
        rows.append((pair, *cells))
    rows.append(("A", *(_factor(values["attention_factor"]) for values in tables.values())))
    explained = "factor by which each pair is slowed; last line: the attention factor"
    return "\n\n".join((title, explained, columns(rows, align=">", indent=2)))


def _facts(n):
    pairs = "(2 j, 2 j + 1)" if n["interleaved"] else f"(j, j + {n['rotary_dim'] // 2})"
    where = f", from {n['rotary_offset']}" if n["rotary_offset"] else ""
    yield "method", n["rope_type"]
    yield "head", f"{n['rotary_dim']} of {n['head_dim']} dimensions turn{where}, in pairs {pairs}"
    yield "rope_theta", f"{n['rope_theta']:.15g}"
    for key, value in n["parameters"].items():
        if value is not None:
            yield key, _brief(value)
    if n["max_position_embeddings"] and "max_position_embeddings" not in n["parameters"]:
        yield "max_position_embeddings", n["max_position_embeddings"]
    if n["axes"] > 1:
        share = ", ".join(str(n["axis_map"].count(axis)) for axis in range(n["axes"]))
        yield "position axes", f"{n['axes']}, which turn {share} pairs"
    if n["cache_class"] == "dynamic":
        (name,) = n["tables"]
        yield "table", f"that of {int(name):,} tokens; --seq-len N shows another"
    for name, table in n["tables"].items():
        label = "attention factor" if len(n["tables"]) == 1 else f"attention factor, {name}"
        yield label, _attention(table["attention_factor"])
    if n["softmax_multiplier"] != 1:
        yield "softmax scale", f"times {n['softmax_multiplier']!r}, left to the attention"
    if n["q_temperature"] is not None:
        beta, length, offset = n["q_temperature"]
        position = "(position + 1)" if offset else "position"
        yield "each query", f"times 1 + {beta:g} ln(1 + floor({position} / {length:g}))"
    yield "cached keys", _cache(n)
    if n["longest_length"]:
        errors = list(n["tables"].values())[-1]["float32_angle_error"]
        worst = max(errors)
        yield (
            "float32 angles",
            f"off by up to {worst:.1e} rad before position {n['longest_length']:,} "
            f"(pair {errors.index(worst)}); these here: exact",
        )
    if n["hf_refusal"]:
        yield 'precision="hf"', f"refused: {n['hf_refusal']}"


def _attention(factor) -> str:
    if factor == 1:
        return "1"
    if isinstance(factor, tuple | list):
        return f"one per pair, {_brief(factor)}: on cos and sin of q and k"
    return f"{factor!r}: on cos and sin of q and k, so logits times {factor * factor:.6g}"


def _cache(n) -> str:
    if n["cache_class"] == "static":
        return "static: valid at every length"
    if n["cache_class"] == "switch":
        first = f", the first {n['n_start']} positions excepted" if n["n_start"] else ""
        return (
            f"switch: of the short table up to {n['switch_length']:,} tokens, of the long one "
            f"beyond{first}; pin the choice (seq_lens) or rerotate"
        )
    return "dynamic: every length has its own table; pin it (seq_lens) or rerotate"


def _pairs(n):
    several = len(n["tables"]) > 1
    tables = list(n["tables"].items())
    header = ["pair", "dims"]
    for name, table in tables:
        suffix = f", {name}" if several else ""
        header += [f"wavelength{suffix}", f"factor{suffix}"]
        if table["turns"] and not several:
            header.append(f"turns in {n['trained_length']:,}")
    header += ["", "float32 error"] if n["longest_length"] else [""]
    yield header
    last, half = tables[-1][1], n["rotary_dim"] // 2
    for pair, zone in enumerate(last["zone"]):
        a, b = (2 * pair, 2 * pair + 1) if n["interleaved"] else (pair, pair + half)
        row = [pair, f"{a + n['rotary_offset']}, {b + n['rotary_offset']}"]
        for _, table in tables:
            row += [_number(table["wavelength"][pair]), _number(table["factor"][pair])]
            if table["turns"] and not several:
                row.append(f"{table['turns'][pair]:.4g}")
        row.append(zone)
        if n["longest_length"]:
            row.append(f"{last['float32_angle_error'][pair]:.1e}")
        yield row


def _align(n) -> str:
    numbers = 3 if len(n["tables"]) == 1 and next(iter(n["tables"].values()))["turns"] else 2
    return ">>" + ">" * numbers * len(n["tables"]) + "<>"


def verdict(reading: dict, attention_factor) -> str:
    """What one reader makes of it, in a few words."""
    if reading["verdict"] != "differs":
        return {"same": "the same tables", "cannot": "cannot"}[reading["verdict"]]
    what = []
    difference = reading["inv_freq_difference"]
    if difference is None:
        what.append("other pairs")
    elif difference:
        # Both ways: a frequency four times too high is 300 % off, and one at a quarter 75 %.
        what.append(f"frequencies by up to {100 * difference:.3g} %")
    if reading["attention_factor"] != attention_factor:
        what.append(f"attention factor {_factor(reading['attention_factor'])}")
    return "differs: " + ", ".join(what)


def _readers(n) -> str:
    ours = list(n["tables"].values())[-1]["attention_factor"]
    width = max(len(reading["reader"]) for reading in n["readers"])
    lines = []
    for reading in n["readers"]:
        lines.append(f"  {reading['reader']:{width}}  {verdict(reading, ours)}")
        lines += (_wrapped(rule, " " * (width + 4)) for rule in reading["rules"])
    return "\n".join(lines)


def _listed(notes) -> str:
    return "\n".join(_wrapped(note, "  ") for note in notes)


def _wrapped(line, indent) -> str:
    return textwrap.fill(
        line, _WIDTH, initial_indent=f"{indent}- ", subsequent_indent=f"{indent}  "
    )


def _number(value) -> str:
    return "-" if value is None else f"{value:.6g}"


def _factor(value) -> str:
    return "per pair" if isinstance(value, tuple | list) else f"{value:.6g}"


def _brief(value) -> str:
    if isinstance(value, tuple | list) and len(value) > _MANY:
        return f"{len(value)} values, {value[0]:g} .. {value[-1]:g}"
    return f"{value:.15g}" if isinstance(value, float) else str(value)
