"""Ties to other libraries: the patcher for Hugging Face transformers models."""

from .transformers import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
