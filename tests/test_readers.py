"""How others read a configuration: agrees with what their own code gave when it was run."""

import dataclasses
import json
from pathlib import Path

import pytest

from rope_fused import readers
from rope_fused.spec import RopeSpec

CONFIGS = Path(__file__).parent / "golden" / "configs"


def by_name(spec, model_type=None):
    """{reader: reading}, llama.cpp and Megatron-LM without their versions."""
    return {r.reader.split(" (")[0]: r for r in readers.readings(spec, model_type)}


def read(name, **changes):
    """(spec, readings by name) of a golden configuration, with other keys in its rope block."""
    golden = json.loads((CONFIGS / f"{name}.json").read_text())
    config = golden["config"]
    if changes:
        config["rope_scaling"] |= changes
    spec = RopeSpec.from_config(config, golden["layer_type"])
    return spec, by_name(spec, config["model_type"])


# (configuration, reader, largest relative difference of a frequency, attention factor): measured
# by running each reader's own function beside that of transformers 5.23, to two digits.
MEASURED = [
    ("qwen2.5-7b-yarn4", "transformers 4.53", 3, 1.0),
    ("qwen2.5-7b-yarn4", "transformers 4.48", 0, 1.138629436111989),
    ("qwen2.5-7b-yarn4", "vLLM 0.33", 0, 1.138629436111989),
    ("yarn-llama-2-7b-128k", "transformers 4.53", 0, 1.3465735902799727),
    ("yarn-llama-2-7b-128k", "transformers 4.48", 30, 1.3465735902799727),
    ("ministral-3-8b", "llama.cpp", 0, 1.0),
    ("gpt-oss-20b", "llama.cpp", 0.76, 1.3465735902799727),
    ("gpt-oss-20b", "vLLM 0.33", 0, 1.3465735902799727),
    ("gpt-oss-20b", "Megatron-LM", 0, 1.3465735902799727),
    ("deepseek-v2-lite", "transformers 4.53", 0, 1.0),
    ("deepseek-v2-lite", "Megatron-LM", 0, 1.0),
    ("deepseek-v4-compress", "vLLM 0.33", 0, 1.0),
    ("deepseek-v4-compress", "llama.cpp", 0, 1.2772588722239782),
    # Their beta_fast and beta_slow, which its loader does not read: 11 of 32 pairs, by up to 0.89.
    ("kimi-k2-instruct", "llama.cpp", 0.89, 1.0),
]


@pytest.mark.parametrize(("name", "reader", "difference", "factor"), MEASURED)
def test_agrees_with_what_was_measured(name, reader, difference, factor):
    spec, found = read(name)
    reading = found[reader]
    assert float(f"{reading.inv_freq_difference:.2g}") == difference
    assert reading.spec.attention_factor == factor
    same = difference == 0 and factor == spec.attention_factor
    assert reading.verdict == ("same" if same else "differs")
    assert same or reading.rules


def test_how_many_pairs_kimi_loses():
    spec, found = read("kimi-k2-instruct")
    theirs = found["llama.cpp"].spec.inv_freq()
    assert (theirs != spec.inv_freq()).sum() == 11


def test_megatron_has_llama3_constants_in_its_code():
    """Step-3.7: high_freq_factor 32 at 131072 tokens; measured: 33 % off."""
    step = RopeSpec.llama3(
        head_dim=128,
        rope_theta=1e4,
        factor=2.0,
        low_freq_factor=1.0,
        high_freq_factor=32.0,
        original_max_position_embeddings=131072,
    )
    reading = by_name(step)["Megatron-LM"]
    assert reading.verdict == "differs" and "fixed in its code" in reading.rules[0]
    own = dataclasses.replace(
        step,
        parameters=tuple(
            (dict(step.parameters) | {"low_freq_factor": 1, "high_freq_factor": 4}
             | {"original_max_position_embeddings": 8192}).items()
        ),
    )  # fmt: skip
    assert reading.spec == own
    _, found = read("llama-3.1-8b")
    assert {r.verdict for r in found.values()} == {"same"}


