"""Writes docs/patched_models.md: what patch(model) does with each family of transformers.

python tests/patched_models.py docs/patched_models.md
"""

import re
import sys
import warnings
from pathlib import Path

import transformers

import rope_fused as rf
import zoo

HEAD = """# What `patch` does, family by family

Every decoder family of transformers {version} that has a rotary embedding, as a tiny random model
with grouped queries and, where its rope block allows, YaRN. This page is written by
`python tests/patched_models.py docs/patched_models.md`. That patched equals unpatched in each of
them (logits, gradients of all parameters, restarting positions, `generate()` with a cache,
`unpatch`), and that the levels are what runs, is checked by `tests/test_patch_matrix.py`, which
transformers 5.0.0 and 4.57.6 pass as well.

- **2**: one operator projects, applies bias and QK-norm, and rotates; **1**: one operator norms
  and rotates; **0**: the rotation alone; **–**: left alone.
- *exact* and *hf* are the values of `precision`; *hf, unfused* is `fuse_projection=False`, which
  changes no bit.
- Layers that do not rotate are not counted, nor are the other layers of hybrid models, the towers
  of composite ones, and the indexers beside sparse attention, which keep their own rotation.

{shares}

| model_type | exact | hf | hf, unfused | why not more (exact) |
|---|---|---|---|---|
"""
MODES = {
    "exact": {},
    "hf": {"precision": "hf"},
    "hf, unfused": {"precision": "hf", "fuse_projection": False},
}
_OTHER = re.compile(r"(vision|visual|audio|image|embed_tokens_extend|indexer|compressor)")


def counted(report):
    """{module: level} of the attentions that turn text, and the reasons of those not at level 2."""
    levels, reasons = {}, {}
    for name, level in report.levels.items():
        reason = report.reasons.get(name, "")
        if _OTHER.search(name) or "NoPE" in reason or "has no rotary embedding" in reason:
            continue
        levels[name] = level
        if reason:
            reasons[reason] = None
    return levels, [*reasons]


def lowest(levels):
    """The level that all of ``levels`` reach; None if one is left alone."""
    found = [*levels.values()]
    return None if not found or None in found else min(found)


def row(model_type):
    """(lowest level in each of MODES, reasons) of a family."""
    model = zoo.make(model_type)
    found = {mode: counted(rf.patch(model, **options)) for mode, options in MODES.items()}
    return [lowest(levels) for levels, _ in found.values()], found["exact"][1]


def shares(rows):
    """How many of ``rows`` are at which level with exact precision, in words."""
    exact = [levels[0] for levels, _ in rows.values()]
    fused, done = (sum(x is not None and x >= least for x in exact) for least in (1, 0))
    return (
        f"Of {len(exact)} families, with exact precision, {fused} ({fused / len(exact):.0%})\n"
        f"are at level 2 or 1, {done} ({done / len(exact):.0%}) at level 0 or better, and "
        f"{len(exact) - done} are left alone."
    )


def table(rows):
    """The page."""
    page = HEAD.format(version=transformers.__version__, shares=shares(rows))
    for model_type, (levels, reasons) in rows.items():
        cells = ["–" if level is None else str(level) for level in levels]
        reason = "; ".join(r.replace("|", "\\|") for r in reasons)
        page += f"| `{model_type}` | {' | '.join(cells)} | {reason} |\n"
    skipped = [f"`{name}` ({why})" for name, why in zoo.SKIPPED.items()]
    return f"{page}\nNot run: {', '.join(skipped)}.\n"


def read(page):
    """{model_type: levels in MODES} of a page that :func:`table` made; {} of another version's."""
    if f" transformers {transformers.__version__} " not in page:
        return {}
    rows = re.findall(r"^\| `(\w+)` \| (.) \| (.) \| (.) \|", page, re.MULTILINE)
    return {name: [int(c) if c.isdigit() else None for c in cells] for name, *cells in rows}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = {name: row(name) for name in zoo.families()}
    Path(sys.argv[1]).write_text(table(rows))
    print(shares(rows))
