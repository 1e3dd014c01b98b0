"""A configuration as a dict is read as the object is that transformers makes of it."""

import copy
import logging

import pytest

from rope_fused import RopeSpec, models
from rope_fused.configs import layer_specs

pytest.importorskip("transformers", minversion="5")
from transformers.models.auto.configuration_auto import (  # noqa: E402
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
)

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NESTED = {
    "full_attention": {**LINEAR, "rope_theta": 7e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
}
DICTS = {
    "nothing": {},
    "theta": {"rope_theta": 777777.0},
    "partial": {"partial_rotary_factor": 0.5},
    "old names": {"rotary_pct": 0.5, "rotary_emb_base": 5e4},
    "local": {"rope_local_base_freq": 6e4, "local_rope_theta": 6e4, "global_rope_theta": 7e5},
    "no keys in the block": {"rope_parameters": {}},
    "no keys in the old block": {"rope_scaling": {}},
    "default": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 777777.0},
    "old default": {"rope_scaling": {"rope_type": "default"}, "rope_theta": 777777.0},
    "base": {"rope_parameters": {"rope_theta": 777777.0}},
    "base outside": {"rope_parameters": LINEAR, "rope_theta": 777777.0},
    "base in both": {"rope_parameters": {**LINEAR, "rope_theta": 7e5}, "rope_theta": 8e5},
    "linear": {"rope_parameters": LINEAR},
    "old linear": {"rope_scaling": LINEAR, "rope_theta": 777777.0},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 7e5, "partial_rotary_factor": 0.5}},
    "old yarn": {"rope_scaling": YARN},
}
NESTED_DICTS = {
    "a block per kind": {"rope_parameters": NESTED},
    "flat keys beside": {"rope_parameters": NESTED | YARN},
    "old keys beside": {"rope_parameters": NESTED, "rope_scaling": {**LINEAR, "factor": 8.0}},
    "one kind": {"rope_parameters": {"full_attention": NESTED["full_attention"]}},
}
EXTRA = {
    "glm4_moe": {"head_dim": 128},
    "glm4v_moe_text": {"head_dim": 128},
    "glm4v_text": {"partial_rotary_factor": 0.5},
    "qwen3_omni_moe_text": {"head_dim": 128},
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def object_of(config):
    """What transformers makes of a dict; None if it refuses."""
    keys = copy.deepcopy(config)
    try:
        return CONFIG_MAPPING[keys.pop("model_type")](**keys)
    except Exception:
        return None


def known(model_type, name):
    """Where the model's own code does what transformers fails to; there are tests of each."""
    loses_base = model_type == "olmo3" and "rope_theta" in DICTS.get(name, {})
    return loses_base or (model_type == "step3p5" and name in ("partial", "old keys beside"))


@pytest.mark.parametrize("model_type", [m for m in models.MODELS if m in CONFIG_MAPPING_NAMES])
def test_dicts_of_every_family(model_type):
    dicts = DICTS | (NESTED_DICTS if "full_attention" in models.LAYERS.get(model_type, ()) else {})
    loaded = 0
    for name, keys in dicts.items():
        config = {"model_type": model_type, **EXTRA.get(model_type, {}), **keys}
        their = object_of(config)
        if their is None or known(model_type, name):
            continue
        loaded += 1
        try:
            want = layer_specs(their)
        except ValueError:  # an object of which transformers can make no model
            with pytest.raises(ValueError):
                layer_specs(config)
            continue
        got = layer_specs(config)
        for kind, spec in want.items():
            assert got[kind] == spec, (name, kind)
    assert loaded > 2


@pytest.mark.parametrize("model_type", [n for n, fate in models.FLAT.items() if fate == "lost"])
def test_flat_keys_that_are_lost_are_noted(model_type):
    config = {"model_type": model_type, "rope_parameters": YARN}
    their = object_of(config)
    for kind in layer_specs(their):
        spec = RopeSpec.from_config(config, kind)
        assert spec.rope_type == "default" and spec == RopeSpec.from_config(their, kind)
        kept = "factor" in their.rope_parameters
        for told in (spec, RopeSpec.from_config(their, kind))[: 1 + kept]:
            assert any("factor" in n and "without effect" in n for n in told.notes), told.notes


def test_notes_of_keys_that_a_family_does_not_read():
    def notes(model_type, **keys):
        return " ".join(RopeSpec.from_config({"model_type": model_type, **keys}).notes)

    assert notes("gpt_oss", rope_theta=777777.0) == ""
    assert "the default rope block of mistral4 and 777777.0" in notes(
        "mistral4", rope_theta=777777.0
    )
    told = notes("gpt_neox", rope_theta=777777.0, partial_rotary_factor=0.5)
    assert "rope_theta=777777.0 has no effect: gpt_neox reads rotary_emb_base" in told
    assert "partial_rotary_factor=0.5 has no effect: gpt_neox reads rotary_pct" in told
    told = notes("llama", rope_parameters={"deep": {"rope_theta": 1e5}, "factor": 2.0})
    assert "factor of the rope block without effect" in told


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"max_position_embeddings": 0}, ValueError, "max_position_embeddings must be .*got 0"),
        ({"max_position_embeddings": 1.5}, ValueError, "max_position_embeddings must be .*got 1.5"),
        ({"model_type": "deepseek_v3", "qk_rope_head_dim": 0}, ValueError, "qk_rope_head_dim must"),
        ({"model_type": "gemma4", "global_head_dim": 0}, ValueError, "global_head_dim must be"),
        (
            {"model_type": "gemma3", "rope_parameters": {**NESTED, "sliding_attention": 3}},
            ValueError,
            "the rope block of sliding_attention must be a dict, got 3",
        ),
    ],
)  # fmt: skip
def test_no_value_is_replaced_in_silence(keys, error, message):
    with pytest.raises(error, match=message):
        RopeSpec.from_config({"model_type": "llama"} | keys, "full_attention")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"axes": 0}, ValueError, "axes must be an integer >= 1, got 0"),
        ({"axes": False}, TypeError, "axes must be an integer >= 1, got False"),
        ({"axes": 1.0}, TypeError, "axes must be an integer >= 1, got 1.0"),
        ({"layer_type": ["a"]}, TypeError, r"layer_type must be a string or None, got \['a'\]"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        RopeSpec.from_config({"model_type": "llama"}, **arguments)
