"""Results in the schema of lm-evaluation-harness, for the tables and tools that read its files."""

from __future__ import annotations

_VERSION = 1  # of our tasks: goes up when their numbers change their meaning


def harness_results(task: str, metrics: dict, samples: int, settings: dict) -> dict:
    """The top-level keys that ``lm_eval`` writes, for one task.

    Args:
        task: its name.
        metrics: {name: (value, whether higher is better)}.
        samples: how many things were measured.
        settings: the run's, kept as the task's metadata.
    """
    numbers = {"alias": task}
    for name, (value, _) in metrics.items():
        numbers |= {f"{name},none": value, f"{name}_stderr,none": "N/A"}
    return {
        "results": {task: numbers},
        "group_subtasks": {task: []},
        "configs": {task: {"task": task, "metadata": {"version": _VERSION} | settings}},
        "versions": {task: _VERSION},
        "n-shot": {task: 0},
        "higher_is_better": {task: {name: better for name, (_, better) in metrics.items()}},
        "n-samples": {task: {"original": samples, "effective": samples}},
    }
