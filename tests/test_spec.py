"""RopeSpec as data, its tables, its 64-bit phase, and what positions decide."""

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
from fractions import Fraction

import hypothesis
import mpmath
import pytest
import torch
from hypothesis import strategies as st

from rope_fused import phase, positions
from rope_fused.spec import RopeSpec

YARN = RopeSpec.yarn(
    head_dim=16, rope_theta=1e4, factor=4.0, original_max_position_embeddings=64, interleaved=True
)
LONG = RopeSpec.longrope(
    head_dim=16,
    rope_theta=1e4,
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[2.0 + i for i in range(8)],
    original_max_position_embeddings=32,
    max_position_embeddings=128,
)
START = RopeSpec.of("longrope", head_dim=16, rope_theta=1e4, n_start=4, **dict(LONG.parameters[:4]))
DYNAMIC = RopeSpec.dynamic(head_dim=16, rope_theta=1e4, factor=2.0, max_position_embeddings=32)
MROPE = RopeSpec.default(head_dim=16, rope_theta=1e4, mrope_section=(2, 3, 3))
SPECS = {
    "default": RopeSpec.default(head_dim=16, rope_theta=1e4, partial_rotary_factor=0.5),
    "yarn": YARN,
    "longrope": LONG,
    "start": START,
    "dynamic": DYNAMIC,
    "mrope": MROPE,
    "still": RopeSpec.of("none", head_dim=16, rope_theta=1e4, q_temperature=(0.1, 8192, 1)),
}
FAR = (0, 1, 4095, 131071, 1048575, 16777216, 2**31 - 1, 2**63 - 1)
FAR += tuple(-p for p in FAR[1:]) + (-(2**63),)


@pytest.fixture(params=SPECS, name="spec")
def _spec(request):
    return SPECS[request.param]


# -- data ---------------------------------------------------------------------------------------


