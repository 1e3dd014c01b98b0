"""patch(model): what it computes, what it recognises, what it refuses and why."""

import copy
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5")

import rope_fused as rf  # noqa: E402
from helpers import same_bits  # noqa: E402
from tiny import (  # noqa: E402
    FAMILIES,
    LAYERS,
    YARN,
    Entries,
    attentions,
    entries,
    gradients,
    make_model,
    one_thread,  # noqa: F401
    relative,
    run,
    tokens,
    unchanged_namespace,
)

# What one forward of each level enters, and how far it may be from the unpatched model in float64:
# "hf" has transformers' own tables, and fused only sums in another order; transformers' tables are
# float32, which "exact" is measured against, not the other way round.
MODES = {
    "hf": ({"fuse_projection": False, "precision": "hf"}, 0, "rotate_tables", 0.0),
    "hf-fused": ({"precision": "hf"}, 2, "rotate_tables", 1e-9),
    "exact": ({"fuse_projection": False}, 0, "rotate", 2e-5),
    "exact-fused": ({}, 2, "project", 2e-5),
}


def patched(model, **kwargs):
    model = copy.deepcopy(model)
    return model, rf.patch(model, **kwargs)


def level_of(family, mode):
    """hf leaves QK-norm to the model's own modules, so that Qwen3 has no level 2 there."""
    return 0 if (family, mode) == ("Qwen3", "hf-fused") else MODES[mode][1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_equals_unpatched(family, mode, device):
    kwargs, _, operator, budget = MODES[mode]
    model = make_model(family, device=device)
    ours, report = patched(model, **kwargs)
    assert [*report.levels.values()] == [level_of(family, mode)] * LAYERS
    ids = tokens(model)
    expected, expected_grads = gradients(model, ids)
    (logits, grads), count = entries(lambda: gradients(ours, ids))
    assert count[operator] >= LAYERS
    if budget == 0:
        assert same_bits(logits, expected)
    else:
        assert relative(logits, expected) <= budget
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        if budget == 0:
            assert same_bits(grad, expected_grads[name]), name
        else:
            assert relative(grad, expected_grads[name]) <= budget, name


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_are_what_runs(family, device):
    model, report = patched(make_model(family, device=device))
    assert [*report.levels.values()] == [2] * LAYERS and report.reasons == {}
    ids = tokens(model)
    with torch.no_grad(), Entries(model) as seen:
        model(ids)
    assert seen.count == {"project": LAYERS}
    assert seen.outside == 0, "a projection of q or k was computed by torch"
    rf.unpatch(model)
    with torch.no_grad(), Entries(model) as seen:
        model(ids)
    assert seen.count == {} and seen.outside == 2 * LAYERS


# Positions on every path: starting again in a row, different from row to row, with gaps, backwards.
POSITIONS = {
    "packed": [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
    "left-padded": [[0] * 6 + [*range(7)], [*range(13)]],
    "with a gap": [[*range(40, 47), *range(57, 63)]],
    "backwards": [[*range(13, 0, -1)], [*range(30, 4, -2)]],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", POSITIONS)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_positions(family, case, mode, device):
    model = make_model(family, device=device)
    ours, _ = patched(model, **MODES[mode][0])
    ids = tokens(model)
    positions = torch.tensor(POSITIONS[case], device=device)
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        got, count = entries(lambda: ours(ids, position_ids=positions).logits)
        assert not torch.allclose(expected, model(ids).logits), "positions without effect"
    assert count == {MODES[mode][2]: LAYERS}
    assert relative(got, expected) <= MODES[mode][3]


@pytest.mark.parametrize("mode", ["hf", "exact", "exact-fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, mode, device):
    model = make_model(family, device=device)
    ours, _ = patched(model, **MODES[mode][0])
    ids = tokens(model)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        options |= {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        expected = model.generate(ids, pad_token_id=0, **options)
        got, count = entries(lambda: ours.generate(ids, pad_token_id=0, **options))  # noqa: B023
        assert torch.equal(got, expected)
        assert count[MODES[mode][2]] == 8 * LAYERS


def test_cached_keys_are_the_keys_of_transformers(device):
    model = make_model("Qwen3", device=device)
    ours, _ = patched(model)
    ids = tokens(model)
    with torch.no_grad():
        caches = [m(ids, use_cache=True).past_key_values for m in (ours, model)]
        for layer in range(LAYERS):
            for name in ("keys", "values"):
                got, expected = (getattr(c.layers[layer], name) for c in caches)
                assert relative(got, expected) <= 2e-5
        # So a conversation may begin unpatched and go on patched.
        last = ids[:, -1:]
        expected = model(last, past_key_values=copy.deepcopy(caches[1])).logits
        assert relative(ours(last, past_key_values=caches[1]).logits, expected) <= 2e-5


def test_output_attentions(device):
    model = make_model(device=device, attn_implementation="eager")
    ours, _ = patched(model)
    ids = tokens(model)
    with torch.no_grad():
        got, expected = (m(ids, output_attentions=True).attentions for m in (ours, model))
    assert len(got) == LAYERS
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) <= 2e-5


@pytest.mark.parametrize("length", [8, 9])
def test_longrope_changes_tables_where_transformers_does(length, device):
    pairs = 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0 + 0.1 * j for j in range(pairs)],
        "long_factor": [2.0 + 0.7 * j for j in range(pairs)],
    }
    model = make_model(rope=rope, device=device)
    ids = tokens(model, seqlen=length)
    for mode, (kwargs, level, _, budget) in MODES.items():
        ours, report = patched(model, **kwargs)
        assert [*report.levels.values()] == [level] * LAYERS, mode
        with torch.no_grad():
            assert relative(ours(ids).logits, model(ids).logits) <= budget, mode


def test_dynamic_scaling_is_left_to_the_tables_of_transformers(device):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = make_model(rope=rope, max_position_embeddings=8, device=device)
    ours, report = patched(model)
    assert [*report.levels.values()] == [None] * LAYERS
    assert "earlier calls" in report.reasons["model.layers.0.self_attn"]
    ours, report = patched(model, precision="hf")
    assert [*report.levels.values()] == [0] * LAYERS and report.reasons
    for seqlen in (6, 13, 10):
        ids = tokens(model, seqlen=seqlen)
        with torch.no_grad():
            assert same_bits(ours(ids).logits, model(ids).logits)


def test_unpatch_restores_every_bit(device):
    model = make_model("Qwen3", torch.float32, device)
    before = copy.deepcopy(model)
    rf.patch(model)
    rf.patch(model, precision="hf", fuse_projection=False)  # patching again replaces the patch
    ids = tokens(model)
    assert run(model, ids)[1] == {"rotate_tables": LAYERS}
    rf.unpatch(model)
    rf.unpatch(model)  # nothing is left to undo
    for old, new in zip(before.modules(), model.modules(), strict=True):
        assert vars(old).keys() == vars(new).keys()
    logits, grads = gradients(model, ids)
    expected, expected_grads = gradients(before, ids)
    assert same_bits(logits, expected)
    assert all(same_bits(grads[name], g) for name, g in expected_grads.items())


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_functional_calls(mode, device):
    model = make_model(device=device)
    rf.patch(model, **MODES[mode][0])
    ids = tokens(model)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (ids,), {"labels": ids}).loss

    got = torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})
    wanted = torch.autograd.grad(model(ids, labels=ids).loss, [*model.parameters()])
    for name, expected in zip(got, wanted, strict=True):
        assert relative(got[name], expected) <= 1e-12, name


