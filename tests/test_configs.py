"""Configurations of every dialect: the golden numbers, and what transformers makes of them."""

import copy
import dataclasses
import importlib
import inspect
import itertools
import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch

from rope_fused import models
from rope_fused.spec import RopeSpec

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = [json.loads(file.read_text()) for file in sorted((GOLDEN / "configs").glob("*.json"))]
CORNERS = json.loads((GOLDEN / "corner_cases.json").read_text())
CORNER_IDS = [f"{case['case']}, {case['seq_len']}" for case in CORNERS]


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)  # transformers warns about what is tested here
    yield
    logging.disable(logging.NOTSET)


def read(config, *args, **kwargs):
    """from_config, which must leave its argument alone."""
    before = copy.deepcopy(config) if isinstance(config, dict) else None
    spec = RopeSpec.from_config(config, *args, **kwargs)
    assert before is None or config == before
    return spec


def config_object(config, class_name=None):
    """The transformers object of a dict; skips where the class is missing."""
    transformers = pytest.importorskip("transformers")
    config = copy.deepcopy(config)
    if class_name is None:
        class_name = type(transformers.AutoConfig.for_model(config["model_type"])).__name__
    if not hasattr(transformers, class_name):
        pytest.skip(f"this transformers has no {class_name}")
    config.pop("model_type")
    return getattr(transformers, class_name)(**config)


# -- golden numbers -----------------------------------------------------------------------------


