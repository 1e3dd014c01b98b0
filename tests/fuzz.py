"""Random legal calls of apply_rope against the reference, forward and backward.

A number draws a call, and is all that it takes to repeat it:

    python tests/fuzz.py --minutes 10 [--seed N] [--backend cpu]
    python tests/fuzz.py --only NUMBER
"""

import argparse
import random
import sys
import time
import traceback
from typing import NamedTuple

import torch

import rope_fused as rf
from helpers import DTYPES, check, shape_of
from rope_fused import reference

HEAD_DIMS = (2, 4, 6, 16, 20, 32, 48, 64, 66, 80, 96, 128, 160, 256)
SEQLENS = (0, 1, 2, 5, 13, 33, 70)
INTS = (torch.int32, torch.int64)
# Sums over tokens of position times gradient, beside the largest of a tensor's elements: float64
# loses what cancels, with positions up to 2**31 some nine digits of the sixteen.
GRADIENT = 1e-7


class Call(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor | None
    spec: rf.RopeSpec
    positions: torch.Tensor | None
    options: dict


def make_call(number) -> Call:
    """The call that `number` draws."""
    draw = random.Random(number)
    torch.manual_seed(number)
    spec = _spec(draw)
    layout = draw.choice(("bshd", "bhsd", "thd"))
    batch = 1 if layout == "thd" else draw.choice((1, 2, 3))
    seqlen, kv_heads, dtype = draw.choice(SEQLENS), draw.choice((1, 2, 3)), draw.choice(DTYPES)
    heads = kv_heads * draw.choice((1, 2, 4))
    q, k = (
        _strided(draw, shape_of(layout, batch, seqlen, n, spec.head_dim), dtype)
        for n in (heads, kv_heads)
    )
    options = {"layout": layout, "conjugate": draw.random() < 0.3}
    sequences = batch
    if batch == 1 and draw.random() < 0.4:
        cuts = sorted(draw.randint(0, seqlen) for _ in range(draw.choice((0, 1, 3))))
        options["cu_seqlens"] = torch.tensor([0, *cuts, seqlen], dtype=draw.choice(INTS))
        sequences = len(cuts) + 1
    if spec.cache_class == "dynamic" or draw.random() < 0.3:
        options["seq_lens"] = torch.randint(1, 100, (sequences,), dtype=draw.choice(INTS))
    pairs = spec.rotary_dim // 2
    if draw.random() < 0.25:
        per_pair = torch.rand(pairs, dtype=torch.float64) + 0.2
        options["attention_factor"] = draw.choice((0.5, torch.tensor(1.3), per_pair))
    if draw.random() < 0.25:
        shape = (seqlen,) if layout == "thd" else (batch, seqlen)
        options["q_scale"] = torch.rand(shape, dtype=torch.float32) + 0.5
    if draw.random() < 0.2:
        options["inv_freq"] = torch.rand(pairs, dtype=torch.float64)
    k = None if draw.random() < 0.15 else k
    return Call(q, k, spec, _positions(draw, layout, batch, seqlen), options)


def run(number, backend="auto"):
    """Make the call and hold it against the reference; half of them with gradients."""
    call = make_call(number)
    check(*call[:4], backend=backend, **call.options)
    if call.q.numel() and number % 2:
        got, want = (_gradients(f, call) for f in (rf.apply_rope, reference.apply_rope))
        for name, expected in want.items():
            distance = (got[name] - expected).abs().max()
            assert distance <= GRADIENT * expected.abs().max(), f"gradient of {name}: {distance}"


def describe(number) -> str:
    """The call in words, and how to repeat it."""
    call = make_call(number)
    tensors = {"q": call.q, "k": call.k, "positions": call.positions, **call.options}
    lines = [f"python tests/fuzz.py --only {number}", f"  {call.spec}"]
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            value = f"{value.dtype} {tuple(value.shape)}, strides {value.stride()}"
        lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def _spec(draw) -> rf.RopeSpec:
    head_dim, partial = draw.choice(HEAD_DIMS), draw.choice((1.0, 1.0, 0.5, 0.25))
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or rotary_dim < 4:
        partial, rotary_dim = 1.0, head_dim
    shared = {
        "head_dim": head_dim,
        "rope_theta": draw.choice((100.0, 1e4, 5e5, 1e6)),
        "partial_rotary_factor": partial,
        "rotary_offset": draw.choice((0, head_dim - rotary_dim, (head_dim - rotary_dim) // 2)),
        "interleaved": draw.random() < 0.4,
    }
    original = {"original_max_position_embeddings": draw.choice((4, 8, 64))}
    pairs = rotary_dim // 2
    short, long = ([1 + top * draw.random() for _ in range(pairs)] for top in (1, 9))
    methods = {
        "default": {},
        "linear": {"factor": 2.5},
        "ntk": {"factor": 8.0},
        "yarn": {"factor": 4.0, **original},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
        "dynamic": {"factor": 2.0, "max_position_embeddings": 8},
        "longrope": {"short_factor": short, "long_factor": long, "factor": 8.0, **original},
    }
    # NTK-aware methods divide by rotary_dim - 2.
    method = draw.choice([*methods]) if rotary_dim >= 4 else "default"
    return getattr(rf.RopeSpec, method)(**shared, **methods[method])


def _strided(draw, shape, dtype):
    """Random numbers in memory of any order, with gaps, or shared by the batch."""
    kind = draw.choice(("plain", "permuted", "heads of more", "columns of more", "shared", "steps"))
    order = draw.sample(range(len(shape)), len(shape))
    *rest, heads, head_dim = shape

    def randn(*size):
        return torch.randn(size, dtype=torch.float64).to(dtype)

    if kind == "permuted":
        return randn(*(shape[i] for i in order)).permute(
            [order.index(i) for i in range(len(shape))]
        )
    if kind == "heads of more":
        return randn(*rest, heads + 3, head_dim)[..., 2 : 2 + heads, :]
    if kind == "columns of more":
        return randn(*rest, heads, head_dim + 5)[..., 3 : 3 + head_dim]
    if kind == "shared":
        return randn(1, *shape[1:]).expand(shape)
    if kind == "steps":
        return randn(*rest, heads, 2 * head_dim)[..., ::2]
    return randn(*shape)


def _positions(draw, layout, batch, seqlen):
    if draw.random() < 0.4:
        return None
    top = draw.choice((10, 200, 2**20, 2**31 - 1))
    shapes = [(seqlen,)] if layout == "thd" else [(seqlen,), (1, seqlen), (batch, seqlen)]
    dtype = draw.choice(INTS) if top < 2**31 - 1 else torch.int64
    return torch.randint(draw.choice((0, -top)), top + 1, draw.choice(shapes), dtype=dtype)


def _gradients(function, call) -> dict[str, torch.Tensor]:
    """Of a weighted sum of the results, in float64, in every tensor that may have one."""
    learned = ("attention_factor", "q_scale", "inv_freq")
    tensors = {"q": call.q, "k": call.k} | {name: call.options.get(name) for name in learned}
    leaves = {
        name: t.detach().double().requires_grad_()
        for name, t in tensors.items()
        if isinstance(t, torch.Tensor)
    }
    options = call.options | {name: t for name, t in leaves.items() if name in learned}
    outputs = function(leaves["q"], leaves.get("k"), call.spec, call.positions, **options)
    torch.manual_seed(0)
    total = sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() for y in outputs if y is not None)
    grads = torch.autograd.grad(total, [*leaves.values()], materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this call alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    number = first = args.seed * 10**6 if args.only is None else args.only
    end, failed = time.monotonic() + 60 * args.minutes, 0
    while number == first or (args.only is None and time.monotonic() < end):
        try:
            run(number, args.backend)
        except Exception:
            failed += 1
            print(traceback.format_exc(), describe(number), sep="\n", flush=True)
        number += 1
    print(f"--seed {args.seed}: {number - first} calls, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
