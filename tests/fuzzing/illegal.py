"""Random illegal calls: a legal one with one thing broken, which must be refused by name."""

from __future__ import annotations

import re
import warnings

import torch

import rope_fused as rf
from fuzzing import draws, legal
from fuzzing.breaking import KEPT, Broken, given, leading, longer, with_change
from fuzzing.calls import AUTOCAST, INTERPRETED, LEARNED
from fuzzing.draws import Draw
from helpers import assert_unchanged, make_spec, snapshot

REFUSALS = (ValueError, TypeError, RuntimeError)


def make(number: int, small: bool = False) -> Broken:
    """The illegal call that `number` draws."""
    draw = Draw(number, "illegal", small)
    while True:
        call = legal.make(draw.random.getrandbits(40), small)
        broken = draw.one(*BREAKS)(draw, call)
        if broken is not None:
            return broken


def run(number: int, backend="auto") -> None:
    """Make the call that `number` draws; anything but a refusal that names the argument fails."""
    broken = make(number, small=backend in INTERPRETED)
    before = snapshot(*_plain(broken.call))
    chosen = backend if broken.backend is KEPT else broken.backend
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            legal.perform(broken.call, chosen)
        except REFUSALS as error:
            if isinstance(error, RuntimeError) and not isinstance(error, ValueError | TypeError):
                assert type(error) is RuntimeError and broken.names == ("backend",), repr(error)
            words = "|".join(map(re.escape, broken.names))
            named = re.search(rf"(?<!\w)({words})(?!\w)", str(error))
            assert named, f"the error names none of {broken.names}: {error!r}"
        else:
            raise AssertionError(f"{broken.how}: a result")
    assert_unchanged(before)


def describe(broken: Broken, number: int, options: str = "") -> str:
    words = legal.describe(broken.call, number, f" --illegal{options}")
    return f"{words}\n  broken: {broken.how}; to be named: {' or '.join(broken.names)}"


def _plain(call):
    for value in (*call.arguments.values(), *(call.out if isinstance(call.out, tuple) else ())):
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            continue
        if not (value.is_nested or value.is_quantized or value.device.type == "meta"):
            yield value


# -- kinds of values ---------------------------------------------------------------------------


def not_a_tensor(draw, call):
    name, value = given(draw, call)
    if name == "attention_factor":
        wrong = draw.one("1.0", [1.0], 1j, True, {}, object())
    else:
        wrong = draw.one(
            "1",
            [1.0],
            1j,
            3,
            2.5,
            True,
            {},
            object(),
            value.detach().resolve_neg().double().numpy(),
        )
    return with_change(call, f"{name} is a {type(wrong).__name__}", name, **{name: wrong})


def missing(draw, call):
    names = [n for n in ("q", "x", "q_weight", "k_weight", "cos", "sin") if n in call.arguments]
    names += ["k"] if call.family == "rerotate" else []
    name = draw.one(*names)
    return with_change(call, f"{name} is None", name, **{name: None})


