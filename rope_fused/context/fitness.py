"""How good a candidate is: the perplexity of a model that turns by it, without loading it again."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..spec import RopeSpec
from .genome import Genome, Space
from .perplexity import forward_options, token_nll
from .swap import swapped


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """What candidates read: ids, int64 [windows, seqlen], and which of them count, bool, alike.

    A token counts with the logarithm of the probability that the tokens before it give it.
    """

    ids: torch.Tensor
    scored: torch.Tensor

    def __post_init__(self):
        if self.ids.dim() != 2 or self.ids.shape != self.scored.shape:
            raise ValueError(
                f"ids and scored must be [windows, seqlen] alike, got {[*self.ids.shape]} and "
                f"{[*self.scored.shape]}"
            )
        if self.scored[:, 0].any() or not self.scored.any():
            raise ValueError("scored must hold some tokens, and no first one: nothing is before it")


def text_windows(ids: torch.Tensor, window: int, samples: int | None = 5) -> Windows:
    """Windows of a text, of which the later half counts: every token has seen half a window.

    Args:
        ids: the text, int64 [tokens], at least ``window`` of them.
        samples: how many windows, spread evenly over the text (LongRoPE: 5); None, or more than
            there are: all that start at multiples of half a window.
    """
    if ids.numel() < window:
        raise ValueError(f"text must have at least window = {window} tokens, got {ids.numel()}")
    starts = torch.arange(0, ids.numel() - window + 1, max(1, window // 2))
    if samples is not None and samples < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, samples).round().long()]
    rows = ids[starts[:, None] + torch.arange(window)]
    return Windows(rows, (torch.arange(window) >= max(1, window // 2)).expand_as(rows))


def needle_windows(tokenizer, ids, window, samples=10, seed=0) -> Windows:
    """LongRoPE2's needle-driven windows (arXiv:2502.20082, section 4.1): only a number counts.

    A sentence with a number at the start, text, and at the end the question whose answer is that
    number. Plain perplexity averages over tokens that their neighbours give away; these can be had
    from the other end of the window alone.

    Args:
        ids: the text between, int64 [tokens].
        samples: windows; the texts are spread evenly, the numbers drawn with ``seed``.
    """
    generator = torch.Generator().manual_seed(seed)

    def encoded(text):
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows, scored = [], []
    for n in range(samples):
        number = str(torch.randint(1_000_000, 10_000_000, (), generator=generator).item())
        needle = encoded(f"One of the special magic numbers for rope-fused is: {number}.\n")
        question = encoded(
            "\nWhat is the special magic number for rope-fused mentioned in the provided text? "
            "The special magic number for rope-fused mentioned in the provided text is:"
        )
        answer = encoded(f" {number}")
        room = window - len(needle) - len(question) - len(answer)
        if room < 1 or ids.numel() < room:
            raise ValueError(
                f"window must leave room for a text between needle and question, and the text fill "
                f"it, got {window} tokens of which {room} are left, and {ids.numel()} of text"
            )
        at = (ids.numel() - room) * n // max(1, samples - 1)
        rows.append(torch.cat((needle, ids[at : at + room], question, answer)))
        scored.append(torch.arange(window) >= window - len(answer))
    return Windows(torch.stack(rows), torch.stack(scored))


class ModelFitness:
    """The perplexity of ``model`` on ``windows`` under a candidate; lower is fitter.

    Args:
        model: a causal language model of transformers, patched or not. It is never changed: only
            the frequencies and the temperature that its attentions read are, while it runs.
        space: the :class:`Space` of the candidates.
        windows: what it reads.
        batch_size: windows per call of the model.
    """

    def __init__(self, model, space: Space, windows: Windows, batch_size: int = 1):
        self.model, self.space = model.eval(), space
        device = next(model.parameters()).device
        self.ids, self.scored = windows.ids.to(device), windows.scored.to(device)
        self.rows = batch_size
        self.count = int(self.scored.sum())

    def __call__(self, genome: Genome) -> float:
        """exp of the mean negative log-likelihood of the tokens that count."""
        with torch.no_grad():
            return math.exp(self._total(sum, spec=self.space.spec(genome)).item() / self.count)

    def gradients(self, inv_freq, attention_factor) -> float:
        """The mean negative log-likelihood at these tensors, whose ``.grad`` gets its gradient.

        The weights get none.
        """
        held = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in held:
            parameter.requires_grad_(False)

        def descend(losses):
            total = 0.0
            for loss in losses:
                (loss / self.count).backward()
                total += loss.item()
            return total

        try:
            factors = {"inv_freq": inv_freq, "attention_factor": attention_factor}
            return self._total(descend, **factors) / self.count
        finally:
            for parameter in held:
                parameter.requires_grad_()

    def _total(self, reduce, spec: RopeSpec | None = None, **factors):
        """``reduce`` of the summed negative log-likelihoods of all batches, float64 0-d tensors."""
        with swapped(self.model, spec, **factors):
            return reduce(
                self._nll(ids, scored)
                for ids, scored in zip(
                    self.ids.split(self.rows), self.scored.split(self.rows), strict=True
                )
            )

    def _nll(self, ids, scored):
        # Only the columns that somebody scores: a head over 100 000 words is most of a small model.
        columns = scored.any(0).nonzero()[:, 0]
        options = forward_options(self.model, columns - 1)
        logits = self.model(input_ids=ids, **options).logits
        if "logits_to_keep" not in options:
            logits = logits[:, columns - 1]
        return token_nll(logits, ids[:, columns])[scored[:, columns]].sum()
