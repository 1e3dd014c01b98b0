"""The lab's page: tables, pictures, and what held of the papers' claims and what did not."""

from __future__ import annotations

import math

from ... import __version__
from ...context import pictures, search_pictures
from ...context.genome import Genome
from ...context.methods import LABELS
from ...report import facts
from . import lab_pictures, world
from .checks import checks

# Perplexities without fine-tuning, of Llama 2 7B: the orders that ours are read against.
_PAPERS = """
| source | setting | PI | NTK | YaRN | LongRoPE |
|---|---|---|---|---|---|
| LongRoPE (arXiv 2402.13753), table 1 | Proof-pile, 16k | 4.93 | 3.87 (dynamic) | 3.25 | 3.13 |
| LongRoPE, table 3 | Proof-pile, 64k | 72.54 | | 4.15 | 3.22 |
| LongRoPE, table 3 | the same, fine-tuned | 2.44 | | 2.42 | 2.36 |
"""


def write(experiments, folder) -> list[tuple]:
    """Write ``folder/README.md`` and its pictures; return (seed, Check) of all assertions."""
    scale = experiments[0].scale
    asserted = [
        (one.seed, check) for one in experiments for check in checks(one.results, scale.factors)
    ]
    failed = [pair for pair in asserted if not pair[1].holds]
    lines = [
        "# Extending a context window, on a small model",
        "",
        f"A Llama of {experiments[0].results['training']['millions']:.2f} million parameters has "
        f"learned to read {world.WINDOW} bytes of Python at a time ({scale.steps} steps of "
        f"{scale.batch} sequences, {scale.passkeys:.0%} with a passkey), then gets windows up to "
        f"{scale.factors[-1]} times as long. {_machine()}",
        "",
        f"**Of {len(asserted)} claims that are asserted, {len(asserted) - len(failed)} hold.**",
        "",
        _table(
            ["seed", "claim", "numbers", "holds"],
            [
                [seed, c.claim, _order(c.numbers), "yes" if c.holds else "**NO**"]
                for seed, c in asserted
            ],
        ),
        "",
        "For comparison, published perplexities of Llama 2 7B, window 4096:",
        _PAPERS,
    ]  # fmt: skip
    for one in experiments:
        lines += _seed(one, folder)
    text = "\n".join(lines).rstrip() + "\n"
    (folder / "README.md").write_text(text)
    return asserted


def _seed(one, folder):
    scale, results = one.scale, one.results
    last = scale.factors[-1]
    name = f"seed-{one.seed}"
    curves = {}
    for factor, row in results["zero_shot"].items():
        for method, cell in row.items():
            curves.setdefault(method, {})[world.WINDOW * int(factor)] = cell["long"]
    pictures.perplexity_curves(
        curves, folder / f"{name}-zero-shot.png", original=world.WINDOW,
        title="Without training: each window with the factor it needs",
    )  # fmt: skip
    recall = {
        method: {int(length): share for length, share in row.items()}
        for method, row in results["passkey"].items()
    }
    pictures.accuracy_curves(recall, folder / f"{name}-passkey.png", original=world.WINDOW)
    lab_pictures.temperature(results["temperature"], last, folder / f"{name}-temperature.png")
    lab_pictures.tuning(results["tuning"], last, folder / f"{name}-tuning.png")
    searches = {
        label: results["search"][f"{kind} {last}"]
        for kind, label in (
            ("evolution", "evolution"),
            ("gradient", "gradient"),
            ("seeded", "gradient, evolution, gradient"),
            ("needle", "evolution by needle (LongRoPE2's fitness)"),
        )
    }
    search_pictures.draw(
        one.space(last),
        {label: Genome.from_json(found["genome"]) for label, found in searches.items()},
        {
            label: (found["spent"], found["history"])
            for label, found in searches.items()
            if "needle" not in label
        },
        folder / f"{name}-search.png",
        title=f"Factors found for {last}x",
    )
    return [
        f"## Seed {one.seed}",
        "",
        "### Without training",
        "",
        f"Perplexity per byte of {scale.test_bytes:,} bytes that nothing was trained on, in "
        "sliding windows, stride half a window; in brackets that of windows of "
        f"{world.WINDOW} bytes under the same factors.",
        "",
        _zero_shot(results["zero_shot"]),
        "",
        f"`rope-fused evaluate compare --model {name}/model --text {name}/test.txt --factor {last} "
        f"--windows {world.WINDOW},{world.WINDOW * last}` measures the column of {last}x anew.",
        "",
        f"![Perplexity against window]({name}-zero-shot.png)",
        "",
        "### Temperature",
        "",
        _temperature(results["temperature"], last),
        "",
        f"![Perplexity against temperature]({name}-temperature.png)",
        "",
        "### Search",
        "",
        _search(searches, results),
        "",
        f"![Factors, and how the searches went]({name}-search.png)",
        "",
        f"### After a fine-tune of {scale.tune_steps} steps",
        "",
        "Each method from the same weights on the same data: four sequences of "
        f"{world.WINDOW * last} bytes a step or as many bytes of shorter ones, half of them with a "
        "passkey.",
        "",
        _tuned(results["tuning"], last),
        "",
        f"![Loss of the fine-tune, and what came of it]({name}-tuning.png)",
        "",
        "### Passkey, without training",
        "",
        f"{scale.trials} prompts of each length: differences below "
        f"{100 / math.sqrt(scale.trials):.0f} points are chance.",
        "",
        f"![Passkey accuracy against length]({name}-passkey.png)",
        "",
    ]


