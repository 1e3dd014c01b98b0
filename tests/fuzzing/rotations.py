"""Random calls of apply_rope, rerotate and apply_rotary_pos_emb, beside the reference."""

from __future__ import annotations

import torch

from fuzzing import draws
from fuzzing.calls import (
    LEARNED,
    Call,
    Expected,
    assert_factor_gradient,
    largest_position,
    least,
    length,
    rotary,
    unit,
)
from fuzzing.draws import Tokens
from helpers import (
    assert_close_to,
    assert_same_bits,
    assert_within_rotation_budget,
    pair_magnitude,
    rotation_slack,
    shape_of,
)
from rope_fused import reference

# -- apply_rope --------------------------------------------------------------------------------


class ApplyRope:
    wide = True

    @staticmethod
    def draw(draw) -> Call:
        spec = draws.spec(draw, draws.head(draw))
        layout = draw.one("bshd", "bhsd", "thd")
        tokens = Tokens(layout == "thd", 1 if layout == "thd" else draw.one(1, 2, 3), draw.seqlen())
        kv_heads, dtype = draw.one(1, 2, 3), draw.dtype()
        heads = kv_heads * draw.one(1, 2, 4)
        written = draw.chance(0.2)
        shapes = [shape_of(layout, *tokens[1:], n, spec.head_dim) for n in (heads, kv_heads)]
        if written and layout != "bhsd" and draw.chance(0.3):  # slices of one projection
            both = draws.strided(draw, (*shapes[0][:-2], heads + kv_heads, spec.head_dim), dtype,
                                 written=True)  # fmt: skip
            q, k = both.split((heads, kv_heads), -2)
        else:
            q, k = (draws.strided(draw, shape, dtype, written) for shape in shapes)
        k = None if draw.chance(0.15) else k
        call = {"q": q, "k": k, "spec": spec, "layout": layout, "conjugate": draw.chance(0.3)}
        call |= rotary(draw, spec, tokens)
        call["positions"] = draws.positions(draw, tokens, spec.axes)
        plain = spec.cache_class == "static" and spec.axes == 1 and spec.q_temperature is None
        plain = plain and not isinstance(spec.attention_factor, tuple)
        if plain and call.keys().isdisjoint(LEARNED) and draw.chance(0.15):
            call["precision"] = "hf"
        if not written:
            return Call("apply_rope", call)
        out = [
            None if x is None else draw.one(x, draws.strided(draw, x.shape, dtype, written=True))
            for x in (q, k)
        ]
        return Call("apply_rope", call, tuple(out))

    @staticmethod
    def values(call):
        call = dict(call)
        if call.pop("precision", "exact") == "exact":
            return reference.apply_rope(**call)
        # transformers' own steps, in its own precision.
        spec, q, layout = call["spec"], call["q"], call["layout"]
        seqlen = q.shape[{"bshd": 1, "bhsd": 2, "thd": 0}[layout]]
        positions = call["positions"]
        if positions is None:
            positions = torch.arange(seqlen)
            if call.get("cu_seqlens") is not None:
                ends = call["cu_seqlens"].tolist()
                lengths = [b - a for a, b in zip(ends[:-1], ends[1:], strict=True)]
                positions = torch.cat([torch.arange(n) for n in lengths])
        positions = positions if positions.dim() == 2 else positions[None]
        angle = positions[..., None].float() * spec.inv_freq("hf")
        wide = angle.repeat_interleave(2, -1) if spec.interleaved else torch.cat((angle, angle), -1)
        scale = spec.attention_factor_at(None, "hf")
        tables = [(f(wide) * torch.tensor(scale)).to(q.dtype) for f in (torch.cos, torch.sin)]
        if call["conjugate"]:
            tables[1] = -tables[1]
        return reference.rotate_tables(
            q,
            call["k"],
            *tables,
            layout=layout,
            interleaved=spec.interleaved,
            rotary_offset=spec.rotary_offset,
        )

    @classmethod
    def expect(cls, call) -> Expected:
        values, spec = cls.values(call.arguments), call.arguments["spec"]
        values = [None if y is None else y.clone() for y in values]  # before an output is written
        x = [call.arguments[name] for name in ("q", "k")]
        exact = call.arguments.get("precision") != "hf"

        def check(i, y):
            if call.out is None:
                like = torch.empty_like(x[i])
                assert y.stride() == like.stride(), f"strides {y.stride()}, not {like.stride()}"
            if exact:
                assert_within_rotation_budget(y, values[i], spec, call.arguments["positions"])
            else:
                assert_same_bits(y, values[i])

        return Expected(tuple(values), x[0].dtype, check)

    @staticmethod
    def check_gradient(call, name, got, want, incoming, outputs):
        arguments = call.arguments
        spec, q, positions = arguments["spec"], arguments["q"], arguments["positions"]
        if arguments.get("precision") == "hf":
            return assert_close_to(got, want, _hf_slack(q.dtype, want, spec))
        if name in ("q", "k"):
            return assert_within_rotation_budget(got, want, spec, positions)
        largest, tokens = largest_position(positions, q.numel()), q.numel() // q.shape[-1] + 1
        relative = rotation_slack(q.dtype, largest) + 2 * tokens * unit(q.dtype)
        terms = length(incoming) * length(outputs) / least(arguments, name)
        assert_factor_gradient(name, got, want, terms, relative, largest)


def _hf_slack(dtype, want, spec):
    """Two products and a sum, each rounded in `dtype`; want is of that dtype's own formula."""
    return 2 * torch.finfo(dtype).eps * pair_magnitude(want.double(), spec)


