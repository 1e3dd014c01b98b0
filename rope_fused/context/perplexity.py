"""Perplexity of a text in windows: sliding, as users expect it, and truncating, as YaRN's table."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import NamedTuple

import torch

from .swap import forget_lengths

_CHUNK = 1 << 23  # logits turned into float64 at a time: 64 MiB


class Window(NamedTuple):
    """Tokens ``start`` to ``end`` go in; those from ``first`` on are scored."""

    start: int
    end: int
    first: int


def perplexity(
    model, tokens, window, stride, *, batch_size=1, checkpoint=None, bar=None, on_window=None
) -> dict:
    """Sliding-window perplexity: exp of the mean of -ln p(token | tokens before it in its window).

    Windows of ``window`` tokens start at 0, ``stride``, 2 ``stride``, …; the last is what is left,
    and holds the last token. Every token is scored once, in the first window that holds it: after
    the first window with at least ``window - stride`` tokens before it. What has no token before
    it is not scored: the first token of the text and, with ``stride == window``, of each window.
    Logits are the model's own; the log-softmax is float64.

    Args:
        model: a causal LM of transformers, or anything whose ``model(input_ids=ids).logits`` are
            [batch, seqlen, vocabulary]. It should be in eval mode.
        tokens: int64 [n] or a sequence of int, n >= 2; or a list of such documents, whose windows
            are apart and whose tokens are pooled.
        window, stride: in tokens; 1 <= stride <= window, window >= 2.
        batch_size: windows per call of the model. Windows of different lengths never share a call,
            so that nothing is padded and length-dependent frequencies see one length; dynamic NTK
            knows of no earlier call.
        checkpoint: a :class:`~rope_fused.context.progress.Checkpoint` to resume from and to save
            to after each batch; the caller makes it, and removes it when all is done.
        bar: something with ``update(n)``, told of n scored tokens.
        on_window: called with (Window, its float64 CPU tensor of NLLs), for curves by position.
            Not called again for what a resumed run had done before.

    Returns:
        {"perplexity": exp(nll), "nll": mean over scored tokens in nats, "tokens": how many}.

    Raises:
        ValueError: fewer than two tokens, an impossible window or stride, logits that are NaN.
    """
    tokens, todo = laid_out(tokens, lambda n: windows(n, window, stride))
    state = begin(checkpoint, {"done": 0, "total": 0.0, "tokens": 0})
    report(bar, state["tokens"])
    for group in batches(todo, batch_size, state["done"]):
        for w, nll in zip(group, score(model, tokens, group), strict=True):
            state["total"] += nll.sum().item()
            state["tokens"] += nll.numel()
            report(bar, nll.numel())
            if on_window is not None:
                on_window(w, nll)
        state["done"] += len(group)
        if checkpoint is not None:
            checkpoint.save(state)
    mean = state["total"] / state["tokens"]
    if math.isnan(mean):
        raise ValueError("model must give numbers, got NaN for a logit of some window")
    return {"perplexity": exp(mean), "nll": mean, "tokens": state["tokens"]}


def truncated_perplexity(
    model, documents, window, *, batch_size=1, checkpoint=None, bar=None
) -> dict:
    """What YaRN's table calls sliding-window perplexity: one window at the head of each document.

    Its evaluation script passes ``--truncate``, which makes the stride equal to the length, and
    averages over windows: exp(mean over documents of (mean NLL of the first ``window`` tokens)).
    A document shorter than the window is left out. For comparison with published numbers only.

    Args:
        documents: as the list of documents in :func:`perplexity`.

    Returns:
        {"perplexity", "nll", "tokens": scored, "documents": how many were long enough}.

    Raises:
        ValueError: no document of ``window`` tokens, or a window below 2.
    """
    documents = [d[:window] for d in map(as_tokens, documents) if d.numel() >= window]
    if not documents:
        raise ValueError(f"documents must have one of at least {window} tokens, got none")
    # Cut alike, all have as many scored tokens: the mean over windows is that over tokens.
    pooled = perplexity(
        model, documents, window, window, batch_size=batch_size, checkpoint=checkpoint, bar=bar
    )
    return pooled | {"documents": len(documents)}


def windows(n, window, stride) -> list[Window]:
    """The windows of a text of ``n`` tokens, as :func:`perplexity` describes them."""
    if n < 2:
        raise ValueError(f"tokens must be at least 2, got {n}")
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to window {window}, got {stride}")
    found, scored = [], 1
    for start in range(0, n, stride):
        end = min(start + window, n)
        found.append(Window(start, end, max(scored, start + 1)))
        scored = end
        if end == n:
            return [w for w in found if w.first < w.end]


def score(model, tokens, group) -> list[torch.Tensor]:
    """The NLLs, in nats, of the scored tokens of each of some windows of one length.

    One call of the model, without gradients; float64 CPU tensors [end - first].
    """
    device = next(model.parameters()).device
    ids = torch.stack([tokens[w.start : w.end] for w in group]).to(device)
    least = min(w.first - w.start for w in group)
    # Only the logits that are used: they can be the largest tensor there is.
    keep = ids.shape[1] - least + 1
    forget_lengths(model)
    with torch.inference_mode():
        logits = model(input_ids=ids, **forward_options(model, keep)).logits[:, -keep:-1]
        nll = token_nll(logits, ids[:, least:])
    return [row[w.first - w.start - least :] for row, w in zip(nll.cpu(), group, strict=True)]


def token_nll(logits, targets) -> torch.Tensor:
    """-ln softmax(logits)[target] in float64: logits [b, n, vocabulary], targets [b, n] → [b, n].

    Differentiable. Converted a piece at a time, so that no float64 copy of all logits exists.
    """
    step = max(1, _CHUNK // (logits.shape[0] * logits.shape[2]))
    parts = []
    for piece, target in zip(logits.split(step, 1), targets.split(step, 1), strict=True):
        # MPS has no float64.
        piece = piece.cpu() if piece.device.type == "mps" else piece
        log_p = piece.double().log_softmax(-1)
        parts.append(-log_p.gather(-1, target.to(piece.device)[..., None]).squeeze(-1))
    return torch.cat(parts, 1)


def as_tokens(tokens) -> torch.Tensor:
    """Token ids as an int64 CPU tensor [n]."""
    tokens = torch.as_tensor(tokens)
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"tokens must be int [n], got {tokens.dtype} {[*tokens.shape]}")
    return tokens.long().cpu()


def laid_out(tokens, spans):
    """One document or a list of them, joined, and ``spans(n)`` of each, where they lie in it."""
    if isinstance(tokens, list | tuple) and tokens and not isinstance(tokens[0], int):
        documents = [as_tokens(document) for document in tokens]
    else:
        documents = [as_tokens(tokens)]
    found, at = [], 0
    for document in documents:
        found += [Window(*(at + edge for edge in w)) for w in spans(document.numel())]
        at += document.numel()
    return torch.cat(documents), found


def exp(nll) -> float:
    """exp, and infinity where it is more than a float64 holds."""
    return math.exp(nll) if nll < 709 else math.inf


def forward_options(model, keep) -> dict:
    """Arguments of a forward that needs no cache and only the last ``keep`` logits.

    A model that knows neither makes both, and the caller takes the last ones.
    """
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in known else {}
    return options | ({"logits_to_keep": keep} if "logits_to_keep" in known else {})


def batches(todo, size, done=0):
    """Windows from number ``done`` on, in runs of at most ``size`` that are equally long."""
    while done < len(todo):
        length = todo[done].end - todo[done].start
        rest = todo[done : done + size]
        group = list(itertools.takewhile(lambda w, n=length: w.end - w.start == n, rest))
        yield group
        done += len(group)


def begin(checkpoint, empty) -> dict:
    """What a checkpoint holds, or ``empty`` where it holds nothing, or there is none."""
    return dict(checkpoint.state) or empty if checkpoint is not None else empty


def report(bar, n) -> None:
    """Tell ``bar``, if there is one, that ``n`` are done."""
    if bar is not None and n:
        bar.update(n)