def _order(numbers):
    return ", ".join(f"{number:.3f}" for number in numbers)


def _zero_shot(table):
    names = [n for n in LABELS if any(n in row for row in table.values())]
    rows = []
    for name in names:
        cells = [row.get(name) for row in table.values()]
        rows.append(
            [LABELS[name]]
            + [f"{c['long']:.3f} [{c['short']:.3f}]" if c else "not searched" for c in cells]
        )
    return _table(["method", *(f"{factor}x" for factor in table)], rows)


def _temperature(table, factor):
    values = {float(t): p for t, p in table.items()}
    best, wanted = min(values, key=values.get), 0.1 * math.log(factor) + 1
    near = min(values, key=lambda t: abs(t - wanted))
    return (
        f"With the frequencies of NTK-by-parts at {factor}x the best attention factor of this "
        f"grid is {best:g}; YaRN's rule has 0.1 ln {factor} + 1 = {wanted:.3f} (perplexity "
        f"{values[best]:.3f}; at the grid's nearest to the rule {values[near]:.3f}, at 1 "
        f"{values[1.0]:.3f})."
    )


def _search(searches, results):
    rows = []
    for label, found in searches.items():
        rows.append(
            [
                label,
                found["evaluations"],
                "-" if "needle" in label else f"{found['fitness']:.4f}",
                f"{found['test']:.4f}",
                f"{found['recall_nll']:.3f}",
            ]
        )
    table = _table(
        ["search", "evaluations", "perplexity it searched by", "perplexity of the test",
         "passkey, nats per digit"],
        rows,
    )  # fmt: skip
    evolution, descent, seeded = (
        found["fitness"] for label, found in searches.items() if "needle" not in label
    )
    apart = descent / evolution - 1
    reached = "reaches" if apart <= 0.01 else "does not reach"
    least = min(evolution, descent)
    never = "are not worse than either" if seeded <= least else "are worse than one of them"
    return (
        f"{table}\n\nOne pass forward is one evaluation, one forward and backward three. The "
        f"descent {reached} evolution's perplexity to 1 % in a fifth of its evaluations "
        f"({apart:+.2%}); both in turns {never} ({seeded / least - 1:+.2%})."
    )


def _tuned(table, factor):
    short, long = str(world.WINDOW), str(world.WINDOW * factor)
    rows = [
        [
            LABELS[name],
            f"{cell['long']:.3f}",
            f"{cell['short']:.3f}",
            f"{cell['recall'][long]:.0%}",
            f"{cell['recall'][short]:.0%}",
        ]
        for name, cell in sorted(table.items(), key=lambda item: item[1]["long"])
    ]
    return _table(
        ["method", f"perplexity at {factor}x", "perplexity at 1x", f"passkey at {factor}x",
         "passkey at 1x"],
        rows,
    )  # fmt: skip


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _machine():
    here = facts()
    return (
        f"Computed by rope_fused {__version__}, torch {here['packages']['torch']}, transformers "
        f"{here['packages']['transformers']} on {here['processor']}, {here['threads']} threads."
    )