# -- rerotate ----------------------------------------------------------------------------------


class Rerotate:
    wide = True

    @staticmethod
    def draw(draw) -> Call:
        shared = draws.head(draw)
        from_spec, to_spec = draws.spec(draw, shared), draws.spec(draw, shared)
        layout = draw.one("bshd", "bhsd", "thd")
        tokens = Tokens(layout == "thd", 1 if layout == "thd" else draw.one(1, 2, 3), draw.seqlen())
        cu_seqlens, count = draws.sequences(draw, tokens, True)
        written, dtype = draw.chance(0.2), draw.dtype()
        k = shape_of(layout, *tokens[1:], draw.one(1, 2, 3), from_spec.head_dim)
        k = draws.strided(draw, k, dtype, written)
        call = {
            "k": k,
            "positions": draws.positions(draw, tokens, from_spec.axes),
            "from_spec": from_spec,
            "to_spec": to_spec,
            "layout": layout,
            "cu_seqlens": cu_seqlens,
            "from_seq_lens": draws.lengths(draw, from_spec, count),
            "to_seq_lens": draws.lengths(draw, to_spec, count),
        }
        if not written:
            return Call("rerotate", call)
        out = draw.one(k, draws.strided(draw, k.shape, dtype, written=True))
        return Call("rerotate", call, (out,))

    @staticmethod
    def values(call):
        def rotate(x, which, **options):
            rest = {name: call[name] for name in ("layout", "cu_seqlens")}
            rest["seq_lens"] = call[f"{which}_seq_lens"]
            spec = call[f"{which}_spec"]
            return reference.apply_rope(x, x, spec, call["positions"], **rest, **options)[1]

        spec, k = call["from_spec"], call["k"].double()
        one = torch.ones_like(k)
        factor = pair_magnitude(rotate(one, "from"), spec) / pair_magnitude(one, spec)
        return (rotate(rotate(k, "from", conjugate=True) / factor.square(), "to"),)

    @classmethod
    def expect(cls, call) -> Expected:
        (want,), k = cls.values(call.arguments), call.arguments["k"]

        def check(i, y):
            if call.out is None:
                assert y.stride() == torch.empty_like(k).stride()
            assert_close_to(y, want, cls._slack(call, want))

        return Expected((want,), k.dtype, check)

    @staticmethod
    def _slack(call, want):
        """Of two rotations and a quotient of factors; the reference rounds the difference of
        frequencies to float64 by at most 2**-54, as they are below 1."""
        k = call.arguments["k"]
        largest = largest_position(call.arguments["positions"], k.numel())
        slack = 3 * rotation_slack(k.dtype, largest) + 2.0**-54 * largest
        return slack * pair_magnitude(want, call.arguments["to_spec"])

    @classmethod
    def check_gradient(cls, call, name, got, want, incoming, outputs):
        assert_close_to(got, want, cls._slack(call, want))


# -- apply_rotary_pos_emb ----------------------------------------------------------------------


class Tables:
    wide = False

    @staticmethod
    def draw(draw) -> Call:
        unsqueeze_dim, batch, seqlen = draw.one(1, 2), draw.one(1, 2, 3), draw.seqlen()
        layout = "bhsd" if unsqueeze_dim == 1 else "bshd"
        head_dim, dtype = draw.one(*draws.HEAD_DIMS), draw.dtype()
        width = 2 * draw.random.randint(1, head_dim // 2)
        width = head_dim if draw.chance(0.6) else width
        other = draw.dtype() if draw.chance(0.3) else dtype
        heads = draw.one(1, 2, 3)
        q, k = (
            draws.strided(draw, shape_of(layout, batch, seqlen, n, head_dim), dtype)
            for n in (heads * draw.one(1, 4), heads)
        )
        shape = (draw.one(1, batch), seqlen, width)
        cos, sin = (draws.strided(draw, shape, other) for _ in range(2))
        if draw.chance(0.2):  # one may be shared by the batch, the other not
            sin = draws.strided(draw, (draw.one(1, batch), seqlen, width), other)
        k = None if draw.chance(0.15) else k
        call = {"q": q, "k": k, "cos": cos, "sin": sin, "unsqueeze_dim": unsqueeze_dim}
        return Call("apply_rotary_pos_emb", call)

    @staticmethod
    def values(call):
        dtype = torch.promote_types(call["q"].dtype, call["cos"].dtype)
        tensors = [None if call[n] is None else call[n].to(dtype) for n in ("q", "k", "cos", "sin")]
        layout = "bhsd" if call["unsqueeze_dim"] == 1 else "bshd"
        return reference.rotate_tables(*tensors, layout=layout)

    @classmethod
    def expect(cls, call) -> Expected:
        values = cls.values(call.arguments)
        dtype = values[0].dtype
        return Expected(values, dtype, lambda i, y: assert_same_bits(y, values[i]))

    @staticmethod
    def check_gradient(call, name, got, want, incoming, outputs):
        if name in ("q", "k"):
            return assert_same_bits(got, want)
        # Products and sums over heads and batch, each rounded; of either formula.
        x = [call.arguments[n] for n in ("q", "k") if call.arguments[n] is not None]
        count = 8 + sum(t.shape[0] * (t.shape[1] + t.shape[2]) for t in x)
        slack = 2 * count * torch.finfo(outputs[0].dtype).eps * length(x) * length(incoming)
        slack += torch.finfo(got.dtype).eps * want.double().abs()
        return assert_close_to(got, want.double(), torch.zeros_like(want.double()) + slack)
