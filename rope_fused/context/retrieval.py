"""Asks a model what a long text hides, over lengths and depths: accuracy, responses, answer NLL."""

from __future__ import annotations

import hashlib
import itertools
import statistics

import torch

from .perplexity import forward_options, report, token_nll
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
    kinds = [(d, t) for d in ([None] if depths is None else depths) for t in range(trials)]
    plan = [(length, *kind) for length in lengths for kind in kinds]
    # What cannot be asked is said before the first question.
    make_prompt(task, tokenizer, min(lengths), *kinds[0], seed, haystack)
    # [number in the plan, what came out], in the order in which they were asked.
    done = list(checkpoint.state.get("done", [])) if checkpoint is not None else []
    report(bar, len(done))
    for first in range(0, len(plan), len(kinds)):
        numbers = range(first, first + len(kinds))
        if len(done) >= numbers.stop:
            continue
        made = {}
        for number in numbers:
            prompt = make_prompt(task, tokenizer, *plan[number], seed, haystack)
            made[number] = prompt, encode_prompt(tokenizer, prompt.text)
        # Equally long ones together; the sort is stable, so that a resumed run asks in this order.
        order = sorted(numbers, key=lambda number: made[number][1].numel())[len(done) - first :]
        for _, same in itertools.groupby(order, key=lambda number: made[number][1].numel()):
            same = list(same)
            for at in range(0, len(same), batch_size):
                group = same[at : at + batch_size]
                answers = _ask(model, tokenizer, task, [made[n] for n in group], with_nll)
                done += [[n, answer] for n, answer in zip(group, answers, strict=True)]
                report(bar, len(group))
                if checkpoint is not None:
                    checkpoint.save({"done": done})
    results = [answer for _, answer in sorted(done, key=lambda pair: pair[0])]
    cells = [
        _cell(plan[at], results[at : at + trials], with_nll) for at in range(0, len(plan), trials)
    ]
    accuracy = statistics.fmean(result["score"] for result in results)
    return {"task": task.name, "accuracy": accuracy, "cells": cells, "trials": results}


def _ask(model, tokenizer, task, group, with_nll):
    """What comes out of (Prompt, ids) that are equally long: one dict each."""
    prompts, ids = zip(*group, strict=True)
    responses = generate(model, torch.stack(ids), task.new_tokens, tokenizer.eos_token_id)
    nlls = answer_nll(model, tokenizer, prompts, ids) if with_nll else [None] * len(group)
    found = []
    for prompt, response, nll in zip(prompts, responses, nlls, strict=True):
        said = tokenizer.decode(response, skip_special_tokens=True)
        one = {
            "length": prompt.length,
            "depth": prompt.depth,
            "trial": prompt.trial,
            "tokens": ids[0].numel(),
            "prompt": hashlib.sha256(prompt.text.encode()).hexdigest()[:16],
            "answers": list(prompt.answers),
            "response": said,
            "score": task.score(prompt, said),
        }
        found.append(one | ({"answer_nll": nll} if with_nll else {}))
    return found


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
