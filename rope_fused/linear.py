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
                product_into(rows, weight, bias, y)


def product_into(x, weight, bias, out):
    """torch's linear.out; sequence by sequence where those of `out` do not follow each other, of
    which it makes an error or a mess."""
    apart = out.dim() == 3 and out.stride(0) != out.shape[1] * out.stride(1)
    for rows, y in zip(x, out, strict=True) if apart else ((x, out),):
        torch.ops.aten.linear.out(rows, weight, bias, out=y)
