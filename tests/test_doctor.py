"""doctor: a sound model has no findings, and every fault it knows is found by its name."""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers  # noqa: E402

import rope_fused as rf  # noqa: E402
from rope_fused import cli  # noqa: E402
from tiny import YARN, attentions, make_model, one_thread  # noqa: E402, F401

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i / 4 for i in range(8)],
}


def make(family="Llama", dtype=torch.float32, device="cpu", rope=YARN, **config):
    return make_model(family, dtype, device, rope, **config)


def gemma(full):
    """A model whose layers rotate in two ways."""
    blocks = {"full_attention": full, "sliding_attention": dict(PLAIN)}
    sizes = make().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    config = transformers.Gemma3TextConfig(
        **{name: sizes[name] for name in (*names, "num_key_value_heads")},
        num_hidden_layers=6,
        max_position_embeddings=4 * full["original_max_position_embeddings"],
        rope_parameters=blocks,
    )
    return transformers.Gemma3ForCausalLM(config).eval()


def rotary(model):
    return model.model.rotary_emb


def names(report, severity=None):
    return {f.name for f in report.findings if severity in (None, f.severity)}


# -- sound models --------------------------------------------------------------------------------

SOUND = {
    "plain": ("Llama", PLAIN),
    "yarn": ("Qwen3", YARN),
    "linear": ("Qwen2", PLAIN | {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ("Llama", PLAIN | {"rope_type": "dynamic", "factor": 4.0}),
    "longrope": ("Llama", LONGROPE),
    "interleaved": ("Cohere", YARN),
    "partial": ("Glm", YARN | {"partial_rotary_factor": 0.5}),
    "norm over all heads": ("Olmo2", YARN),
    "layers that do not rotate": ("SmolLM3", YARN | {"rope_theta": 2e6}),
    "layers of a kind that does not": ("Cohere2", PLAIN),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SOUND)
def test_sound_models(case, dtype, device):
    family, rope = SOUND[case]
    model = make(family, torch.float32, device, rope, pad_token_id=0)
    for module in model.modules():  # buffers stay as they are made
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to(dtype))
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = rf.doctor(model)
    assert report.findings == () and report.ok, str(report)
    assert report.tables and all(not isinstance(layer, str) for layer in report.layers.values())
    assert len(report.layers) == model.config.num_hidden_layers
    for table in report.tables:
        assert torch.allclose(table.inv_freq, table.expected_inv_freq, rtol=2.0**-20, atol=1e-7)
    assert "computes what its configuration says" in str(report)
    # It is left as it was.
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_latent_attention(device):
    """DeepSeek-V3 caches what keys are made of, and pairs that it has moved."""
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config).to(device)
    report = rf.doctor(model)
    assert report.findings == () and len(report.tables) == 1, str(report)
    assert all(not isinstance(layer, str) for layer in report.layers.values())
    for layer in model.model.layers:  # its softmax carries the temperature
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    assert names(rf.doctor(model)) == {"temperature missing"}


def test_a_model_type_that_nobody_knows(device):
    model = make(device=device)
    report = rf.doctor(model, config=model.config.to_dict() | {"model_type": "something_new"})
    assert names(report, "warning") == {"unknown model_type"} and report.ok
    assert "computes what its configuration says" not in str(report)


def test_nothing_measured_is_not_sound():
    report = rf.doctor(make().to("meta"))
    assert names(report, "error") == {"nothing measured"} and not report.ok
    assert "meta device" in str(report) and "computes what" not in str(report)
    assert not report.to_dict()["ok"]


def test_the_temperature_of_layers_is_measured(device):
    report = rf.doctor(make(device=device))
    factor = rf.RopeSpec.from_config(make().config).attention_factor
    assert all(abs(layer.factor - factor) < 1e-6 for layer in report.layers.values())


@pytest.mark.parametrize("kwargs", [{}, {"fuse_projection": False}, {"precision": "hf"}])
def test_sound_and_patched(kwargs, device):
    model = make("Llama", device=device)
    rf.patch(model, strict=True, **kwargs)
    report = rf.doctor(model)
    assert report.findings == () and report.patched == len(attentions(model))


def test_layers_of_two_kinds(device):
    model = gemma(dict(YARN)).to(device)
    report = rf.doctor(model)
    assert report.findings == () and len(report.tables) == 2
    slow = {kind: spec.inv_freq()[-1] for kind, spec in ((t.where, t.spec) for t in report.tables)}
    assert len(set(slow.values())) == 2


# -- faults --------------------------------------------------------------------------------------


def off_by_file(model):
    """The model was made without the scaling that its config.json asks for."""
    return make(rope=PLAIN), model.config.to_dict()


def overwritten(model):
    unscaled = rf.RopeSpec.default(head_dim=16, rope_theta=1e4).inv_freq("hf")
    rotary(model).inv_freq.copy_(unscaled)


