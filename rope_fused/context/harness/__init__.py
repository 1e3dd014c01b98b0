"""Tasks for lm-evaluation-harness: ``lm_eval --include_path FOLDER``, the folder from folder()."""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    """Where the task files are; ``rope-fused evaluate harness`` prints it, and how to call it."""
    return Path(__file__).parent