def assert_golden(spec, result, exact_factor=None):
    seq_len = result["seq_len"]
    hf, exact = spec.inv_freq("hf", seq_len), spec.inv_freq("exact", seq_len)
    want = [float.fromhex(x) for x in result["inv_freq_hf_fp32"]]
    assert (hf.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert hf.tolist() == want
    want = torch.tensor(result["inv_freq_exact"], dtype=torch.float64)
    assert exact.shape == want.shape
    assert ((exact - want).abs() <= 1e-14 * want.abs()).all()
    assert spec.attention_factor_at(seq_len) == result["attention_factor"]
    assert spec.attention_factor_at(seq_len, "hf") == result["attention_factor"]


@pytest.mark.parametrize("kind", ["dict", "object"])
@pytest.mark.parametrize("golden", CONFIGS, ids=lambda golden: golden["name"])
def test_golden(golden, kind):
    config = golden["config"]
    if kind == "object":
        config = config_object(config, golden["config_class"])
    spec = read(config, golden["layer_type"])
    assert (spec.head_dim, spec.rotary_dim) == (golden["head_dim"], golden["rotary_dim"])
    at_end = golden["config"]["model_type"] == "deepseek_v4"  # all others turn the first dimensions
    assert spec.rotary_offset == (spec.head_dim - spec.rotary_dim if at_end else 0)
    for result in golden["results"]:
        assert_golden(spec, result)
    multiplier = golden.get("softmax_scale", {"multiplier": 1.0})["multiplier"]
    assert spec.softmax_multiplier == multiplier


def test_golden_is_complete():
    assert len(CONFIGS) == 25 and len(CORNERS) == 25


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("case", CORNERS, ids=CORNER_IDS)
def test_corner_cases(case, key):
    config = {"model_type": "llama", key: case["rope_parameters"]}
    config |= {name: case[name] for name in ("head_dim", "rope_theta", "max_position_embeddings")}
    if case["expect"] == "ValueError":
        named = ("beta_fast", "factor", "short_factor", "partial_rotary_factor")
        with pytest.raises(ValueError, match=" must ") as error:
            read(config)
        assert str(error.value).startswith(named)
        return
    spec = read(config)
    if case["expect"] == "finite":
        assert case["hf"]["has_nan"]
        exact = spec.inv_freq()
        want = torch.tensor(case["exact"]["inv_freq"], dtype=torch.float64)
        assert exact.isfinite().all()
        assert ((exact - want).abs() <= 1e-14 * want).all()
        with pytest.raises(ValueError, match="precision must be 'exact'"):
            spec.inv_freq("hf")
        return
    assert case["expect"] == "value"
    result = {"seq_len": case["seq_len"], "inv_freq_hf_fp32": case["hf"]["inv_freq_fp32"]}
    result |= {"inv_freq_exact": case["exact"]["inv_freq"]}
    assert_golden(spec, result | {"attention_factor": case["hf"]["attention_factor"]})
    # The 60-digit value may differ from the float64 expression that models are served with.
    assert spec.attention_factor == pytest.approx(case["exact"]["attention_factor"], rel=2**-51)
    if not case["rope_parameters"].get("partial_rotary_factor"):
        assert read(config_object(config | {"hidden_size": 2 * case["head_dim"]})) == spec


# -- every model family, as transformers rotates it ---------------------------------------------

# Their class defaults have heads of an odd number of pairs, or sections for half the head.
EXTRA = {
    "glm4_moe": {"head_dim": 128},
    "glm4v_moe_text": {"head_dim": 128},
    "glm4v_text": {"partial_rotary_factor": 0.5},
    "qwen3_omni_moe_text": {"head_dim": 128},
}
ROTARY_OF = {
    "qwen2_5_omni_text": "Qwen2_5OmniRotaryEmbedding",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextRotaryEmbedding",
}


def family_of(model_type):
    """(configuration, modeling module, rotary embedding module) of a model_type."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    if model_type not in auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers has no {model_type}")
    cls = auto.CONFIG_MAPPING[model_type]
    folder = os.path.basename(os.path.dirname(inspect.getsourcefile(cls)))
    try:
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ModuleNotFoundError:
        pytest.skip(f"transformers has no model for {model_type}")
    config = cls(**EXTRA.get(model_type, {}))
    classes = [
        c
        for name, c in inspect.getmembers(modeling, inspect.isclass)
        if name.endswith("RotaryEmbedding") and c.__module__ == modeling.__name__
        if not any(word in name for word in ("Vision", "Audio", "Talker", "DiT"))
    ]
    if model_type in ROTARY_OF:
        classes = [getattr(modeling, ROTARY_OF[model_type])]
    (rotary,) = classes
    return config, modeling, rotary(config)


def rotated_by(modeling, rotary, kind, x, positions):
    """q and k = x as the model rotates them: [batch, heads, seqlen, head_dim] or as it likes."""
    wanted = inspect.signature(rotary.forward).parameters
    tables = rotary(x, positions, **({"layer_type": kind} if "layer_type" in wanted else {}))
    if hasattr(modeling, "apply_rotary_emb"):  # complex numbers
        if "llama4" in modeling.__name__:
            q, k = (t.transpose(1, 2) for t in (x, x.roll(1, 1)))
            return (t.transpose(1, 2) for t in modeling.apply_rotary_emb(q, k, tables))
        return modeling.apply_rotary_emb(x, x.roll(1, 1), tables)
    if modeling.__name__.split(".")[2] in ("persimmon", "phi", "stablelm"):  # split the head first
        width = tables[0].shape[-1]
        turned = modeling.apply_rotary_pos_emb(x[..., :width], x.roll(1, 1)[..., :width], *tables)
        return (
            torch.cat((t, rest[..., width:]), -1)
            for t, rest in zip(turned, (x, x.roll(1, 1)), strict=True)
        )
    for name in ("apply_rotary_pos_emb_interleave", "apply_rotary_pos_emb"):
        apply = getattr(modeling, name, None)
        if apply is None:
            continue
        if "x" in inspect.signature(apply).parameters:
            return (apply(t, *tables) for t in (x, x.roll(1, 1)))
        return apply(x, x.roll(1, 1), *tables)
    raise AssertionError(f"{modeling.__name__} has no rotation")


def rotate(x, spec, positions):
    """The rotation a spec means, in float64."""
    cos, sin = (t[:, None] for t in spec.cos_sin(positions, torch.float64))
    inside = slice(spec.rotary_offset, spec.rotary_offset + spec.rotary_dim)
    y = x.double().clone()
    part = y[..., inside]
    if spec.interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    y[..., inside] = turned * spec.attention_factor
    return y


@pytest.mark.parametrize("model_type", models.MODELS)
def test_families(model_type):
    """The defaults, the frequencies bit for bit, and which dimensions make a pair."""
    config, modeling, rotary = family_of(model_type)
    plain = {"model_type": model_type, **EXTRA.get(model_type, {})}
    kinds = [
        name[: -len("_inv_freq")] for name, _ in rotary.named_buffers() if "original" not in name
    ]
    kinds = [kind for kind in kinds if kind != "inv_freq"[: -len("_inv_freq")]] or [None]
    for kind in kinds:
        buffer = getattr(rotary, f"{kind}_inv_freq" if kind else "inv_freq")
        factor = getattr(rotary, f"{kind}_attention_scaling" if kind else "attention_scaling", 1.0)
        asked = "chunked_attention" if model_type == "llama4_text" else kind
        spec = read(config, asked)
        assert read(plain, asked) == spec
        assert spec.max_position_embeddings == config.max_position_embeddings
        assert spec.attention_factor == factor
        got = spec.inv_freq("hf")
        if models.MODELS[model_type].mrope == "ernie":  # its buffer has the two axes side by side
            got = torch.cat((got[:44:2], got[1:44:2], got[44:]))
        assert torch.equal(got, buffer)
        # The pairs may come out in another order, so compare what attention sees of them.
        x = torch.randn(1, 2, 12, spec.head_dim)
        positions = torch.arange(12)[None] * 5
        if spec.axes > 1:
            positions = torch.stack((positions, positions // 3, positions // 7 + 2))
        q, k = rotated_by(modeling, rotary, kind, x, positions)
        got = q.double() @ k.double().transpose(-1, -2)
        q, k = (rotate(t, spec, positions) for t in (x, x.roll(1, 1)))
        want = q @ k.transpose(-1, -2)
        # Angles below 60 with two roundings, a few roundings of the rotation, both sides.
        size = q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :]
        assert ((got - want).abs() <= 2 * (60 * 2.0**-23 + 4 * 2.0**-23) * size).all()


def test_no_family_is_missing_a_layer():
    for name, layers in models.LAYERS.items():
        assert name in models.MODELS
        assert len(layers) == 2
    assert models.find("qwen2_vl") == models.find("qwen2_vl_text")
    assert models.find("made_up") is None and models.find(None) is None


def test_still_layers():
    """The layers that do not rotate; in Llama-4 q has a temperature there."""
    for name, model in models.MODELS.items():
        if model.nope and name != "llama4_text":
            still = read({"model_type": name}, model.nope)
            assert still.rope_type == "none" and not still.inv_freq().any()
            assert not still.inv_freq("hf").any()
            rotating = read({"model_type": name})
            assert rotating == read({"model_type": name}, "sliding_attention")
            assert any("do not rotate" in note for note in rotating.notes)
    assert (
        read({"model_type": "exaone4", "sliding_window": None}, "full_attention").inv_freq().all()
    )
    llama4 = {"model_type": "llama4_text", "attn_scale": 0.2, "floor_scale": 4096}
    assert read(llama4, "chunked_attention").q_temperature is None
    assert read(llama4, "full_attention").q_temperature == (0.2, 4096, 1)
    llama4["attn_temperature_tuning"] = False
    assert read(llama4, "full_attention").q_temperature is None
    with pytest.raises(ValueError, match="layer_type must be one of 'chunked_attention', 'full"):
        read({"model_type": "llama4"})


# -- where transformers and the authors part ways -----------------------------------------------


def assert_hf_is_theirs(spec, rotary, kind=None):
    """The first table and its factor, bit for bit."""
    buffer = getattr(rotary, f"{kind}_inv_freq" if kind else "inv_freq")
    factor = getattr(rotary, f"{kind}_attention_scaling" if kind else "attention_scaling")
    assert torch.equal(spec.inv_freq("hf"), buffer)
    assert spec.attention_factor_at(None, "hf") == factor


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}


def rotary_of(config, folder, name):
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return getattr(modeling, f"{name}RotaryEmbedding")(config)


def test_truncate_in_a_nested_block():
    config = {"model_type": "olmo3", "max_position_embeddings": 65536}
    config["rope_scaling"] = {**YARN, "truncate": False}
    spec = read(config, "full_attention")
    assert dict(spec.parameters)["truncate"] is False
    assert any("truncate=False" in note for note in spec.notes)
    assert dict(spec.hf_parameters) == {"truncate": True}
    assert not torch.equal(spec.inv_freq("hf"), spec.inv_freq().float())
    with pytest.raises(ValueError, match="layer_type must be one of 'full_attention', 'sliding"):
        read(config)
    their = config_object(config)
    assert read(their, "full_attention") == spec
    assert_hf_is_theirs(spec, rotary_of(their, "olmo3", "Olmo3"), "full_attention")
    # Flat, as in gpt-oss, it is read.
    flat = read({"model_type": "gpt_oss"})
    assert dict(flat.parameters)["truncate"] is False and flat.hf_parameters == ()


def test_olmo3_sliding_layers_lose_their_base():
    config = {"model_type": "olmo3", "rope_theta": 1e6}
    spec = read(config, "sliding_attention")
    assert spec.rope_theta == read(config, "full_attention").rope_theta == 1e6
    with pytest.raises(ValueError, match="transformers misses rope_theta=1000000.0"):
        spec.inv_freq("hf")
    assert read(config_object(config), "full_attention").rope_theta == 1e6
    assert read(config_object(config), "sliding_attention").rope_theta == 5e5


def test_blocks_that_agree_need_no_layer_type():
    block = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    config = {"model_type": "gemma3", "rope_parameters": {"full_attention": block}}
    config["rope_parameters"]["sliding_attention"] = dict(block)
    assert read(config) == read(config, "full_attention") == read(config, "sliding_attention")
    with pytest.raises(ValueError, match="layer_type must be one of .*, got 'global'"):
        read(config, "global")
    # A block per layer type is understood of any model.
    config = {"model_type": "llama", "rope_theta": 1e5, "head_dim": 16}
    config["rope_parameters"] = {"full_attention": block, "sliding_attention": {}}
    assert read(config, "sliding_attention").rope_theta == 1e5
    assert read(config, "full_attention").rope_theta == 1e6


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(64)],
    "long_factor": [2.0 + i for i in range(64)],
    "original_max_position_embeddings": 4096,
}


def test_phimoe_never_turns_long():
    block = LONGROPE | {"short_mscale": 1.243163121016122, "long_mscale": 1.25}
    config = {"model_type": "phimoe", "rope_scaling": block, "max_position_embeddings": 131072}
    spec = read(config)
    assert torch.equal(spec.rows("hf")[0], spec.rows("hf")[1])
    assert not torch.equal(*spec.rows())
    assert spec.attention_factor_at(4096) == 1.243163121016122
    assert spec.attention_factor_at(4097) == spec.attention_factor_at(4097, "hf") == 1.25
    rotary = rotary_of(config_object(config), "phimoe", "Phimoe")
    for length in (4096, 4097):
        positions = torch.tensor([[0, length - 1]])
        cos, sin = rotary(torch.zeros(1), positions)
        for want, got in zip((cos, sin), spec.cos_sin(positions, precision="hf"), strict=True):
            assert torch.equal(want[..., :64], got * spec.attention_factor_at(length, "hf"))


def test_the_first_phi3():
    """'su' does not load in transformers 5, and its 'yarn' is longrope with another factor."""
    block = {**LONGROPE, "type": "su"}
    del block["rope_type"]
    block |= {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = {"model_type": "phi3", "max_position_embeddings": 131072, "rope_scaling": block}
    su = read(config)
    assert su.rope_type == "longrope" and any("'su'" in note for note in su.notes)
    assert su == read(config | {"rope_scaling": {**block, "type": "longrope"}})
    yarn = read(config | {"rope_scaling": {**block, "type": "yarn"}})
    assert yarn.rope_type == "longrope"
    assert yarn.attention_factor == 0.1 * math.log(32) + 1.0
    assert yarn.attention_factor_at(None, "hf") == su.attention_factor
    their = config_object(config | {"rope_scaling": {**block, "type": "yarn"}})
    assert_hf_is_theirs(yarn, rotary_of(their, "phi3", "Phi3"))
    plain = read({"model_type": "phi3", "rope_scaling": YARN})
    with pytest.raises(ValueError, match="transformers takes 'yarn' of phi3 for longrope"):
        plain.inv_freq("hf")


def test_deepseek_v4_has_no_temperature():
    block = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    flat = {"model_type": "deepseek_v4", "rope_scaling": block}
    spec = read(flat, "compress")
    assert (spec.rotary_offset, spec.interleaved, spec.rope_theta) == (448, True, 16e4)
    assert spec.attention_factor == spec.attention_factor_at(None, "hf") == 1.0
    for kind in ("compressed_sparse_attention", "heavily_compressed_attention"):
        assert read(flat, kind) == spec
    assert read(flat, "sliding_attention") == read(flat, "main") != spec
    nested = {"main": {"rope_theta": 1e4}, "compress": {**block, "rope_theta": 16e4}}
    nested = {"model_type": "deepseek_v4", "rope_parameters": nested}
    nested["rope_parameters"]["main"]["partial_rotary_factor"] = 0.125
    nested["rope_parameters"]["compress"]["partial_rotary_factor"] = 0.125
    spec = read(nested, "compress")
    assert spec.attention_factor == 1.0
    their = config_object(nested)
    assert_hf_is_theirs(spec, rotary_of(their, "deepseek_v4", "DeepseekV4"), "compress")
    assert read({**flat, "qk_rope_head_dim": 128}, "main").rotary_dim == 128


@pytest.mark.parametrize(("mscale", "all_dim"), [(0.7, None), (None, 0.7), (0.7, 0), (0.7, 1.3)])
def test_deepseek_mscale(mscale, all_dim):
    """Absent keys are 1 and 0 in DeepSeek's code; transformers ignores one without the other."""
    keys = {"mscale": mscale, "mscale_all_dim": all_dim}
    block = {**YARN, **{key: value for key, value in keys.items() if value is not None}}
    config = {"model_type": "deepseek_v3", "rope_scaling": block, "max_position_embeddings": 65536}
    spec = read(config)

    def g(m):
        return 0.1 * m * math.log(8.0) + 1.0

    assert spec.attention_factor == g(1 if mscale is None else mscale) / g(all_dim or 0)
    assert spec.softmax_multiplier == (g(all_dim) * g(all_dim) if all_dim else 1.0)
    assert_hf_is_theirs(spec, rotary_of(config_object(config), "deepseek_v3", "DeepseekV3"))
    llama = read(config | {"model_type": "llama"})
    both = bool(mscale) and bool(all_dim)
    assert llama.attention_factor == (g(mscale) / g(all_dim) if both else g(1))
    assert llama.softmax_multiplier == 1.0
    assert both or any("without each other" in note for note in llama.notes)


def test_other_yarns():
    config = {"model_type": "deepseek_v3", "max_position_embeddings": 65536}
    keys = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    yarn = read(config | {"rope_scaling": {**keys, "rope_type": "deepseek_yarn"}})
    assert yarn == read(config | {"rope_scaling": keys}) and yarn.softmax_multiplier > 1
    plain = read(config | {"rope_scaling": {**keys, "rope_type": "deepseek_llama_scaling"}})
    assert plain == dataclasses.replace(yarn, softmax_multiplier=1.0)
    telechat = {**YARN, "rope_type": "telechat3-yarn"}
    telechat = read({"model_type": "llama", "rope_parameters": telechat})
    assert telechat.attention_factor == 0.1 * 0.7 * math.log(8.0) + 1.0
    with pytest.raises(ValueError, match="no rope_type 'telechat3-yarn'"):
        telechat.inv_freq("hf")
    times = read({"model_type": "llama", "rope_scaling": {**YARN, "attn_factor": 2.0}})
    assert times.attention_factor == 2 * (0.1 * math.log(8.0) + 1.0)
    assert times.attention_factor_at(None, "hf") == 0.1 * math.log(8.0) + 1.0
    grok = {
        "model_type": "grok",
        "head_dim": 128,
        "rope_type": "original",
        "scaling_factor": 16.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 8,
        "beta_slow": 1,
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "max_position_embeddings": 131072,
        "rope_theta": 208533496,
    }
    assert read(grok) == RopeSpec.yarn(
        head_dim=128,
        rope_theta=208533496,
        factor=16.0,
        original_max_position_embeddings=8192,
        beta_fast=8,
    )


def test_hunyuan_alpha():
    block = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    config = {"model_type": "hunyuan_v1_dense", "rope_scaling": block, "head_dim": 128}
    spec = read(config | {"max_position_embeddings": 262144})
    assert spec == RopeSpec.ntk(head_dim=128, rope_theta=1e4, factor=1000.0)
    assert spec.cache_class == "static" and any("alpha" in note for note in spec.notes)
    their = config_object(config | {"max_position_embeddings": 262144})
    assert_hf_is_theirs(spec, rotary_of(their, "hunyuan_v1_dense", "HunYuanDenseV1"))
    other = read(config | {"model_type": "llama"})
    assert torch.equal(other.inv_freq(), spec.inv_freq())
    with pytest.raises(ValueError, match="alpha only in HunYuan"):
        other.inv_freq("hf")
    with pytest.raises(ValueError, match="alpha must be a finite number >= 1"):
        read(config | {"rope_scaling": {**block, "alpha": 0.5}})
    without = read(config | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert without.rope_type == "dynamic"


def test_partial_rotary():
    """Each model's default, keys old and new, and the models whose default rope has none."""
    for name, given, want in (
        ("gpt_neox", {}, 24),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 2e4}, 48),
        ("minimax_m2", {"rotary_dim": 64}, 64),
        ("phi", {"partial_rotary_factor": 0.25, "head_dim": 64}, 16),
        ("llama", {"partial_rotary_factor": 0.5}, 128),
        (
            "llama",
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2}},
            64,
        ),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, 64),
    ):
        spec = read({"model_type": name, **given})
        assert spec.rotary_dim == want
        told = any("partial_rotary_factor=0.5 has no effect" in note for note in spec.notes)
        assert told == (name == "llama" and "rope_scaling" not in given)
    assert read({"model_type": "gpt_neox", "rotary_emb_base": 2e4}).rope_theta == 2e4


