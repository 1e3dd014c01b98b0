"""Who computes: the only place that knows which backends are installed and what each can take."""

from __future__ import annotations

import functools

import torch

from . import composite, reference

BACKENDS = ("auto", "cpu", "triton", "cuda", "reference")

try:
    from . import native
except ImportError as error:  # ROPE_FUSED_PURE=1, or a broken build: said by backends()
    native, _why_not_native = None, str(error)


def backends() -> dict[str, str]:
    """What each backend is good for here: "ready", or why it is not."""
    if native is None:
        cpu = f"not built ({_why_not_native}); CPU tensors go through the reference, slowly"
    else:
        cpu = "ready"
    return {
        "cpu": cpu,
        "triton": _triton_state(),
        "cuda": _cuda_state(),
        "reference": "ready",
    }


def check_backend(backend: str, tensor: torch.Tensor) -> None:
    """Raise unless `backend` is a name this version knows and can compute `tensor`'s device
    here."""
    if backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )
    if backend == "cpu" and tensor.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"backend must suit the tensors' device: 'cpu' takes CPU tensors, got {tensor.device}"
        )
    if backend in ("triton", "cuda"):
        # Of this one alone: under torch.compile a look at one that is missing breaks the graph.
        state = _triton_state() if backend == "triton" else _cuda_state()
        if state not in ("ready", "interpreted"):
            raise RuntimeError(
                f"backend {backend!r} cannot run here: {state}; use backend='auto', or "
                "'reference' on any device"
            )
        wanted = "cpu" if state == "interpreted" else "cuda"
        if tensor.device.type not in (wanted, "meta"):
            raise ValueError(
                f"backend must suit the tensors' device: {backend!r} ({state}) takes {wanted} "
                f"tensors, got {tensor.device}"
            )
    elif backend == "cpu" and native is None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {backends()[backend]}")


@functools.cache
def _triton_state() -> str:
    """How the kernels run: compiled, on CUDA tensors; interpreted, on those of the CPU; why not."""
    try:
        module = _triton()
    except Exception as error:  # also a version that lacks what the kernels need
        return f"not installed ({error})"
    if module.INTERPRETED:
        return "interpreted"
    return "ready" if torch.cuda.is_available() else "no CUDA device"


@functools.cache
def _triton():
    from . import triton_backend

    return triton_backend


@functools.cache
def _cuda_state() -> str:
    """ "ready", or why the CUDA kernels cannot run."""
    try:
        module = _cuda()
    except ImportError as error:
        return f"not built ({(native and native.WITHOUT_CUDA) or error})"
    if torch.cuda.is_available():
        return "ready"
    return f"built for {module.ARCHITECTURES}; no CUDA device"


@functools.cache
def _cuda():
    from . import cuda_backend

    return cuda_backend


def _kernels(backend: str, q: torch.Tensor, pairs: int):
    """The module whose kernels compute this call, or None: the reference computes what is left."""
    device = q.device.type
    if backend in ("auto", "cpu") and device == "cpu":
        name, module = "cpu", native
    elif backend == "cuda":
        name, module = "cuda", _cuda()
    # "auto" on CUDA tensors is Triton until measurements say where the CUDA kernels are faster.
    elif backend == "triton" or (
        backend == "auto" and device == "cuda" and _triton_state() == "ready"
    ):
        name, module = "triton", _triton()
    else:
        return None
    if module is None or pairs <= module.MAX_PAIRS:
        return module
    if backend == name:
        raise ValueError(
            f"backend {name!r} rotates at most {2 * module.MAX_PAIRS} dimensions, got {2 * pairs}; "
            "use 'auto' or 'reference'"
        )
    return None


def rotate(q, k, rotation, out=None):
    """(q2, k2), k2 empty when k is None. `out`: tensors to write into instead of new ones."""
    kernels = _kernels(rotation.backend, q, rotation.pairs)
    if kernels is native is not None:
        _check_factors(rotation, names=("q_scale",))  # the kernel looks at the others
    else:
        _check_factors(rotation)
    if kernels is not None:
        return kernels.rotate(q, k, rotation, out)
    return _rounded((q, k), reference.rotate(q, k, **_operands(rotation)), out)


def rotate_backward(dq, dk, dv, q, k, rotation, packed):
    """See ops.rotate_backward."""
    kernels = _kernels(rotation.backend, dq, rotation.pairs)
    if kernels is not None:
        return kernels.rotate_backward(dq, dk, dv, q, k, rotation, packed)
    return _reference_backward(dq, dk, dv, q, k, rotation, packed)


