"""Home of the Triton kernels; this folder is imported only as `rope_fused.triton_kernels`.

A top-level module `triton_kernels` belongs to Triton's own kernel package, which vLLM and others
import by that name, so this one must never stand in for it.
"""

if __name__ != "rope_fused.triton_kernels":
    raise ImportError(
        f"this folder is the package rope_fused.triton_kernels, not {__name__}: install rope_fused "
        "and import it by that name"
    )