def test_models_side_by_side(device):
    from transformers.models.llama import modeling_llama

    with unchanged_namespace(
        modeling_llama, modeling_llama.LlamaAttention, modeling_llama.nn.Linear
    ):
        plain = make_model(device=device)
        fused, _ = patched(plain)
        tables, _ = patched(plain, precision="hf", fuse_projection=False)
        other = make_model(rope={"rope_type": "default", "rope_theta": 5e5}, device=device)
        rf.patch(other)
        ids = tokens(plain)
        runs = [(fused, "project"), (plain, None), (tables, "rotate_tables"), (other, "project")]
        for model, operator in runs * 2:
            assert run(model, ids)[1] == ({operator: LAYERS} if operator else {})
        expected = run(plain, ids)[0]
        assert relative(run(fused, ids)[0], expected) <= 2e-5
        assert same_bits(run(tables, ids)[0], expected)
        assert relative(run(other, ids)[0], expected) > 1e-2, "specs were mixed up"


# -- frequencies ---------------------------------------------------------------------------------


def test_exact_frequencies_survive_a_cast_of_the_model(device):
    """transformers has frequencies in a buffer, which a cast rounds; ours come from the config."""
    model = make_model(dtype=torch.float32, device=device)
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    kept = copy.deepcopy(rounded)
    kept.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
    before, _ = patched(model)
    for m in (rounded, kept):
        report = rf.patch(m)
        assert [*report.levels.values()] == [2] * LAYERS
    ids = tokens(model)
    positions = torch.arange(40, 53, device=device)[None]
    with torch.no_grad():
        expected = kept(ids, position_ids=positions).logits
        for m in (rounded, before.to(torch.bfloat16)):
            assert same_bits(m(ids, position_ids=positions).logits, expected)


