"""Perplexity of the tokens that need a long context: those that a short one makes much less likely.

Fang et al. 2024, What is wrong with perplexity for long-context language modeling (LongPPL, arXiv
2410.23771), equations 2 to 5.
"""

from __future__ import annotations

import torch

from .perplexity import Window, batches, begin, exp, laid_out, report, score, windows


def key_token_perplexity(
    model,
    tokens,
    window,
    stride,
    *,
    short=None,
    judge=None,
    gain=2.0,
    floor=-2.0,
    batch_size=1,
    checkpoint=None,
    bar=None,
) -> dict:
    """exp of the mean NLL over key tokens, each seen with the long context.

    A token x is key if, for the judge, the long context makes it likely and the short one does not:
    ``ln p(x | long) - ln p(x | short) > gain`` (LSD) and ``ln p(x | long) > floor`` (LCL).

    Args:
        model, tokens, window, stride, batch_size, checkpoint, bar: as in
            :func:`~rope_fused.context.perplexity.perplexity`, whose windows are the long contexts.
        short: tokens of the short window: a token has at least half of it before it, where the text
            has. None: window / 8, at least 2. The paper takes 4096 of 32 k.
        judge: the model that decides which tokens are key, of the same vocabulary; None: ``model``
            itself. The paper has one strong judge for all models, so that all of them are measured
            on the same tokens.
        gain, floor: the paper's α and β, in nats.

    Returns:
        {"perplexity": of the key tokens (None if there are none), "nll", "key_tokens": how many,
        "perplexity_all", "tokens": of all scored tokens, as ``perplexity`` has them}.

    Raises:
        ValueError: an impossible window, stride or short window.
    """
    judge = model if judge is None else judge
    short = max(2, window // 8) if short is None else short
    if not 2 <= short < window:
        raise ValueError(f"short must be from 2 to below window {window}, got {short}")
    tokens, todo = laid_out(tokens, lambda n: windows(n, window, stride))
    state = begin(checkpoint, {"done": 0, "total": 0.0, "tokens": 0, "key": 0.0, "keys": 0})
    report(bar, state["tokens"])
    while state["done"] < len(todo):
        w = todo[state["done"]]
        (measured,) = score(model, tokens, [w])
        judged = measured if judge is model else score(judge, tokens, [w])[0]
        alone = _short_context(judge, tokens, w, short, batch_size)
        key = (alone - judged > gain) & (judged < -floor)
        state["total"] += measured.sum().item()
        state["tokens"] += measured.numel()
        state["key"] += measured[key].sum().item()
        state["keys"] += int(key.sum())
        state["done"] += 1
        report(bar, measured.numel())
        if checkpoint is not None:
            checkpoint.save(state)
    mean = state["key"] / state["keys"] if state["keys"] else None
    return {
        "perplexity": None if mean is None else exp(mean),
        "nll": mean,
        "key_tokens": state["keys"],
        "perplexity_all": exp(state["total"] / state["tokens"]),
        "tokens": state["tokens"],
    }


def _short_context(model, tokens, w, short, batch_size):
    """NLLs of what ``w`` scores, in windows of ``short`` tokens inside it: float64 [scored]."""
    step = max(1, short // 2)
    spans = []
    for first in range(w.first, w.end, step):
        end = min(first + step, w.end)
        spans.append(Window(max(w.start, end - short), end, first))
    parts = [score(model, tokens, group) for group in batches(spans, batch_size)]
    return torch.cat([nll for part in parts for nll in part])