def test_value_semantics(spec):
    for other in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec), dataclasses.replace(spec)):
        assert other == spec and hash(other) == hash(spec) and repr(other) == repr(spec)
    assert len({spec, copy.copy(spec)}) == 1
    others = [other for other in SPECS.values() if other is not spec]
    assert spec not in others
    assert all(not isinstance(value, torch.Tensor) for value in vars(spec).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.head_dim = 32
    assert dataclasses.replace(spec, notes=("hello",)) == spec


def test_what_makes_the_numbers_makes_the_identity():
    """Equal specs share what is cached, so whatever changes a table must keep them apart."""
    changes = {"head_dim": 32, "rope_theta": 2e4, "interleaved": False, "rotary_offset": 2}
    changes |= {"q_temperature": (0.1, 4.0, 0.0), "softmax_multiplier": 2.0}
    changes |= {"axis_map": (0, 1, 2, 0), "rotary_dim": 4}
    base = dataclasses.replace(YARN, head_dim=16, rotary_dim=8)
    for name, value in changes.items():
        other = dataclasses.replace(base, **{name: value})
        assert other != base, name
    other = dataclasses.replace(base, rope_theta=2e4)
    assert not torch.equal(base.rows(), other.rows())


def test_the_kept_hash_does_not_travel(tmp_path):
    """Strings hash differently in another process, so a pickled hash would be wrong there."""
    hash(YARN)
    file = tmp_path / "spec.pickle"
    file.write_bytes(pickle.dumps(YARN))
    code = (
        "import dataclasses, pickle, sys; spec = pickle.load(open(sys.argv[1], 'rb'));"
        "assert {spec: 1}[dataclasses.replace(spec)]"
    )
    subprocess.run([sys.executable, "-c", code, file], check=True, timeout=120)


def test_spelling_does_not_matter():
    """Defaults spelled out, ints for floats, tuples for lists: the same spec."""
    spelled = RopeSpec.yarn(
        head_dim=16,
        rope_theta=10000,
        factor=4,
        original_max_position_embeddings=64,
        beta_fast=32.0,
        beta_slow=1,
        truncate=True,
        interleaved=True,
    )
    assert spelled == YARN and hash(spelled) == hash(YARN)
    again = dict(LONG.parameters)
    again["short_factor"] = torch.tensor(again["short_factor"], dtype=torch.float64)
    again["long_factor"] = list(again["long_factor"])
    assert RopeSpec.of("longrope", head_dim=16, rope_theta=1e4, **again) == LONG


def test_repr_tells_what_is_unusual():
    assert repr(YARN) == (
        "RopeSpec('yarn', head_dim=16, rope_theta=10000.0, factor=4.0, "
        "original_max_position_embeddings=64, interleaved=True)"
    )
    assert "short_factor=<8: 1.0, 1.1, ..., 1.7000000000000002>" in repr(LONG)
    assert "rotary_dim=8" in repr(SPECS["default"])


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn", "longrope", "proportional"])
def test_named_constructors(rope_type):
    given = {"head_dim": 16, "rope_theta": 1e4}
    if rope_type in ("linear", "yarn"):
        given["factor"] = 4.0
    if rope_type in ("yarn", "longrope"):
        given["original_max_position_embeddings"] = 64
    if rope_type == "longrope":
        given |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "attention_factor": 1.2}
    spec = getattr(RopeSpec, rope_type)(**given)
    assert spec == RopeSpec.of(rope_type, **given)
    assert spec.rope_type == rope_type
    with pytest.raises(TypeError):
        getattr(RopeSpec, rope_type)(16, 1e4)
    with pytest.raises(ValueError, match="surprise is not a parameter"):
        getattr(RopeSpec, rope_type)(**given, surprise=1)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"head_dim": 0}, "head_dim must be an integer >= 2"),
        ({"head_dim": 15}, "rotary_dim must be even, got 15"),
        ({"head_dim": 16.0}, "head_dim must be an integer"),
        ({"rotary_offset": 2}, "rotary_offset must leave room"),
        ({"rotary_offset": -1}, "rotary_offset must be an integer >= 0"),
        ({"interleaved": 1}, "interleaved must be"),
        ({"axis_map": (0,) * 7}, "axis_map must have one axis for each of 8 pairs"),
        ({"axis_map": (-1,) * 8}, "axis_map must be an integer >= 0"),
        ({"mrope_section": (4, 4, 4)}, "mrope_section must .* 8, got"),
        ({"mrope_section": (4, 4, 0)}, "mrope_section must"),
        ({"mrope_section": (2.0, 3.0, 3.0)}, "mrope_section must"),
        ({"q_temperature": (0.1, 0, 0)}, "q_temperature must be"),
        ({"q_temperature": (0.1, 64, 2)}, "q_temperature must be"),
        ({"q_temperature": (math.nan, 64, 0)}, "q_temperature must be"),
        ({"softmax_multiplier": 0.0}, "softmax_multiplier must be"),
        ({"softmax_multiplier": math.inf}, "softmax_multiplier must be"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ({"hf_parameters": (("factor", 2.0),)}, "factor is not a parameter"),
    ],
)
def test_refusals(given, named):
    with pytest.raises((ValueError, TypeError), match=named):
        RopeSpec.default(**{"head_dim": 16, "rope_theta": 1e4, **given})


