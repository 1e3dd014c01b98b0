"""vmap of the operators: one call with a larger batch where that is the same, else call by call."""

from __future__ import annotations

import torch

# The operands of a rotation that have a row per token, and those that all tokens share.
_TOKENS = ("positions", "table_index", "token_scale")
_SHARED = ("inv_freq", "turns", "scale", "axis_map", "q_norm", "k_norm")


def one_by_one(call, size, in_dims, args):
    """``call`` for each of ``size`` elements, stacked: (outputs, out_dims)."""
    results = [
        call(
            *(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True))
        )
        for i in range(size)
    ]
    outputs = tuple(map(torch.stack, zip(*results, strict=True)))
    return outputs, (0,) * len(outputs)


def together(call, size, in_dims, names, args, heads, shared=()):
    """``call`` once, with the elements along its batch, or one by one where they cannot be.

    Args:
        names: of the arguments; those of a rotation as in ops.Rotation.
        heads: names of the arguments with a batch (or, in layout "thd", nothing) in front.
        shared: names of others that must be the same for all elements.
    """
    dims = dict(zip(names, in_dims, strict=True))
    given = dict(zip(names, args, strict=True))
    if any(dims.get(name) is not None for name in (*_SHARED, *shared)):
        return one_by_one(call, size, in_dims, args)
    packed = given["layout"] == "thd"
    batch = 1 if packed else _batch(given[heads[0]], dims[heads[0]])
    for name in heads:
        if given[name] is not None:
            x = _in_front(given[name], dims[name], size)
            given[name] = x if packed else x.flatten(0, 1)
    for name, after in (*((n, 1) for n in _TOKENS), ("cos", 2), ("sin", 2)):
        if given.get(name) is not None:
            given[name] = _rows(given[name], dims[name], size, batch, after)
    if packed:
        given["layout"] = "bshd"
    outputs = call(*given.values())
    # What is left out is an empty tensor, whatever the batch.
    dims = tuple(None if t.dim() == 1 else 0 for t in outputs)
    unfolded = (
        t if d is None or packed else t.unflatten(0, (size, batch))
        for t, d in zip(outputs, dims, strict=True)
    )
    return tuple(unfolded), dims


def _batch(x, dim):
    return x.shape[0] if dim != 0 else x.shape[1]


def _in_front(x, dim, size):
    return x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _rows(t, dim, size, batch, after):
    """[.., 1|batch, seqlen, ..] as [.., 1|size * batch, seqlen, ..]; ``after``: dims behind it."""
    at = -1 - after
    if dim is None:
        if t.shape[at] == 1:
            return t
        t = t.unsqueeze(at - 1)
    else:
        t = t.movedim(dim, at - 1)
    shape = list(t.shape)
    shape[at - 1], shape[at] = size, batch
    return t.expand(shape).flatten(at - 1, at)
