"""A whole attention block and a whole training step of transformers, as they are and patched."""

OPS = ("block", "training-step")


def test_model(measure):
    measure()
