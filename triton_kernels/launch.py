"""Launches that are prepared once: all of a kernel's operands but the tensors'."""

from __future__ import annotations

import contextlib
import threading

import torch
import triton

# The interpreter keeps its state in global variables.
INTERPRETED = triton.knobs.runtime.interpret
_turn = threading.Lock() if INTERPRETED else contextlib.nullcontext()


class Launch:
    """A kernel on `programs` programs, with all operands that follow from the shapes, strides and
    dtypes of its tensors; `rest` are those operands, in the order of the kernel's parameters.

    Called with the tensors, which come before the rest; those of a projection may be tensor
    descriptors, and any may be None. Triton looks at every operand of every launch to find what it
    has compiled for their kinds. Here only addresses change from call to call, so it looks once,
    and then the compiled kernel is called as it is. It is compiled for addresses that are multiples
    of 16 bytes; a launch with others goes through Triton.
    """

    def __init__(self, kernel, programs, *rest, **options):
        self.kernel, self.programs, self.rest, self.options = kernel, programs, rest, options
        self._compiled = {}  # by device

    def __call__(self, tensors):
        device = getattr(tensors[0], "base", tensors[0]).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(tensors)
        operands, bits = [], 0
        for t in tensors:
            if isinstance(t, torch.Tensor):
                t = t.data_ptr()
                bits |= t
            operands.append(t)
        compiled = self._compiled.get(device.index)
        if bits % 16 or compiled is None:
            compiled = self.start(tensors)
            if not (bits % 16 or INTERPRETED):
                self._compiled[device.index] = compiled[(self.programs, 1, 1)]
        else:
            compiled(*operands, *self.rest)

    def start(self, tensors):
        """Launch through Triton, which compiles what it has not compiled yet."""
        with _turn:
            return self.kernel[(self.programs,)](*tensors, *self.rest, **self.options)
