"""Asks a model what a long text hides, over lengths and depths: accuracy, responses, answer NLL."""

from __future__ import annotations

import hashlib
import statistics

import torch

from .perplexity import forward_options, token_nll
from .prompts import Task, make_prompt
from .swap import forget_lengths


def retrieve(
    model,
    tokenizer,
    task: Task,
    lengths,
    *,
    depths=None,
    trials=10,
    seed=0,
    batch_size=1,
    haystack=None,
    with_nll=False,
    checkpoint=None,
    bar=None,
) -> dict:
    """Ask ``trials`` questions of ``task`` at every length and depth; decoding is greedy.

    Prompts depend on (task, length, depth, trial, seed) only: see :func:`prompts.make_prompt`.
    Those of one token count share a call of the model, so that nothing is padded.

    Args:
        model, tokenizer: of transformers.
        task: one of :mod:`~rope_fused.context.prompts`.
        lengths: tokens of prompt and answer together.
        depths: where the hidden sentence is, 0 to 1; None: anew at random for each trial.
        batch_size: prompts per call of the model.
        haystack: sentences to hide it in, instead of the task's own.
        with_nll: also how likely the right answers were; reads every prompt a second time.
        checkpoint, bar: as for :func:`~rope_fused.context.perplexity.perplexity`; the bar counts
            prompts.

    Returns:
        {"task", "accuracy": mean score, "cells": [{"length", "depth", "trials", "accuracy"}, ...],
        "trials": [{"length", "depth", "trial", "tokens", "prompt": hash, "answers", "response",
        "score"}, ...]}. ``depth`` of a cell is None where it was random. ``with_nll`` adds
        "answer_nll" to cells and trials: the mean NLL (nats) of the tokens of the right answer
        given the prompt, of which LongRoPE2's needle-driven perplexity is the exponential.

    Raises:
        ValueError: a length without room for the question, a depth outside 0 to 1.
    """
    places = [None] if depths is None else list(depths)
    plan = [(n, d, t) for n in lengths for d in places for t in range(trials)]
    make = _maker(task, tokenizer, seed, haystack)
    make(min(lengths), places[0], 0)  # what cannot be asked is said before the first question
    done = list(checkpoint.state.get("trials", [])) if checkpoint is not None else []
    if bar is not None and done:
        bar.update(len(done))
    while len(done) < len(plan):
        group = [make(*plan[len(done)])]
        while len(group) < batch_size and len(done) + len(group) < len(plan):
            following = make(*plan[len(done) + len(group)])
            if following[1].numel() != group[0][1].numel():
                break
            group.append(following)
        prompts, ids = zip(*group, strict=True)
        responses = generate(model, torch.stack(ids), task.new_tokens, tokenizer.eos_token_id)
        nlls = answer_nll(model, tokenizer, prompts, ids) if with_nll else [None] * len(group)
        for prompt, tokens, response, nll in zip(prompts, ids, responses, nlls, strict=True):
            said = tokenizer.decode(response, skip_special_tokens=True)
            done.append(
                {
                    "length": prompt.length,
                    "depth": prompt.depth,
                    "trial": prompt.trial,
                    "tokens": tokens.numel(),
                    "prompt": hashlib.sha256(prompt.text.encode()).hexdigest()[:16],
                    "answers": list(prompt.answers),
                    "response": said,
                    "score": task.score(prompt, said),
                }
                | ({"answer_nll": nll} if with_nll else {})
            )
        if bar is not None:
            bar.update(len(group))
        if checkpoint is not None:
            checkpoint.save({"trials": done})
    cells = [
        _cell(plan[at], done[at : at + trials], with_nll) for at in range(0, len(done), trials)
    ]
    accuracy = statistics.fmean(trial["score"] for trial in done)
    return {"task": task.name, "accuracy": accuracy, "cells": cells, "trials": done}


def _cell(first, trials, with_nll):
    length, depth, _ = first
    cell = {"length": length, "depth": depth, "trials": len(trials)}
    names = {"accuracy": "score"} | ({"answer_nll": "answer_nll"} if with_nll else {})
    return cell | {
        name: statistics.fmean(trial[key] for trial in trials) for name, key in names.items()
    }


def generate(model, ids, steps, stop=None) -> list[list[int]]:
    """Greedy continuations of equally long prompts.

    The model's own ``generate`` obeys what a checkpoint's generation_config.json says of sampling
    and penalties; this takes the likeliest token, ``steps`` times or up to the token ``stop``.

    Args:
        ids: int64 [batch, seqlen].

    Returns:
        For each prompt its new tokens, ``stop`` left out.
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    options = forward_options(model, 1) | {"use_cache": True}
    step, cache, made = ids, None, []
    forget_lengths(model)
    finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
    with torch.inference_mode():
        for _ in range(steps):
            out = model(input_ids=step, past_key_values=cache, **options)
            new = out.logits[:, -1].argmax(-1)
            made.append(new)
            if stop is not None:
                finished |= new == stop
                if bool(finished.all()):
                    break
            cache = out.past_key_values
            # A model without a cache reads everything again.
            step = new[:, None] if cache is not None else torch.cat((ids, torch.stack(made, 1)), 1)
    rows = torch.stack(made, 1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def answer_nll(model, tokenizer, prompts, ids=None) -> list[float]:
    """Mean NLL, in nats per token, of the right answer of each prompt, which follows it.

    Args:
        prompts: :class:`~rope_fused.context.prompts.Prompt`; their answers, joined by ", ".
        ids: their token ids, if they are at hand.
    """
    device = next(model.parameters()).device
    ids = [encode_prompt(tokenizer, p.text) for p in prompts] if ids is None else list(ids)
    answers = [encode_answer(tokenizer, " " + ", ".join(p.answers)) for p in prompts]
    sizes = [(prompt.numel(), answer.numel()) for prompt, answer in zip(ids, answers, strict=True)]
    found = [0.0] * len(prompts)
    for size in sorted(set(sizes)):
        members = [i for i, s in enumerate(sizes) if s == size]
        rows = torch.stack([torch.cat((ids[i], answers[i])) for i in members]).to(device)
        count = size[1]
        forget_lengths(model)
        with torch.inference_mode():
            logits = model(input_ids=rows, **forward_options(model, count + 1)).logits
            nll = token_nll(logits[:, -count - 1 : -1], rows[:, -count:]).mean(1).tolist()
        for i, value in zip(members, nll, strict=True):
            found[i] = value
    return found


def encode_prompt(tokenizer, text) -> torch.Tensor:
    """A prompt as ids, with the special tokens that the tokenizer puts before a text."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    # One that ends every text, as some tokenizers add, would end the answer before it began.
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return torch.tensor(ids, dtype=torch.int64)


def encode_answer(tokenizer, text) -> torch.Tensor:
    """What follows a prompt as ids, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _maker(task, tokenizer, seed, haystack):
    """(length, depth, trial) → (Prompt, its ids); the last few are kept for the next batch."""
    kept = {}

    def make(length, depth, trial):
        key = length, depth, trial
        if key not in kept:
            if len(kept) > 1:
                kept.clear()
            prompt = make_prompt(task, tokenizer, length, depth, trial, seed, haystack)
            kept[key] = prompt, encode_prompt(tokenizer, prompt.text)
        return kept[key]

    return make
