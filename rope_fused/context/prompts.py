"""Prompts that hide something in a long text: passkey, needle, RULER-style keys and variables.

A prompt depends on its task, length, depth, trial and seed, the tokenizer and the text of the
haystack, and on nothing else: it is the same in whatever order, and wherever, prompts are made.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Callable

# The passkey prompt of Mohtashami & Jaggi, Landmark Attention (arXiv 2305.16300), appendix: the
# numbers published for it (YaRN, LongRoPE) are for these words.
_PASSKEY_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there.\n"
)
_PASSKEY_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_PASSKEY_NEEDLE = "The pass key is {0}. Remember it. {0} is the pass key."
_PASSKEY_TAIL = "\nWhat is the pass key? The pass key is"

_PLACES = [
    "Amsterdam",
    "Athens",
    "Bergen",
    "Bogota",
    "Boston",
    "Cairo",
    "Chicago",
    "Dakar",
    "Dublin",
    "Geneva",
    "Hanoi",
    "Havana",
    "Kyoto",
    "Lagos",
    "Lima",
    "Lisbon",
    "Madrid",
    "Nairobi",
    "Oslo",
    "Prague",
    "Quito",
    "Riga",
    "Tunis",
    "Vienna",
]


class TooShortError(ValueError):
    """A length has no room for a question; the message says how much it needs."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question about a long text.

    text      what the model is given
    answers   strings that the answer must contain
    length    tokens asked for: those of the text and of the answer together are no more
    depth     where the (first) hidden sentence is, 0 (start) to 1 (end)
    """

    task: str
    text: str
    answers: tuple[str, ...]
    length: int
    depth: float
    trial: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A way to make prompts, and to read answers.

    make        (random.Random, depth) → (head, [(depth, hidden sentence)], tail, answers)
    filler      the sentences of the haystack, repeated as often as needed; () takes a text's
    new_tokens  of an answer, at most
    exact       the first number of the answer has to be the one asked for; else the score is the
                share of ``answers`` that it contains
    """

    name: str
    make: Callable
    filler: tuple[str, ...] = _PASSKEY_FILLER
    new_tokens: int = 16
    exact: bool = False

    def score(self, prompt: Prompt, response: str) -> float:
        """0 (wrong) to 1 (all of it)."""
        if self.exact:
            first = re.search(r"\d+", response)
            return float(first is not None and first.group() == prompt.answers[0])
        return sum(answer in response for answer in prompt.answers) / len(prompt.answers)