def wrong_dtype(draw, call):
    name, value = given(draw, call)
    floats = (torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ints = (torch.float32, torch.int16, torch.uint8, torch.bool, torch.complex128)
    dtype = draw.one(*(floats if value.is_floating_point() else ints))
    if call.mode in AUTOCAST and dtype.is_floating_point and call.family == "qkv_rope":
        return None  # autocast casts it
    return with_change(call, f"{name} is {dtype}", name, **{name: value.detach().to(dtype)})


def other_float(draw, call):
    """Floats of another type than the tensor that they go with."""
    names = ["k"] if call.family == "apply_rope" else []
    names += [f"{n}_{what}" for n in "qkv" for what in ("weight", "bias")]
    name, value = given(draw, call, *names)
    if name is None or call.mode in AUTOCAST:
        return None
    dtype = draw.one(*(d for d in draws.DTYPES if d != value.dtype))
    return with_change(call, f"{name} is {dtype}", name, **{name: value.to(dtype)})


def other_memory(draw, call):
    """Sparse, quantized, nested and meta tensors."""
    name, value = given(draw, call)
    kind = draw.one("sparse", "quantized", "nested", "meta", "mkldnn")
    value = value.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "sparse" and value.dim():
            wrong = value.resolve_neg().to_sparse()
        elif kind == "quantized" and value.is_floating_point():
            wrong = torch.quantize_per_tensor(value.float().contiguous(), 0.1, 0, torch.qint8)
        elif kind == "nested" and value.dim() > 1 and value.numel():
            layout = draw.one(torch.strided, torch.jagged)
            wrong = torch.nested.nested_tensor(list(value.resolve_neg()), layout=layout)
        elif kind == "mkldnn" and value.dtype == torch.float32 and value.numel():
            wrong = torch.ones(2, 3).to_mkldnn()
        elif kind == "meta" and len(call.tensors()) > 1:
            # One of two devices is wrong, and either may be named.
            names = tuple(call.tensors())
            return with_change(call, f"{name} is on meta", names, **{name: value.to("meta")})
        else:
            return None
    return with_change(call, f"{name} is {kind}", name, **{name: wrong})


def not_finite(draw, call):
    name, value = given(draw, call, *LEARNED)
    if name is None or not value.numel():
        return None
    wrong = value.detach().contiguous().clone()
    wrong.view(-1)[draw.random.randrange(wrong.numel())] = float(draw.one("nan", "inf", "-inf"))
    if name == "attention_factor" and draw.chance(0.3):
        wrong = draw.one(float("nan"), float("inf"), 10**400)
    change = {name: wrong}
    spec = call.arguments["spec"]
    norms = {"q_norm_weight", "k_norm_weight"} & call.arguments.keys()
    if spec.cache_class == "static" and not spec.hf_refusal and not norms and draw.chance(0.3):
        change["precision"] = "hf"
    return with_change(call, f"{name} is not finite", name, **change)


# -- shapes ------------------------------------------------------------------------------------


def wrong_rank(draw, call):
    name, value = given(draw, call, "q", "k", "cos", "sin", "q_weight", "k_weight", "v_weight",
                         "q_bias", "k_bias", "v_bias", "q_norm_weight", "k_norm_weight",
                         "cu_seqlens", "seq_lens", "from_seq_lens", "to_seq_lens")  # fmt: skip
    if name is None:
        return None
    wrong = value.detach()[None] if draw.chance(0.6) or not value.shape[0] else value.detach()[0]
    return with_change(call, f"{name} is {list(wrong.shape)}", name, **{name: wrong})


def wrong_size(draw, call):
    """One dimension is longer by one than what the others allow."""
    lead = leading(call)
    name, value = given(draw, call)
    tokens = ("q", "x") if lead != "k" else ("k",)
    if name in tokens:  # what is wrong then is what it goes with
        if name == "x":
            names = tuple(n for n in call.tensors() if n.endswith("_weight"))
            return with_change(call, "x is wider", names, x=longer(value, -1))
        wrong, names = longer(value, -1), name
        if call.family == "apply_rotary_pos_emb":
            names = ("q", "k")
            if call.arguments["k"] is None:
                return None
        return with_change(call, f"{name} is {list(wrong.shape)}", names, **{name: wrong})
    last = name in ("attention_factor", "inv_freq", "positions", "q_scale") or value.dim() == 1
    if not value.dim() or (name == "k_norm_weight" and call.arguments.get("k_weight") is None):
        return None
    if name == "positions" and call.arguments["spec" if lead != "k" else "from_spec"].axes > 1:
        last = draw.chance(0.5)
        wrong = longer(value, -1 if last else 0)
        return with_change(call, f"positions is {list(wrong.shape)}", name, positions=wrong)
    if name in ("cu_seqlens",):
        return None
    if name in ("cos", "sin"):
        wrong = longer(value, draw.one(1, 2))
        return with_change(call, f"{name} is {list(wrong.shape)}", (name, "sin"), **{name: wrong})
    if name == "k":
        heads = {"bshd": 2, "bhsd": 1, "thd": 1}[call.arguments.get("layout", "bshd")]
        if "unsqueeze_dim" in call.arguments:
            heads = call.arguments["unsqueeze_dim"]
        dims = [d for d in range(value.dim()) if d != heads]
        wrong = longer(value, draw.one(*dims))
    else:
        wrong = longer(value, -1 if last else draw.one(*range(value.dim())))
    if name.endswith("_weight") and "norm" not in name:
        names = (name, name.replace("weight", "bias"))
        if (
            wrong.shape[0] % call.arguments["spec"].head_dim == 0
            and wrong.shape[1] == value.shape[1]
        ):
            return None
        return with_change(call, f"{name} is {list(wrong.shape)}", names, **{name: wrong})
    return with_change(call, f"{name} is {list(wrong.shape)}", name, **{name: wrong})


def another_batch(draw, call):
    name, value = given(draw, call, "positions", "q_scale", "inv_freq")
    if name is None:
        return None
    shape = value.shape[-1:] if name != "positions" else value.shape[-1:]
    lead = call.arguments[leading(call)]
    spec = call.arguments.get("spec", call.arguments.get("from_spec"))
    if name == "positions" and spec.axes > 1:
        shape = (spec.axes, lead.shape[0] + 2, *shape)
    else:
        shape = (lead.shape[0] + 101, *shape)
    wrong = torch.ones(shape, dtype=value.dtype)
    return with_change(call, f"{name} is {list(shape)}", name, **{name: wrong})


def no_heads(draw, call):
    if call.family != "qkv_rope":
        return None
    name = draw.one("q_weight", "k_weight")
    return with_change(call, f"{name} has no rows", name, **{name: call.arguments[name][:0]})


def bias_without_v(draw, call):
    if call.family != "qkv_rope" or "v_weight" in call.arguments:
        return None
    return with_change(call, "v_bias without v", "v_bias", v_bias=call.arguments["k_weight"][:, 0])


# -- sequences ---------------------------------------------------------------------------------


def wrong_ends(draw, call):
    cu_seqlens = call.arguments.get("cu_seqlens")
    if cu_seqlens is None:
        return None
    wrong = cu_seqlens.clone()
    kind = draw.one("start", "end", "negative", "descending", "huge")
    if kind == "start":
        wrong[0] += draw.one(1, -1)
    elif kind == "end":
        wrong[-1] += draw.one(1, -1)
    elif kind == "descending" and len(wrong) > 2 and wrong[-1] > 0:
        wrong[1] = wrong[-1] + 1
    elif kind == "negative" and len(wrong) > 2:
        wrong[1] = -1
    elif kind == "huge" and len(wrong) > 2:
        wrong[1] = torch.iinfo(wrong.dtype).max
    else:
        return None
    return with_change(call, f"cu_seqlens {wrong.tolist()}", "cu_seqlens", cu_seqlens=wrong)


def ends_beside_a_batch(draw, call):
    lead = call.arguments[leading(call)]
    packed = call.arguments.get("layout") == "thd" or (leading(call) == "x" and lead.dim() == 2)
    if packed or lead.shape[0] == 1 or "unsqueeze_dim" in call.arguments:
        return None
    return with_change(
        call, "cu_seqlens beside a batch", "cu_seqlens", cu_seqlens=torch.tensor([0, 1])
    )


def negative_length(draw, call):
    name, value = given(draw, call, "seq_lens", "from_seq_lens", "to_seq_lens")
    if name is None or not value.numel():
        return None
    wrong = value.clone()
    wrong[draw.random.randrange(len(wrong))] = draw.one(-1, torch.iinfo(wrong.dtype).min)
    return with_change(call, f"{name} {wrong.tolist()}", name, **{name: wrong})


def no_length(draw, call):
    for spec, name in (("spec", "seq_lens"), ("from_spec", "from_seq_lens"),
                       ("to_spec", "to_seq_lens")):  # fmt: skip
        if spec in call.arguments and call.arguments[spec].cache_class == "dynamic":
            return with_change(call, f"no {name}", name, **{name: None})
    return None


def no_positions(draw, call):
    spec = call.arguments.get("spec", call.arguments.get("from_spec"))
    if spec is None or spec.axes == 1:
        return None
    return with_change(call, "no positions", "positions", positions=None)


# -- choices -----------------------------------------------------------------------------------


def wrong_choice(draw, call):
    kinds = {
        "apply_rope": ("layout", "precision", "backend", "conjugate"),
        "qkv_rope": ("precision", "backend", "norm_scope", "norm_eps"),
        "rerotate": ("layout", "backend"),
        "apply_rotary_pos_emb": ("unsqueeze_dim",),
    }
    name = draw.one(*kinds[call.family])
    any_type = ("", "sbhd", None, 7, b"bshd", ["bshd"], 1.5, object(), torch.ones(2))
    wrong = {
        "conjugate": ("yes", 1, None, 0.0, torch.ones(2), []),
        "norm_eps": (-1e-6, float("nan"), float("inf"), "1e-6", None, True, 10**400, 1j, [1e-6]),
        "unsqueeze_dim": (0, 3, -1, "1", None, 1.0, [1], torch.ones(2), True),
    }.get(name, any_type)
    wrong = draw.one(*wrong)
    if name == "backend":
        return Broken(call, f"backend is {wrong!r}", ("backend",), wrong)
    return with_change(call, f"{name} is {wrong!r}", name, **{name: wrong})


def a_backend_that_is_not_here(draw, call):
    absent = [n for n, state in rf.backends().items() if state not in ("ready", "interpreted")]
    if not absent or call.family == "apply_rotary_pos_emb":
        return None
    return Broken(call, "a backend that is not here", ("backend",), draw.one(*absent))


def wrong_spec(draw, call):
    names = [n for n in ("spec", "from_spec", "to_spec") if n in call.arguments]
    if not names:
        return None
    name = draw.one(*names)
    spec = call.arguments[name]
    kind = draw.one("type", "head")
    if kind == "type":
        wrong = draw.one(None, {"rope_type": "default"}, "default", rf.RopeSpec, spec.inv_freq())
        return with_change(call, f"{name} is a {type(wrong).__name__}", name, **{name: wrong})
    wrong = make_spec(spec.head_dim + 2)
    if call.family == "qkv_rope":  # rows may be a multiple of the other as well
        weights = [v for k, v in call.arguments.items() if k.endswith("_weight") and v.dim() == 2]
        if all(w.shape[0] % wrong.head_dim == 0 for w in weights):
            return None
    return with_change(call, f"{name} of another head", ("head_dim", name), **{name: wrong})


def other_pairs(draw, call):
    if call.family != "rerotate":
        return None
    spec = call.arguments["to_spec"]
    wrong = make_spec(spec.head_dim, interleaved=not spec.interleaved)
    return with_change(call, "to_spec turns other pairs", "to_spec", to_spec=wrong)


def unknown_argument(draw, call):
    return with_change(call, "an unknown argument", "colour", colour=1)


def norm_in_hf(draw, call):
    if call.family != "qkv_rope":
        return None
    names = [n for n in ("q_norm_weight", "k_norm_weight") if n in call.arguments]
    return with_change(call, "a norm in hf", names, precision="hf") if names else None


# -- out= --------------------------------------------------------------------------------------


def wrong_out(draw, call):
    if call.out is None or call.family == "apply_rotary_pos_emb":
        return None
    at = draw.random.randrange(len([t for t in call.out if t is not None]))
    out = list(call.out)
    target = out[at]
    kind = draw.one("type", "shape", "dtype", "meta", "expanded", "shared", "none", "sparse",
                    "input", "factor", "with gradients", "count", "more")  # fmt: skip
    names = ("out",)
    if kind == "type":
        out[at] = draw.one("q", 1, target.tolist())
    elif kind == "shape":
        out[at] = longer(target, draw.random.randrange(target.dim()))
    elif kind == "dtype":
        out[at] = target.to(draw.one(*(d for d in draws.DTYPES if d != target.dtype), torch.int64))
    elif kind == "meta":
        out[at] = target.to("meta")
    elif kind == "sparse" and target.numel():
        out[at] = target.to_sparse()
    elif kind == "expanded" and target.numel() > 1:
        out[at] = torch.zeros((), dtype=target.dtype).expand(target.shape)
    elif kind == "shared" and at and out[0].shape == target.shape and target.numel():
        out[at] = out[0]
    elif kind == "input" and target.numel():
        lead = call.arguments[leading(call)].detach()
        if call.family == "qkv_rope" or any(t is call.arguments[leading(call)] for t in out):
            return None
        # An input that lies one element further in the same memory.
        room = torch.zeros(target.numel() + 1, dtype=target.dtype)
        out[at] = room[:-1].view(target.shape)
        if lead.shape != target.shape or at:
            return None
        changed = with_change(
            call, "out overlaps an input", names, **{leading(call): room[1:].view(target.shape)}
        )
        return changed._replace(call=changed.call._replace(out=tuple(out)))
    elif kind == "factor" and target.numel() and "q_scale" in call.arguments:
        scale = call.arguments["q_scale"]
        if target.numel() < scale.numel() or not target.is_contiguous():
            return None
        wrong = target.view(-1)[: scale.numel()].view(scale.shape)
        return with_change(call, "out is the memory of q_scale", names, q_scale=wrong)
    elif kind == "with gradients" and call.learned and call.family != "rerotate":
        shares = set(call.learned) & {"q", "k", "x", "q_weight", "k_weight", "v_weight"}
        return Broken(call._replace(mode="grad"), "out with gradients", names) if shares else None
    elif kind == "none":
        out[at] = None
        if call.family == "rerotate":
            return None
    elif kind == "count" and len(out) > 1:
        out.pop()
    elif kind == "more" and call.family != "rerotate":
        out.append(target)
    else:
        return None
    return Broken(call._replace(out=tuple(out)), f"out: {kind}", names)


BREAKS = (
    not_a_tensor, missing, wrong_dtype, other_float, other_memory, other_memory, not_finite,
    wrong_rank, wrong_size, wrong_size, another_batch, no_heads, bias_without_v, wrong_ends,
    ends_beside_a_batch, negative_length, no_length, no_positions, wrong_choice, wrong_choice,
    a_backend_that_is_not_here, wrong_spec, other_pairs, unknown_argument, norm_in_hf, wrong_out,
    wrong_out,
)  # fmt: skip
