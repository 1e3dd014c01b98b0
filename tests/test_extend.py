"""extend_config: what comes out is what transformers then computes, and nothing else changed."""

import copy

import pytest
import torch

import rope_fused as rf
from rope_fused import models
from rope_fused.configs import layer_specs

PAIRS = 8
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(PAIRS)], "long_factor": [4.0] * PAIRS}
METHODS = {
    "linear": {},
    "ntk": {},
    "dynamic": {},
    "ntk_by_parts": {},
    "llama3": {"low_freq_factor": 2.0},
    "yarn": {"beta_fast": 16, "truncate": False},
    "longrope": FACTORS,
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 2 * PAIRS,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
OLD = {"model_type": "qwen3", "rope_theta": 1e6, **SIZES}
NEW = {
    "model_type": "qwen3",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    **SIZES,
}


def wanted(method, factor=4.0, theta=1e6, **parameters):
    """The spec that was asked for, made without any configuration."""
    lengths = {"original_max_position_embeddings": 64}
    if method == "dynamic":
        lengths = {"max_position_embeddings": 64}
    elif method in ("linear", "ntk"):
        lengths = {}
    elif method == "llama3":
        parameters = {"high_freq_factor": 4.0} | parameters
    make = getattr(rf.RopeSpec, method)
    return make(head_dim=16, rope_theta=theta, factor=factor, **lengths, **parameters)


def same_tables(spec, other, seq_len=None):
    # ntk says its base, which is a rounded number, where the method has exact powers.
    a, b = spec.inv_freq(seq_len=seq_len), other.inv_freq(seq_len=seq_len)
    assert torch.allclose(a, b, rtol=16 * 2.0**-52, atol=0)
    assert spec.attention_factor_at(seq_len) == other.attention_factor_at(seq_len)


@pytest.mark.parametrize("dialect", [OLD, NEW], ids=["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("method", METHODS)
def test_dicts_in_both_dialects(method, dialect):
    before = copy.deepcopy(dialect)
    config = rf.extend_config(dialect, method, factor=4.0, **METHODS[method])
    assert type(config) is dict and dialect == before
    spec = rf.RopeSpec.from_config(config)
    for seq_len in (None, 64, 65, 256):
        same_tables(spec, wanted(method, **METHODS[method]), seq_len)
    assert config["max_position_embeddings"] == (64 if method == "dynamic" else 256)
    key = "rope_parameters" if dialect is NEW else "rope_scaling"
    assert {k for k in config if k.startswith("rope_")} <= {key, "rope_theta"}
    assert not any("stands in" in note or "factor counts" in note for note in spec.notes)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_transformers_computes_it(method, family, tmp_path, recwarn):
    """Its own rotary module, of a model that was saved with the configuration and loaded again."""
    transformers = pytest.importorskip("transformers", minversion="5")
    config = getattr(transformers, f"{family}Config")(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **SIZES
    )
    before = config.to_dict()
    extended = rf.extend_config(config, method, factor=4.0, **METHODS[method])
    assert type(extended) is type(config) and config.to_dict() == before
    model = transformers.AutoModelForCausalLM.from_config(extended)
    model.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    rotary = model.model.rotary_emb
    spec = rf.RopeSpec.from_config(model.config)
    same_tables(spec, wanted(method, **METHODS[method]))
    for top in (40, 200):  # on both sides of the length where longrope and dynamic change
        positions = torch.arange(top)[None]
        cos, _ = rotary(torch.zeros(1), positions)
        table, _ = wanted(method, **METHODS[method]).cos_sin(positions)
        expected = table * wanted(method, **METHODS[method]).attention_factor_at(top)
        # transformers' float32: 8 units of rounding of every angle, and of its functions.
        assert (cos[..., :PAIRS] - expected).abs().max() <= 2 * 2.0**-24 * (8 * top + 8)


def test_a_dict_of_transformers_4_loads_in_5():
    transformers = pytest.importorskip("transformers", minversion="5")
    config = rf.extend_config(OLD, "yarn", factor=4.0)
    loaded = transformers.AutoConfig.for_model(**config)
    same_tables(rf.RopeSpec.from_config(loaded), wanted("yarn"))


class Four:
    """As a configuration of transformers 4: rope_theta and rope_scaling are attributes."""

    def __init__(self, **keys):
        self.__dict__.update(keys, rope_scaling=None)

    def to_dict(self):
        return dict(self.__dict__)


def test_objects_of_transformers_4():
    config = rf.extend_config(Four(**OLD), "yarn", factor=4.0)
    assert type(config) is Four and config.rope_theta == 1e6
    assert config.rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    same_tables(rf.RopeSpec.from_config(config), wanted("yarn"))


def test_only_global_layers_are_extended():
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6})
    local = rf.RopeSpec.from_config(config, "sliding_attention")
    extended = rf.extend_config(config, "linear", factor=8.0)
    assert rf.RopeSpec.from_config(extended, "sliding_attention") == local
    spec = rf.RopeSpec.from_config(extended, "full_attention")
    assert (spec.rope_type, dict(spec.parameters)) == ("linear", {"factor": 8.0})
    assert extended.max_position_embeddings == 512
    both = rf.extend_config(extended, "linear", factor=2.0, layer_type="sliding_attention")
    assert rf.RopeSpec.from_config(both, "sliding_attention").rope_type == "linear"
    with pytest.raises(ValueError, match="truncate=False is in a block per layer type"):
        rf.extend_config(config, "yarn", factor=4.0, truncate=False)
    rf.extend_config(config, "yarn", factor=4.0)


def test_composite_configurations():
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.Qwen2VLConfig()
    extended = rf.extend_config(config, "yarn", factor=4.0)
    block = extended.text_config.rope_parameters
    spec = rf.RopeSpec.from_config(extended)
    assert block["rope_type"] == "yarn" and spec.rope_type == "yarn" and spec.axes == 3
    assert spec.axis_map == rf.RopeSpec.from_config(config).axis_map


def test_phi3_says_its_original_length_outside():
    config = {
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        **SIZES,
        "max_position_embeddings": 64,
    }
    short, long = FACTORS["short_factor"][:4], FACTORS["long_factor"][:4]
    extended = rf.extend_config(config, "longrope", factor=8, short_factor=short, long_factor=long)
    spec = rf.RopeSpec.from_config(extended)
    assert (spec.rotary_dim, spec.switch_length) == (8, 64)
    again = rf.extend_config(
        extended,
        "longrope",
        factor=2,
        original_max_position_embeddings=128,
        short_factor=torch.tensor(short),
        long_factor=long,
    )
    assert rf.RopeSpec.from_config(again).switch_length == 128
    assert again["max_position_embeddings"] == 256
    with pytest.raises(ValueError, match="'yarn' here: transformers takes 'yarn' of phi3"):
        rf.extend_config(config, "yarn", factor=4.0)


def test_lengths():
    config = rf.extend_config(OLD, "yarn", max_position_embeddings=256)
    assert config["rope_scaling"]["factor"] == 4.0
    config = rf.extend_config(OLD, "yarn", factor=3.0, max_position_embeddings=256)
    assert (config["rope_scaling"]["factor"], config["max_position_embeddings"]) == (3.0, 256)
    config = rf.extend_config(OLD, "yarn", factor=4.0, original_max_position_embeddings=32)
    assert config["rope_scaling"]["original_max_position_embeddings"] == 32
    assert config["max_position_embeddings"] == 128


def test_scaled_configurations_are_not_scaled_twice():
    yarn = rf.extend_config(OLD, "yarn", factor=4.0, beta_fast=16)
    for method in METHODS:
        with pytest.raises(ValueError, match=r"scaled already, by 'yarn'.*it says 64"):
            rf.extend_config(yarn, method, factor=8.0, **METHODS[method])
    again = rf.extend_config(yarn, "yarn", factor=8.0, original_max_position_embeddings=64)
    assert again == rf.extend_config(OLD, "yarn", factor=8.0)
    plain = rf.extend_config(yarn, "default", original_max_position_embeddings=64)
    assert plain == OLD | {"rope_scaling": None}


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("YaRN", {"factor": 4.0}, "method must be one of default, linear.*got 'YaRN'"),
        ("dynamic_yarn", {"factor": 4.0}, "transformers has no such method"),
        ("yarn", {}, "factor or max_position_embeddings is required"),
        ("yarn", {"factor": 0.5}, "factor must be a finite number >= 1, got 0.5"),
        ("yarn", {"factor": 4.0, "beta_first": 1}, "beta_first is not a parameter: 'yarn' has"),
        ("linear", {"factor": 4.0, "beta_fast": 1}, "no parameters of its own"),
        ("yarn", {"factor": 4.0, "beta_fast": 1, "beta_slow": 32}, "swapped"),
        ("longrope", {"factor": 4.0}, "short_factor"),
        ("longrope", {"factor": 4.0, **FACTORS, "long_factor": [1.0]}, "long_factor must have"),
        ("dynamic", {"factor": 4.0, "max_position_embeddings": 256}, "must be None with 'dynamic'"),
        ("default", {"factor": 4.0}, "factor must be None"),
    ],
)
def test_refusals(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        rf.extend_config(OLD, method, **arguments)


def test_a_configuration_is_needed():
    with pytest.raises(TypeError, match="config must be a dict"):
        rf.extend_config("llama", "yarn", factor=4.0)


def loaded(config):
    """What transformers makes of a configuration that was saved."""
    transformers = pytest.importorskip("transformers", minversion="5")
    if isinstance(config, dict):
        return transformers.AutoConfig.for_model(**copy.deepcopy(config))
    return type(config).from_dict(config.to_dict())


GPT_OSS = {
    **SIZES,
    "model_type": "gpt_oss",
    "max_position_embeddings": 131072,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}
OWN_BLOCKS = [
    GPT_OSS,
    *(
        {"model_type": name, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
        for name in sorted(models.BLOCKS)
    ),
]


@pytest.mark.parametrize("method", ["default", "ntk"])
@pytest.mark.parametrize("config", OWN_BLOCKS, ids=lambda config: config["model_type"])
def test_the_scaling_of_the_family_does_not_come_back(config, method):
    """Without a block these families scale by themselves: a plain one has to be there."""
    arguments = {} if method == "default" else {"factor": 4.0}
    plain = rf.extend_config(config, method, original_max_position_embeddings=4096, **arguments)
    assert plain["rope_scaling"] == {"rope_type": "default"}
    spec = rf.RopeSpec.from_config(plain)
    base = rf.RopeSpec.from_config(config).rope_theta
    assert spec.rope_type == "default" and (spec.rope_theta > base) == (method == "ntk")
    their = loaded(plain)
    assert their.rope_parameters["rope_type"] == "default"
    assert rf.RopeSpec.from_config(their) == spec
    text = rf.extend_config(
        {"model_type": "outer", "text_config": config},
        method,
        original_max_position_embeddings=4096,
        **arguments,
    )
    assert text["text_config"] == plain


@pytest.mark.parametrize("family", ["ministral3", "mistral4"])
@pytest.mark.parametrize("method", ["default", "linear", "yarn"])
def test_the_temperature_of_q_stays(family, method):
    config = {"model_type": family}
    q = rf.RopeSpec.from_config(config).q_temperature
    arguments = {} if method == "default" else {"factor": 4.0}
    original = int(q[1])
    extended = rf.extend_config(
        config, method, original_max_position_embeddings=original, **arguments
    )
    assert rf.RopeSpec.from_config(extended).q_temperature == q
    their = loaded(extended)
    assert rf.RopeSpec.from_config(their) == rf.RopeSpec.from_config(extended)
    keys = ("llama_4_scaling_beta", "original_max_position_embeddings")  # that its attention reads
    assert tuple(their.rope_parameters[key] for key in keys) == q[:2]


@pytest.mark.parametrize("family", models.NO_HEAD_DIM)
def test_longrope_of_families_that_say_no_head_dim(family):
    config = {"model_type": family, **SIZES}
    del config["head_dim"]
    for config_of in (config, loaded(config)):
        extended = rf.extend_config(config_of, "longrope", factor=4.0, **FACTORS)
        assert rf.RopeSpec.from_config(loaded(extended)) == rf.RopeSpec.from_config(extended)
        assert loaded(extended).head_dim == 2 * PAIRS


def test_the_base_is_written_where_the_family_reads_it():
    config = {"model_type": "gpt_neox", "rotary_emb_base": 5e4, "rope_scaling": None, **SIZES}
    config["rope_theta"] = 10000  # of no effect
    extended = rf.extend_config(config, "ntk", factor=4.0)
    assert extended["rotary_emb_base"] > 5e4
    spec = rf.RopeSpec.from_config(extended)
    assert spec.rope_theta == extended["rotary_emb_base"]
    assert rf.RopeSpec.from_config(loaded(extended)) == spec


@pytest.mark.parametrize("family", ["phi3", "phi4_multimodal", "phimoe"])
@pytest.mark.parametrize("dialect", ["rope_scaling", "rope_parameters", "object"])
def test_methods_with_which_transformers_does_not_load(family, dialect):
    config = {"model_type": family, **SIZES, "rope_theta": 1e4}
    config.pop("head_dim")
    if dialect == "rope_parameters":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    elif dialect == "object":
        config = loaded(config)
    for method in ("linear", "dynamic", "llama3", "ntk_by_parts", "yarn", "proportional"):
        with pytest.raises(ValueError, match=f"method must not be '{method}' here: transformers"):
            rf.extend_config(config, method, factor=4.0)
    with pytest.raises(ValueError, match=f"loads {family} with 'default' and 'longrope' alone"):
        rf.extend_config(config, "linear", factor=4.0)
    extended = rf.extend_config(config, "ntk", factor=4.0)
    assert rf.RopeSpec.from_config(loaded(extended)) == rf.RopeSpec.from_config(extended)


FLAT = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0}
FLAT["original_max_position_embeddings"] = 64


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3n_text", "olmo3"])
@pytest.mark.parametrize("block", [None, {"rope_type": "default", "rope_theta": 1e5}, FLAT])
@pytest.mark.parametrize("method", ["default", "linear", "ntk", "yarn", "dynamic"])
def test_families_that_read_no_flat_block(family, block, method):
    flat = {"model_type": family, "rope_parameters": block}
    for config in (flat, loaded(flat)):
        before = layer_specs(config)
        full = before["full_attention"]
        arguments = {} if method == "default" else {"factor": 2.0}
        extended = rf.extend_config(config, method, **arguments)
        specs = layer_specs(loaded(extended))
        assert specs == layer_specs(extended)
        if isinstance(extended, dict) and method != "default":
            assert set(extended["rope_parameters"]) == {"full_attention", "sliding_attention"}
        assert specs["full_attention"].rope_type == ("default" if method == "ntk" else method)
        assert (specs["full_attention"].rope_theta > full.rope_theta) == (method == "ntk")
        local = specs["sliding_attention"]
        assert torch.equal(local.inv_freq(), before["sliding_attention"].inv_freq())


def test_families_whose_layers_share_the_old_block():
    config = {"model_type": "modernbert", "rope_scaling": {"rope_type": "default"}}
    for layers in layer_specs(rf.extend_config(config, "linear", factor=4.0)).values():
        assert layers.rope_type == "linear"
    bare = rf.extend_config({"model_type": "modernbert"}, "linear", factor=4.0)
    specs = layer_specs(loaded(bare))
    assert specs == layer_specs(bare)
    kinds = {kind: spec.rope_type for kind, spec in specs.items()}
    assert kinds == {"full_attention": "linear", "sliding_attention": "default"}
    olmo = {"model_type": "olmo3", "rope_theta": 5e4}
    with pytest.raises(ValueError, match="layers of type sliding_attention would change too"):
        rf.extend_config(olmo, "ntk", factor=4.0)


def test_readings_that_do_not_mean_what_was_asked_are_refused():
    config = {"model_type": "llama", **SIZES, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="'linear' here: rotary_dim would be read as 8 instead of"):
        rf.extend_config(config, "linear", factor=4.0)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (["yarn"], {}, r"method must be a string, got \['yarn'\]"),
        ("longrope", {**FACTORS, "short_factor": 1.0}, "short_factor must be a list of numbers"),
        ("longrope", {**FACTORS, "long_factor": "ab"}, "long_factor must be a list of numbers"),
        ("longrope", {**FACTORS, "long_factor": ["x"] * PAIRS}, "long_factor must be a finite"),
        ("yarn", {"attention_factor": "x"}, "attention_factor must be a finite number > 0"),
    ],
)
def test_errors_name_the_argument(method, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        rf.extend_config(OLD, method, factor=4.0, **arguments)
