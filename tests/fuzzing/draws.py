"""What random calls are made of: specs, tensors in memory of every kind, positions, factors."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

import rope_fused as rf
from helpers import DTYPES

INTS = (torch.int32, torch.int64)
SEQLENS = (0, 1, 2, 5, 13, 33, 70)
HEAD_DIMS = (2, 4, 6, 16, 20, 32, 48, 64, 66, 80, 96, 128, 160, 256)
# An interpreted kernel takes milliseconds for a tile of tokens: fewer and smaller ones there.
SMALL = {"seqlens": (0, 1, 2, 5, 9), "head_dims": (2, 4, 6, 16, 20, 32)}


class Draw:
    """A source of random choices; `number` is all that it takes to repeat them."""

    def __init__(self, number: int, what: str, small: bool = False):
        self.random = random.Random(f"{what} {number}")
        torch.manual_seed(self.random.getrandbits(60))
        self.small = small

    def one(self, *choices):
        return self.random.choice(choices)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def seqlen(self) -> int:
        return self.one(*(SMALL["seqlens"] if self.small else SEQLENS))

    def dtype(self) -> torch.dtype:
        return self.one(*DTYPES)


# -- specs -------------------------------------------------------------------------------------


def head(draw) -> dict:
    """The geometry that specs of one head share."""
    head_dim = draw.one(*(SMALL["head_dims"] if draw.small else HEAD_DIMS))
    partial = draw.one(1.0, 1.0, 0.5, 0.25)
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or rotary_dim < 4:
        partial, rotary_dim = 1.0, head_dim
    shared = {
        "head_dim": head_dim,
        "partial_rotary_factor": partial,
        "rotary_offset": draw.one(0, head_dim - rotary_dim, (head_dim - rotary_dim) // 2),
        "interleaved": draw.chance(0.4),
    }
    if rotary_dim >= 8 and draw.chance(0.1):
        pairs = rotary_dim // 2
        first = draw.random.randint(1, pairs - 2)
        second = draw.random.randint(1, pairs - first - 1)
        shared["mrope_section"] = (first, second, pairs - first - second)
        shared["mrope_interleaved"] = draw.chance(0.5)
    return shared


def spec(draw, shared: dict) -> rf.RopeSpec:
    """A spec of some method for the head that `shared` describes."""
    original = {"original_max_position_embeddings": draw.one(4, 8, 64)}
    pairs = int(shared["head_dim"] * shared["partial_rotary_factor"]) // 2
    short, long = ([1 + top * draw.random.random() for _ in range(pairs)] for top in (1, 9))
    per_pair = [0.5 + draw.random.random() for _ in range(pairs)]
    methods = {
        "default": {},
        "linear": {"factor": 2.5},
        "ntk": {"factor": 8.0},
        "yarn": {"factor": 4.0, **original, "attention_factor": draw.one(None, 0.75, per_pair)},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **original},
        "dynamic": {"factor": 2.0, "max_position_embeddings": 8},
        "dynamic_yarn": original,
        "longrope": {
            "short_factor": short,
            "long_factor": long,
            "factor": 8.0,
            "n_start": draw.one(0, 0, 3),
            **original,
        },
    }
    # NTK-aware methods divide by rotary_dim - 2.
    method = draw.one(*methods) if pairs >= 2 else "default"
    options = methods[method] | shared | {"rope_theta": draw.one(100.0, 1e4, 5e5, 1e6)}
    if draw.chance(0.1):
        options["q_temperature"] = (0.25, draw.one(3, 100), draw.one(0, 1))
    return getattr(rf.RopeSpec, method)(**options)


# -- tensors -----------------------------------------------------------------------------------


def numbers(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def strided(draw, shape, dtype, written=False) -> torch.Tensor:
    """Random numbers in memory of any order, with gaps, at any offset; read-only ones also shared.

    written: they are to be written, so no two elements share memory.
    """
    *rest, last = shape
    kinds = ["plain", "permuted", "rows of more", "columns of more", "steps", "offset"]
    kinds += [] if written else ["shared", "overlapping", "negated", "one number"]
    kind = draw.one(*kinds)
    if kind == "permuted":
        order = draw.random.sample(range(len(shape)), len(shape))
        return numbers(*(shape[i] for i in order), dtype=dtype).permute(
            [order.index(i) for i in range(len(shape))]
        )
    if kind == "rows of more" and len(shape) > 1:
        *first, rows = rest
        return numbers(*first, rows + 3, last, dtype=dtype)[..., 2 : 2 + rows, :]
    if kind == "columns of more":
        return numbers(*rest, last + 5, dtype=dtype)[..., 3 : 3 + last]
    if kind == "steps":
        return numbers(*rest, 2 * last, dtype=dtype)[..., ::2]
    if kind == "offset":
        total = torch.Size(shape).numel()
        return numbers(total + 3, dtype=dtype)[draw.one(1, 3) :][:total].view(shape)
    if kind == "shared":
        return numbers(1, *shape[1:], dtype=dtype).expand(shape)
    if kind == "overlapping":  # every row begins inside the row before it
        return numbers(sum(shape) + 1, dtype=dtype).as_strided(shape, (1,) * len(shape), 1)
    if kind == "negated" and dtype in (torch.float32, torch.float64):
        both = torch.complex(numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype))
        return both.conj().imag  # torch keeps the sign aside, as a bit of the tensor
    if kind == "one number":
        return numbers(dtype=dtype).expand(shape)
    return numbers(*shape, dtype=dtype)


class Tokens(NamedTuple):
    """How the tokens of a call are laid out."""

    packed: bool  # no batch dimension
    batch: int
    seqlen: int

    @property
    def shape(self):
        return (self.seqlen,) if self.packed else (self.batch, self.seqlen)


def positions(draw, tokens: Tokens, axes: int):
    if axes == 1 and draw.chance(0.4):
        return None
    top = draw.one(10, 200, 2**20, 2**31 - 1)
    least = draw.one(0, -top)
    dtype = draw.one(*INTS) if top < 2**31 - 1 else torch.int64
    shapes = [(tokens.seqlen,)]
    if not tokens.packed:
        shapes += [(1, tokens.seqlen), (tokens.batch, tokens.seqlen)]
    shape = draw.one(*shapes)
    shape = shape if axes == 1 else (axes, *shape)
    kind = draw.one("any", "any", "repeated", "descending", "steps")
    if kind == "repeated":
        return torch.randint(least, top + 1, (), dtype=dtype).expand(shape)
    if kind == "steps":
        return torch.randint(least, top + 1, (*shape, 2), dtype=dtype)[..., 1]
    found = torch.randint(least, top + 1, shape, dtype=dtype)
    return found.sort(-1, descending=True).values if kind == "descending" else found


def sequences(draw, tokens: Tokens, packable: bool):
    """(cu_seqlens or None, how many sequences there are)."""
    if tokens.batch != 1 or not packable or draw.chance(0.6):
        return None, tokens.batch
    cuts = sorted(draw.random.randint(0, tokens.seqlen) for _ in range(draw.one(0, 1, 3)))
    return torch.tensor([0, *cuts, tokens.seqlen], dtype=draw.one(*INTS)), len(cuts) + 1


def lengths(draw, spec: rf.RopeSpec, count: int):
    """seq_lens of `count` sequences, or None where none are needed."""
    if spec.cache_class != "dynamic" and draw.chance(0.7):
        return None
    return torch.randint(1, draw.one(10, 100), (count,), dtype=draw.one(*INTS))


def factors(draw, spec: rf.RopeSpec, tokens: Tokens, count: int) -> dict:
    """inv_freq, attention_factor and q_scale in place of the spec's, each in a quarter of calls."""
    pairs, made = spec.rotary_dim // 2, {}
    floats = (torch.float32, torch.float64, torch.bfloat16)

    def some(shape, least):
        x = (torch.rand(shape, dtype=torch.float64) + least).to(draw.one(*floats))
        return x.expand(shape) if draw.chance(0.8) else x[..., :1].expand(shape) if shape else x

    if draw.chance(0.25):
        made["attention_factor"] = draw.one(0.5, 2, some((), 0.2), some((pairs,), 0.2))
    if draw.chance(0.25):
        shapes = [(tokens.seqlen,)] if tokens.packed else [tokens.shape, (1, tokens.seqlen)]
        made["q_scale"] = some(draw.one(*shapes), 0.5) * draw.one(1, -1)
    if draw.chance(0.25):
        if spec.cache_class == "dynamic":
            tables = count
        else:
            tables = 1 + (spec.switch_length is not None) + (spec.n_start > 0)
        made["inv_freq"] = some(draw.one((pairs,), (tables, pairs)), -0.1)
    return made
