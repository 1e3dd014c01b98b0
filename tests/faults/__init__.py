"""Small faults that mutations.py plants, each with the tests that must notice it.

A fault is one that somebody might make: a sign, an index, a bound, a factor twice. Backends and
orders of derivatives fail apart from each other, so the tests are named with their parameters.
"""

from . import kernels, package
from .fault import Fault

__all__ = ["FAULTS", "Fault"]
FAULTS = kernels.FAULTS + package.FAULTS
