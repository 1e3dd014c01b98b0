"""Published fine-tuning recipes, by name, each with its source."""

from __future__ import annotations

import dataclasses

from .training import Recipe


@dataclasses.dataclass(frozen=True)
class Stage:
    """One fine-tune: a factor, the length of its data, and how it is trained.

    factor   s: the window becomes s times the original one
    length   tokens of a training sequence, in original windows
    recipe   its ``accumulation`` is left at 1: it follows from ``batch``
    batch    sequences of an optimizer step, over all processes
    """

    factor: float
    length: float
    recipe: Recipe
    batch: int


@dataclasses.dataclass(frozen=True)
class Preset:
    """Stages that follow each other, each from the weights of the one before."""

    method: str
    stages: tuple[Stage, ...]
    source: str


def _yarn(steps, rate=2e-5, schedule="linear"):
    return Recipe(steps, rate, schedule, warmup_steps=20)


PRESETS = {
    "pi": Preset(
        "linear",
        (Stage(4, 4, Recipe(1000, 2e-5, "constant", warmup_steps=20), 64),),
        "Chen et al., arXiv 2306.15595, section 3.1: Llama 7B and 13B, 1000 steps, window 8192",
    ),
    "yarn": Preset(
        "yarn",
        (Stage(16, 16, _yarn(400), 64), Stage(32, 16, _yarn(200), 64)),
        "Peng et al., arXiv 2309.00071, section 4.1, and train.sh of jquesnelle/yarn: Llama 2 7B "
        "and 13B; s = 32 goes on from s = 16 with the same data of 64k tokens",
    ),
    "yarn-mistral": Preset(
        "yarn",
        (
            Stage(8, 2, _yarn(1000, 1e-6, "constant"), 64),
            Stage(16, 2, _yarn(500, 1e-6, "constant"), 64),
        ),
        "Peng et al., arXiv 2309.00071, appendix B.4: Mistral 7B, data of 16k tokens",
    ),
    "longrope": Preset(
        "longrope",
        (Stage(32, 32, _yarn(400), 32), Stage(64, 32, _yarn(600), 32)),
        "Ding et al., arXiv 2402.13753, section 4.1: Llama 2 7B, 400 steps with the factors for "
        "128k, then 600 with those for 256k",
    ),
    "longrope-mistral": Preset(
        "longrope",
        (Stage(16, 2, _yarn(400, 1e-6, "constant"), 64),),
        "Ding et al., arXiv 2402.13753, section 4.1: Mistral 7B, data of 16k tokens",
    ),
    "longrope2": Preset(
        "longrope",
        (Stage(16, 16, Recipe(1200, 2e-5, "cosine", warmup_steps=20), 64),),
        "Shang et al., arXiv 2502.20082, section 5.1: Llama 3 8B from 8k to 128k on 10 B tokens, "
        "short and long texts mixed (--mixed)",
    ),
    "two-stages": Preset(
        "yarn",
        (Stage(4, 4, _yarn(400), 64), Stage(16, 16, _yarn(200), 64)),
        "YaRN's hyper-parameters for 8k to 32k to 128k; no publication has just these",
    ),
}
