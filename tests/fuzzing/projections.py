"""Random calls of qkv_rope, beside the reference."""

from __future__ import annotations

import torch

from fuzzing import draws
from fuzzing.calls import (
    AUTOCAST,
    LEARNED,
    Call,
    Expected,
    assert_factor_gradient,
    assert_within,
    largest_position,
    least,
    length,
    rotary,
    unit,
)
from fuzzing.draws import Tokens
from helpers import assert_close_to, half_ulp, pair_magnitude, rotation_slack
from rope_fused import reference


class QkvRope:
    wide = True

    @staticmethod
    def draw(draw) -> Call:
        spec = draws.spec(draw, draws.head(draw))
        packed = draw.chance(0.4)
        tokens = Tokens(packed, 1 if packed else draw.one(1, 2, 3), draw.seqlen())
        kv_heads, dtype, d_model = draw.one(1, 2), draw.dtype(), draw.one(1, 3, 8, 16, 37, 64)
        heads = {"q": kv_heads * draw.one(1, 2, 4), "k": kv_heads, "v": kv_heads}
        if draw.chance(0.2):
            del heads["v"]
        rows = {name: n * spec.head_dim for name, n in heads.items()}
        x = draws.strided(draw, (*tokens.shape, d_model), dtype)
        call = {"x": x, "spec": spec, "positions": draws.positions(draw, tokens, spec.axes)}

        def put(suffix, names, shape):
            """Tensors of their own, or row slices of one in whatever order."""
            sizes = [rows[name] for name in names]
            if draw.chance(0.5):
                found = [draws.strided(draw, (n, *shape), dtype) for n in sizes]
                call.update({f"{name}_{suffix}": t for name, t in zip(names, found, strict=True)})
                return
            one = draws.strided(draw, (sum(sizes) + 2, *shape), dtype)[1:-1]
            order = list(names) if draw.chance(0.6) else draw.random.sample(names, len(names))
            parts = one.split([rows[name] for name in order])
            call.update({f"{name}_{suffix}": t for name, t in zip(order, parts, strict=True)})

        put("weight", list(rows), (d_model,))
        if draw.chance(0.4):
            names = [name for name in rows if draw.chance(0.8)]
            if names:
                put("bias", names, ())
        if draw.chance(0.4):
            call["norm_scope"] = draw.one("head", "all")
            call["norm_eps"] = draw.one(1e-6, 1e-3, 1)
            for name in ("q", "k"):
                if draw.chance(0.85):
                    size = rows[name] if call["norm_scope"] == "all" else spec.head_dim
                    kind = draw.one(dtype, torch.float32)
                    call[f"{name}_norm_weight"] = draws.strided(draw, (size,), kind)
        call |= rotary(draw, spec, tokens)
        if draw.chance(0.8):
            return Call("qkv_rope", call)
        shapes = {n: (*tokens.shape, heads[n], spec.head_dim) for n in heads}
        if draw.chance(0.4):
            one = draws.numbers(*tokens.shape, sum(heads.values()), spec.head_dim, dtype=dtype)
            out = one.split(list(heads.values()), -2)
        else:
            out = [draws.strided(draw, shape, dtype, written=True) for shape in shapes.values()]
        return Call("qkv_rope", call, (*out, *(None for _ in range(3 - len(out)))))

    @staticmethod
    def values(call):
        return reference.qkv_rope(**call)

    @classmethod
    def expect(cls, call) -> Expected:
        arguments, dtype = call.arguments, call.arguments["x"].dtype
        if call.mode in AUTOCAST and dtype != torch.float64:
            dtype = AUTOCAST[call.mode]
            names = ("x", *(f"{n}_{what}" for n in "qkv" for what in ("weight", "bias")))
            arguments = {k: v.to(dtype) if k in names else v for k, v in arguments.items()}
        values, errors = cls.values(arguments), cls._errors(arguments, dtype)

        def check(i, y):
            if call.out is None:
                assert y.is_contiguous()
            assert_within(y, values[i], errors[i].detach())

        return Expected(values, dtype, check)

    @classmethod
    def _errors(cls, call, dtype):
        """How far from the reference each result may be, its own rounding apart."""
        spec = call["spec"]
        made = [cls._projected(call, name, dtype) for name in "qkv"]
        errors = [None if m is None else m[1] for m in made]
        ones = [torch.ones_like(e) for e in errors[:2]]
        rest = {k: call[k] for k in ("positions", "cu_seqlens", "seq_lens", *LEARNED) if k in call}
        layout = "thd" if call["x"].dim() == 2 else "bshd"
        # The rotation lengthens every pair by a factor, and so an error of the projection.
        for i, y in enumerate(reference.apply_rope(*ones, spec, layout=layout, **rest)):
            factor = pair_magnitude(y, spec) / pair_magnitude(ones[i], spec)
            largest = largest_position(call["positions"], y.numel())
            slack = rotation_slack(dtype, largest) * pair_magnitude(made[i][0], spec)
            errors[i] = factor * (pair_magnitude(errors[i], spec) + slack)
        return errors

    @staticmethod
    def _projected(call, name, dtype):
        """(float64 projection after the norm, how far off it is when computed in `dtype`)."""
        weight, bias = call.get(f"{name}_weight"), call.get(f"{name}_bias")
        if weight is None:
            return None
        x, weight = call["x"].double(), weight.double()
        z, sizes = (torch.nn.functional.linear(f(x), f(weight)) for f in (lambda t: t, torch.abs))
        # Two orders of a sum (problems.reordering), which may begin with the bias, and a rounding
        # of it, with the bias or before.
        sizes = sizes if bias is None else sizes + bias.double().abs()
        error = 2 * (x.shape[-1] + 1) * unit(dtype) * sizes
        if bias is not None:
            error = error + half_ulp(z.abs() + error, dtype)
            z = z + bias.double()
        error = error + half_ulp(z.abs() + error, dtype)
        heads = (-1, call["spec"].head_dim)
        norm = call.get(f"{name}_norm_weight")
        if norm is None:
            return z.unflatten(-1, heads), error.unflatten(-1, heads)
        if call["norm_scope"] == "head":
            z, error = z.unflatten(-1, heads), error.unflatten(-1, heads)
        rstd = torch.rsqrt(z.square().mean(-1, keepdim=True) + call["norm_eps"])
        # d rstd / rstd = -mean(z dz) rstd**2, and the sum of squares has roundings of its own;
        # twice over, for what is not linear.
        of_rstd = (z.abs() * error).mean(-1, keepdim=True) * rstd**2 + z.shape[-1] * unit(dtype)
        factor = rstd * norm.double().abs()
        error = 2 * factor * (error + z.abs() * of_rstd)
        made = (z * rstd * norm.double(), error)
        return made if call["norm_scope"] == "head" else [t.unflatten(-1, heads) for t in made]

    @classmethod
    def check_gradient(cls, call, name, got, want, incoming, outputs):
        """Held to the lengths of what is multiplied: |sum a b| <= |a| |b|."""
        arguments = call.arguments
        x, dtype = arguments["x"], arguments["x"].dtype
        if not x.numel():
            return assert_close_to(got, want, torch.zeros_like(want))
        largest = largest_position(arguments["positions"], x.numel() // x.shape[-1])
        weights = [arguments.get(f"{n}_weight") for n in "qkv"]
        rows = sum(w.shape[0] for w in weights if w is not None)
        count = x.numel() + rows + sum(y.numel() for y in outputs)
        # The projection's gradient is rounded, and so are up to three partial sums of products.
        relative = rotation_slack(dtype, largest) + 2 * torch.finfo(dtype).eps
        relative += count * unit(dtype)
        turned = length(incoming) * cls._factor(arguments)
        for which in "qk":
            made = cls._projected({**arguments, f"{which}_norm_weight": None}, which, dtype)
            norm = arguments.get(f"{which}_norm_weight")
            if norm is None:
                continue
            z, error = made
            if arguments["norm_scope"] == "all":
                z, error = z.flatten(-2), error.flatten(-2)
            rstd = torch.rsqrt(z.square().mean(-1, keepdim=True) + arguments["norm_eps"])
            # An error e of the normed numbers reaches their gradient through rstd, n and a mean.
            off = (error * rstd).max().item() * z.shape[-1] ** 0.5
            relative += 8 * off
            if off > 0.25:
                return None  # a norm of nearly nothing: what was rounded away decides
            longest = max(1.0, norm.double().abs().max().item())
            turned = turned * max(1.0, rstd.max().item()) * longest
        sizes = {
            "x": turned * length(weights),
            "weight": turned * length([x]),
            "bias": turned * (x.numel() / x.shape[-1]) ** 0.5,
            "norm_weight": turned * (x.numel() / x.shape[-1] * rows) ** 0.5,
        }
        if name in LEARNED:
            seen = length(outputs) + length(cls._errors(arguments, dtype)[:2]) / relative
            terms = length(incoming) * seen / least(arguments, name)
            return assert_factor_gradient(name, got, want, terms, relative, largest)
        size = sizes[name.split("_", 1)[-1]]
        return assert_within(got, want, torch.full_like(want, relative * size))

    @staticmethod
    def _factor(call) -> float:
        """The most that the rotation lengthens anything by."""
        x, spec = call["x"], call["spec"]
        one = torch.ones(*x.shape[:-1], 1, spec.head_dim, dtype=torch.float64)
        rest = {k: call[k] for k in ("positions", "cu_seqlens", "seq_lens", *LEARNED) if k in call}
        layout = "thd" if x.dim() == 2 else "bshd"
        made = reference.apply_rope(one, one, spec, layout=layout, **rest)
        return max(y.abs().max().item() for y in made) * 2**0.5