def test_transformers_is_the_hf_precision():
    """Its reading has the frequencies of precision="hf", to float32; or says why there are none."""
    nested = {"model_type": "olmo3", "max_position_embeddings": 65536}
    nested["rope_scaling"] = {"type": "yarn", "factor": 8.0, "truncate": False}
    nested["rope_scaling"]["original_max_position_embeddings"] = 8192
    spec = RopeSpec.from_config(nested, "full_attention")
    reading = by_name(spec, "olmo3")["transformers 5.23"]
    assert reading.verdict == "differs" and "not inside the layer type" in reading.rules[0]
    relative = (reading.spec.inv_freq() - spec.inv_freq("hf")).abs() / reading.spec.inv_freq()
    assert relative.max() < 1e-6 < reading.inv_freq_difference
    paper = RopeSpec.ntk_by_parts(
        head_dim=16, rope_theta=1e4, factor=4.0, original_max_position_embeddings=64
    )
    for reading in readers.readings(paper):
        assert reading.verdict == "cannot" and reading.spec is None and reading.rules


def test_length_dependent_methods():
    _, found = read("phi-3-mini-128k-2024-04")
    assert (
        "whole batch" in found["transformers 5.23"].rules[0]
        and "per server" in found["vLLM 0.33"].rules[0]
    )
    assert "per context" in found["llama.cpp"].rules[0] and found["Megatron-LM"].verdict == "cannot"
    assert {r.verdict for n, r in found.items() if n != "Megatron-LM"} == {"same"}
    spec, found = read("phi-3-mini-128k-2024-04", attention_factor=1.5)
    assert spec.attention_factor == 1.5 and found["transformers 5.23"].verdict == "same"
    for name in ("vLLM 0.33", "llama.cpp"):
        assert found[name].verdict == "differs"
        assert found[name].spec.attention_factor == 1.1902380714238083
    spec, found = read("internlm2-dynamic2")
    assert (
        found["vLLM 0.33"].spec.rope_type == "default" and found["vLLM 0.33"].verdict == "differs"
    )
    assert "earlier calls" in found["transformers 5.23"].rules[0]


def test_su_does_not_load():
    _, found = read("phi-3-mini-128k-2024-04", type="su")
    assert found["transformers 5.23"].verdict == "cannot"
    assert "'su'" in found["transformers 5.23"].rules[0]
    assert found["vLLM 0.33"].verdict == "same"


def test_smaller_rules():
    spec = RopeSpec.linear(head_dim=16, rope_theta=1e4, factor=8)
    assert "not a float" in by_name(spec)["vLLM 0.33"].rules[0]
    spec = RopeSpec.ntk(head_dim=16, rope_theta=1e4, factor=8.0)
    reading = by_name(spec)["vLLM 0.33"]
    assert reading.verdict == "differs" and dict(reading.spec.parameters)["mixed_b"] == 1
    assert by_name(spec, "hunyuan_v1_dense")["vLLM 0.33"].verdict == "same"
    partial = {"head_dim": 16, "rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 4.0}
    spec = RopeSpec.yarn(**partial, original_max_position_embeddings=64)
    reading = by_name(spec)["Megatron-LM"]
    assert reading.verdict == "differs" and reading.spec.rotary_dim == 16
    assert reading.inv_freq_difference is None
    spec = RopeSpec.proportional(head_dim=16, rope_theta=1e4, factor=2.0, partial_rotary_factor=0.5)
    assert by_name(spec)["vLLM 0.33"].inv_freq_difference == 1
    for n_start in (0, 4):
        spec = RopeSpec.longrope(
            head_dim=4,
            rope_theta=1e4,
            short_factor=[1.0, 1.0],
            long_factor=[2.0, 4.0],
            factor=4.0,
            original_max_position_embeddings=64,
            n_start=n_start,
        )
        said = any("first tokens" in rule for rule in by_name(spec)["vLLM 0.33"].rules)
        assert said == (n_start > 0)


def test_absent_original_length_is_no_ratio():
    """4.51 to 4.55 take the ratio only where the block has original_max_position_embeddings."""
    config = {"model_type": "qwen2", "max_position_embeddings": 32768, "hidden_size": 256}
    config |= {"num_attention_heads": 2, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    spec = RopeSpec.from_config(config)
    assert by_name(spec, "qwen2")["transformers 4.53"].verdict == "same"
    config["rope_scaling"]["original_max_position_embeddings"] = 32768
    spec = RopeSpec.from_config(config)
    assert "YaRN is off" in by_name(spec, "qwen2")["transformers 4.53"].rules[0]


def test_every_golden_configuration_can_be_read():
    for file in CONFIGS.glob("*.json"):
        golden = json.loads(file.read_text())
        spec = RopeSpec.from_config(golden["config"], golden["layer_type"])
        found = by_name(spec, golden["config"]["model_type"])
        assert {"transformers 5.23", "vLLM 0.33"} <= found.keys()
        assert found["transformers 5.23"].verdict == "same"
        assert not any("transformers" in r.reader for r in readers.readings(spec, mistral=True))
