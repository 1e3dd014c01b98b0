"""Rotating q and k, and turning gradients back, against a copy and against everybody else."""

from rope_fused.cli.bench import rotation

OPS = rotation.OPS


def test_rotate(measure):
    measure()
