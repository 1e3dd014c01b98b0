"""How large the lab's experiment is: the usual one, the full one, and one for the tests."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scale:
    """Numbers of the experiment.

    seeds          of models, each with its own training
    layers, width  of the model
    steps, batch   of its training: sequences of 128 tokens
    passkeys       share of them that end in a passkey prompt
    factors        how much longer windows get; the last is searched and tuned for
    test_bytes     of the text that everything is tested on
    evaluations    of a search
    search_tokens  that a search judges a candidate by, half of which count
    tune_steps     of fine-tuning, on four sequences of the longest window each
    trials         passkey prompts of one length
    """

    seeds: tuple[int, ...] = (0,)
    layers: int = 4
    width: int = 128
    steps: int = 900
    batch: int = 32
    passkeys: float = 0.4
    factors: tuple[int, ...] = (2, 4, 8)
    test_bytes: int = 40_960
    evaluations: int = 512
    search_tokens: int = 10_240
    tune_steps: int = 60
    trials: int = 20


USUAL = Scale()
FULL = Scale(seeds=(0, 1), evaluations=1344, tune_steps=240, trials=50)