@pytest.mark.parametrize("precision", ["exact", "hf"])
def test_frequencies_edited_after_loading(precision, device):
    """The config says one thing, the buffers another: what the model computes must not change."""
    model = make_model(rope={"rope_type": "default", "rope_theta": 1e4}, device=device)
    model.config.rope_parameters |= YARN
    ids = tokens(model)
    ours, report = patched(model, precision=precision)
    level = None if precision == "exact" else 0  # level 0 with hf reads the model's own tables
    assert [*report.levels.values()] == [level] * LAYERS
    assert "not what its configuration says" in report.reasons["model.layers.0.self_attn"]
    with torch.no_grad():
        assert same_bits(ours(ids).logits, model(ids).logits)


@pytest.mark.parametrize("precision", ["exact", "hf"])
def test_frequencies_edited_alone(precision, device):
    """Temperature and configuration as before: the numbers themselves are compared."""
    model = make_model(device=device)
    model.model.rotary_emb.inv_freq.mul_(1.02)
    ours, report = patched(model, precision=precision)
    assert [*report.levels.values()] == [None if precision == "exact" else 0] * LAYERS
    assert "inv_freq is not what" in report.reasons["model.layers.0.self_attn"]
    ids = tokens(model)
    with torch.no_grad():
        assert same_bits(ours(ids).logits, model(ids).logits)


def test_meta_device(device):
    model = make_model("Qwen3", device="meta")
    report = rf.patch(model)
    assert [*report.levels.values()] == [2] * LAYERS
    assert "random weights" in report.reasons["model.layers.0.self_attn"]
    source = make_model("Qwen3", device=device)
    model.to_empty(device=device)
    model.load_state_dict(source.state_dict())
    model.model.rotary_emb.inv_freq.copy_(source.model.rotary_emb.inv_freq)
    ids = tokens(source)
    logits, count = run(model, ids)
    assert relative(logits, run(source, ids)[0]) <= 2e-5
    assert count == {"project": LAYERS}


def test_weights_that_are_not_numbers_yet(device):
    """Memory without values yet may hold NaN, which equals nothing: others serve the self-test."""
    model = make_model(device=device)
    for attention in attentions(model):
        attention.q_proj.weight.data.fill_(float("nan"))
    assert [*rf.patch(model).levels.values()] == [2] * LAYERS