def test_head_dim():
    for given, want in (
        ({"hidden_size": 96, "num_attention_heads": 6}, 16),
        ({"hidden_size": 96, "num_attention_heads": 6, "head_dim": None}, 16),
        ({"hidden_size": 96, "num_attention_heads": 6, "head_dim": 32}, 32),
        ({}, 128),
    ):
        assert read({"model_type": "llama", **given}).head_dim == want
    # Qwen3's own default wins over the quotient, as in its configuration class.
    assert (
        read({"model_type": "qwen3", "hidden_size": 96, "num_attention_heads": 6}).head_dim == 128
    )
    with pytest.raises(ValueError, match="head_dim is required, or hidden_size and num_att"):
        read({"model_type": "llama", "hidden_size": 96})
    assert read({"model_type": "gemma4", "global_head_dim": 256}, "full_attention").head_dim == 256


# -- containers ---------------------------------------------------------------------------------


def test_composite_configurations():
    text = {"model_type": "gemma3_text", "head_dim": 256, "rope_theta": 1e6}
    text["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    want = read(text, "full_attention")
    assert want.rope_type == "linear"
    composite = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    assert read(composite, "full_attention") == want
    del text["model_type"]
    assert read(composite, "full_attention") == want
    around = {key: text.pop(key) for key in ("rope_scaling", "rope_theta")}
    assert read(composite | around, "full_attention") == want
    thinker = {"text_config": {"model_type": "qwen2_5_omni_text", "rope_theta": 1e6}}
    assert read({"model_type": "qwen2_5_omni", "thinker_config": thinker}).axes == 3
    transformers = pytest.importorskip("transformers")
    their = transformers.Gemma3Config(text_config={"rope_scaling": around["rope_scaling"]})
    assert read(their, "full_attention") == want


PARAMS = {"dim": 4096, "n_layers": 2, "n_heads": 32, "head_dim": 128, "rope_theta": 1e6}
PARAMS["yarn"] = {
    "factor": 16,
    "original_max_position_embeddings": 16384,
    "alpha": 1,
    "beta": 64,
    "apply_scale": False,
}
PARAMS["max_position_embeddings"] = 262144


def test_mistral_params():
    """Its own names, interleaved pairs, and a temperature only if it says so."""
    keys = {"factor": 16, "original_max_position_embeddings": 16384, "beta_fast": 64}
    want = {"head_dim": 128, "rope_theta": 1e6, "interleaved": True, **keys}
    assert read(PARAMS) == RopeSpec.yarn(**want, attention_factor=1.0)
    scaled = PARAMS | {"yarn": PARAMS["yarn"] | {"apply_scale": True}}
    assert read(scaled) == RopeSpec.yarn(**want)
    tempered = {"beta": 0.1, "original_max_position_embeddings": 8192}
    tempered = read(PARAMS | {"llama_4_scaling": tempered})
    assert tempered.q_temperature == (0.1, 8192, 0)
    mla = read(scaled | {"qk_rope_head_dim": 64})
    m = 0.1 * math.log(16) + 1.0
    assert (mla.head_dim, mla.attention_factor, mla.softmax_multiplier) == (64, 1.0, m * m)
    assert read(PARAMS | {"qk_rope_head_dim": 64}).softmax_multiplier == 1.0
    plain = {key: value for key, value in PARAMS.items() if key not in ("yarn", "head_dim")}
    assert read(plain) == RopeSpec.default(head_dim=128, rope_theta=1e6, interleaved=True)
    assert read(plain, interleaved=False).interleaved is False
    with pytest.raises(ValueError, match="gamma is not a rope key"):
        read(PARAMS | {"yarn": PARAMS["yarn"] | {"gamma": 1}})
    with pytest.raises(ValueError, match="llama_4_scaling must have beta"):
        read(PARAMS | {"llama_4_scaling": {"beta": 0.1}})


def test_ministral_temperature():
    spec = read({"model_type": "ministral3"})
    assert spec.q_temperature == (0.1, 16384, 0) and spec.attention_factor == 1.0
    block = YARN | {"llama_4_scaling_beta": 0.1}
    other = read({"model_type": "llama", "rope_parameters": block})
    assert other.q_temperature is None
    assert any("llama_4_scaling_beta" in note for note in other.notes)


def test_step_has_values_per_layer():
    config = {
        "model_type": "step3p5",
        "head_dim": 128,
        "rope_theta": [5e6, 1e4, 1e4, 5e6],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5],
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "yarn_only_types": ["full_attention"],
    }
    config["layer_types"] = ["full_attention", *["sliding_attention"] * 2, "full_attention"]
    full, sliding = read(config, "full_attention"), read(config, "sliding_attention")
    assert (full.rope_type, full.rope_theta, full.rotary_dim) == ("linear", 5e6, 64)
    assert (sliding.rope_type, sliding.rope_theta, sliding.rotary_dim) == ("default", 1e4, 128)
    turned = config | {"yarn_only_types": ["sliding_attention"]}
    assert read(turned, "full_attention").rope_type == "default"
    with pytest.raises(ValueError, match="rope_theta has a value per layer"):
        read(config | {"layer_types": ["full_attention"] * 5}, "full_attention")


