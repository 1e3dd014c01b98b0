"""The fused projection against the bare product, and against transformers' steps in its place."""

from rope_fused.cli.bench import projection

OPS = projection.OPS


def test_projection(measure):
    measure()