def rotate_tables(q, k, cos, sin, interleaved, rotary_offset, transpose, layout, backend, out=None):
    """See ops.rotate_tables."""
    kernels = _kernels(backend, q, cos.shape[-1] // 2)
    if kernels is not None:
        return kernels.rotate_tables(
            q, k, cos, sin, interleaved, rotary_offset, transpose, layout, out
        )
    results = reference.rotate_tables(
        q,
        k,
        cos,
        sin,
        layout=layout,
        interleaved=interleaved,
        rotary_offset=rotary_offset,
        transpose=transpose,
    )
    return _rounded((q, k), results, out)


def project(x, weights, biases, head_dim, rotation, keep, out=None):
    """See ops.project."""
    kernels = _kernels(rotation.backend, x, rotation.pairs)
    if kernels is not None:
        # The CPU kernel looks at the others, but behind the products, when `out` is written.
        late = kernels is native and out is None
        _check_factors(rotation, names=("q_scale",) if late else _FACTORS)
        return kernels.project(x, weights, biases, head_dim, rotation, keep, out)
    heads = (-1, head_dim)
    z = [
        x.new_empty(0) if w is None else torch.nn.functional.linear(x, w, b).unflatten(-1, heads)
        for w, b in zip(weights, biases, strict=True)
    ]
    q, k = rotate(z[0], z[1], rotation, None if out is None else out[:2])
    v = z[2] if out is None or weights[2] is None else out[2].copy_(z[2])
    return (q, k, v, z[0], z[1]) if keep else (q, k, v, x.new_empty(0), x.new_empty(0))


def packed_weight(weights) -> torch.Tensor | None:
    """The one matrix whose consecutive row blocks `weights` are, or None if they are separate
    tensors.

    Reads addresses, so it only looks at plain tensors: not at those of a trace, nor at subclasses.
    """
    first = weights[0]
    end = first.storage_offset()
    for weight in weights:
        if (
            type(weight) not in (torch.Tensor, torch.nn.Parameter)
            or weight.stride() != first.stride()
            or weight.stride(1) != 1
            or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or weight.storage_offset() != end
        ):
            return None
        end += weight.shape[0] * weight.stride(0)
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), first.stride())


def _operands(rotation) -> dict:
    """A Rotation as the reference takes it."""
    operands = rotation._asdict()
    del operands["turns"], operands["norm_all"], operands["backend"]
    return operands | {"norm_scope": "all" if rotation.norm_all else "head"}


def _rounded(like, results, out=None):
    """The float64 results in the inputs' dtype and strides, or in `out`; empty for None."""
    done = []
    for i, (x, y) in enumerate(zip(like, results, strict=True)):
        if x is None:
            done.append(like[0].new_empty(0))
        else:
            done.append((torch.empty_like(x) if out is None else out[i]).copy_(y))
    return tuple(done)


_FACTORS = ("inv_freq", "attention_factor", "q_scale")


def _check_factors(rotation, names=_FACTORS) -> None:
    """Refuse factors that are not finite where they can be looked at: on the CPU."""
    factors = (rotation.inv_freq, rotation.scale, rotation.token_scale)
    for name, values in zip(_FACTORS, factors, strict=True):
        if name not in names or values is None or values.device.type != "cpu":
            continue
        if not values.isfinite().all():
            raise ValueError(f"{name} must be finite, got {values[~values.isfinite()][0].item()}")


def _reference_backward(dq, dk, dv, q, k, rotation, packed):
    """The formulas of composite.py around the reference's rotation, in float64."""

    def turn(q, k, rotation):
        return reference.rotate(q, k, **_operands(rotation))

    if q is None:
        gq, gk = turn(dq, dk, rotation._replace(conjugate=not rotation.conjugate))
        factors = [None] * 5
    else:
        wide = [None if t is None else t.double() for t in (dq, dk, q, k)]
        gq, gk, factors = composite.rotate_backward(turn, *wide, rotation)
    empty = dq.new_empty(0)
    if packed:
        parts = [g.to(dq.dtype) for g in (gq, gk, dv) if g is not None]
        first, second = torch.cat(parts, -2), empty
    else:
        first, second = _rounded((dq, dk), (gq, gk))
    factors = [dq.new_empty(0, dtype=torch.float64) if f is None else f.clone() for f in factors]
    if q is not None and rotation.token_scale is None:
        tokens = composite.bshd(dq, rotation.layout).shape[:2]
        factors[-1] = dq.new_zeros(tokens, dtype=torch.float64)
    return first, second, *factors
