"""Random fused projections with random options, and what must come out of them."""

import dataclasses

import torch
import torch.nn.functional as F

from helpers import make_spec, randn
from rope_fused import ops, phase, reference


@dataclasses.dataclass
class Call:
    """A random projection with random options, and the same in float64."""

    head_dim: int = 64
    heads: tuple = (3, 2, 1)
    d_model: int = 48
    shape: tuple = (2, 37)
    dtype: torch.dtype = torch.float16
    rotary_dim: int | None = None
    offset: int = 0
    interleaved: bool = False
    conjugate: bool = False
    bias: bool = False
    norm: bool = False
    keep: bool = False
    positions: str | None = None  # "int32", "int64", "axes"
    tables: int = 1
    token_scale: bool = False
    device: str = "cpu"

    def __post_init__(self):
        def draw(*shape, dtype=None):
            return randn(*shape, dtype=dtype or self.dtype, device=self.device)

        pairs = (self.rotary_dim or self.head_dim) // 2
        batch, seqlen = self.shape
        self.x = draw(batch, seqlen, self.d_model)
        rows = [n * self.head_dim for n in self.heads]
        self.weights = [draw(n, self.d_model) * self.d_model**-0.5 if n else None for n in rows]
        self.biases = [draw(n) if n and self.bias else None for n in rows]
        spec = make_spec(2 * pairs)
        factors = 1 + torch.arange(self.tables, device=self.device)[:, None]
        inv_freq = spec.inv_freq().to(self.device)[None] / factors
        per_token = (1, seqlen) if batch == 1 or self.positions == "int32" else (batch, seqlen)
        options = {"positions": None, "axis_map": None}
        if self.positions == "axes":
            shape = (3, *per_token)
            options["axis_map"] = torch.randint(0, 3, (pairs,), dtype=torch.int32)
        else:
            shape = per_token
        if self.positions:
            kind = torch.int32 if self.positions == "int32" else torch.int64
            options["positions"] = torch.randint(-(2**20), 2**20, shape, dtype=kind)
        if self.tables > 1:
            options["table_index"] = torch.randint(0, self.tables, per_token, dtype=torch.int32)
        options = {k: None if v is None else v.to(self.device) for k, v in options.items()}
        if self.token_scale:
            options["token_scale"] = draw(*per_token, dtype=torch.float32)
        if self.norm:
            options |= {
                "q_norm": draw(self.head_dim, dtype=torch.float32),
                "k_norm": draw(self.head_dim),
            }
        self.rotation = ops.Rotation(
            inv_freq=inv_freq,
            turns=phase.turns_on_device(inv_freq),
            scale=0.5 + torch.rand_like(inv_freq),
            rotary_offset=self.offset,
            interleaved=self.interleaved,
            conjugate=self.conjugate,
            **options,
        )

    def outputs(self, fill=torch.nan):
        def new(n):
            return torch.full(
                (*self.shape, n, self.head_dim), fill, dtype=self.dtype, device=self.device
            )

        made = [new(n) if n else None for n in self.heads]
        return [*made, *(new(n) if self.keep else None for n in self.heads[:2])]

    def outputs_with_gaps(self, gap):
        """([q, k, v, None, None] with `gap` elements behind each row, the memory that holds them),
        all NaN."""
        rooms = [
            torch.full(
                (*self.shape, n * self.head_dim + gap),
                torch.nan,
                dtype=self.dtype,
                device=self.device,
            )
            for n in self.heads
        ]
        outputs = [r[..., :-gap].unflatten(-1, (-1, self.head_dim)) for r in rooms]
        return [*outputs, None, None], rooms

    def check_run(self):
        self.check(self.run())

    def projections(self, dtype):
        """x w^T + bias as heads, in `dtype`."""

        def linear(w, b):
            b = None if b is None else b.to(dtype)
            return F.linear(self.x.to(dtype), w.to(dtype), b).unflatten(-1, (-1, self.head_dim))

        pairs = zip(self.weights, self.biases, strict=True)
        return [None if w is None else linear(w, b) for w, b in pairs]

    def expected(self, z):
        """[q, k, v, z_q, z_k] in float64 from projections."""
        operands = self.rotation._asdict()
        for name in ("turns", "norm_all", "backend"):
            del operands[name]
        q, k = reference.rotate(z[0], z[1], **operands)
        kept = z[:2] if self.keep else (None, None)
        return [t if t is None else t.double() for t in (q, k, z[2], *kept)]

    def check(self, got):
        """No worse by root mean square than rounding each step, plus one rounding; and as near
        everywhere as float32 sums and one rounding allow."""
        exact = self.expected(self.projections(torch.float64))
        eager = self.expected(self.projections(self.dtype))
        for name, y, want, rounded in zip(
            ("q", "k", "v", "z_q", "z_k"), got, exact, eager, strict=True
        ):
            if want is None:
                assert y is None
                continue
            assert y.isfinite().all(), name
            unit = torch.finfo(self.dtype).eps / 2
            error = (y.double() - want).square().mean().sqrt()
            budget = (rounded.to(self.dtype).double() - want).square().mean().sqrt()
            budget += unit * want.square().mean().sqrt()
            assert error <= budget, f"{name}: rms {error:.3e}, budget {budget:.3e}"
            worst, largest = (y.double() - want).abs().max(), want.abs().max()
            # A float32 sum of d_model products (and a norm's of head_dim) loses a unit for each.
            lost = 2.0**-24 * (self.d_model + self.head_dim) + unit
            assert worst <= 4 * lost * largest, f"{name}: worst {worst:.3e} of {largest:.3e}"


EVERYTHING = {
    "bias": True,
    "norm": True,
    "keep": True,
    "tables": 3,
    "token_scale": True,
    "positions": "axes",
}