def make_prompt(task: Task, tokenizer, length, depth, trial, seed, haystack=None) -> Prompt:
    """The prompt of ``task`` with these numbers, as long as it can be.

    Args:
        tokenizer: counts the tokens; one of transformers.
        length: tokens of prompt and answer together, at most. What is left over is less than a
            sentence of the haystack.
        depth: 0 to 1, or None: random.
        haystack: sentences instead of the task's own; read from a random one on, round and round.

    Raises:
        TooShortError: ``length`` has no room for the question.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be from 0 to 1, got {depth}")
    # Not Python's hash of a tuple, which differs from one process to the next for strings.
    rng = random.Random(f"{task.name}/{length}/{depth}/{trial}/{seed}")
    depth = rng.random() if depth is None else depth
    head, hidden, tail, answers = task.make(rng, depth)
    sentences = haystack or task.filler
    start = rng.randrange(len(sentences)) if haystack else 0

    def text(count):
        filler = list(itertools.islice(itertools.cycle(sentences), start, start + count))
        # From the last to the first, so that an insertion moves none that is still to come. The
        # sort is stable, and of two at one place the first one listed ends up first.
        for at, sentence in sorted(hidden, key=lambda pair: pair[0])[::-1]:
            filler.insert(round(at * count), sentence)
        return head + " ".join(filler) + tail

    def size(count):
        return len(tokenizer(text(count), verbose=False)["input_ids"])

    count = _largest(size, length - task.new_tokens)
    if count is None:
        raise TooShortError(
            f"lengths must be at least {size(0) + task.new_tokens} tokens for {task.name} with "
            f"this tokenizer, got {length}"
        )
    return Prompt(task.name, text(count), answers, length, depth, trial)


def _largest(size, room):
    """The largest count with size(count) <= room, size being nearly linear; None if not even 0."""
    low, low_size = 0, size(0)
    if low_size > room:
        return None
    high, high_size = 16, size(16)
    while high_size <= room:
        low, low_size = high, high_size
        high = max(2 * high, math.ceil(high * (room + 1) / high_size) + 1)
        high_size = size(high)
    while high - low > 1:  # size(low) <= room < size(high): where a line would cross
        share = (room - low_size) / (high_size - low_size)
        guess = min(max(low + 1, low + int(share * (high - low))), high - 1)
        got = size(guess)
        if got <= room:
            low, low_size = guess, got
        else:
            high, high_size = guess, got
    return low


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, or its lines where it is no prose; blank ones left out."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


# -- the tasks -----------------------------------------------------------------------------------


def _passkey(head):
    def make(rng, depth):
        key = str(rng.randint(10000, 99999))
        return head, [(depth, _PASSKEY_NEEDLE.format(key))], _PASSKEY_TAIL, (key,)

    return make


def _fact(place, number):
    return f"The secret number of {place} is {number}."


def _ask(places, several):
    named = places[0] if len(places) == 1 else f"{', '.join(places[:-1])} and {places[-1]}"
    subject = f"secret numbers of {named}" if several else f"secret number of {named}"
    verb = "are" if several else "is"
    return f"\nWhat {verb} the {subject}? The {subject} {verb}"


def _facts(head, keys=1, values=1, queries=1):
    """Facts about ``keys`` places with ``values`` numbers each, ``queries`` places asked for.

    The first is at the depth asked for, the others anywhere.
    """

    def make(rng, depth):
        places = rng.sample(_PLACES, keys)
        numbers = iter(rng.sample(range(10000, 100000), keys * values))
        facts = [(place, str(next(numbers))) for place in places for _ in range(values)]
        asked = places[:queries]
        spots = [depth, *(rng.random() for _ in facts[1:])]
        hidden = [(at, _fact(*fact)) for at, fact in zip(spots, facts, strict=True)]
        answers = tuple(number for place, number in facts if place in asked)
        return head, hidden, _ask(asked, len(answers) > 1), answers

    return make


def _variables(hops):
    """One chain of assignments and one that leads astray; all names of the first are asked for."""

    def make(rng, depth):
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        names = set()
        while len(names) < 2 * (hops + 1):
            names.add("".join(rng.choices(letters, k=4)))
        names = rng.sample(sorted(names), len(names))
        value, other = rng.sample(range(10000, 100000), 2)
        hidden = []
        for chain, number in ((names[: hops + 1], value), (names[hops + 1 :], other)):
            links = [
                f"{chain[0]} = {number}.",
                *(f"{b} = {a}." for a, b in itertools.pairwise(chain)),
            ]
            first = depth if number == value else rng.random()
            # In order, from the first link on: a value is known before it is handed on.
            spots = [first, *sorted(first + (1 - first) * rng.random() for _ in links[1:])]
            hidden += [(at, f"Variable {link}") for at, link in zip(spots, links, strict=True)]
        head = "The following text hides assignments of variables. Follow them.\n"
        tail = (
            f"\nWhich variables have the value {value}, according to the text?"
            f" The {hops + 1} variables with the value {value} are"
        )
        return head, hidden, tail, tuple(names[: hops + 1])

    return make


PASSKEY = Task("passkey", _passkey(_PASSKEY_HEAD), new_tokens=10, exact=True)
PASSKEY_BRIEF = Task("passkey", _passkey(""), new_tokens=10, exact=True)
"""The passkey prompt without its introduction: for models with small windows."""
NEEDLE = Task("needle", _facts(""), new_tokens=10, exact=True)
_HEAD = "Secret numbers are hidden in the following text. Remember them.\n"
RULER = {
    task.name: task
    for task in (
        Task("niah_single", _facts(_HEAD), new_tokens=16),
        Task("niah_multikey", _facts(_HEAD, keys=4), new_tokens=16),
        Task("niah_multivalue", _facts(_HEAD, values=4), new_tokens=64),
        Task("niah_multiquery", _facts(_HEAD, keys=4, queries=4), new_tokens=64),
        Task("variable_tracking", _variables(hops=4), new_tokens=48),
    )
}
"""In the manner of RULER (Hsieh et al., arXiv 2404.06654): its kinds of task, not its words.

Scores are comparable with one another; for RULER's own, use its harness or lm-evaluation-harness.
"""
