"""What commands tell: the facts about an installation, aligned columns, and errors of the user."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from . import dispatch

# Looked up in their metadata: importing them takes seconds, and only to say a number.
_PACKAGES = ("torch", "numpy", "triton", "transformers", "matplotlib", "tqdm")
_INSTRUCTION_SETS = {"x86_64_v4": "AVX-512", "x86_64_v3": "AVX2", "baseline": "baseline"}
_ENVIRONMENT = {
    "ROPE_FUSED_CPU_ISA": "baseline or x86_64_v3: CPU kernels of that instruction set, at most",
    "ROPE_FUSED_CHECK": "1: check the values of tensors on other devices too, at a host sync each",
    "ROPE_FUSED_CUDA": "1: fail without CUDA kernels, 0: leave them out; read when it is built",
    "ROPE_FUSED_PURE": "1: compile nothing; read when rope_fused is built",
}


class UserError(Exception):
    """What the user can put right; commands print it in one line, without a traceback."""


def facts() -> dict:
    """Versions, machine, kernels, backends and environment, as data that JSON can hold."""
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "kernels": _kernels(),
        "backends": dispatch.backends(),
        "environment": {
            name: {"value": os.environ.get(name), "meaning": meaning}
            for name, meaning in _ENVIRONMENT.items()
        },
    }


def columns(rows, align="<", indent=0) -> str:
    """Rows of cells as text; ``align``: < or > per column, the last one for all that follow."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:{align[min(at, len(align) - 1)]}{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" " * indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor():
    """The name of the processor, which Python's platform module does not know on Linux."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _kernels():
    """How the C++ kernels were built, or None where there are none."""
    try:
        from . import _cpu
    except ImportError:
        return None
    return {
        "instruction_set": f"{_INSTRUCTION_SETS.get(_cpu.isa, _cpu.isa)} ({_cpu.isa})",
        "compiler": _cpu.compiler,
        "flags": _cpu.flags,
    }
