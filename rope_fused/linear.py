"""Projections by the library's matrix product, each into memory that is given."""

from __future__ import annotations

import torch


def linear_into(x, weights, biases, outputs):
    """x projected by each weight that is not None into its output [.., heads, head_dim]."""
    with torch.no_grad():  # an out= product refuses inputs that require a gradient
        for weight, bias, z in zip(weights, biases, outputs, strict=True):
            if weight is not None:
                y, rows = z.flatten(-2), x
                if y.is_contiguous() and x.is_contiguous():
                    # Two dimensions let the bias be added before the product is rounded.
                    y, rows = y.flatten(0, -2), x.flatten(0, -2)
                torch.ops.aten.linear.out(rows, weight, bias, out=y)