def test_multi_axis():
    config = {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope"}}
    config["rope_scaling"]["mrope_section"] = [16, 24, 24]
    spec = read(config)
    assert [spec.axis_map.count(axis) for axis in range(spec.axes)] == [16, 24, 24]
    assert read(config, axes=3) == spec
    text = read(config, axes=1)
    assert text.axes == 1 and torch.equal(text.rows(), spec.rows())
    with pytest.raises(ValueError, match="axes must be 3, as mrope_section"):
        read(config, axes=4)
    with pytest.raises(ValueError, match="axes must be 1"):
        read({"model_type": "llama"}, axes=3)
    with pytest.raises(ValueError, match="mrope_section must be counts with the sum .* = 64"):
        read({"model_type": "qwen2_vl", "rope_scaling": {"mrope_section": [1, 2, 3]}})
    yarn = {**YARN, "mrope_section": [24, 20, 20], "mrope_interleaved": False}
    yarn = read({"model_type": "qwen3_vl", "rope_parameters": yarn})
    assert (yarn.rope_type, yarn.axes, yarn.axis_map[1]) == ("yarn", 3, 1)
    assert any("mrope_interleaved=False has no effect" in note for note in yarn.notes)
    llama = read({"model_type": "llama", "rope_scaling": {"type": "mrope", "mrope_section": [1]}})
    assert llama.axes == 1 and any("mrope_section" in note for note in llama.notes)


def test_sections_that_nobody_here_understands_are_refused():
    config = {"model_type": "hunyuan_v1_dense", "rope_scaling": {"xdrope_section": [16] * 4}}
    with pytest.raises(ValueError, match="xdrope_section must be absent, got .* axes=1 reads"):
        read(config)
    assert read(config, axes=1) == read({"model_type": "hunyuan_v1_dense"})


def test_unknown_model():
    config = {"model_type": "made_up", "head_dim": 64, "rope_theta": 1e4}
    for block in ({}, {"rope_parameters": YARN}):
        with pytest.raises(ValueError, match="model_type must be a known one.*got 'made_up'"):
            read(config | block)
    spec = read(config | {"rope_parameters": YARN}, interleaved=True, rotary_offset=0, axes=1)
    assert spec.interleaved and spec.rope_type == "yarn"
    spec = read(config | {"partial_rotary_factor": 0.5}, interleaved=False, rotary_offset=32)
    assert (spec.rotary_dim, spec.rotary_offset) == (32, 32)
    section = {"rope_parameters": {"mrope_section": [8, 12, 12], "mrope_interleaved": True}}
    with pytest.raises(ValueError, match="axes is required for an unknown model_type"):
        read(config | section, interleaved=False)
    assert read(config | section, interleaved=False, axes=3).axis_map[:4] == (0, 1, 2, 0)
    for missing in ("head_dim", "rope_theta"):
        partly = {key: value for key, value in config.items() if key != missing}
        with pytest.raises(ValueError, match=f"{missing} is required"):
            read(partly, interleaved=False)
    with pytest.raises(ValueError, match="model_type must be a known one"):
        read({"rope_parameters": YARN})
    with pytest.raises(TypeError, match="config must be a dict or have to_dict"):
        read("config.json")


# -- disagreements and refusals -----------------------------------------------------------------


def llama(block, **config):
    return {"model_type": "llama", "max_position_embeddings": 32768, **config} | {
        "rope_scaling": block
    }


@pytest.mark.parametrize(
    ("config", "noted"),
    [
        (llama(YARN), "factor=8.0 but max_position_embeddings / original"),
        (llama(YARN | {"factor": 4}), None),
        (llama(YARN | {"factor": None}), "factor is absent"),
        (llama({"type": "yarn", "factor": 4.0}), "original_max_position_embeddings is absent"),
        (llama(YARN, original_max_position_embeddings=4096), "4096 at the top level, 4096 counts"),
        (llama(YARN | {"rope_theta": 1e6}, rope_theta=1e4), "rope_theta is 1000000.0"),
        (llama(YARN | {"finetuned": True}), "finetuned=True has no effect with 'yarn'"),
        (llama(YARN | {"attention_factor": 1.0, "attn_factor": 2}), "attn_factor=2 has no effect"),
        (llama(YARN | {"max_position_embeddings": 5}), "max_position_embeddings=5 in the rope"),
        (llama({"type": "default", "factor": 8.0}), "factor=8.0 has no effect with 'default'"),
        (llama({"type": "linear", "factor": 8.0, "beta_fast": 1}), "beta_fast=1 has no effect"),
        (llama({"type": "default", "long_factor": [1.0] * 9}), "long_factor=<9 values>"),
        (llama({"type": "ntk", "factor": 8.0}), "vLLM means another law"),
        (llama(LONGROPE | {"short_mscale": 1.2}), "short_mscale=1.2 has no effect"),
        (llama(LONGROPE | {"factor": 2.0}), "factor=2.0 but max_position"),
        (llama(LONGROPE), None),
    ],
)  # fmt: skip
def test_notes(config, noted):
    spec = read(config)
    if noted is None:
        assert spec.notes == ()
    else:
        assert any(noted in note for note in spec.notes), spec.notes


def test_which_length_counts():
    """The top level's in a flat configuration, the block's in a nested one, as in transformers."""
    flat = llama(YARN, original_max_position_embeddings=4096)
    assert dict(read(flat).parameters)["original_max_position_embeddings"] == 4096
    nested = {"model_type": "gemma3", "original_max_position_embeddings": 4096}
    nested["rope_parameters"] = {"full_attention": dict(YARN), "sliding_attention": {}}
    spec = read(nested, "full_attention")
    assert dict(spec.parameters)["original_max_position_embeddings"] == 8192
    del nested["rope_parameters"]["full_attention"]["original_max_position_embeddings"]
    spec = read(nested, "full_attention")
    assert dict(spec.parameters)["original_max_position_embeddings"] == 4096
    assert dict(spec.hf_parameters) == {"original_max_position_embeddings": 131072}


def test_two_containers():
    both = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    both["rope_scaling"] = {"type": "mrope", "rope_theta": 1e6}
    assert read(both).rope_theta == 1e6
    both["rope_scaling"]["rope_theta"] = 1e5
    with pytest.raises(ValueError, match="rope_theta must be the same in rope_parameters and"):
        read(both)
    both["rope_scaling"] = YARN
    with pytest.raises(ValueError, match="rope_type must be the same in rope_parameters and"):
        read(both)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (llama({"type": "yarn", "rope_type": "linear", "factor": 2}), "rope_type must agree with"),
        (llama({"type": "spiral"}), "rope_type must be one of .*longrope.*su.*got 'spiral'"),
        (llama({"type": "axial"}), "rope_type must be one of"),
        (llama({"rope_type": 3}), "rope_type must be a string"),
        (llama({"rope_type": "none"}), "rope_type must be one of"),
        (llama("yarn"), "rope_scaling must be a dict"),
        (llama(YARN | {"beta_quick": 3}), "beta_quick is not a rope key: 'yarn' takes factor"),
        (llama({"wobble": 1}), "wobble is not a rope key: 'default' takes none of its own"),
        (llama(YARN | {"extrapolation_factor": 0.5}), "extrapolation_factor must be 1"),
        (llama(YARN | {"factor": 0.5}), "factor must be a finite number >= 1"),
        (llama(YARN | {"factor": math.nan}), "factor must be"),
        (llama(YARN | {"beta_fast": 1, "beta_slow": 32}), "beta_fast must be >= beta_slow"),
        (llama(YARN | {"beta_slow": 0}), "beta_slow must be"),
        (llama(YARN | {"original_max_position_embeddings": -1}), "original_max_position_emb"),
        (llama(YARN | {"mscale": "1"}), "mscale must be"),
        (llama(YARN | {"attn_factor": 0}), "attn_factor must be"),
        (llama({"type": "linear"}), "factor is required by 'linear'"),
        (llama({"type": "llama3", "factor": 8.0}), "low_freq_factor is required"),
        (llama({"type": "longrope", "factor": 8.0}), "short_factor is required"),
        (llama(LONGROPE | {"mscale_factors": [1.0]}), "attention_factor must have .* 64 values"),
        (llama(LONGROPE | {"long_factor": [1.0] * 63}), "long_factor must have .* 64 values"),
        (llama({}, rope_theta="1e4"), "rope_theta must be"),
        (llama({}, head_dim=15), "rotary_dim must be even, got 15"),
        (llama({"type": "linear", "factor": 2, "partial_rotary_factor": 0.4}), "partial_rotary_f"),
        ({"model_type": "gemma4", "rope_parameters": YARN}, "rope_parameters must hold a block"),
    ],
)  # fmt: skip
def test_refusals(config, named):
    with pytest.raises(ValueError, match=named):
        read(config, None if config["model_type"] == "llama" else "full_attention")


