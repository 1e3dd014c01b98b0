"""Tensors between pages that must not be touched, and every CPU kernel called on them.

Run by tests/test_memory.py in a process of its own, which dies of the first access beyond:

    python tests/guarded.py ends|starts [beyond]
"""

import ctypes
import mmap
import sys

import torch

from rope_fused import ops, phase
from rope_fused.dispatch import native

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_held = []  # the mappings in use


def room(size: int, at_end: bool) -> int:
    """The address of `size` bytes that end at a forbidden page, or begin behind one."""
    pages = max(1, -(-size // PAGE))
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    _held.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (start, start + (pages + 1) * PAGE):
        if _libc.mprotect(ctypes.c_void_p(page), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    return start + (pages + 1) * PAGE - size if at_end else start + PAGE


def guarded(x, at_end: bool):
    """A copy of a tensor, strides included, whose first or last element lies beside a guard."""
    if x is None or not x.numel():
        return x
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = span * x.element_size()
    buffer = (ctypes.c_char * size).from_address(room(size, at_end))
    flat = torch.frombuffer(buffer, dtype=x.dtype)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


class Guarded:
    """torch as rope_fused.native sees it: what it allocates, and makes contiguous, is guarded."""

    def __init__(self, at_end):
        self.at_end = at_end

    def __getattr__(self, name):
        found = getattr(torch, name)
        if name not in ("empty_strided", "empty_like", "zeros", "empty"):
            return found

        def allocate(*args, **kwargs):
            made = found(*args, **kwargs)
            return made if made.device.type == "meta" else guarded(made, self.at_end)

        return allocate


def operands(dtype, head_dim, interleaved, rotary_dim, offset, norm, tables, axes, tokens, layout):
    batch, seqlen = tokens
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = rotary_dim // 2

    def rows(heads):
        shape = (batch, seqlen, heads, head_dim)
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        return x.transpose(1, 2).contiguous() if layout == "bhsd" else x

    q, k = rows(3), rows(1)
    inv_freq = torch.rand(tables, pairs, dtype=torch.float64)
    shape = (batch, seqlen)
    rotation = ops.Rotation(
        inv_freq=inv_freq,
        turns=phase.turns_on_device(inv_freq),
        scale=torch.rand(tables, pairs, dtype=torch.float64) + 0.5,
        positions=torch.randint(-9, 99, (axes, *shape) if axes > 1 else shape,
                                dtype=torch.int32 if pairs % 2 else torch.int64),
        table_index=torch.randint(0, tables, shape, dtype=torch.int32) if tables > 1 else None,
        axis_map=torch.arange(pairs, dtype=torch.int32) % axes if axes > 1 else None,
        token_scale=torch.rand(shape, dtype=wide) if tables > 1 else None,
        q_norm=torch.randn(head_dim * (3 if norm == "all" else 1), dtype=wide) if norm else None,
        k_norm=torch.randn(head_dim, dtype=wide) if norm else None,
        norm_all=norm == "all",
        rotary_offset=offset,
        interleaved=interleaved,
        layout=layout,
    )  # fmt: skip
    return q, k, rotation


def every_kernel(at_end: bool) -> int:
    """Forward, backward, reductions and tables, in every type and shape of row; how many calls."""
    torch.manual_seed(0)
    native.torch, native._OutputBuffer = Guarded(at_end), None
    calls = 0

    def g(x):
        return guarded(x, at_end)

    shapes = [
        (2, 2, 0),
        (6, 4, 1),
        (16, 16, 0),
        (20, 10, 5),
        (66, 66, 0),
        (96, 48, 48),
        (128, 128, 0),
    ]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for at, (head_dim, rotary_dim, offset) in enumerate(shapes):
            for interleaved in (False, True):
                for norm in (None, "head", "all"):
                    tables, axes = (3, 1) if at % 2 else (1, 2 if rotary_dim > 4 else 1)
                    layout = "bhsd" if norm == "head" and at % 3 else "bshd"
                    q, k, rotation = operands(
                        dtype, head_dim, interleaved, rotary_dim // 2 * 2, offset, norm, tables,
                        axes, ((2, 5), (1, 1), (3, 33))[at % 3], layout,
                    )  # fmt: skip
                    q, k = g(q), g(k)
                    rotation = rotation._replace(
                        **{n: g(v) for n, v in rotation._asdict().items() if torch.is_tensor(v)}
                    )
                    for large in (0, 1 << 30):  # written past the caches, and through them
                        native._LARGE = large
                        native.rotate(q, k, rotation)
                    native.rotate(q, k, rotation, out=(q, k))
                    native.rotate_backward(q, k, None, q, k, rotation, False)
                    native.rotate_backward(q, k, None, None, None, rotation, False)
                    if layout == "bshd":
                        native.rotate_backward(q, k, k, q, k, rotation, True)
                    shape = (q.shape[0], q.shape[2 if layout == "bhsd" else 1], rotary_dim)
                    cos, sin = (g(torch.randn(shape).to(dtype)) for _ in range(2))
                    for transpose in (False, True):
                        native.rotate_tables(q, k, cos, sin, interleaved, offset, transpose, layout)
                    steps = g(torch.randn(*q.shape[:-1], 2 * head_dim).to(dtype)[..., ::2])
                    native.rotate(steps, k, rotation)
                    native.rotate_backward(steps, k, None, q, k, rotation, False)
                    calls += 10
                    del q, k, rotation, cos, sin, steps
                    _held.clear()
    return calls


def beyond(at_end: bool) -> None:
    """A row beside the memory that there is, which must be the end of this process."""
    q, _, rotation = operands(torch.float32, 16, False, 16, 0, None, 1, 1, (1, 8), "bshd")
    q = guarded(q, at_end)
    size = q.numel() * q.element_size()
    shifted = q.data_ptr() + (4 if at_end else -4)
    buffer = (ctypes.c_char * size).from_address(shifted)
    native.rotate(torch.frombuffer(buffer, dtype=q.dtype).view(q.shape), None, rotation)


if __name__ == "__main__":
    if sys.argv[2:] == ["beyond"]:
        beyond(sys.argv[1] == "ends")
    else:
        print(every_kernel(sys.argv[1] == "ends"))
