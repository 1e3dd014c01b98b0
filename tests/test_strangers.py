"""What strangers wrote: configurations of any JSON, checkpoints with code and pickles inside."""

import json
import pickle
import random

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import strangers
from rope_fused import RopeSpec, cli, configs

draws = hypothesis.settings(max_examples=300, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.text(max_size=9) | st.sampled_from(strangers.KEYS), children, max_size=5
        )
    ),
    max_leaves=9,
)


@draws
@hypothesis.given(st.integers(0, 2**64))
def test_known_configurations_with_anything_in_a_few_places(number):
    draw = random.Random(number)
    strangers.outcome(strangers.changed(draw.choice(strangers.SEEDS), draw))


@draws
@hypothesis.given(JSON, st.sampled_from(range(len(strangers.SEEDS))), st.data())
def test_any_json(value, number, data):
    """By itself, and in the place of something in a known configuration."""
    strangers.outcome(value)
    config = json.loads(json.dumps(strangers.SEEDS[number]))
    places = [p for p in strangers.paths(config) if p]
    *way, last = data.draw(st.sampled_from(places))
    home = config
    for key in way:
        home = home[key]
    home[last] = value
    strangers.outcome(config)


# What the two above have found.
FOUND = {
    "model_type that is a list": {"model_type": ["llama"], "head_dim": 64},
    "hidden_size that is text": {"model_type": "llama", "hidden_size": "64"},
    "head_dim that is a number": {"model_type": "llama", "head_dim": 64.5},
    "head_dim without end": {"model_type": "llama", "head_dim": 10**12},
    "partial that is infinite": {
        "model_type": "glm", "head_dim": 64, "partial_rotary_factor": float("inf"),
    },
    "theta beyond floats": {"model_type": "llama", "head_dim": 64, "rope_theta": 10**400},
    "layer types that are a number": {"model_type": "gemma3_text", "layer_types": 1.5},
    "section that is a number": {
        "model_type": "qwen2_vl", "head_dim": 128, "rope_scaling": {"mrope_section": 3},
    },
    "text that is a list": {"text_config": ["llama"]},
    "interleave that is text": {"model_type": "llama", "head_dim": 64, "rope_interleave": "no"},
    "temperature that is a list": {
        "model_type": "mistral", "head_dim": 64,
        "llama_4_scaling": {"beta": [1], "original_max_position_embeddings": 8},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_not_refused_once(name):
    with pytest.raises(ValueError, match=r"must be|is required"):
        configs.layer_specs(FOUND[name])


def test_text_models_inside_each_other():
    """As many as one likes: reading them takes no stack."""
    config = {"model_type": "llama", "head_dim": 64}
    for _ in range(10_000):
        config = {"text_config": config}
    assert RopeSpec.from_config(config).head_dim == 64


# -- files -------------------------------------------------------------------------------------


FILES = {
    "nothing": b"",
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "lists without end": b"[" * 200_000,
    "a number of many digits": b'{"model_type": "llama", "head_dim": ' + b"1" * 5000 + b"}",
    "NaN": b'{"model_type": "llama", "head_dim": 64, "rope_theta": NaN}',
    "a key twice": b'{"model_type": "llama", "head_dim": 64, "head_dim": "64"}',
}


def inspected(content, folder, capsys):
    """The exit status of `inspect --json`, having said in one line why it is not 0."""
    file = folder / "config.json"
    file.write_bytes(content)
    status = cli.main(["inspect", str(file), "--json"])
    said = capsys.readouterr()
    if status:
        assert said.err.startswith("rope-fused inspect: ") and said.err.count("\n") == 1, said.err
        assert not said.out
    else:
        json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} in the output"))
    return status


@pytest.mark.parametrize("name", FILES)
def test_inspecting_what_is_no_configuration(name, tmp_path, capsys):
    assert inspected(FILES[name], tmp_path, capsys) == 1


def test_inspecting_what_strangers_wrote(tmp_path, capsys, request):
    draw = random.Random(request.config.getoption("--seed"))
    found = []
    for _ in range(60):
        config = strangers.changed(draw.choice(strangers.SEEDS), draw)
        found.append(inspected(json.dumps(config).encode(), tmp_path, capsys))
    assert set(found) == {0, 1}


# -- checkpoints -------------------------------------------------------------------------------


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("kind", ["pickle", "pickle beside safetensors", "code", "tokenizer code"])
def test_a_checkpoint_runs_no_code(kind, tmp_path):
    """Neither that of a pickle nor that of a module which a configuration names."""
    pytest.importorskip("transformers")
    from rope_fused.context import loading

    trap, folder = tmp_path / "sprung", tmp_path / "checkpoint"
    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": 256, "hidden_size": 16, "head_dim": 8,
              "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    loading.byte_tokenizer().save_pretrained(folder)
    code = f"open({str(trap)!r}, 'w')\n"
    for name in ("modeling_trap.py", "configuration_trap.py", "tokenization_trap.py"):
        (folder / name).write_text(code)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    torch.save({"x": Trap(trap)}, folder / "model.pt")
    if kind == "code":
        config |= {
            "model_type": "trap",
            "auto_map": {
                "AutoConfig": "configuration_trap.TrapConfig",
                "AutoModelForCausalLM": "modeling_trap.TrapModel",
            },
        }
    elif kind == "tokenizer code":
        file = folder / "tokenizer_config.json"
        told = json.loads(file.read_text()) | {
            "tokenizer_class": "TrapTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_trap.TrapTokenizer", None]},
        }
        file.write_text(json.dumps(told))
    if kind == "pickle beside safetensors":
        (folder / "model.safetensors").write_bytes(b"not what it says")
    (folder / "config.json").write_text(json.dumps(config))
    try:
        loading.load(folder)
    except loading.CheckpointError as error:
        assert str(folder) in str(error)
    else:
        raise AssertionError("loaded")
    assert not trap.exists()
