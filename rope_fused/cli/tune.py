"""Measure the fused projection on this GPU and keep the fastest way to run it.

For each shape and number of tokens, every candidate tile of Triton's fused kernel, and on sm_90 the
CUDA one, is timed beside a library GEMM for each weight and one rotation. What wins is kept in the
user's cache ($XDG_CACHE_HOME/rope_fused/projection.json), where later calls look it up; shapes that
were never measured use cautious defaults. Takes minutes: each candidate is compiled first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from .. import ops, phase, report
from ..spec import RopeSpec

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


class Shape(NamedTuple):
    """The attention layer of a model."""

    d_model: int
    heads: int
    kv_heads: int
    spec: RopeSpec

    def __str__(self):
        d = self.spec.head_dim
        return f"{self.d_model}, {self.heads} + 2 x {self.kv_heads} heads of {d}"


def shape(text) -> Shape:
    """A Shape from D_MODEL,HEADS,KV_HEADS,HEAD_DIM."""
    try:
        d_model, heads, kv_heads, head_dim = (int(n) for n in text.split(","))
        if min(d_model, heads, kv_heads) < 1:
            raise ValueError
        return Shape(d_model, heads, kv_heads, RopeSpec.default(head_dim=head_dim, rope_theta=1e6))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be D_MODEL,HEADS,KV_HEADS,HEAD_DIM, got {text!r}"
        ) from error


# Of Qwen3-0.6B, Llama-3.2-1B, Qwen3-1.7B, Llama-3.1-8B and Qwen3-32B.
_SHAPES = ("1024,16,8,128", "2048,32,8,64", "2048,16,8,128", "4096,32,8,128", "5120,64,8,128")


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_arguments(parser):
    parser.add_argument(
        "--shape",
        help=f"a layer to measure, any number of times (default: {' '.join(_SHAPES)})",
        type=shape,
        action="append",
        metavar="D_MODEL,HEADS,KV_HEADS,HEAD_DIM",
    )
    parser.add_argument(
        "--config",
        help="the layer of the model with this config.json, any number of times",
        type=Path,
        action="append",
        metavar="FILE",
    )
    parser.add_argument(
        "--tokens",
        help="batch times sequence length, any number of times (default: 4096 16384)",
        type=_positive,
        action="append",
        metavar="N",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--norm", action="store_true", help="with an RMS-norm of q and k")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be measured")
    parser.add_argument(
        "--arch",
        choices=_ARCHITECTURES,
        help="with --dry-run: list for this architecture (default: this GPU's, or sm_90)",
    )


def run(args):
    try:
        from .. import triton_backend  # noqa: F401
    except ImportError as error:
        raise report.UserError(f"tune needs Triton: pip install triton ({error})") from error
    if args.arch and not args.dry_run:
        raise report.UserError("--arch is for --dry-run; what is measured is this GPU")
    if not args.dry_run and not torch.cuda.is_available():
        raise report.UserError(
            "no CUDA device, so there is nothing to measure (--dry-run lists what would be)"
        )
    shapes = [*(args.shape or ()), *(_from_config(file) for file in args.config or ())]
    shapes = shapes or [shape(text) for text in _SHAPES]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done = 0
    for layer in shapes:
        for tokens in args.tokens or (4096, 16384):
            case = _Case(layer, tokens, _DTYPES[args.dtype], args.norm)
            arch = _arch(args, device)
            tiles = [*case.candidates(arch), *case.cuda_kernel(arch)]
            print(f"{args.dtype}, {tokens} tokens of {layer}: {len(tiles)} candidates", flush=True)
            if not tiles:
                print("  this head makes no tile: always a GEMM and a rotation")
            elif args.dry_run:
                print("\n".join(f"  {_words(tile)}" for tile in tiles))
            else:
                done += _measure(case, tiles, device)
    if not args.dry_run:
        print(f"{done} measurements kept in {_cache_file()}")


def _cache_file():
    from ..triton_kernels import configs

    return configs.cache_file()


def _arch(args, device) -> int:
    from ..triton_kernels import plan

    if args.arch:
        return _ARCHITECTURES[args.arch]
    return plan.device_of(device).arch if device.type == "cuda" else 90


def _from_config(file) -> Shape:
    try:
        config = json.loads(file.read_text())
        config = config.get("text_config") or config
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        return Shape(config["hidden_size"], heads, kv_heads, RopeSpec.from_config(config))
    except (KeyError, AttributeError, ValueError) as error:
        raise report.UserError(f"{file} is not the configuration of a model: {error}") from error


def _words(tile) -> str:
    if tile is None:
        return "the CUDA kernel"
    how = "descriptors" if tile.descriptors else "pointers"
    return (
        f"{tile.rows} tokens x {tile.heads} heads x {tile.depth}, {tile.warps} warps, "
        f"{tile.stages} stages, {tile.programs} per multiprocessor, {how}"
    )


class _Case:
    """One layer at one number of tokens: its operands, and its two ways to be computed."""

    def __init__(self, layer: Shape, tokens, dtype, norm):
        from ..triton_kernels import configs

        spec = layer.spec
        self.layer, self.tokens, self.dtype, self.norm = layer, tokens, dtype, norm
        self.head_counts = (layer.heads, layer.kv_heads, layer.kv_heads)
        self.head = configs.head_view(
            spec.head_dim, spec.rotary_dim, spec.rotary_offset, spec.interleaved
        )

    def problem(self, x):
        from ..triton_kernels import configs

        weights = [x.new_empty((n * self.layer.spec.head_dim, 0)) for n in self.head_counts]
        return configs.problem_of(x, weights, self.layer.spec.head_dim, self.rotation("cpu"))

    def candidates(self, arch):
        from ..triton_kernels import configs

        if self.head is None:
            return []
        x = torch.empty(0, dtype=self.dtype).new_empty(1).expand(self.tokens, self.layer.d_model)
        return configs.candidates(arch, self.problem(x), self.head)

    def cuda_kernel(self, arch):
        """[None], which stands among the tiles for the CUDA kernel, where that is built and made
        for this; else []."""
        try:
            from .. import cuda_backend
        except ImportError:
            return []
        made = cuda_backend.takes(self.dtype, self.layer.spec.head_dim, self.rotation("cpu"))
        return [None] if arch == 90 and made else []

    def rotation(self, device):
        """What kind of rotation it is decides how long it takes; its angles do not."""
        spec, one = self.layer.spec, {"device": device}
        inv_freq = torch.rand(1, spec.rotary_dim // 2, dtype=torch.float64, **one)
        weight = torch.ones(spec.head_dim, dtype=self.dtype, **one) if self.norm else None
        index = positions = axis_map = None
        if spec.cache_class != "static":
            index = torch.zeros(1, self.tokens, dtype=torch.int32, **one)
        if spec.axis_map is not None:
            positions = torch.arange(self.tokens, **one).expand(spec.axes, 1, -1)
            axis_map = torch.tensor(spec.axis_map, dtype=torch.int32, **one)
        return ops.Rotation(
            inv_freq=inv_freq,
            turns=phase.turns_on_device(inv_freq),
            scale=torch.ones_like(inv_freq),
            positions=positions,
            table_index=index,
            axis_map=axis_map,
            q_norm=weight,
            k_norm=weight,
            rotary_offset=spec.rotary_offset,
            interleaved=spec.interleaved,
            layout="thd",
        )

    def operands(self, device):
        """(x, weights, biases, outputs, rotation)."""
        d, d_model = self.layer.spec.head_dim, self.layer.d_model
        x = torch.randn(self.tokens, d_model, dtype=self.dtype, device=device)
        weights, outputs = [], []
        for n in self.head_counts:
            weight = torch.randn(n * d, d_model, dtype=self.dtype, device=device)
            weights.append(weight * d_model**-0.5)
            outputs.append(x.new_empty((self.tokens, n, d)))
        return x, weights, [None] * 3, [*outputs, None, None], self.rotation(device)


def _measure(case, tiles, device) -> int:
    """Time a case, keep and print what was found; how many measurements that makes: one of each
    backend that could run."""
    from .. import triton_backend
    from ..triton_kernels import configs, plan

    if None in tiles:
        from .. import cuda_backend

    x, weights, biases, outputs, rotation = case.operands(device)
    head_dim = case.layer.spec.head_dim

    def composed():
        triton_backend.project_composed(x, weights, biases, outputs, rotation)

    def fused(tile):
        operands = x, weights, biases, outputs, head_dim, rotation
        if tile is not None:
            triton_backend.project_fused(*operands, tile)
        elif not cuda_backend.project_fused(*operands, always=True):
            raise RuntimeError("another GPU")

    composed()
    want = [y.clone() for y in outputs[:3]]
    usable = []
    for tile in tiles:
        try:
            for y in outputs[:3]:
                y.fill_(torch.nan)
            fused(tile)
            wrong = _difference(outputs[:3], want)
        except Exception as error:  # a compiler has many ways to fail, and other tiles remain
            print(f"  {_words(tile)}: cannot run here ({' '.join(str(error).split())[:100]})")
            continue
        # Both round once or twice, and add in another order.
        if not wrong <= 8 * torch.finfo(case.dtype).eps + 2**-23 * case.layer.d_model**0.5:
            print(f"  {_words(tile)}: WRONG by {wrong:.1e}, not used; please report this")
            continue
        usable.append(tile)
    if not usable:
        return 0
    ways = {tile: lambda tile=tile: fused(tile) for tile in usable}
    times = _times({"composed": composed} | ways)
    limit = times.pop("composed")
    found = []
    for cuda in (False, True):
        kind = [tile for tile in times if (tile is None) == cuda]
        if not kind:
            continue
        best = min(kind, key=times.get)
        found.append(configs.Measurement(case.problem(x), best, times[best], limit))
        won = "fused" if times[best] < limit else "GEMM and rotation"
        print(f"  GEMM and rotation {limit:.1f} us, fused {times[best]:.1f} us: {won} from now on")
        print(f"  {_words(best)}")
    configs.save(plan.device_of(device).name, found)
    return len(found)


def _difference(outputs, want) -> float:
    """The largest error of an output by root mean square, relative to its size; NaN counts."""
    errors = [
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for a, b in zip(outputs, want, strict=True)
    ]
    return max(errors, key=lambda e: (e != e, e))


def _times(calls, rounds=20, seconds=0.02) -> dict:
    """Median microseconds of each call, timed in turns so that a change of clocks meets all."""
    repeats = {}
    for name, call in calls.items():
        repeats[name] = max(1, round(seconds * 1e6 / max(1.0, _microseconds(call, 3))))
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_microseconds(call, repeats[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def _microseconds(call, repeats):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats
