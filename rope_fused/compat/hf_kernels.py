"""A layer for Hugging Face ``kernels``: transformers' rotation, by this package's operators."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from ..api import apply_rotary_pos_emb

_METADATA = {
    "name": "rope-fused",
    "id": "rope_fused_kernel",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
    "backend": {"type": "cpu"},
}


class apply_rotary_transformers(nn.Module):  # noqa: N801 (the name transformers looks for)
    """The kernel layer ``rotary_pos_emb``: stateless, with a backward, bit-identical to eager."""

    can_torch_compile = True
    has_backward = True

    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def write_folder(path) -> Path:
    """Write a local kernel repository that leads to this layer; its path.

    ::

        folder = write_folder("rope-fused-kernel")
        LocalLayerRepository(folder, layer_name="apply_rotary_transformers")       # kernels
        KernelConfig({"rotary_pos_emb": f"{folder}:apply_rotary_transformers"},    # transformers
                     use_local_kernel=True)

    Tested with kernels 0.17 on the CPU. transformers takes a KernelConfig on accelerators only:
    that way has not been run.
    """
    path = Path(path).absolute()
    variant = path / "build" / "torch-universal"
    variant.mkdir(parents=True, exist_ok=True)
    (variant / "__init__.py").write_text(
        '"""rope_fused, as a kernel repository."""\n\n'
        "from rope_fused.compat import hf_kernels as layers\n\n"
        '__all__ = ["layers"]\n'
    )
    (variant / "metadata.json").write_text(json.dumps(_METADATA, indent=2) + "\n")
    return path