def test_layer_type_of_a_uniform_model():
    listed = {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}
    assert read(listed, "sliding_attention") == read(listed) == read(listed, "full_attention")
    with pytest.raises(ValueError, match="layer_type must be one of 'full_attention', 'sliding"):
        read(listed, "chunked_attention")
    assert read({"model_type": "llama"}, "full_attention") == read({"model_type": "llama"})
    with pytest.raises(ValueError, match="layer_type must be one of"):
        read({"model_type": "llama"}, "deep")


def test_longrope_keys_for_research():
    """What the papers have and transformers has not, by the keys of Microsoft's code."""
    factors = [1 + i / 64 for i in range(64)]
    spec = read(llama(LONGROPE | {"mscale_factors": factors, "n_start": 16}))
    assert spec.attention_factor == tuple(factors) and spec.n_start == 16
    assert spec.rows().shape == (3, 64)
    spec = read(llama(LONGROPE | {"magnitude_scaling_policy": "yarn"}))
    assert spec.attention_factor == 0.1 * math.log(8) + 1.0
    dynamic = read(llama({"type": "dynamic-yarn", "original_max_position_embeddings": 8192}))
    assert dynamic.cache_class == "dynamic" and dynamic.attention_factor_at(8192) == 1.0
    parts = read(llama({**YARN, "rope_type": "ntk-by-parts"}))
    assert parts.rope_type == "ntk_by_parts" and parts.attention_factor == 1.0
    paper = read(llama(YARN | {"ramp": "rotations"}))
    assert torch.equal(paper.inv_freq(), parts.inv_freq())


def test_every_pair_of_spellings_is_one_spec():
    """rope_scaling or rope_parameters, type or rope_type, theta inside or outside: all the same."""
    specs = set()
    for key, kind, inside in itertools.product(
        ("rope_scaling", "rope_parameters"), ("type", "rope_type"), (True, False)
    ):
        block = {kind: "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}
        config = {"model_type": "llama", key: block}
        (block if inside else config)["rope_theta"] = 1e6
        specs.add(read(config))
    assert len(specs) == 1
