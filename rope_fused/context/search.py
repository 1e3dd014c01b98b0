"""Search the factors and the temperature that stretch a model's window best.

By evolution, as LongRoPE does (Ding et al., arXiv:2402.13753) or as LongRoPE2 (Shang et al.,
arXiv:2502.20082); by gradient, which nobody had; or by both in turns.
"""

from __future__ import annotations

import dataclasses
import math

import torch.distributed as dist

from . import evolution, gradient, methods
from .fitness import ModelFitness, Windows
from .genome import Genome, Space
from .perplexity import perplexity
from .progress import Checkpoint
from .swap import swapped

METHODS = ("evolution", "gradient", "seeded")
_GRADIENT_SHARE = 5  # of a seeded search's evaluations, one in so many goes into the gradient


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What was found, and how.

    genome       the best candidate
    block        the same as ``rope_parameters`` of transformers
    perplexity   of the whole text, sliding by half a window
    evaluations  of candidates on the search's windows: a pass forward is one, a pass forward and
                 backward three
    known        fitness of every candidate, in the order of their evaluation
    spent        evaluations up to each of them
    yarn         perplexity of the whole text with YaRN
    """

    genome: Genome
    block: dict
    perplexity: float
    evaluations: int
    known: dict[Genome, float]
    spent: tuple[int, ...]
    yarn: float


def space_of(model, factor, *, original=None, **options) -> Space:
    """The :class:`Space` of a transformers model: its plain rotary embedding, to be stretched.

    Args:
        factor: s, how much longer the window shall be.
        original: tokens that the weights were trained to read; None: what the configuration says.
        options: further fields of Space.

    Raises:
        ValueError: a model that does not rotate by one table of positions on one axis.
    """
    config = model.config.get_text_config()
    base = methods.spec_of(config, methods.block_of("none", config, 1.0))
    if base.axes > 1 or base.rope_type != "default":
        raise ValueError(f"model must have plain rotary embedding under its scaling, got {base}")
    return Space(base, original or methods.original_length(config), float(factor), **options)


def search(
    model,
    tokens,
    space: Space,
    windows: Windows,
    *,
    window: int,
    evaluations: int | None = None,
    method: str = "evolution",
    seed: int = 0,
    batch_size: int = 1,
    checkpoint: Checkpoint | None = None,
    bar=None,
) -> SearchResult:
    """Search ``space`` for the candidate under which ``model`` reads ``windows`` best.

    The weights stay, the frequencies are swapped: no candidate costs more than its forward passes.
    The winner on ``windows`` is then compared with YaRN on the whole text, and the better of the
    two is the result. With torch.distributed initialised, the processes share the candidates, and
    all return the same result.

    Args:
        model: of transformers, in eval mode, patched or not.
        tokens: the whole text, int64 [n].
        windows: what candidates are judged by: :func:`~rope_fused.context.fitness.text_windows` of
            the text, or :func:`~rope_fused.context.fitness.needle_windows`.
        window: tokens of a window of the final perplexity; its stride is half of that.
        evaluations: None: :func:`usual_evaluations`.
        method: "evolution"; "gradient": a descent from YaRN; "seeded": a fifth of the evaluations
            for the descent, evolution with what it found in the first generation, and a fifth for
            a descent from the best of all.
        seed: of the evolution. The same seed gives the same result.
        batch_size: windows per call of the model.
        checkpoint: to resume from, and to save to after every generation; the caller removes it.
        bar: something with ``update(n)``, told of n evaluations.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if evaluations is None:
        evaluations = usual_evaluations(method)
    checkpoint = checkpoint or Checkpoint(None, {})
    fitness = ModelFitness(model, space, windows, batch_size)
    known, spent = {}, []

    def keep(found, passes):
        """Add what was ``found``, a genome after every so many ``passes``."""
        before = spent[-1] if spent else 0
        spent.extend(before + passes * n for n, g in enumerate(found, 1) if g not in known)
        known.update({g: f for g, f in found.items() if g not in known})

    def descend(start, evaluations, part):
        steps = gradient.Descent(max(1, evaluations // gradient.PASSES_PER_STEP))
        found = gradient.descend(fitness, start, steps, checkpoint=checkpoint.part(part), bar=bar)
        keep(found, gradient.PASSES_PER_STEP)

    share = evaluations if method == "gradient" else evaluations // _GRADIENT_SHARE
    if method != "evolution":
        descend(space.seeds()["yarn"], share, "gradient")
    # Evolution leaves the nearest minimum, and the gradient finds what is lowest around it.
    between = evaluations - (2 * spent[-1] if method == "seeded" else 0)
    if method != "gradient" and between > 0:
        extra = (evolution.best(known),) if known else ()
        sizes = evolution.Evolution.within(between)
        part = checkpoint.part("evolution")
        keep(
            evolution.evolve(
                fitness, space, sizes, seed=seed, extra=extra, checkpoint=part, bar=bar
            ),
            1,
        )
    if method == "seeded" and (left := evaluations - spent[-1]) >= gradient.PASSES_PER_STEP:
        descend(evolution.best(known), left, "descent")
    expressible = {g: f for g, f in known.items() if not g.n_start}
    finalists = {"found": evolution.best(expressible), "yarn": space.seeds()["yarn"]}
    scores = {
        name: _whole(model, tokens, space, genome, window, batch_size, checkpoint.part(name))
        for name, genome in finalists.items()
    }
    winner = "found" if scores["found"] <= scores["yarn"] else "yarn"
    return SearchResult(
        finalists[winner],
        space.block(finalists[winner]),
        scores[winner],
        spent[-1],
        known,
        tuple(spent),
        scores["yarn"],
    )


def usual_evaluations(method) -> int:
    """LongRoPE's 1344, or a fifth of them where the gradient searches alone."""
    return evolution.Evolution().evaluations // (_GRADIENT_SHARE if method == "gradient" else 1)


def _whole(model, tokens, space, genome, window, batch_size, checkpoint):
    """The perplexity of all of the text, as ``rope-fused evaluate perplexity`` has it."""
    config = model.config.get_text_config()
    stride = max(1, window // 2)
    with swapped(model, methods.spec_of(config, space.block(genome))):
        found = perplexity(
            model, tokens, window, stride, batch_size=batch_size, checkpoint=checkpoint
        )
    value = found["perplexity"]
    return value if math.isfinite(value) else math.inf


def shared_checkpoint(file, settings) -> Checkpoint:
    """A Checkpoint for all processes of torch.distributed: the first one reads and writes it.

    The others get what it read, and keep theirs in memory.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Checkpoint(file, settings)
    told = [None]
    if dist.get_rank() == 0:
        try:
            checkpoint = Checkpoint(file, settings)
            told = [checkpoint.state]
        except OSError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], OSError):
        raise told[0]
    if dist.get_rank():
        checkpoint = Checkpoint(None, settings)
        checkpoint.state = told[0]
    return checkpoint
