"""How the projection is tiled, and when a fused kernel beats a library GEMM and one rotation.

Both are looked up: in what `rope-fused tune` measured on this GPU and kept in the user's cache, and
else in the defaults below. Nothing is ever tried out inside a call, which may be a training step or
a graph capture.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from ..files import replacing

FORMAT = 1  # of the file; a file of another format is none of ours


class Problem(NamedTuple):
    """The shape of a projection: what a choice depends on."""

    dtype: str  # "bfloat16" | "float16" | "float32" | "tf32"
    tokens: int
    d_model: int
    heads: tuple[int, int, int]  # of q, k and v (0: no v)
    head_dim: int
    rotary_dim: int
    interleaved: bool
    normed: bool = False  # an RMS-norm of q or k
    gathered: bool = False  # angles of a table, or from a position axis, that each token chooses

    @property
    def features(self) -> int:
        return sum(self.heads) * self.head_dim


_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def problem_of(x, weights, head_dim, rotation) -> Problem | None:
    """The shape of a projection, or None if there is nothing to do or the dtype is float64."""
    dtype = _DTYPES.get(x.dtype)
    if dtype is None or 0 in x.shape:
        return None
    if dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        dtype = "tf32"
    return Problem(
        dtype,
        math.prod(x.shape[:-1]),
        x.shape[-1],
        tuple(0 if w is None else w.shape[0] // head_dim for w in weights),
        head_dim,
        2 * rotation.pairs,
        rotation.interleaved,
        rotation.q_norm is not None or rotation.k_norm is not None,
        rotation.table_index is not None or rotation.axis_map is not None,
    )


class Tile(NamedTuple):
    """One way to run the Triton kernel."""

    rows: int  # tokens
    heads: int  # heads side by side
    depth: int  # of d_model at a time
    warps: int
    stages: int  # of the pipeline that loads x and the weights
    parts: int = 2  # goes in which the epilogue takes the pairs: 1, 2 or 4
    programs: int = 1  # per multiprocessor
    band: int = 8  # rows of tiles that share weights in the L2 cache
    descriptors: bool = True  # load and store by tensor descriptors (TMA), where alignment allows


class Head(NamedTuple):
    """A head as the kernel sees it: [slabs, width], every width padded to a power of two."""

    slabs: int
    width: int

    @property
    def padded(self) -> int:
        return power_of_two(self.width)

    @property
    def columns(self) -> int:
        return self.slabs * self.padded


def power_of_two(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache(maxsize=256)
def head_view(head_dim, rotary_dim, offset, interleaved) -> Head | None:
    """How the kernel sees a head, or None where it cannot.

    Half-split pairs are the same column of neighbouring slabs, so the rotated slice must be one of
    a power of two of equal slices; interleaved pairs must begin at even features.
    """
    if interleaved:
        head = Head(1, head_dim) if offset % 2 == 0 and head_dim % 2 == 0 else None
    else:
        slices = head_dim // rotary_dim
        whole = head_dim == slices * rotary_dim and offset % rotary_dim == 0
        head = Head(2 * slices, rotary_dim // 2) if whole else None
        if slices != power_of_two(slices):
            head = None
    if head is None or head.columns > 256 or head.padded < 4:
        return None
    return head


# ---------------------------------------------------------------------------------------- defaults


@functools.cache
def _old() -> bool:
    """Whether the compiler would put a few registers of some default tiles into memory."""
    import triton  # here alone: the measurements are also read where there is no Triton

    return tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def architecture(capability: tuple[int, int] | None) -> int:
    """The architecture whose defaults suit a device: 80 is every one without wgmma or tcgen05, and
    what is not from NVIDIA."""
    if capability is None:
        return 80
    return {9: 90, 10: 100}.get(capability[0], 80)


def default_tile(arch: int, problem: Problem, head: Head) -> Tile:
    """The tile for a problem that nobody measured.

    Chosen by what the compiler makes of them: no spills with any options, and on sm_90 two programs
    on a multiprocessor, of which one can be in its epilogue while the other multiplies. Not chosen
    by time: no GPU was at hand.
    """
    heads = max(1, 128 // head.columns)
    wide = heads * head.columns > 128
    few = problem.tokens <= 64
    # Entries that each token gathers for itself take registers; 16 bytes is the least that a
    # descriptor stores.
    tight = problem.gathered or (_old() and arch == (80 if problem.dtype == "float32" else 100))
    parts = 4 if tight and head.padded >= 32 else 2
    if problem.dtype == "float32":  # no tensor cores
        return Tile(32 if wide else 64, heads, 16, 8, 2, parts, descriptors=arch >= 90)
    if problem.dtype == "tf32":
        warps = 4 if arch == 80 and not wide else 8
        return Tile(64, heads, 32, warps, 2 if wide else 3, parts, descriptors=arch >= 90)
    if arch == 80:
        return Tile(64 if wide or few else 128, heads, 32, 8, 3, parts, descriptors=False)
    laden = problem.gathered or (problem.normed and arch == 100)
    if few or (laden and (wide or (_old() and heads > 1))):
        return Tile(64, heads, 64, 8 if wide else 4, 3, parts)
    return Tile(128, heads, 64, 8, 3, parts, programs=1 if wide else 2)


def pays_by_default(arch: int, problem: Problem, head: Head) -> bool:
    """Whether to fuse a projection that nobody measured.

    Fusing saves one pass over q and k: r = 2 F / (B d_model) of the GEMM's time (F: its rate, B:
    the memory's), which is 0.36 at d_model 1024, 0.18 at 2048 and 0.09 at 4096 on an H200 with F =
    790e12 and B = 4.3e12 (and 0.30 at 1024 on an A100, with F = 250e12 and B = 1.6e12). So the
    kernel has to reach 1 / (1 + r) = 0.74, 0.85 and 0.92 of the library's rate where all of the
    output is rotated, and more where v is in it. Published rates of Triton's GEMMs on Hopper are
    0.76 to 0.97 of cuBLAS, so only up to d_model 1024 is there room to spare. Not measured here,
    hence the caution in everything else: many tokens (few leave processors idle, for which the
    libraries split d_model), no padding (it is multiplied too), tensor cores, and architectures
    whose tensor cores Triton keeps busy without warp specialisation.
    """
    return (
        arch in (80, 90)
        and problem.dtype in ("bfloat16", "float16")
        and problem.d_model <= 1024
        and problem.tokens >= 4096
        and head.padded == head.width
        and problem.head_dim <= 128
    )


def candidates(arch: int, problem: Problem, head: Head) -> list[Tile]:
    """The tiles worth measuring for a problem, the default first."""
    first = default_tile(arch, problem, head)
    tiles = [first]
    narrow, double = max(1, 128 // head.columns), max(1, 256 // head.columns)
    if problem.dtype in ("bfloat16", "float16"):
        if arch == 80:
            sizes = [(128, narrow, 32, 8, 4), (64, narrow, 32, 4, 4), (64, narrow, 64, 4, 3)]
            sizes += [(128, double, 32, 8, 3), (64, double, 32, 8, 3)]
        else:
            sizes = [(128, narrow, 64, 8, 4), (64, double, 64, 4, 2), (128, double, 64, 8, 3)]
            sizes += [(64, narrow, 64, 4, 4)]
        for rows, heads, depth, warps, stages in sizes:
            for programs in (1, 2):
                tile = Tile(rows, heads, depth, warps, stages, programs=programs)
                tiles.append(tile._replace(descriptors=first.descriptors))
    if first.descriptors:
        tiles.append(first._replace(descriptors=False))
    elements = 4 if problem.dtype in ("float32", "tf32") else 2
    return [
        tile
        for tile in dict.fromkeys(tiles)
        if tile.programs * shared_memory(tile, head, elements) <= _SHARED[arch]
    ]


_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes per multiprocessor


def shared_memory(tile: Tile, head: Head, element_size: int) -> int:
    """Bytes of shared memory, about: the pipeline's stages and, with descriptors, the result."""
    columns = tile.heads * head.columns
    loads = tile.stages * (tile.rows + columns) * tile.depth
    stores = tile.rows * columns // tile.parts if tile.descriptors else 0
    return element_size * (loads + stores) + 1024


