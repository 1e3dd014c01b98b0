"""Fine-tune a model for a longer window, stage by stage, and measure before and after."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from . import loading, methods
from .perplexity import perplexity
from .presets import Stage
from .progress import Checkpoint, write_json
from .swap import swapped
from .training import train


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`extend` does with one stage.

    stage    of a preset, or one's own
    block    ``rope_parameters`` of the stage
    window   tokens that the model is made for
    lengths  tokens of the training sequences; each micro-batch has one of them, at random
    """

    stage: Stage
    block: Mapping
    window: int
    lengths: tuple[int, ...]


def plans(config, stages, method, *, original=None, blocks=(), mixed=False) -> list[Plan]:
    """The plans of some stages for the model of ``config``.

    Args:
        stages: :class:`~rope_fused.context.presets.Stage`, with rising factors.
        method: a name of :func:`rope_fused.context.methods.block_of`, or "longrope".
        blocks: one ``rope_parameters`` per stage, which "longrope" needs: its factors are searched
            (:mod:`rope_fused.context.search`).
        original: the window of the weights; None: what the configuration says.
        mixed: besides the stage's length also shorter ones, halved down to the original window: a
            model trained on full windows alone forgets short ones (LongRoPE2's mixed windows).
    """
    original = original or methods.original_length(config)
    if blocks and len(blocks) != len(stages):
        raise ValueError(f"blocks must be one for each of {len(stages)} stages, got {len(blocks)}")
    if method == "longrope" and not blocks:
        raise ValueError(
            f"method longrope needs a block of searched factors for each of {len(stages)} stages"
        )
    found = []
    for number, stage in enumerate(stages):
        block = blocks[number] if blocks else methods.block_of(
            method, config, stage.factor, original
        )  # fmt: skip
        lengths = [round(stage.length * original)]
        while mixed and lengths[-1] // 2 >= original:
            lengths.append(lengths[-1] // 2)
        block, window = loading.complete_rope(config, block), round(stage.factor * original)
        found.append(Plan(stage, block, window, tuple(lengths)))
    return found


def check(plans: list[Plan], tokens, micro_batch=1, processes=1) -> None:
    """Raise ValueError where some plan cannot be followed: what :func:`extend` checks first.

    Args: ``tokens``: of the training text, or None with a ``draw`` of one's own.
    """
    longest, sequences = max(max(plan.lengths) for plan in plans), micro_batch * processes
    if tokens is not None and tokens.numel() < longest:
        raise ValueError(f"text must have at least {longest} tokens, got {tokens.numel()}")
    for plan in plans:
        if plan.stage.batch % sequences:
            raise ValueError(
                f"batch must be a multiple of micro-batch x processes = {sequences}, got "
                f"{plan.stage.batch}"
            )


def extend(
    folder,
    tokens,
    plans: list[Plan],
    out,
    *,
    prepare: Callable | None = None,
    tokenizer=None,
    draw: Callable | None = None,
    micro_batch: int = 1,
    processes: int = 1,
    seed: int = 0,
    device="cpu",
    autocast: bool = False,
    checkpointing: bool = False,
    said: Callable | None = None,
) -> list[Path]:
    """Fine-tune the checkpoint in ``folder``; each stage starts from the weights of the last.

    Stopped at any point and called again with the same arguments, it goes on from the last
    checkpoint of the stage it was in, to the same weights.

    Args:
        tokens: of the training text, int64 [n].
        plans: from :func:`plans`.
        out: a folder; ``out/stage-1``, ... get a model, its tokenizer and ``losses.json``, and what
            training needs to go on.
        prepare: called with the model before it is trained: ``rope_fused.patch``.
        tokenizer: as for :func:`rope_fused.context.loading.load`; saved with every stage.
        draw: ``draw(plan, generator)`` makes a micro-batch of ids, instead of stretches of
            ``tokens``.
        micro_batch: sequences of the longest length in one pass; shorter ones are more.
        processes: that train together (torchrun).
        device, autocast, checkpointing: where, whether in bfloat16, whether activations are
            recomputed.
        said: ``said(stage number, step, steps, loss)`` after every step.

    Returns:
        The folders of the stages' models.
    """
    check(plans, None if draw else tokens, micro_batch, processes)
    out, folder, done = Path(out), Path(folder), []
    for number, plan in enumerate(plans, 1):
        target = out / f"stage-{number}"
        if not (target / "losses.json").exists():
            # Weights in float32: updates of 1e-5 are lost in bfloat16.
            model, reader = loading.load(
                folder,
                rope=plan.block,
                tokenizer=tokenizer if number == 1 else None,
                dtype=torch.float32,
                device=device,
            )
            model.config.get_text_config().max_position_embeddings = plan.window
            if prepare is not None:
                prepare(model)
            losses = train(
                model.train(),
                _draw(plan, tokens, micro_batch) if draw is None else _bound(draw, plan),
                dataclasses.replace(
                    plan.stage.recipe, accumulation=plan.stage.batch // (micro_batch * processes)
                ),
                out / f"stage-{number}.training",
                seed=seed + number,
                autocast=autocast,
                checkpointing=checkpointing,
                said=None if said is None else _bound(said, number),
            )
            if not dist.is_initialized() or dist.get_rank() == 0:
                _save(model, reader, losses, target)
            if dist.is_initialized():  # by the Trainer, under torchrun
                dist.barrier()
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.rmtree(out / f"stage-{number}.training", ignore_errors=True)
        folder = target
        done.append(target)
    return done


def losses_of(folder) -> list[float]:
    """The losses of the training that made ``folder``."""
    return json.loads((Path(folder) / "losses.json").read_text())


def curve(model, tokens, windows, block, *, batch_size=1, checkpoint=None, name="") -> dict:
    """{window: perplexity}, sliding by half a window, with the rope of ``block``.

    ``name`` tells its parts of ``checkpoint`` from those of others.
    """
    checkpoint = checkpoint or Checkpoint(None, {})
    config = model.config.get_text_config()
    spec = methods.spec_of(config, block)
    with swapped(model, spec):
        return {
            window: perplexity(
                model,
                tokens,
                window,
                max(1, window // 2),
                batch_size=batch_size,
                checkpoint=checkpoint.part(f"{name} {window}"),
            )["perplexity"]
            for window in windows
        }


def _draw(plan, tokens, micro_batch):
    def draw(generator):
        pick = torch.randint(len(plan.lengths), (), generator=generator).item()
        seqlen = plan.lengths[pick]
        rows = micro_batch * max(plan.lengths) // seqlen
        starts = torch.randint(tokens.numel() - seqlen + 1, (rows, 1), generator=generator)
        return tokens[starts + torch.arange(seqlen)]

    return draw


def _bound(function, first):
    return lambda *rest: function(first, *rest)


def _save(model, reader, losses, target):
    """Model, tokenizer and losses in ``target``, which is there only when all of it is."""
    unfinished = target.with_name(f"{target.name}.partial")
    for folder in (unfinished, target):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(unfinished)
    reader.save_pretrained(unfinished)
    write_json(unfinished / "losses.json", losses)
    unfinished.rename(target)
