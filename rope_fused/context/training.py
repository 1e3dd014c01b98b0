"""Training a causal language model by transformers' Trainer; a kill costs a few steps."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

_COMPLETE = "complete"  # in a checkpoint's folder: everything in it has been written


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train: what :class:`transformers.TrainingArguments` calls the same things.

    steps            optimizer steps
    learning_rate    its largest value
    schedule         "linear", "cosine" or "constant", after ``warmup_steps`` of linear warm-up
    accumulation     micro-batches per step and process
    betas            of AdamW
    weight_decay     of AdamW
    clip             largest norm of the gradient
    """

    steps: int
    learning_rate: float
    schedule: str = "linear"
    warmup_steps: int = 0
    accumulation: int = 1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0


class MicroBatches(torch.utils.data.Dataset):
    """A micro-batch for every index, made by ``draw(generator)``: int64 ids [batch, seqlen].

    A pure function of ``seed`` and the index, so training that stops and goes on, or that several
    processes share, sees the same data. Every micro-batch may have a length of its own. ``draw``
    may return (ids, labels), with -100 where there is nothing to learn.
    """

    def __init__(self, draw: Callable, count: int, seed: int):
        self.draw, self.count, self.seed = draw, count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        mixed = (self.seed * 1_000_003 + index) % 2**63
        drawn = self.draw(torch.Generator().manual_seed(mixed))
        ids, labels = drawn if isinstance(drawn, tuple) else (drawn, drawn)
        return {"input_ids": ids, "labels": labels}


def train(
    model,
    draw,
    recipe,
    folder,
    *,
    seed=0,
    save_every=None,
    autocast=False,
    checkpointing=False,
    said=None,
):
    """Train ``model`` in place on what ``draw`` makes (:class:`MicroBatches`); return the losses.

    Args:
        model: a causal language model of transformers, patched or not.
        recipe: a :class:`Recipe`.
        folder: gets the checkpoints. Called again with the same arguments, training goes on after
            the last complete one, to the same weights as without the interruption.
        save_every: steps between checkpoints; None: a tenth of the steps.
        autocast: compute in bfloat16.
        checkpointing: recompute activations in the backward (gradient checkpointing).
        said: ``said(step, steps, loss)`` is called after every step.

    Returns:
        The loss of every step, list of floats.
    """
    folder = Path(folder)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # an item is a whole micro-batch
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule + "_with_warmup" * (recipe.schedule == "constant"),
        warmup_steps=recipe.warmup_steps,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        optim="adamw_torch_fused",
        bf16=autocast,
        save_steps=save_every or max(1, recipe.steps // 10),
        # Not 1: the Trainer removes the older one before we know that the newer one is complete.
        save_total_limit=2,
        logging_steps=1,
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    # One micro-batch more for every process and accumulation: the Trainer counts epochs in them.
    count = recipe.steps * recipe.accumulation * max(1, arguments.world_size)
    watcher = _Watcher(recipe.steps, said)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=MicroBatches(draw, count, seed),
        data_collator=lambda items: items[0],
        callbacks=[watcher],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_complete(folder))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _Trainer(transformers.Trainer):
    """Takes the micro-batches in their order: their content is random as it is."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)


class _Watcher(transformers.TrainerCallback):
    """Marks checkpoints that are complete, and tells of every step."""

    def __init__(self, steps, said):
        self.steps, self.said = steps, said

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    def on_log(self, args, state, control, logs=None, **_):
        if self.said is not None and "loss" in (logs or {}):
            self.said(state.global_step, self.steps, logs["loss"])


def _last_complete(folder):
    """The newest checkpoint that was written to its end, as a string; None without one."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda f: int(f.name.split("-")[1]))
    for checkpoint in found:
        if not (checkpoint / _COMPLETE).exists() and int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(checkpoint, ignore_errors=True)
    done = [checkpoint for checkpoint in found if (checkpoint / _COMPLETE).exists()]
    return str(done[-1]) if done else None