# ---------------------------------------------------------------------------------------- measured


class Measurement(NamedTuple):
    """What tune found for a problem on one GPU: microseconds of the best tile (None: of the CUDA
    kernel, which has one way to run) and of the library's GEMM with one rotation."""

    problem: Problem
    tile: Tile | None
    fused_us: float
    composed_us: float


def cache_file() -> Path:
    """Where the measurements of this user are kept: $XDG_CACHE_HOME/rope_fused/projection.json."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return folder / "rope_fused" / "projection.json"


def save(gpu: str, measurements: list[Measurement], file: Path | None = None) -> Path:
    """Add to the measurements of `gpu`, or replace those of the same problems; in one step, so that
    no reader sees half a file."""
    file = file or cache_file()
    try:
        content = _content(file)
    except (OSError, ValueError):
        content = {}  # not there, or of no use
    fresh = {(m.problem, m.tile is None): m for m in [*content.get(gpu, []), *measurements]}
    content[gpu] = list(fresh.values())
    data = {"format": FORMAT, "gpus": {}}
    for name, rows in content.items():
        data["gpus"][name] = [
            {
                "problem": m.problem._asdict(),
                "tile": m.tile and m.tile._asdict(),
                "fused_us": m.fused_us,
                "composed_us": m.composed_us,
            }
            for m in rows
        ]
    with replacing(file, shared=True) as path:
        path.write_text(json.dumps(data, indent=1) + "\n")
    measured.cache_clear()
    choose.cache_clear()
    hopper_pays.cache_clear()
    return file


@functools.cache
def measured(gpu: str) -> tuple[Measurement, ...]:
    """The measurements of `gpu`. A file that cannot be used is reported once, and ignored."""
    file = cache_file()
    try:
        return tuple(_content(file).get(gpu, ()))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        warnings.warn(
            f"rope_fused ignores {file}: {error}; delete it, or run rope-fused tune again",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()


def _content(file: Path) -> dict[str, list[Measurement]]:
    """Everything in the file, checked; ValueError where it is not what `save` writes."""
    data = json.loads(file.read_text())
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"its format must be {FORMAT}")
    gpus = data.get("gpus")
    if not isinstance(gpus, dict) or not all(isinstance(rows, list) for rows in gpus.values()):
        raise ValueError("gpus must be an object of lists")
    return {gpu: [_measurement(row) for row in rows] for gpu, rows in gpus.items()}


def _measurement(row) -> Measurement:
    try:
        problem = Problem(**row["problem"])
        problem = problem._replace(heads=tuple(problem.heads))
        tile = None if row["tile"] is None else Tile(**row["tile"])
        times = float(row["fused_us"]), float(row["composed_us"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"an entry is not complete ({error!r})") from error
    sizes = (problem.tokens, problem.d_model, problem.head_dim, problem.rotary_dim)
    good = all(type(n) is int and n > 0 for n in (*sizes, *problem.heads[:2]))
    good = good and all(0 < t < math.inf for t in times) and len(problem.heads) == 3
    good = good and type(problem.heads[2]) is int and (tile is None or _usable(tile))
    if not good:
        raise ValueError(f"an entry has a value out of range: {row}")
    return Measurement(problem, tile, *times)


def _usable(tile: Tile) -> bool:
    good = all(type(n) is int and n > 0 for n in tile[:-1])
    good = good and all(n == power_of_two(n) for n in tile[:4]) and tile.parts in (1, 2, 4)
    good = good and 16 <= tile.rows <= 256 and 16 <= tile.depth <= 256 and tile.heads <= 64
    good = good and tile.warps <= 16 and tile.stages <= 8 and tile.programs <= 8
    return good and type(tile.descriptors) is bool


# ------------------------------------------------------------------------------------------ choice


@functools.lru_cache(maxsize=4096)
def choose(gpu: str, arch: int, problem: Problem, head: Head) -> Tile | None:
    """The tile to run the fused kernel with, or None: the library's GEMM and a rotation are
    faster."""
    nearest = _nearest([m for m in measured(gpu) if m.tile is not None], problem)
    if nearest is not None:
        return nearest.tile if nearest.fused_us < nearest.composed_us else None
    if pays_by_default(arch, problem, head):
        return default_tile(arch, problem, head)
    return None


@functools.lru_cache(maxsize=4096)
def hopper_pays(gpu: str, problem: Problem) -> bool:
    """Whether the CUDA kernel of the projection, for sm_90a, is faster than the library's GEMM and
    a rotation.

    Where nobody measured it, up to d_model 2048: there it needs 0.85 of the library's rate (see
    pays_by_default). It is built as the library's own kernels are (TMA, wgmma, two warpgroups in
    turns), which reach 0.9 and more of that rate; at 4096 it would need 0.92.
    """
    nearest = _nearest([m for m in measured(gpu) if m.tile is None], problem)
    if nearest is not None:
        return nearest.fused_us < nearest.composed_us
    return problem.d_model <= 2048 and problem.tokens >= 4096


def _nearest(measurements, problem: Problem) -> Measurement | None:
    """The measurement that speaks for a problem: of the same kind of head, and within half a
    doubling of d_model, of the features and, unless it has more tokens than were ever measured, of
    the tokens. Beyond a few thousand tokens the ratio does not depend on them."""

    def distance(m):
        other = m.problem
        d = [abs(math.log2(problem.d_model / other.d_model))]
        d += [abs(math.log2(problem.features / other.features))]
        tokens = math.log2(problem.tokens / other.tokens)
        if tokens > 0.5 and other.tokens == most.get(other._replace(tokens=0)):
            tokens = 0.5
        return [*d, abs(tokens)]

    def kind(p):
        return p._replace(tokens=0, d_model=0, heads=(0, 0, 0))

    of_kind = [m for m in measurements if kind(m.problem) == kind(problem)]
    most: dict[Problem, int] = {}
    for m in of_kind:
        layer = m.problem._replace(tokens=0)
        most[layer] = max(most.get(layer, 0), m.problem.tokens)
    near = [(sum(distance(m)), m) for m in of_kind if max(distance(m)) <= 0.5]
    return min(near, key=lambda item: item[0])[1] if near else None
