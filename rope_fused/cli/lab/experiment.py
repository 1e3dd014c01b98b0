"""The lab's experiment, part by part; what each part found is kept, and never computed again."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import torch
import transformers

from ... import patch
from ...context import evolution, extend, fitness, loading, methods, search
from ...context.genome import Genome
from ...context.perplexity import perplexity
from ...context.presets import Stage
from ...context.progress import Checkpoint, bar
from ...context.swap import swapped
from ...context.training import Recipe, train
from . import world

METHODS = ("none", "linear", "ntk", "by_parts", "yarn")
TUNED = ("none", "linear", "ntk", "yarn", "longrope")
TEMPERATURES = (1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4)
_READ_AT_ONCE = 8192  # tokens
_FOUND = "longrope"


class Experiment:
    """One seed's experiment at some scale, in a folder of its own.

    Args:
        scale: a :class:`~rope_fused.cli.lab.scale.Scale`.
        folder: models, checkpoints, and ``results.json``: {part: what it found}.
    """

    # Each part, and its share of the time: training alone is a good quarter.
    PARTS = {
        "training": 30,
        "search": 34,
        "zero_shot": 12,
        "temperature": 4,
        "passkey": 3,
        "tuning": 17,
    }

    def __init__(self, scale, seed, folder):
        self.scale, self.seed, self.folder = scale, seed, Path(folder)
        settings = dataclasses.asdict(scale) | {"seed": seed, "torch": torch.__version__}
        settings |= {"transformers": transformers.__version__}
        del settings["seeds"]
        self.kept = Checkpoint(self.folder / "results.json", settings)
        self.kept.SHARE = math.inf  # what a part found is written at once, however quick it was

    @property
    def results(self) -> dict:
        """What the parts found that are done."""
        return self.kept.state

    def run(self, part):
        """Run a part, unless it is done."""
        if part not in self.results:
            self.kept.save(self.results | {part: getattr(self, f"_{part}")()})

    # -- parts ---------------------------------------------------------------------------------

    def _training(self):
        scale = self.scale
        model = world.model(self.seed, scale.layers, scale.width)
        levels = patch(model, strict=True).levels
        draw = world.mixture(self.texts.train, scale.batch, (world.WINDOW,), scale.passkeys)
        recipe = Recipe(scale.steps, 3e-3, "cosine", warmup_steps=min(20, scale.steps // 5))
        with bar(scale.steps, f"seed {self.seed}: training", "step") as progress:
            losses = train(
                model, draw, recipe, self.folder / "training", seed=self.seed, said=_told(progress)
            )
        model.save_pretrained(self.folder / "model")
        world.tokenizer().save_pretrained(self.folder / "model")
        for name, tokens in (("search", self.texts.search), ("test", self._test)):
            (self.folder / f"{name}.txt").write_text(world.text(tokens))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        return {"losses": losses, "millions": millions, "levels": sorted(set(levels.values()))}

    def _search(self):
        """Evolution at every factor but the first; by gradient, seeded, by needle at the last."""
        found = {}
        *others, last = self.scale.factors[1:]
        for factor in others:
            found[f"evolution {factor}"] = self._searched(factor, "evolution")
        for kind in ("evolution", "gradient", "seeded"):
            found[f"{kind} {last}"] = self._searched(last, kind)
        found[f"needle {last}"] = self._searched(last, "evolution", needle=True)
        return found

    def _zero_shot(self):
        """{factor: {method: {"long", "short"}}}: perplexity in the long and in the old window."""
        table = {}
        cells = [(s, name) for s in self.scale.factors for name in self._blocks(s)]
        with bar(len(cells), f"seed {self.seed}: zero-shot", "cell") as progress:
            for factor, name in cells:
                block = self._blocks(factor)[name]
                table.setdefault(str(factor), {})[name] = {
                    "long": self._perplexity(self.model, factor, block),
                    "short": self._perplexity(self.model, 1, block),
                }
                progress.update()
        return table

    def _temperature(self):
        """{temperature: perplexity} with the frequencies of NTK-by-parts, at the last factor."""
        factor = self.scale.factors[-1]
        block = self._blocks(factor)["by_parts"]
        return {
            str(t): self._perplexity(self.model, factor, block | {"attention_factor": t})
            for t in TEMPERATURES
        }

    def _passkey(self):
        """{method: {length: accuracy}}, each length with the factor it needs."""
        plain = self._blocks(self.scale.factors[0])["none"]
        table = {"none": {str(world.WINDOW): self._recall(self.model, 1, plain)}}
        for factor in self.scale.factors:
            for name, block in self._blocks(factor).items():
                right = self._recall(self.model, factor, block)
                table.setdefault(name, {})[str(world.WINDOW * factor)] = right
        return table

    def _tuning(self):
        """{method: losses, perplexities and accuracies} after the same short fine-tune."""
        factor, scale = self.scale.factors[-1], self.scale
        recipe = Recipe(scale.tune_steps, 5e-4, "cosine", warmup_steps=min(10, scale.tune_steps))
        stage = Stage(factor, factor, recipe, 4)
        config = self.model.config
        draw = functools.partial(_mixed, self.texts.train)
        table = {}
        for name in TUNED:
            block = self._blocks(factor)[name]
            folder = self.folder / "tuned" / name
            plan = extend.plans(config, [stage], name, blocks=[block], mixed=True)
            with bar(scale.tune_steps, f"seed {self.seed}: tuning {name}", "step") as progress:
                told = _told(progress)
                (stage_folder,) = extend.extend(
                    self.folder / "model",
                    self.texts.train,
                    plan,
                    folder,
                    prepare=functools.partial(patch, strict=True),
                    draw=draw,
                    micro_batch=4,
                    seed=self.seed,
                    said=lambda _, step, steps, loss, told=told: told(step, steps, loss),
                )
            model, _ = loading.load(stage_folder)
            patch(model, strict=True)
            table[name] = {
                "losses": extend.losses_of(stage_folder),
                "long": self._perplexity(model, factor, block),
                "short": self._perplexity(model, 1, block),
                "recall": {
                    str(world.WINDOW * s): self._recall(model, s, block) for s in (1, factor)
                },
            }
        return table

    # -- what they share -----------------------------------------------------------------------

    @functools.cached_property
    def texts(self):
        return world.texts()

    @functools.cached_property
    def model(self):
        model, _ = loading.load(self.folder / "model")
        patch(model, strict=True)
        return model

    @property
    def _test(self):
        return self.texts.test[: self.scale.test_bytes]

    def space(self, factor):
        """The search's :class:`~rope_fused.context.genome.Space`."""
        return search.space_of(self.model, factor, original=world.WINDOW)

    def _blocks(self, factor):
        """{method: rope_parameters} for a factor; the searched ones with their factors throughout.

        (In use, their block keeps the original frequencies up to 128 tokens: ``short`` then shows
        what a method does to short texts that it is applied to.)
        """
        config = self.model.config
        blocks = {n: methods.block_of(n, config, factor, world.WINDOW) for n in METHODS}
        found = self.results.get("search", {}).get(f"evolution {factor}")
        if found is not None:
            genome = Genome.from_json(found["genome"])
            block = self.space(factor).block(genome)
            blocks[_FOUND] = block | {"short_factor": block["long_factor"]}
        return blocks

    def _searched(self, factor, kind, needle=False):
        scale, window = self.scale, world.WINDOW * factor
        generator = torch.Generator().manual_seed(self.seed)
        samples = max(1, scale.search_tokens // window)
        if needle:
            rows = world.passkeys(self.texts.search, 2 * samples, window, generator)
            windows = fitness.Windows(
                rows, (torch.arange(window) >= window - world.DIGITS).expand_as(rows)
            )
        else:
            windows = fitness.text_windows(self.texts.search, window, samples)
        budget = scale.evaluations
        if kind == "gradient":
            budget //= 5
        if needle:
            budget //= 2
        name = f"{'needle' if needle else kind} {factor}"
        checkpoint = Checkpoint(
            self.folder / f"search-{name.replace(' ', '-')}.partial", {"evaluations": budget}
        )
        with bar(budget, f"seed {self.seed}: {name}x", "evaluation") as progress:
            result = search.search(
                self.model,
                self.texts.search[: 2 * window],
                self.space(factor),
                windows,
                window=window,
                evaluations=budget,
                method=kind,
                seed=self.seed,
                batch_size=max(1, _READ_AT_ONCE // window),
                checkpoint=checkpoint,
                bar=progress,
            )
        checkpoint.remove()
        known = result.known
        best = evolution.best(known)
        block = self.space(factor).block(best)
        block |= {"short_factor": block["long_factor"]}
        return {
            "genome": best.as_json(),
            "fitness": known[best],
            "history": evolution.history(known),
            "evaluations": result.evaluations,
            "spent": result.spent,
            "test": self._perplexity(self.model, factor, block),
            "recall_nll": self._recall_nll(factor, block),
        }

    def _perplexity(self, model, factor, block):
        """Of the test's text in windows ``factor`` times as long as the training's."""
        window = world.WINDOW * factor
        with swapped(model, methods.spec_of(model.config, block)):
            found = perplexity(
                model, self._test, window, window // 2, batch_size=max(1, _READ_AT_ONCE // window)
            )
        return found["perplexity"]

    def _keys(self, factor):
        generator = torch.Generator().manual_seed(self.seed + 1)
        rows = world.passkeys(self.texts.test, self.scale.trials, world.WINDOW * factor, generator)
        return rows.split(max(1, _READ_AT_ONCE // rows.shape[1]))

    def _recall(self, model, factor, block):
        """Share of passkeys that greedy decoding gets right: each digit is the likeliest one."""
        right = 0
        with swapped(model, methods.spec_of(model.config, block)), torch.no_grad():
            for rows in self._keys(factor):
                logits = model(rows, use_cache=False, logits_to_keep=world.DIGITS + 1).logits
                said = logits[:, :-1].argmax(-1)
                right += (said == rows[:, -world.DIGITS :]).all(1).sum().item()
        return right / self.scale.trials

    def _recall_nll(self, factor, block):
        """Nats per digit of the passkeys' answers."""
        total = 0.0
        with swapped(self.model, methods.spec_of(self.model.config, block)), torch.no_grad():
            for rows in self._keys(factor):
                logits = self.model(rows, use_cache=False, logits_to_keep=world.DIGITS + 1).logits
                losses = torch.nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2), rows[:, -world.DIGITS :], reduction="sum"
                )
                total += losses.item()
        return total / (self.scale.trials * world.DIGITS)


def _mixed(tokens, plan, generator):
    """Half text and half passkeys, of one of the lengths of ``plan``."""
    return world.mixture(tokens, 4, plan.lengths, 0.5)(generator)


def _told(progress):
    def told(step, steps, loss):
        progress.update(step - progress.n)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)

    return told