def test_calls_that_are_refused():
    for call in (YARN.inv_freq, YARN.rows, YARN.scale_rows, DYNAMIC.inv_freq, LONG.inv_freq):
        with pytest.raises(ValueError, match="precision must be 'exact' or 'hf', got 'fast'"):
            call("fast")
    with pytest.raises(TypeError, match="seq_len must be an integer"):
        LONG.inv_freq(seq_len=33.0)
    with pytest.raises(ValueError, match="seq_len must be an integer >= 1"):
        LONG.attention_factor_at(0)
    with pytest.raises(ValueError, match="seq_lens: a static spec"):
        YARN.rows_at(torch.tensor([3]))
    with pytest.raises(TypeError, match="positions must be an integer tensor, got torch.float32"):
        YARN.cos_sin(torch.ones(3))
    for bad in (torch.arange(9), torch.zeros(2, 9, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"positions must be \[3 axes"):
            MROPE.cos_sin(bad)


# -- tables -------------------------------------------------------------------------------------


def test_tables(spec):
    tables, pairs = spec.rows().shape
    assert pairs == spec.rotary_dim // 2
    assert spec.rows().dtype == spec.scale_rows().dtype == torch.float64
    assert spec.scale_rows().shape == spec.turns().shape == (tables, pairs)
    assert torch.equal(spec.turns(), phase.exact_turns(spec.rows()))
    assert torch.equal(spec.rows()[0], spec.inv_freq())
    assert tables == {"static": 1, "dynamic": 1, "switch": 2}[spec.cache_class] + (spec.n_start > 0)
    assert (spec.switch_length is None) == (spec.cache_class != "switch")
    if spec.n_start == 0:
        assert spec.rows("hf").shape == (tables, pairs)
        assert torch.equal(spec.rows("hf")[0], spec.inv_freq("hf"))


def test_switch():
    """L itself is short, L + 1 is long."""
    for seq_len, row in ((None, 0), (1, 0), (32, 0), (33, 1), (1 << 40, 1)):
        assert torch.equal(LONG.inv_freq(seq_len=seq_len), LONG.rows()[row])
        assert torch.equal(LONG.inv_freq("hf", seq_len), LONG.rows("hf")[row])
        assert (LONG.scale_rows()[row] == LONG.attention_factor_at(seq_len)).all()


def test_n_start():
    """The last table is the base, with the attention factor of the others."""
    plain = RopeSpec.default(head_dim=16, rope_theta=1e4)
    assert torch.equal(START.rows(), torch.cat((LONG.rows(), plain.rows())))
    assert (START.scale_rows() == START.attention_factor).all()
    tokens = torch.tensor([[0, 3, 4, 31], [0, 3, 4, 32]])
    assert START.table_index(tokens).tolist() == [[2, 2, 0, 0], [2, 2, 1, 1]]
    assert START.table_index(tokens, 32).tolist() == [[2, 2, 0, 0], [2, 2, 0, 0]]
    assert YARN.table_index(tokens) is None


def test_attention_factor_per_pair():
    factors = tuple(1 + 0.1 * i for i in range(8))
    spec = dataclasses.replace(
        YARN, parameters=(*YARN.parameters[:-2], ("attention_factor", factors))
    )
    assert spec.attention_factor == factors
    assert spec.scale_rows().tolist() == [list(factors)]


@pytest.mark.parametrize("finetuned", [False, True])
def test_rows_at(finetuned):
    """A table per length, the very bits of asking for one at a time."""
    yarn = RopeSpec.dynamic_yarn(
        head_dim=64,
        rope_theta=1e4,
        original_max_position_embeddings=32,
        max_position_embeddings=64,
        finetuned=finetuned,
    )
    dynamic = RopeSpec.dynamic(head_dim=64, rope_theta=1e4, factor=3, max_position_embeddings=32)
    lengths = torch.tensor([1, 32, 33, 64, 65, 1000, 2**31 + 5])
    for spec in (yarn, dynamic):
        assert spec.cache_class == "dynamic"
        rows, scales = spec.rows_at(lengths), spec.scale_rows_at(lengths.int())
        assert rows.shape == scales.shape == (7, 32)
        for row, scale, length in zip(rows, scales, lengths.tolist(), strict=True):
            assert torch.equal(row, spec.inv_freq(seq_len=length))
            assert (scale == spec.attention_factor_at(length)).all() or length > 2**31
        constants = spec.dynamic_constants()
        assert torch.equal(spec.rows_at(lengths, constants=constants), rows)


def test_tables_are_made_on_the_cpu():
    """Whatever the default device, the default type, and the mode around: the same bits."""
    makers = [
        lambda spec: spec.rows(),
        lambda spec: spec.rows("hf"),
        lambda spec: spec.turns(),
        lambda spec: spec.scale_rows(),
        lambda spec: spec.inv_freq(seq_len=99),
        lambda spec: spec.cos_sin(torch.arange(99, device="cpu"))[0],
        lambda spec: spec.cos_sin(torch.arange(99, device="cpu"), precision="hf")[1],
    ]
    specs = [dataclasses.replace(spec) for spec in (YARN, LONG, DYNAMIC)]
    want = [[make(spec) for make in makers] for spec in specs]
    default = torch.get_default_dtype()
    for around in (
        torch.device("meta"),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        with around:
            torch.set_default_dtype(torch.float64)
            try:
                got = [[make(spec) for make in makers] for spec in specs]
            finally:
                torch.set_default_dtype(default)
        for a, b in zip(sum(got, []), sum(want, []), strict=True):
            assert a.device.type == "cpu" and a.dtype == b.dtype and torch.equal(a, b)


# -- the phase ----------------------------------------------------------------------------------


def units_apart(a, b):
    """|a - b| of turns modulo 2**64."""
    return (a - b).abs().max().item()


def test_two_pi():
    with mpmath.workdps(90):
        digits = mpmath.mpf(phase.TWO_PI.numerator) / phase.TWO_PI.denominator
        assert abs(digits - 2 * mpmath.pi) < mpmath.mpf(10) ** -75


def test_exact_turns():
    rows = torch.tensor([1.0, -1.0, 0.1, 1e-12, 0.0, 6.5, 1e3, math.pi, math.nan, -math.inf])
    rows = rows.double()
    with mpmath.workdps(60):
        for got, value in zip(phase.exact_turns(rows).tolist(), rows.tolist(), strict=True):
            if not math.isfinite(value):
                assert got == 0
                continue
            turns = int(mpmath.nint(mpmath.mpf(value) / (2 * mpmath.pi) * 2**64))
            assert (got - turns) % 2**64 == 0 and -(2**63) <= got < 2**63
    assert phase.exact_turns(torch.ones(2, 3, dtype=torch.float64)).shape == (2, 3)


def test_turns_on_device(device):
    generator = torch.Generator().manual_seed(torch.initial_seed())
    exponents = torch.rand(20000, generator=generator, dtype=torch.float64) * 15 - 12
    x = 10.0**exponents
    special = [0.0, -0.0, 1e-300, 5e-324, 1e-12, 1e3, math.pi, 2 * math.pi, 1.0]
    # Where the fraction of a turn is a half and its integer would not fit.
    special += [math.nextafter(math.pi * k, s) for k in (1, 3, 99) for s in (0.0, 1e9)]
    special += [1e6 + 0.1, 2.0**40 - 1, 1e12]
    x = torch.cat((x, torch.tensor(special, dtype=torch.float64)))
    x = torch.cat((x, -x))
    got = phase.turns_on_device(x.to(device))
    assert got.device.type == device.type and got.dtype == torch.int64
    assert units_apart(got.cpu(), phase.exact_turns(x)) <= 1
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64, device=device)
    assert phase.turns_on_device(bad).tolist() == [0, 0, 0]
    assert phase.turns_on_device(x[:6].reshape(2, 3).to(device)).shape == (2, 3)
    with pytest.raises(TypeError, match="inv_freq must be float64, got torch.float32"):
        phase.turns_on_device(x.float())


@hypothesis.settings(max_examples=500, deadline=None)
@hypothesis.given(st.floats(-1e3, 1e3))
def test_turns_on_device_of_any_number(value):
    x = torch.tensor([value], dtype=torch.float64)
    assert units_apart(phase.turns_on_device(x), phase.exact_turns(x)) <= 1


def reference_angle(position, inv_freq):
    """position * inv_freq modulo 2 pi, exact for what any test here can see."""
    with mpmath.workdps(60):
        product = Fraction(position) * Fraction(inv_freq)
        angle = mpmath.mpf(product.numerator) / product.denominator
        return mpmath.cos(angle), mpmath.sin(angle)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_cos_sin(theta, dtype, device):
    spec = RopeSpec.default(head_dim=128, rope_theta=theta)
    cos, sin = spec.cos_sin(torch.tensor(FAR, device=device), dtype)
    assert cos.shape == sin.shape == (len(FAR), 64) and cos.dtype == sin.dtype == dtype
    assert cos.device.type == device.type
    rounding = torch.finfo(dtype).eps / 2 if dtype == torch.float32 else 0
    for i, p in enumerate(FAR):
        # T is half a unit off, times the position; then the angle, below pi, is rounded, multiplied
        # by a rounded constant, and so are cos and sin (within 1 ulp).
        bound = 2 * math.pi * 2.0**-65 * abs(p) + (2 * math.pi + 1) * 2.0**-53 * 2 + rounding
        for j in (*range(0, 64, 9), 63):
            want = reference_angle(p, spec.inv_freq()[j].item())
            assert abs(cos[i, j].item() - want[0]) <= bound
            assert abs(sin[i, j].item() - want[1]) <= bound
            if abs(p) < 2**31:
                assert bound <= (2e-7 if dtype == torch.float32 else 1e-9)


def test_cos_sin_of_any_integers(device):
    want = YARN.cos_sin(torch.tensor([[3, 5], [7, 100]], device=device))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        given = torch.tensor([[3, 5], [7, 100]], dtype=dtype, device=device)
        for a, b in zip(YARN.cos_sin(given), want, strict=True):
            assert torch.equal(a, b)
    for spec in (YARN, LONG, DYNAMIC):
        for precision in ("exact", "hf"):
            empty = torch.zeros(2, 0, dtype=torch.int64, device=device)
            assert spec.cos_sin(empty, precision=precision)[0].shape == (2, 0, 8)


def tables_of(row, tokens):
    """cos, sin of one table."""
    return phase.phase_cos_sin(tokens[..., None], phase.exact_turns(row))


def test_cos_sin_chooses_the_table_of_each_sequence():
    tokens = torch.stack((torch.arange(40), torch.arange(40) - 8))
    long, short = (tables_of(LONG.rows()[row], tokens) for row in (1, 0))
    for got, far, near in zip(LONG.cos_sin(tokens), long, short, strict=True):
        assert torch.equal(got, torch.stack((far[0], near[1])))
    for seq_len, want in ((32, short), (33, long), (torch.tensor([[32], [99]]), None)):
        for got, far, near in zip(LONG.cos_sin(tokens, seq_len=seq_len), long, short, strict=True):
            expected = torch.stack((near[0], far[1])) if want is None else None
            expected = expected if want is None else (far if want is long else near)
            assert torch.equal(got, expected)
    base = tables_of(START.rows()[2], tokens)
    for got, far, start in zip(START.cos_sin(tokens), long, base, strict=True):
        assert torch.equal(got[0, :4], start[0, :4]) and torch.equal(got[0, 4:], far[0, 4:])
        assert torch.equal(got[1, :12], start[1, :12])


def test_cos_sin_makes_the_table_of_each_length():
    tokens = torch.stack((torch.arange(40), torch.arange(40) - 8))
    got = DYNAMIC.cos_sin(tokens, torch.float64)
    for row, length in enumerate((40, 32)):
        rows = DYNAMIC.inv_freq(seq_len=length)
        turns = phase.turns_on_device(rows)
        want = phase.phase_cos_sin(tokens[row, :, None], turns, torch.float64)
        pinned = DYNAMIC.cos_sin(tokens[row], torch.float64, seq_len=length)
        for a, b, c in zip(got, want, pinned, strict=True):
            assert torch.equal(a[row], b) and torch.equal(c, b)


@pytest.mark.parametrize("name", ["yarn", "longrope", "dynamic", "mrope"])
def test_cos_sin_hf(name):
    """float32 products; one table for the whole batch."""
    spec = SPECS[name]
    tokens = torch.stack((torch.arange(40), torch.arange(40) - 8))
    row = spec.inv_freq("hf", tokens.max() + 1)
    angles = tokens[..., None].float() * row
    if spec.axes > 1:
        tokens = torch.stack((tokens, tokens * 2, tokens * 3))
        angles = tokens[list(spec.axis_map)].movedim(0, -1).float() * row
    for got, want in zip(
        spec.cos_sin(tokens, precision="hf"), (angles.cos(), angles.sin()), strict=True
    ):
        assert torch.equal(got, want)
    half = spec.cos_sin(tokens, torch.bfloat16, "hf")
    assert torch.equal(half[0], angles.cos().bfloat16())


# -- several axes, and the factor on q ----------------------------------------------------------


def test_axis_maps():
    assert positions.axis_map("blocks", 8, (2, 3, 3)) == (0, 0, 1, 1, 1, 2, 2, 2)
    assert positions.axis_map("ernie", 6, (2, 2, 2)) == (1, 2, 1, 2, 0, 0)
    # Qwen3-VL: height at 1, 4, ... below 3 * 20, width at 2, 5, ..., the rest temporal.
    alternating = positions.axis_map("alternating", 64, (24, 20, 20))
    want = [0] * 64
    for axis in (1, 2):
        for i in range(axis, 60, 3):
            want[i] = axis
    assert alternating == tuple(want)
    assert [alternating.count(axis) for axis in range(3)] == [24, 20, 20]
    for bad in (("ernie", 6, (1, 2, 3)), ("spiral", 6, (2, 2, 2)), ("blocks", 6, ())):
        with pytest.raises(ValueError, match="mrope_section|layout"):
            positions.axis_map(*bad)


def test_lengths():
    """Of integers of every width, up to the end of their range."""
    for dtype in (torch.int32, torch.int64):
        last = torch.iinfo(dtype).max
        tokens = torch.tensor([[3, last], [0, 1], [-9, -3]], dtype=dtype)
        assert positions.lengths(tokens).tolist() == [[min(last + 1, 2**63 - 1)], [2], [1]]
        assert LONG.table_index(tokens).tolist() == [[1, 1], [0, 0], [0, 0]]
        longest = LONG.cos_sin(tokens, precision="hf")[0]
        assert torch.equal(longest, (tokens[..., None].float() * LONG.rows("hf")[1]).cos())
    assert positions.lengths(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [[1], [1]]


def test_mrope():
    assert (MROPE.axes, MROPE.axis_map) == (3, (0, 0, 1, 1, 1, 2, 2, 2))
    tokens = torch.randint(-(2**40), 2**40, (3, 2, 5))
    got = MROPE.cos_sin(tokens)
    plain = RopeSpec.default(head_dim=16, rope_theta=1e4)
    for pair, axis in enumerate(MROPE.axis_map):
        for a, b in zip(got, plain.cos_sin(tokens[axis]), strict=True):
            assert torch.equal(a[..., pair], b[..., pair])


@pytest.mark.parametrize(
    ("beta", "length", "offset"), [(0.1, 8192, 1), (0.1, 16384, 0), (0.35, 100, 1)]
)
def test_q_scale(beta, length, offset):
    spec = RopeSpec.default(head_dim=16, rope_theta=1e4, q_temperature=(beta, length, offset))
    tokens = [0, 1, length - 2, length - 1, length, 2 * length, 131071, 2**31 - 1, 2**40]
    got = spec.q_scale(torch.tensor(tokens)[None])
    assert got.shape == (1, len(tokens)) and got.dtype == torch.float32
    with mpmath.workdps(40):
        for value, p in zip(got[0].tolist(), tokens, strict=True):
            want = 1 + mpmath.mpf(beta) * mpmath.log(1 + (p + offset) // length)
            assert abs(value - want) <= 2.0**-24 * want + 2.0**-50
    assert spec.q_scale(torch.tensor([-1, -5 * length])).tolist() == [1.0, 1.0]
    assert YARN.q_scale(torch.arange(3)) is None


def test_q_scale_hf():
    """The very operations of the models."""
    llama4 = RopeSpec.default(head_dim=16, rope_theta=1e4, q_temperature=(0.1, 8192, 1))
    tokens = torch.randint(0, 2**22, (1000,))
    want = torch.log1p(torch.floor((tokens.float() + 1.0) / 8192)) * 0.1 + 1.0
    assert torch.equal(llama4.q_scale(tokens, "hf"), want)
    modeling = pytest.importorskip("transformers.models.ministral3.modeling_ministral3")
    ministral = RopeSpec.default(head_dim=16, rope_theta=1e4, q_temperature=(0.1, 16384, 0))
    want = modeling.get_llama_4_attn_scale(tokens[None], 0.1, 16384)[0, 0, :, 0]
    assert torch.equal(ministral.q_scale(tokens, "hf"), want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.cos_sin([0, 1]), "positions must be an integer tensor, got list"),
        (lambda s: s.cos_sin(torch.ones(2)), "positions must be .*got torch.float32"),
        (lambda s: s.q_scale([1]), "positions must be an integer tensor, got list"),
        (lambda s: s.q_scale(torch.tensor([1.5])), "positions must be .*got torch.float32"),
        (lambda s: s.cos_sin(torch.arange(2), torch.int32), "dtype must be .*got torch.int32"),
        (lambda s: s.cos_sin(torch.arange(2), torch.bool), "dtype must be .*got torch.bool"),
        (lambda s: s.cos_sin(torch.arange(2), "float32"), "dtype must be .*got 'float32'"),
        (lambda s: s.attention_factor_at("x"), "seq_len must be an integer >= 1, got 'x'"),
    ],
)
@pytest.mark.parametrize("temperature", [None, (0.1, 64, 0)])
def test_tables_of_what_is_no_position(call, message, temperature):
    spec = RopeSpec.of(
        "default", head_dim=8, rope_theta=1e4, interleaved=False, q_temperature=temperature
    )
    with pytest.raises(TypeError, match=message):
        call(spec)
