"""What the task files in this folder call: lm-evaluation-harness loads this file by its path."""

from __future__ import annotations

import functools

from rope_fused.context import prompts
from rope_fused.context.loading import load_tokenizer

_TASKS = {"passkey": prompts.PASSKEY, "needle": prompts.NEEDLE, **prompts.RULER}


def _dataset(
    name,
    *,
    tokenizer=None,
    pretrained=None,
    max_seq_lengths=(4096,),
    depths=None,
    trials=10,
    seed=0,
    **others,
):
    """{"test": prompts of one task}; lm_eval hands on --metadata and --model_args.

    ``others`` are arguments of the model that are no business of a task.
    """
    import datasets

    source = tokenizer or pretrained
    if not source:
        raise ValueError(
            "prompts are measured in tokens: pass pretrained=FOLDER in --model_args, or "
            'tokenizer in --metadata, as {"tokenizer": "FOLDER"}'
        )
    reader, task = load_tokenizer(source), _TASKS[name]
    rows = []
    for length in max_seq_lengths:
        for depth in depths or [None]:
            for trial in range(trials):
                made = prompts.make_prompt(task, reader, length, depth, trial, seed)
                row = {"task": name, "text": made.text, "answers": list(made.answers)}
                rows.append(row | {"length": length, "depth": made.depth, "trial": trial})
    return {"test": datasets.Dataset.from_list(rows, split=datasets.Split.TEST)}


passkey = functools.partial(_dataset, "passkey")
needle = functools.partial(_dataset, "needle")
niah_single = functools.partial(_dataset, "niah_single")
niah_multikey = functools.partial(_dataset, "niah_multikey")
niah_multivalue = functools.partial(_dataset, "niah_multivalue")
niah_multiquery = functools.partial(_dataset, "niah_multiquery")
variable_tracking = functools.partial(_dataset, "variable_tracking")


def doc_to_text(doc):
    return doc["text"]


def doc_to_target(doc):
    return ", ".join(doc["answers"])


def process_results(doc, results):
    prompt = prompts.Prompt(
        doc["task"],
        doc["text"],
        tuple(doc["answers"]),
        doc["length"],
        doc["depth"],
        doc["trial"],
    )
    return {"accuracy": _TASKS[doc["task"]].score(prompt, results[0])}
