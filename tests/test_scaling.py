"""Every scaling method, against formulas evaluated afresh in 60 digits and against transformers."""

import math
from types import SimpleNamespace

import hypothesis
import mpmath
import pytest
import torch
from hypothesis import strategies as st

from rope_fused import scaling
from rope_fused.spec import RopeSpec

draws = hypothesis.settings(max_examples=200, deadline=None)
HALF_DIMS = st.integers(2, 32)
THETAS = st.floats(1.5, 1e8)
FACTORS = st.one_of(st.floats(1, 256), st.integers(1, 128))
LENGTHS = st.integers(2, 1 << 20)
PARTIALS = st.floats(0.05, 1)
U = 2.0**-53  # unit roundoff of float64


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(60):
        yield


def powers(theta, dim, pairs=None):
    """theta ** (-2 i / dim), by powers of the base rather than through its logarithm."""
    return [
        1 / mpmath.power(theta, mpmath.mpf(2 * i) / dim)
        for i in range(dim // 2 if pairs is None else pairs)
    ]


def rounded(values):
    return [float(value) for value in values]


def exact(rope_type, dim, theta, **parameters):
    with mpmath.workdps(15):  # the precision around it must not matter
        spec = RopeSpec.of(rope_type, head_dim=dim, rope_theta=theta, **parameters)
        return spec, spec.inv_freq().tolist()


# -- the authors' formulas: the correctly rounded float64, not a bit off -------------------------


@draws
@hypothesis.given(HALF_DIMS, THETAS)
def test_default(half, theta):
    spec, got = exact("default", 2 * half, theta)
    assert got == rounded(powers(theta, 2 * half))
    assert spec.attention_factor == 1.0


@draws
@hypothesis.given(HALF_DIMS, THETAS, FACTORS)
def test_linear(half, theta, factor):
    _, got = exact("linear", 2 * half, theta, factor=factor)
    assert got == rounded(x / mpmath.mpf(factor) for x in powers(theta, 2 * half))


@draws
@hypothesis.given(HALF_DIMS, THETAS, FACTORS)
def test_ntk(half, theta, factor):
    dim = 2 * half
    base = mpmath.mpf(theta) * mpmath.power(factor, mpmath.mpf(dim) / (dim - 2))
    _, got = exact("ntk", dim, theta, factor=factor)
    assert got == rounded(powers(base, dim))


@draws
@hypothesis.given(HALF_DIMS, THETAS, FACTORS, st.floats(0.1, 3))
def test_ntk_mixed(half, theta, factor, mixed_b):
    a = mpmath.log(factor) / mpmath.power(half, mixed_b)
    want = [
        x / mpmath.exp(a * mpmath.power(i + 1, mixed_b))
        for i, x in enumerate(powers(theta, 2 * half))
    ]
    _, got = exact("ntk", 2 * half, theta, factor=factor, mixed_b=mixed_b)
    assert got == rounded(want)


@draws
@hypothesis.given(HALF_DIMS, THETAS, FACTORS, LENGTHS, st.floats(0.01, 64), st.floats(0, 64))
@hypothesis.example(64, 5e5, 16.0, 8192, 1.0, 0.0)
def test_ntk_by_parts(half, theta, factor, length, low, width):
    """Definition 2 of the YaRN paper; llama3 is the same thing with other names."""
    high = low + width

    def scaled(x):
        turns = length * x / (2 * mpmath.pi)
        if turns < low:
            gamma = mpmath.mpf(0)
        elif turns > high or low == high:
            gamma = mpmath.mpf(1)
        else:
            gamma = (turns - low) / (mpmath.mpf(high) - low)
        return (1 - gamma) * x / mpmath.mpf(factor) + gamma * x

    want = rounded(map(scaled, powers(theta, 2 * half)))
    for rope_type in ("llama3", "ntk_by_parts"):
        _, got = exact(
            rope_type,
            2 * half,
            theta,
            factor=factor,
            original_max_position_embeddings=length,
            low_freq_factor=low,
            high_freq_factor=high,
        )
        assert got == want


def yarn_shares(dim, theta, length, fast, slow, truncate):
    """How far each pair is interpolated in released code."""
    low, high = (
        dim * mpmath.log(length / (mpmath.mpf(turns) * 2 * mpmath.pi)) / (2 * mpmath.log(theta))
        for turns in (fast, slow)
    )
    if truncate:
        low, high = mpmath.floor(low), mpmath.ceil(high)
    low, high = max(low, mpmath.mpf(0)), min(high, mpmath.mpf(dim - 1))
    if low == high:
        high += mpmath.mpf("0.001")
    return [min(max((i - low) / (high - low), mpmath.mpf(0)), 1) for i in range(dim // 2)]


BETAS = st.tuples(st.floats(0.1, 64), st.floats(0, 64)).map(lambda b: (b[0] + b[1], b[0]))


@draws
@hypothesis.given(HALF_DIMS, THETAS, FACTORS, LENGTHS, BETAS, st.booleans())
@hypothesis.example(64, 1e4, 8.0, 4, (32, 1), True)  # the ramp ends before the first pair
@hypothesis.example(64, 1e4, 8.0, 131072, (32, 1), True)  # and after the last
@hypothesis.example(32, 5e4, 64.0, 4096, (1, 1), True)  # a step
@hypothesis.example(32, 15e4, 32.0, 4096, (32, 1), False)
def test_yarn(half, theta, factor, length, betas, truncate):
    shares = yarn_shares(2 * half, theta, length, *betas, truncate)
    want = [
        x * m / mpmath.mpf(factor) + x * (1 - m)
        for x, m in zip(powers(theta, 2 * half), shares, strict=True)
    ]
    spec, got = exact(
        "yarn",
        2 * half,
        theta,
        factor=factor,
        original_max_position_embeddings=length,
        beta_fast=betas[0],
        beta_slow=betas[1],
        truncate=truncate,
    )
    assert got == rounded(want)
    assert spec.attention_factor == (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)


@draws
@hypothesis.given(HALF_DIMS, THETAS, FACTORS, LENGTHS, BETAS)
def test_yarn_with_the_ramp_of_the_paper(half, theta, factor, length, betas):
    """Equations 17 and 18: linear in the number of turns r inside the original length."""
    fast, slow = map(mpmath.mpf, betas)
    hypothesis.assume(fast > slow)

    def scaled(x):
        r = length * x / (2 * mpmath.pi)
        kept = min(max((r - slow) / (fast - slow), mpmath.mpf(0)), mpmath.mpf(1))
        return (1 - kept) * x / mpmath.mpf(factor) + kept * x

    spec, got = exact(
        "yarn",
        2 * half,
        theta,
        ramp="rotations",
        factor=factor,
        original_max_position_embeddings=length,
        beta_fast=betas[0],
        beta_slow=betas[1],
    )
    assert got == rounded(map(scaled, powers(theta, 2 * half)))
    assert spec.attention_factor == (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)


@draws
@hypothesis.given(st.floats(1, 256), st.floats(0.01, 4), st.floats(0.01, 4))
def test_yarn_attention_factor(factor, mscale, all_dim):
    def attention(**keys):
        spec = RopeSpec.yarn(
            head_dim=8,
            rope_theta=1e4,
            factor=factor,
            original_max_position_embeddings=64,
            **keys,
        )
        return spec.attention_factor

    def g(m):
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    assert attention(mscale=mscale, mscale_all_dim=all_dim) == g(mscale) / g(all_dim)
    assert attention(mscale=mscale) == attention(mscale_all_dim=all_dim) == g(1)
    assert attention(mscale=mscale, mscale_all_dim=0) == g(1)
    assert attention(mscale=mscale, mscale_all_dim=all_dim, attention_factor=mscale) == mscale


@draws
@hypothesis.given(HALF_DIMS, THETAS, LENGTHS, st.floats(0.5, 64), st.randoms(use_true_random=False))
def test_longrope(half, theta, length, factor, random):
    """Factors below one and out of order are real, as is a ratio below one."""
    short, long = ([random.uniform(0.5, 100) for _ in range(half)] for _ in range(2))
    spec, got = exact(
        "longrope",
        2 * half,
        theta,
        short_factor=short,
        long_factor=long,
        original_max_position_embeddings=length,
        max_position_embeddings=max(2.0, length * factor),
    )
    base = powers(theta, 2 * half)
    assert got == rounded(x / f for x, f in zip(base, short, strict=True))
    assert spec.rows()[1].tolist() == rounded(x / f for x, f in zip(base, long, strict=True))
    ratio = max(2.0, length * factor) / length
    want = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(length))
    assert spec.attention_factor == want


@draws
@hypothesis.given(
    HALF_DIMS, THETAS, LENGTHS, FACTORS, st.sampled_from(("su", "yarn", 1.25)), st.integers(1, 64)
)
def test_longrope_of_the_papers(half, theta, length, factor, policy, n_start):
    """A factor of its own beats the ratio; the first n-hat tokens keep the base frequencies;
    LongRoPE2 gives every pair a magnitude."""
    given = {
        "short_factor": [1.0] * half,
        "long_factor": [float(factor)] * half,
        "original_max_position_embeddings": length,
        "max_position_embeddings": 3 * length,
        "factor": factor,
        "n_start": n_start,
    }
    spec, _ = exact("longrope", 2 * half, theta, **given, magnitude_scaling_policy=policy)
    base = powers(theta, 2 * half)
    want = [rounded(base), rounded(x / mpmath.mpf(float(factor)) for x in base), rounded(base)]
    assert spec.rows().tolist() == want
    laws = {
        "su": lambda: math.sqrt(1 + math.log(factor) / math.log(length)),
        "yarn": lambda: 0.1 * math.log(factor) + 1.0,
        1.25: lambda: 1.25,
    }
    magnitude = 1.0 if factor <= 1 and policy != 1.25 else laws[policy]()
    assert spec.scale_rows().tolist() == [[magnitude] * half] * 3
    each = [1 + i / half for i in range(half)]
    spec, _ = exact("longrope", 2 * half, theta, **given, attention_factor=each)
    assert spec.scale_rows().tolist() == [each] * 3


@draws
@hypothesis.given(HALF_DIMS, THETAS, PARTIALS, FACTORS)
def test_proportional(half, theta, partial, factor):
    dim = 2 * half
    turning = int(partial * dim // 2)
    want = [x / mpmath.mpf(factor) for x in powers(theta, dim, turning)]
    spec, got = exact("proportional", dim, theta, partial_rotary_factor=partial, factor=factor)
    assert got == rounded(want) + [0.0] * (half - turning)
    assert spec.rotary_dim == dim


def assert_close(got, want, bound):
    for a, b in zip(got, want, strict=True):
        assert abs(mpmath.mpf(a) - b) <= bound * b


@draws
@hypothesis.given(HALF_DIMS, THETAS, FACTORS, LENGTHS, st.integers(1, 1 << 24))
def test_dynamic(half, theta, factor, length, seq_len):
    dim = 2 * half
    spec, at_rest = exact("dynamic", dim, theta, factor=factor, max_position_embeddings=length)
    assert at_rest == rounded(powers(theta, dim))
    assert spec.inv_freq(seq_len=length).tolist() == at_rest
    longest = max(seq_len, length)
    growth = mpmath.mpf(factor) * longest / length - (mpmath.mpf(factor) - 1)
    base = mpmath.mpf(theta) * mpmath.power(growth, mpmath.mpf(dim) / (dim - 2))
    # g carries 3 roundings, its exponent 1 (and |exponent| <= 1), pow 2, theta and the product 2.
    bound = (3 + float(mpmath.log(growth)) + 4) * U
    assert_close(spec.inv_freq(seq_len=seq_len).tolist(), powers(base, dim), bound)
    assert spec.attention_factor_at(seq_len) == 1.0


@draws
@hypothesis.given(HALF_DIMS, THETAS, LENGTHS, st.integers(1, 1 << 24), BETAS, st.booleans())
def test_dynamic_yarn(half, theta, length, seq_len, betas, finetuned):
    spec, _ = exact(
        "dynamic_yarn",
        2 * half,
        theta,
        original_max_position_embeddings=length,
        max_position_embeddings=3 * length,
        beta_fast=betas[0],
        beta_slow=betas[1],
        finetuned=finetuned,
    )
    longest = max(seq_len, 3 * length if finetuned else length)
    s = mpmath.mpf(longest) / length
    shares = yarn_shares(2 * half, theta, length, *betas, True)
    want = [x * m / s + x * (1 - m) for x, m in zip(powers(theta, 2 * half), shares, strict=True)]
    # s, the quotient, its two constants and the sum: 5 roundings of positive numbers.
    assert_close(spec.inv_freq(seq_len=seq_len).tolist(), want, 5 * U)
    # ln has an error of 1 ulp and that of s, 0.1 and the product one each, and the sum one.
    factor = mpmath.mpf("0.1") * mpmath.log(s) + 1
    assert abs(spec.attention_factor_at(seq_len) - factor) <= (5 * 0.1 * abs(mpmath.log(s)) + 2) * U


def test_dynamic_rest_length():
    given = {"head_dim": 16, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    plain = RopeSpec.dynamic_yarn(**given)
    longer = RopeSpec.dynamic_yarn(**given, max_position_embeddings=256)
    assert torch.equal(plain.inv_freq(), plain.inv_freq(seq_len=64))
    assert torch.equal(longer.inv_freq(), longer.inv_freq(seq_len=256))
    assert longer.attention_factor == longer.attention_factor_at(256) > 1
    assert plain.attention_factor == plain.attention_factor_at(3) == 1.0


# -- transformers: the same bits ----------------------------------------------------------------


def theirs(rope_type, dim, theta, seq_len=None, length=4096, **parameters):
    """(inv_freq, attention factor) of the installed transformers."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as hunyuan
    from transformers.models.llama import modeling_llama as llama

    config = SimpleNamespace(
        head_dim=dim,
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=length,
        rope_parameters={"rope_theta": theta, **parameters},
        standardize_rope_params=lambda: None,
    )
    if rope_type == "default":
        return llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    if rope_type == "ntk":
        config.rope_parameters["alpha"] = parameters["factor"]
        return hunyuan.HunYuanDenseV1RotaryEmbedding.compute_ntk_alpha_rope_parameters(config)
    return rope_utils.ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=seq_len)


@st.composite
def hf_configurations(draw):
    """(rope_type, D, theta, parameters, lengths worth asking for)."""
    half, theta, length = draw(HALF_DIMS), draw(THETAS), draw(LENGTHS)
    rope_type = draw(
        st.sampled_from(
            ("default", "linear", "ntk", "dynamic", "llama3", "yarn", "longrope", "proportional")
        )
    )
    p, lengths = {}, [None]
    if rope_type not in ("default", "longrope"):
        p["factor"] = draw(FACTORS)
    if rope_type == "llama3":
        low = draw(st.floats(0.1, 8))
        p |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0, 32))}
    if rope_type == "yarn":
        fast, slow = draw(BETAS)
        p |= {"beta_fast": fast, "beta_slow": slow, "truncate": draw(st.booleans())}
        if draw(st.booleans()):
            p |= {"mscale": draw(st.floats(0, 2)), "mscale_all_dim": draw(st.floats(0, 2))}
    if rope_type == "proportional":
        p["partial_rotary_factor"] = draw(PARTIALS)
    if rope_type == "longrope":
        factors = st.lists(st.floats(0.5, 100), min_size=half, max_size=half)
        p |= {"short_factor": draw(factors), "long_factor": draw(factors)}
        lengths = [None, length, length + 1]
    if rope_type in ("llama3", "yarn", "longrope"):
        p["original_max_position_embeddings"] = length
    if rope_type == "dynamic":
        lengths = [None, 1, length, length + 1, draw(st.integers(1, 1 << 24))]
    return rope_type, 2 * half, theta, p, lengths, max(2, 4 * length)


@hypothesis.settings(max_examples=800, deadline=None)
@hypothesis.given(hf_configurations())
def test_hf_bits(drawn):
    rope_type, dim, theta, p, lengths, longest = drawn
    if rope_type == "dynamic":
        longest = max(2, longest // 4)
    spec = RopeSpec.of(
        rope_type, head_dim=dim, rope_theta=theta, max_position_embeddings=longest, **p
    )
    for seq_len in lengths:
        want, attention_factor = theirs(rope_type, dim, theta, seq_len, longest, **p)
        if want.isfinite().all():
            got = spec.inv_freq("hf", seq_len)
            assert got.dtype == torch.float32
            assert got.tolist() == want.tolist()
        else:
            with pytest.raises(ValueError, match="precision must be 'exact'.*NaN"):
                spec.inv_freq("hf", seq_len)
        assert spec.attention_factor_at(seq_len) == attention_factor
        assert spec.attention_factor_at(seq_len, "hf") == attention_factor


@pytest.mark.parametrize("factor", [1, 2.0, 3.7])
def test_hf_dynamic_of_a_running_model(factor):
    """A running model computes the base in float32, from a tensor."""
    spec = RopeSpec.dynamic(head_dim=64, rope_theta=1e4, factor=factor, max_position_embeddings=100)
    lengths = torch.tensor([1, 100, 101, 150, 4096])
    rows = spec.rows_at(lengths, "hf")
    for row, length in zip(rows, lengths, strict=True):
        want, _ = theirs("dynamic", 64, 1e4, length, 100, factor=factor)
        assert torch.equal(row, want)
        assert torch.equal(spec.inv_freq("hf", length), want)


# -- refusals -----------------------------------------------------------------------------------

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"original_max_position_embeddings": 64, "factor": 4.0}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("rope_type", "given", "named"),
    [
        ("spiral", {}, "rope_type must be one of default"),
        ("linear", {}, "factor is required by 'linear'"),
        ("linear", {"factor": None}, "factor is required"),
        ("linear", {"factor": 0.5}, "factor must be a finite number >= 1, got 0.5"),
        ("linear", {"factor": math.nan}, "factor must be a finite"),
        ("linear", {"factor": math.inf}, "factor must be a finite"),
        ("linear", {"factor": "8"}, "factor must be a finite number"),
        ("linear", {"factor": True}, "factor must be a finite number"),
        ("linear", {"factor": 2.0, "beta_fast": 32}, "beta_fast is not a parameter of 'linear'"),
        ("default", {"factor": 2.0}, "factor is not a parameter of 'default', which takes: none"),
        ("default", {"rope_theta": 1.0}, "rope_theta must be a finite number > 1"),
        ("default", {"rope_theta": -1e4}, "rope_theta must be"),
        ("default", {"rope_theta": math.inf}, "rope_theta must be"),
        ("default", {"rope_theta": None}, "rope_theta must be"),
        ("default", {"partial_rotary_factor": 0.0}, "partial_rotary_factor must be a number in"),
        ("default", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be a number in"),
        ("default", {"partial_rotary_factor": 0.33}, "partial_rotary_factor must give an even"),
        ("default", {"partial_rotary_factor": 0.01}, "partial_rotary_factor must give an even"),
        ("dynamic", {"factor": 2.0}, "max_position_embeddings is required"),
        ("dynamic", {"factor": 0.9, "max_position_embeddings": 64}, "factor must be"),
        ("ntk", {"factor": 2.0, "head_dim": 2}, "rotary_dim must be >= 4"),
        ("ntk", {"factor": 2.0, "mixed_b": 0.0}, "mixed_b must be"),
        ("llama3", YARN, "low_freq_factor is required"),
        ("llama3", LLAMA3 | {"high_freq_factor": 0.5}, "high_freq_factor must be >= low"),
        ("llama3", LLAMA3 | {"low_freq_factor": 0}, "low_freq_factor must be a finite number > 0"),
        ("yarn", {"factor": 4.0}, "original_max_position_embeddings is required"),
        ("yarn", YARN | {"original_max_position_embeddings": 0}, "original_max_pos"),
        ("yarn", YARN | {"beta_fast": 1, "beta_slow": 32}, "beta_fast must be >= beta_slow"),
        ("yarn", YARN | {"beta_fast": 0}, "beta_fast must be a finite number > 0"),
        ("yarn", YARN | {"beta_slow": 0}, "beta_slow must be a finite number > 0"),
        ("yarn", YARN | {"beta_fast": None}, "beta_fast is required"),
        ("yarn", YARN | {"truncate": 1}, "truncate must be true or false"),
        ("yarn", YARN | {"mscale": -1.0}, "mscale must be a finite number >= 0"),
        ("yarn", YARN | {"attention_factor": 0.0}, "attention_factor must be a finite number > 0"),
        ("yarn", YARN | {"attention_factor": [1.0] * 7}, "attention_factor must have .* 8 "),
        ("yarn", YARN | {"attention_factor": "big"}, "attention_factor must be a list of 8"),
        ("yarn", YARN | {"ramp": "sideways"}, "ramp must be 'dimension'"),
        ("yarn", YARN | {"ramp": "rotations", "beta_fast": 1}, "beta_fast must be > "),
        ("longrope", LONG | {"short_factor": [1.0] * 7}, "short_factor must have .* = 8 values"),
        ("longrope", LONG | {"long_factor": [1.0] * 9}, "long_factor must have .*got 9"),
        ("longrope", LONG | {"long_factor": 2.0}, "long_factor must be a list"),
        ("longrope", LONG | {"long_factor": [0.0] * 8}, "long_factor must be a finite number > 0"),
        ("longrope", LONG | {"long_factor": [math.nan] * 8}, "long_factor must be"),
        ("longrope", LONG | {"factor": None}, "factor is required where"),
        ("longrope", LONG | {"n_start": -1}, "n_start must be an integer >= 0"),
        ("longrope", LONG | {"n_start": 0.5}, "n_start must be an integer >= 0"),
        ("longrope", LONG | {"n_start": 4, "long_mscale": 1.2}, "n_start must be 0"),
        ("longrope", LONG | {"magnitude_scaling_policy": "loud"}, "magnitude_scaling_policy"),
        ("longrope", LONG | {"magnitude_scaling_policy": 0.0}, "magnitude_scaling_policy"),
    ],
)  # fmt: skip
def test_refusals(rope_type, given, named):
    with pytest.raises(ValueError, match=named):
        RopeSpec.of(rope_type, **{"head_dim": 16, "rope_theta": 1e4, **given})


def test_no_such_method_in_transformers():
    common = {"head_dim": 16, "rope_theta": 1e4}
    for spec, why in (
        (RopeSpec.ntk_by_parts(**common, **YARN), "no rope_type 'ntk_by_parts'"),
        (RopeSpec.dynamic_yarn(**common, original_max_position_embeddings=64), "'dynamic_yarn'"),
        (RopeSpec.ntk(**common, factor=2.0, mixed_b=0.5), "mixed_b"),
        (RopeSpec.yarn(**common, **YARN, ramp="rotations"), "ramp"),
        (RopeSpec.yarn(**common, **YARN, attention_factor=[1.1] * 8), "attention_factor per pair"),
        (RopeSpec.longrope(**common, **LONG, n_start=4), "n_start"),
    ):
        assert spec.inv_freq().isfinite().all()
        for refused in (spec.inv_freq, spec.rows):
            with pytest.raises(ValueError, match=f"precision must be 'exact'.*{why}"):
                refused("hf")


def test_longrope_attention_factors():
    def attention(seq_len=None, **given):
        spec = RopeSpec.longrope(head_dim=16, rope_theta=1e4, **LONG | given)
        return spec.attention_factor_at(seq_len)

    su = math.sqrt(1 + math.log(4.0) / math.log(64))
    yarn = 0.1 * math.log(4.0) + 1.0
    assert attention() == attention(64) == attention(65) == su
    assert attention(max_position_embeddings=4096) == su  # the factor counts, not the ratio
    assert attention(magnitude_scaling_policy="yarn") == yarn
    assert attention(magnitude_scaling_policy=1.3) == 1.3
    assert attention(attention_factor=1.5, magnitude_scaling_policy="yarn") == 1.5
    each = {"short_mscale": 1.1, "long_mscale": 1.2}
    assert (attention(64, **each), attention(65, **each)) == (1.1, 1.2)
    assert (attention(64, long_mscale=1.2), attention(65, long_mscale=1.2)) == (su, 1.2)
    per_pair = tuple(1 + 0.1 * i for i in range(8))
    assert attention(65, attention_factor=per_pair) == per_pair


def test_each_method_says_where_it_comes_from():
    for name, method in scaling.METHODS.items():
        assert method.__name__ == name
        assert len(method.__doc__) > 40
