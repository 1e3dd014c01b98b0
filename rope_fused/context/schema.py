"""Results in the schema of lm-evaluation-harness, for the tables and tools that read its files."""

from __future__ import annotations

import math
import statistics

_VERSION = 1  # of our tasks: goes up when their numbers change their meaning


def accuracy(trials) -> tuple[float, bool, float | str]:
    """The metric that scored trials make: the mean, True, and the standard error of the mean."""
    scores = [trial["score"] for trial in trials]
    mean = statistics.fmean(scores)
    if len(scores) < 2:
        return mean, True, "N/A"
    return mean, True, statistics.stdev(scores, mean) / math.sqrt(len(scores))


def harness_results(task: str, metrics: dict, samples: int, settings: dict) -> dict:
    """The top-level keys that ``lm_eval`` writes, for one task.

    Args:
        task: its name.
        metrics: {name: (value, whether higher is better)}, or with the standard error as a third.
        samples: how many things were measured.
        settings: the run's, kept as the task's metadata.
    """
    numbers = {"alias": task}
    for name, (value, _, *error) in metrics.items():
        numbers |= {f"{name},none": value, f"{name}_stderr,none": error[0] if error else "N/A"}
    return {
        "results": {task: numbers},
        "group_subtasks": {task: []},
        "configs": {task: {"task": task, "metadata": {"version": _VERSION} | settings}},
        "versions": {task: _VERSION},
        "n-shot": {task: 0},
        "higher_is_better": {task: {name: better for name, (_, better, *_) in metrics.items()}},
        "n-samples": {task: {"original": samples, "effective": samples}},
    }