def test_patch_leaves_random_numbers_weights_and_caches_alone(device):
    model = make_model("Qwen3", device=device)
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    keys = [*weights]
    state = torch.get_rng_state()
    rf.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [*model.state_dict()] == keys
    assert all(same_bits(p, weights[n]) for n, p in model.state_dict().items())
    assert all(same_bits(b, buffers[n]) for n, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


# -- recognition ---------------------------------------------------------------------------------


class Toy(nn.Module):
    """No attention at all."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)


def gpt2():
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (Toy, "", "Toy has no attention"),
        (gpt2, "transformer.h.0.attn", "no rotary embedding"),
    ],
)
def test_unrecognised_model(make, name, reason):
    model = make()
    before = [dict(vars(m)) for m in model.modules()]
    report = rf.patch(model)
    assert report.levels == {name: None}
    assert reason in report.reasons[name]
    with pytest.raises(ValueError, match="strict"):
        rf.patch(model, strict=True)
    assert [vars(m).keys() for m in model.modules()] == [b.keys() for b in before]


def attention_with(body, rotate="a * cos - b * sin, b * cos + a * sin"):
    """The source of an attention with ``body`` before its rotation and its own rotary function."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    return f"""
import torch
from {LlamaAttention.__module__} import LlamaAttention


def apply_rotary_pos_emb(q, k, cos, sin):
    out = []
    for x in (q, k):
        a, b = x.chunk(2, dim=-1)
        cos, sin = cos[..., : a.shape[-1]], sin[..., : a.shape[-1]]
        cos, sin = (t.unsqueeze(1) if t.dim() == 3 else t for t in (cos, sin))
        out.append(torch.cat(({rotate}), dim=-1))
    return out


class OddAttention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        {body}
        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        value = torch.nn.functional.scaled_dot_product_attention(
            query_states, key_states, value_states, is_causal=True, enable_gqa=True
        )
        return self.o_proj(value.transpose(1, 2).flatten(2)), None
"""


PROJECTIONS = """query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)"""
ODD = {
    # name: (body, rotation, level, part of the reason)
    "as usual": (PROJECTIONS, None, 2, ""),
    "the other way round": (PROJECTIONS, "a * cos + b * sin, b * cos - a * sin", 2, ""),
    "twice as large": (
        PROJECTIONS,
        "2 * (a * cos - b * sin), 2 * (b * cos + a * sin)",
        None,
        "apply_rotary_pos_emb computes no rotation by its tables",
    ),
    "clipped": (
        f"{PROJECTIONS}\n        query_states = query_states.clamp(-99, 99)",
        None,
        0,
        "its q is not what a linear layer returned, or is changed on the way",
    ),
    "clipped in place": (
        f"{PROJECTIONS}\n        key_states.clamp_(-99, 99)",
        None,
        0,
        "its k is not what a linear layer returned, or is changed on the way",
    ),
    "scaled inside": (
        PROJECTIONS.replace("self.q_proj(hidden_states)", "(2 * self.q_proj(hidden_states))"),
        None,
        0,
        "its q is not what a linear layer returned",
    ),
    "other input": (
        PROJECTIONS.replace("key_states =", "hidden_states = 2 * hidden_states; key_states ="),
        None,
        0,
        "projected from different tensors",
    ),
    "other input, in place": (
        "hidden_states = hidden_states.clone()\n        "
        + PROJECTIONS.replace("key_states =", "hidden_states.mul_(2); key_states ="),
        None,
        0,
        "projected from different tensors",
    ),
    "another name for the input": (
        "other = hidden_states; "
        + PROJECTIONS.replace("self.k_proj(hidden_states)", "self.k_proj(other)"),
        None,
        2,
        "",
    ),
    "q used before its rotation": (
        f"{PROJECTIONS}\n        value_states = value_states * query_states[:, :2].sigmoid()",
        None,
        0,
        "the self-test failed: value_states differs",
    ),
    "heads in another order": (
        PROJECTIONS.replace(
            "(hidden_shape).transpose(1, 2)", "(hidden_shape).flip(2).transpose(1, 2)"
        ),
        None,
        0,
        "its q is not what a linear layer returned",
    ),
    "dimensions before heads": (
        PROJECTIONS.replace(
            "self.q_proj(hidden_states).view(hidden_shape)",
            "self.q_proj(hidden_states).unflatten(-1, (self.head_dim, -1)).transpose(2, 3)",
        ),
        None,
        0,
        "its q is not cut into heads",
    ),
    "by the length": (
        f"{PROJECTIONS}\n        if hidden_states.shape[1] > 10:\n            key_states *= 2",
        None,
        0,
        "its forward goes different ways: hidden_states.shape[1] > 10",
    ),
    "keys by what it is given": (
        f"{PROJECTIONS}\n        if attention_mask is None:\n            key_states = "
        "self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)",
        None,
        0,
        "k_proj runs or not by attention_mask is None",
    ),
    "may call the forward of its base class": (
        f"if attention_mask is False:\n            return super().forward(None)\n        "
        f"{PROJECTIONS}",
        None,
        2,
        "",
    ),
    "other tables": (
        f"{PROJECTIONS}\n        position_embeddings = [2 * t for t in position_embeddings]",
        None,
        None,
        "computes no rotation by its tables",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_other_attentions(case, tmp_path, monkeypatch):
    body, rotate, level, reason = ODD[case]
    options = {} if rotate is None else {"rotate": rotate}
    name = f"odd_attention_{case.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(attention_with(body, **options))
    monkeypatch.syspath_prepend(tmp_path)
    odd = __import__(name)
    monkeypatch.delitem(sys.modules, name)
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.__class__ = odd.OddAttention
    ours, report = patched(model)
    assert [*report.levels.values()] == [level] * LAYERS
    assert reason in report.reasons.get("model.layers.0.self_attn", "")
    ids = tokens(model)
    got, count = run(ours, ids)
    assert relative(got, run(model, ids)[0]) <= 2e-5
    assert count == {2: {"project": LAYERS}, 0: {"rotate": LAYERS}, None: {}}[level]


def test_source_that_is_not_the_code(tmp_path, monkeypatch):
    """The file changed after its import: what would be rewritten is not what runs."""
    (tmp_path / "edited_attention.py").write_text(attention_with(PROJECTIONS))
    monkeypatch.syspath_prepend(tmp_path)
    import edited_attention

    monkeypatch.delitem(sys.modules, "edited_attention")
    text = attention_with(PROJECTIONS).replace("is_causal=True", "is_causal=not 0")
    (tmp_path / "edited_attention.py").write_text(text)
    model = make_model()
    model.model.layers[0].self_attn.__class__ = edited_attention.OddAttention
    report = rf.patch(model)
    assert [*report.levels.values()] == [None, 2]
    assert "not the code that runs" in report.reasons["model.layers.0.self_attn"]


def test_replaced_forward_is_respected(device):
    model = make_model(device=device)
    first = model.model.layers[0].self_attn
    first.forward = lambda *args, **kwargs: type(first).forward(first, *args, **kwargs)
    with pytest.raises(ValueError, match="replaced on this instance"):
        rf.patch(model, strict=True)
    assert run(model, tokens(model))[1] == {}
    report = rf.patch(model)
    assert report.levels == {"model.layers.0.self_attn": None, "model.layers.1.self_attn": 2}
    assert "1 of 2 attention modules patched" in str(report)
    assert "has been replaced on this instance" in str(report)


def test_call_without_positions_warns_and_uses_its_tables(device):
    """In the models recognised here every layer is given position_ids; other callers may not."""
    model = make_model(device=device)
    x = torch.randn(2, 5, 32, dtype=torch.float64, device=device)
    tables = model.model.rotary_emb(x, torch.arange(5, device=device)[None])
    attention = attentions(model)[0]
    expected = attention(x, position_embeddings=tables)[0]
    rf.patch(model)
    with pytest.warns(UserWarning, match="without the position_ids"):
        got, count = entries(lambda: attention(x, position_embeddings=tables)[0])
    assert same_bits(got, expected) and count == {}


def test_another_rotary_module_in_the_place_of_the_models(device):
    """Its tables say nothing of their positions, and are not those of what was patched."""
    model = make_model(device=device)
    ours, _ = patched(model)
    ids = tokens(model)
    run(ours, ids)
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    for m in (model, ours):
        m.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    with pytest.warns(UserWarning, match="not those it was patched for"):
        got, count = run(ours, ids)
    assert same_bits(got, run(model, ids)[0]) and count == {}
    rf.patch(ours, strict=True)
    got, count = run(ours, ids)
    assert relative(got, run(model, ids)[0]) <= 2e-5 and count == {"project": LAYERS}


def test_tables_that_a_hook_changes(device):
    model = make_model(device=device)
    ours, _ = patched(model)
    ids = tokens(model)

    def hotter(module, args, tables):
        for table in tables:
            table.mul_(1.5)

    for m in (model, ours):
        m.model.rotary_emb.register_forward_hook(hotter)
    with pytest.warns(UserWarning, match="not those it was patched for"):
        got, count = run(ours, ids)
    assert same_bits(got, run(model, ids)[0]) and count == {}


def test_layers_that_differ_in_a_child(device):
    """One layer has another epsilon, and then a norm of another kind, of the same shape."""

    class Doubling(type(attentions(make_model("Qwen3"))[0].q_norm)):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_model("Qwen3", device=device)
    ids = tokens(model)
    last = attentions(model)[-1]
    last.q_norm.variance_epsilon = last.k_norm.variance_epsilon = 0.5
    ours, report = patched(model)
    assert [*report.levels.values()] == [2] * LAYERS
    assert relative(run(ours, ids)[0], run(model, ids)[0]) <= 2e-5
    for m in (model, ours):  # what is changed later counts as well
        attentions(m)[0].q_norm.variance_epsilon = 0.25
    got, count = run(ours, ids)
    assert relative(got, run(model, ids)[0]) <= 2e-5
    assert count == {"rotate": 1, "project": LAYERS - 1}
    last.q_norm.__class__ = Doubling
    ours, report = patched(model)
    assert [*report.levels.values()][-1] == 1
    assert "q_norm, before the rotation, is no RMSNorm" in [*report.reasons.values()][-1]
    assert relative(run(ours, ids)[0], run(model, ids)[0]) <= 2e-5


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")])
@pytest.mark.parametrize("precision", ["exact", "hf"])
def test_patch_inside_of_a_context(context, precision, device):
    model = make_model(device=device)
    with context():
        report = rf.patch(model, precision=precision)
    assert [*report.levels.values()] == [2] * LAYERS
    ids = tokens(model)
    got, grads = gradients(model, ids)
    rf.unpatch(model)
    expected, expected_grads = gradients(model, ids)
    assert relative(got, expected) <= 2e-5
    assert all(relative(grads[n], g) <= 2e-5 for n, g in expected_grads.items())


def test_bad_arguments(device):
    model = make_model(device=device)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        rf.patch({})
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got NoneType"):
        rf.unpatch(None)
    bad = [
        ("precision", "bf16"),
        ("backend", "gpu"),
        ("fuse_projection", 1),
        ("strict", "yes"),
    ]
    for name, value in bad:
        with pytest.raises(ValueError, match=name):
            rf.patch(model, **{name: value})
    assert run(model, tokens(model))[1] == {}
