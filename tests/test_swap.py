"""Other frequencies for a loaded model: the logits of one loaded with them, and back again."""

import warnings

import pytest
import torch
import transformers

import rope_fused as rf
from checkpoints import VOCABULARY, make_llama
from rope_fused.context import loading, methods, swap
from rope_fused.context.perplexity import token_nll
from tiny import one_thread  # noqa: F401

pytestmark = pytest.mark.no_poison
BASE = {"rope_theta": 1e4}
BLOCKS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + j / 20 for j in range(8)],
        "long_factor": [1.0 + j for j in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def ids(seqlen, batch=2):
    return torch.randint(2, VOCABULARY, (batch, seqlen))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_swapped_model_is_the_one_built_with_that_block(name):
    model, block = make_llama(), BASE | BLOCKS[name]
    built = make_llama(rope_parameters=dict(block))
    spec = methods.spec_of(model.config, block)
    for seqlen in (30, 50, 90):
        x = ids(seqlen)
        before, want = logits(model, x), logits(built, x)
        with swap.swapped(model, spec):
            got = logits(model, x)
        if name == "dynamic":  # the exact frequencies, where transformers computes in float32
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(got, want)
        assert torch.equal(want, before) == (name == "dynamic" and seqlen <= 64)
        assert torch.equal(logits(model, x), before)
        swap.forget_lengths(built)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("own", ["yarn", "longrope"])
def test_a_patched_model_swaps_alike(own, fuse):
    model = make_llama(rope_parameters=BASE | BLOCKS[own]).double()
    twin = make_llama(rope_parameters=BASE | BLOCKS[own]).double()
    assert set(rf.patch(model, fuse_projection=fuse).levels.values()) == {2 if fuse else 0}
    x = ids(50)
    before = logits(model, x)
    spec = methods.spec_of(model.config, BASE | BLOCKS["linear"])
    for arguments in (
        {"spec": spec},
        {"inv_freq": spec.inv_freq(), "attention_factor": 1.25},
    ):
        with (
            warnings.catch_warnings(record=True) as said,
            swap.swapped(model, **arguments),
            swap.swapped(twin, **arguments),
        ):
            warnings.simplefilter("always")
            got, want = logits(model, x), logits(twin, x)
        # By operands of its own: else it says so, and rotates by the tables it is given.
        assert not [w for w in said if "rotated by the tables" in str(w.message)]
        # The plain model's angles are float32.
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert (got - before).abs().max() > 0.1
        assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize("patched", [False, True])
def test_gradients_reach_the_factors(patched):
    model = make_llama().double()
    if patched:
        rf.patch(model)
    x = ids(20)
    inv_freq = swap._known_spec(model).inv_freq().requires_grad_()
    factor = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

    def loss(inv_freq, factor):
        with swap.swapped(model, inv_freq=inv_freq, attention_factor=factor):
            return token_nll(model(x).logits[:, :-1], x[:, 1:]).mean()

    grads = torch.autograd.grad(loss(inv_freq, factor), (inv_freq, factor))
    for at in (0, 5):
        # Far larger than the rounding of a float32 angle, small enough for a quadratic error.
        step = torch.zeros_like(inv_freq)
        step[at] = 1e-3
        with torch.no_grad():
            up, down = (loss(inv_freq + sign * step, factor) for sign in (1, -1))
        assert grads[0][at].item() == pytest.approx((up - down).item() / 2e-3, rel=0.02, abs=1e-4)
    with torch.no_grad():
        up, down = (loss(inv_freq, factor + sign * 2e-3) for sign in (1, -1))
    assert grads[1].item() == pytest.approx((up - down).item() / 4e-3, rel=5e-3, abs=2e-4)


def test_start_tokens_keep_their_frequencies():
    """n̂, which transformers cannot express: the tables of a plain model, token by token."""
    model = make_llama()
    spec = rf.RopeSpec.longrope(
        head_dim=16, **BASE, **{k: v for k, v in BLOCKS["longrope"].items() if k != "rope_type"},
        n_start=4,
    )  # fmt: skip
    positions = torch.arange(60)[None]
    with swap.swapped(model, spec):
        cos, sin = model.model.rotary_emb(torch.empty(1, 60, 32), positions)
    want = spec.cos_sin(positions, torch.float64)
    factor = spec.attention_factor_at(60)
    scale = torch.where(positions < 4, spec.scale_rows()[2, 0], factor)[..., None]
    for got, table in zip((cos, sin), want, strict=True):
        torch.testing.assert_close(got[..., :8].double(), table * scale, rtol=0, atol=1e-5)


def test_swaps_nest_and_stay_until_reset():
    model, x = make_llama(), ids(30)
    plain = logits(model, x)
    specs = [methods.spec_of(model.config, BASE | BLOCKS[name]) for name in ("linear", "yarn")]
    swap.set_rope(model, specs[0])
    first = logits(model, x)
    with swap.swapped(model, specs[1]):
        assert not torch.equal(logits(model, x), first)
        with pytest.raises(RuntimeError), swap.swapped(model, specs[0]):
            raise RuntimeError
        assert not torch.equal(logits(model, x), first)
    assert torch.equal(logits(model, x), first)
    swap.reset_rope(model)
    assert torch.equal(logits(model, x), plain)
    assert not {"forward", "rope_override"} & model.model.rotary_emb.__dict__.keys()


def test_what_cannot_be_swapped_is_said():
    model = make_llama()
    spec = rf.RopeSpec.default(head_dim=8, rope_theta=1e4)
    with pytest.raises(ValueError, match="spec must have 8 pairs, got 4"):
        swap.set_rope(model, spec)
    with pytest.raises(TypeError, match="either spec or inv_freq"):
        swap.set_rope(model)
    with pytest.raises(ValueError, match=r"inv_freq must be floating \[8\], got torch.int64"):
        swap.set_rope(model, inv_freq=torch.arange(8))
    with pytest.raises(ValueError, match="attention_factor must be one number"):
        swap.set_rope(model, inv_freq=torch.rand(8), attention_factor=torch.rand(8))
    with pytest.raises(ValueError, match="model must have a rotary module"):
        swap.set_rope(torch.nn.Linear(2, 2), inv_freq=torch.rand(8))


def test_methods_are_blocks_that_transformers_reads():
    model = make_llama()
    for name in methods.NAMES:
        block = methods.block_of(name, model.config, 4.0)
        config = transformers.LlamaConfig(**model.config.to_dict() | {"rope_parameters": block})
        built = transformers.LlamaForCausalLM(config)
        spec = methods.spec_of(model.config, block)
        assert torch.equal(built.model.rotary_emb.inv_freq, spec.inv_freq("hf"))
        assert built.model.rotary_emb.attention_scaling == spec.attention_factor
    ntk = methods.spec_of(model.config, methods.block_of("ntk", model.config, 4.0))
    # NTK-aware: the slowest pair is interpolated in full, the fastest not at all.
    plain = loading.RopeSpec.default(head_dim=16, rope_theta=1e4)
    ratio = plain.inv_freq() / ntk.inv_freq()
    assert ratio[0].item() == 1.0 and ratio[-1].item() == pytest.approx(4.0, rel=1e-12)
    with pytest.raises(ValueError, match="method must be one of none, linear"):
        methods.block_of("magic", model.config, 4.0)