def edited(model):
    model = make(rope=PLAIN)
    model.config.rope_parameters = dict(YARN)
    return model


def edited_factor(model):
    model.config.rope_parameters["factor"] = 8.0


def edited_original(model):
    model.config.rope_parameters["original_max_position_embeddings"] = 32


def original_of_another(model):
    return make(rope=YARN | {"original_max_position_embeddings": 64}), model.config


def original_not_given(model):
    rope = {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}
    return make(rope=rope)


def scale(power):
    def fault(model):
        rotary(model).attention_scaling **= power

    return fault


def scale_softmax(model):
    for attention in attentions(model):
        attention.scaling *= rotary(model).attention_scaling ** 2


def truncate_lost(model):
    return gemma(YARN | {"truncate": False, "original_max_position_embeddings": 64})


def zeroed(model):
    rotary(model).inv_freq.zero_()


def not_finite(model):
    rotary(model).inv_freq.fill_(float("nan"))


def half(model):
    model.to(torch.bfloat16)


def rounded(model):
    rotary(model).inv_freq.copy_(rotary(model).inv_freq.bfloat16().float())


def twice(model):
    base = rf.RopeSpec.default(head_dim=16, rope_theta=1e4).inv_freq().float()
    rotary(model).inv_freq.copy_(rotary(model).inv_freq ** 2 / base)


def another(model):
    rotary(model).inv_freq.copy_(rf.RopeSpec.default(head_dim=16, rope_theta=1e4).inv_freq() / 4)


def noise(model):
    rotary(model).inv_freq.mul_(1.01 + torch.arange(8) / 100)


FAULTS = {
    "off, by its file": (off_by_file, {"YaRN silently off", "temperature missing"}),
    "off, in its buffers": (overwritten, {"YaRN silently off"}),
    "edited": (
        edited,
        {"scaling edited after load", "YaRN silently off", "temperature missing"},
    ),
    "factor edited": (
        edited_factor,
        {"scaling edited after load", "wrong factor", "wrong temperature"},
    ),
    "original length edited": (
        edited_original,
        {"scaling edited after load", "wrong original_max_position_embeddings"},
    ),
    "original length": (original_of_another, {"wrong original_max_position_embeddings"}),
    "temperature missing": (scale(0), {"temperature missing"}),
    "temperature twice": (scale(2), {"temperature applied twice"}),
    "temperature in the softmax too": (scale_softmax, {"temperature applied twice"}),
    "temperature": (scale(1.5), {"wrong temperature"}),
    "truncate": (truncate_lost, {"nested truncate lost"}),
    "zeroed": (zeroed, {"zeroed buffers"}),
    "not finite": (not_finite, {"buffers are not finite"}),
    "cast": (half, {"bf16 inv_freq"}),
    "rounded": (rounded, {"bf16 inv_freq"}),
    "twice": (twice, {"scaling applied twice"}),
    "another method": (another, {"another method"}),
    "no known method": (noise, {"frequencies differ"}),
}


def broken(fault, device):
    model = make(device=device)
    result = fault(model)
    config = None
    if isinstance(result, tuple):
        model, config = result
    elif result is not None:
        model = result
    return model.to(device), config


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_found_by_name(case, device):
    fault, expected = FAULTS[case]
    model, config = broken(fault, device)
    report = rf.doctor(model, config=config)
    assert names(report, "error") == expected, str(report)
    assert not report.ok
    for name in expected:
        assert f"error: {name} (" in str(report)
    json.dumps(report.to_dict())


def test_original_length_that_was_not_given(device):
    """transformers then takes max_position_embeddings, which has been raised."""
    report = rf.doctor(original_not_given(None).to(device))
    assert names(report) == {"wrong original_max_position_embeddings"}
    (finding,) = report.findings
    assert "if the model was trained at 16" in finding.text


def test_a_patch_does_not_read_broken_buffers(device):
    """Frequencies come from the configuration: what is wrong with the buffers is harmless."""
    model = make(device=device)
    rf.patch(model)
    half(model)
    report = rf.doctor(model)
    assert report.ok and names(report, "warning") == {"bf16 inv_freq"}
    assert "the layers are patched" in str(report)


def test_faults_of_layers_that_no_table_shows(device):
    """The tables are right, and somebody's attention makes its own, without the scaling."""
    model = make(rope=YARN, device=device)
    own = rotary(make(rope=PLAIN)).to(device)

    def replace(attention):
        forward = type(attention).forward

        def dropping(hidden_states, position_embeddings, **kwargs):
            tables = own(hidden_states, kwargs["position_ids"])
            return forward(attention, hidden_states, position_embeddings=tables, **kwargs)

        attention.forward = dropping

    for attention in attentions(model):
        replace(attention)
    report = rf.doctor(model)
    assert names(report, "error") == {"YaRN silently off", "temperature missing"}
    assert all("layers 0 .. 1, by their keys" in finding.where for finding in report.findings)


def test_a_configuration_that_is_refused(device):
    model = make(rope=PLAIN, device=device)
    config = model.config.to_dict() | {"rope_parameters": {"rope_type": "yarn", "beta": 3}}
    report = rf.doctor(model, config=config)
    assert names(report) == {"configuration refused"} and "beta is not a rope key" in str(report)


# -- perplexity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [dict(YARN), dict(PLAIN)], ids=["yarn", "plain"])
def test_flat_keys_that_a_family_passes_over(block, device):
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
    config = transformers.Gemma3TextConfig(
        **sizes, **heads, layer_types=kinds, rope_parameters=dict(block)
    )
    report = rf.doctor(transformers.Gemma3ForCausalLM(config).eval().to(device))
    scaled = block["rope_type"] == "yarn"
    assert report.ok is not scaled
    assert names(report) == {"YaRN silently off" if scaled else "rope keys without effect"}
    (finding,) = report.findings
    assert f"rope_type='{block['rope_type']}', rope_theta=" in finding.text
    assert any("of the rope block without effect" in note for note in report.notes)
    told = {"model_type": "gemma3_text", **sizes, **heads, "rope_parameters": dict(block)}
    model = transformers.Gemma3ForCausalLM(config).eval().to(device)
    assert names(rf.doctor(model, config=told | {"layer_types": kinds})) == names(report)


def test_perplexity_at_two_lengths(device):
    model = make(device=device)
    ids = torch.randint(1, 64, (50,), device=device)
    report = rf.doctor(model, ids, lengths=(12, 40))
    expected = {}
    for length in (12, 40):
        with torch.no_grad():
            logits = model(ids[None, 40 - length : 40]).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits[-6:], ids[34:40])
        expected[length] = loss.exp().item()
    assert report.perplexity == pytest.approx(expected, rel=1e-9)
    default = rf.doctor(model, ids).perplexity
    assert [*default] == [16, 50]  # the original length, and as much as there is
    with pytest.raises(ValueError, match="lengths must be 2 <= short < long <= 50"):
        rf.doctor(model, ids, lengths=(12, 60))
    with pytest.raises(TypeError, match="input_ids must be an integer tensor"):
        rf.doctor(model, ids.float())


def test_a_longer_context_that_hurts(device):
    """A model that sees a bigram better than chance, and whose far positions drown it."""
    model = make(device=device, rope=PLAIN)
    ids = torch.randint(1, 64, (40,), device=device)

    def drown(module, args, output):
        output.logits = output.logits.clone()
        if ids.shape[0] and output.logits.shape[1] > 12:
            output.logits[..., 0] += 20.0
        return output

    handle = model.register_forward_hook(drown)
    report = rf.doctor(model, ids, lengths=(12, 40))
    handle.remove()
    assert names(report) == {"long context hurts"}


def test_a_model_is_needed():
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        rf.doctor(torch.nn.Linear(2, 2))


# -- the command ---------------------------------------------------------------------------------


def tokenizer(folder):
    """One that knows 60 words, so that nothing has to be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(63)} | {"?": 63}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def test_command(tmp_path, capsys):
    make().save_pretrained(tmp_path)
    tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * 7 % 60}" for i in range(64)))
    assert cli.main(["doctor", "--model", str(tmp_path), "--text", str(text)]) == 0
    printed = capsys.readouterr().out
    assert "YaRN" in printed and "perplexity of the same tokens" in printed
    assert "computes what its configuration says" in printed
    # The file is what counts: somebody edits it, and transformers does not read the new key.
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["beta_fast"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["doctor", "--json", "--model", str(tmp_path), "--text", str(text)]
    assert cli.main([*command, "--lengths", "20,40"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and [*report["perplexity"]] == ["20", "40"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "there is no config.json"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "no safetensors"),
        (
            lambda d: (d / "config.json").write_text(
                json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.C"}})
            ),
            "cannot be loaded",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100), "cannot be loaded"),
        (
            lambda d: (d / "model.safetensors").write_bytes(
                (d / "model.safetensors").read_bytes()[:-7]
            ),
            "cannot be loaded",
        ),
        (lambda d: (d / "config.json").write_text("[1]"), "cannot be loaded"),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), "cannot be loaded"),
    ],
)
def test_command_refuses(change, said, tmp_path, capsys):
    make().save_pretrained(tmp_path)
    change(tmp_path)
    (tmp_path / "own.py").write_text("raise SystemExit('code of the folder was run')")
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert said in err.splitlines()[-1] and out == ""


def test_command_needs_a_model_for_a_text(capsys):
    assert cli.main(["doctor", "--text", "x"]) == 1
    assert capsys.readouterr().err == "rope-fused doctor: --text needs --model\n"
