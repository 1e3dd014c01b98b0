"""The demo: it runs, its numbers are of what it names, and it says when they are against us."""

import json
import time

import pytest
import torch
import transformers

from rope_fused import cli
from rope_fused.cli.demo import comparison, layer, picture, training
from rope_fused.report import UserError
from tiny import entries

TINY = ["--layers", "1", "--batch", "1", "--seqlen", "32", "--lengths", "32", "48", "--no-compile"]


def demo(folder, *arguments):
    """What `rope-fused demo` wrote into `folder`."""
    assert cli.main(["demo", *TINY, "--out", str(folder), *arguments]) == 0
    return json.loads((folder / "demo.json").read_text())


class Bar:
    """Stands in for a progress bar."""

    def update(self):
        pass

    def set_postfix(self, *args, **kwargs):
        pass


# -- from end to end ---------------------------------------------------------------------------


def plain_losses(steps, dtype, seed):
    """The losses of the demo's own model, trained by nothing but transformers and torch."""
    model = training.build(None, dtype, 1, seed)
    ids = training.tokens(training.read_text())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / 20
        start = torch.randint(len(ids) - 31, (1, 1), generator=generator).item()
        x = ids[None, start : start + 32]
        logits = model(x).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo(dtype, tmp_path, capsys):
    results = demo(tmp_path, "--steps", "5", "--seed", "3", "--dtype", dtype)
    printed = capsys.readouterr()

    theirs, ours = results["losses"]["transformers"], results["losses"]["rope_fused"]
    assert theirs == pytest.approx(plain_losses(5, getattr(torch, dtype), 3), rel=1e-6)
    apart, _ = comparison.largest_difference(results)
    assert apart <= {"float32": 5e-6, "bfloat16": torch.finfo(torch.bfloat16).eps}[dtype]
    assert len(ours) == 5
    assert all(len(seconds) == 2 for seconds in results["step_seconds"].values())
    assert results["levels"] == {"model.layers.0.self_attn": 2}
    assert set(results["layer_seconds"]) == {"32", "48"}
    for times in results["layer_seconds"].values():
        assert set(times) == {"transformers", "rope_fused", "projections alone"}
        assert all(t > 0 for series in times.values() for t in series)

    png = (tmp_path / "demo.png").read_bytes()
    assert png.startswith(b"\x89PNG") and 10_000 < len(png) < 300_000
    assert f"{sum(theirs) / 5:.5f}" in printed.out and f"{sum(ours) / 5:.5f}" in printed.out
    assert "1 x  2  projection + rope" in printed.out
    assert "not measured: left out by --no-compile" in printed.out
    assert "training both" in printed.err and "projection + rotary" in printed.err


def test_hf_precision_trains_the_same_bits(tmp_path, capsys):
    results = demo(tmp_path, "--steps", "4", "--precision", "hf")
    assert results["losses"]["transformers"] == results["losses"]["rope_fused"]
    assert results["levels"] == {"model.layers.0.self_attn": 0}
    assert "the same bit for bit" in capsys.readouterr().out


def test_text_of_ones_own(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"a" * 1000)
    losses = demo(tmp_path / "out", "--text", str(text), "--steps", "30")["losses"]
    for series in losses.values():  # nothing is easier to learn
        assert series[-1] < 0.1 * series[0]


def test_checkpoint_with_its_tokenizer(tmp_path):
    folder = tmp_path / "checkpoint"
    checkpoint(folder, transformers.Qwen3Config, num_key_value_heads=2, head_dim=16)
    text = tmp_path / "text"
    text.write_text("To be, or not to be\n" * 9)
    results = demo(tmp_path, "--model", str(folder), "--text", str(text), "--steps", "2")
    assert results["model"]["class"] == "Qwen3ForCausalLM"
    assert results["model"]["layer"] == "d_model 64, 4 + 2 heads of 16"
    assert results["levels"] == {"model.layers.0.self_attn": 2}


def checkpoint(folder, config, **options):
    """A tiny model of a configuration, and a tokenizer of ASCII characters, saved in `folder`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {chr(i): i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=chr(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = config(vocab_size=128, intermediate_size=64, **sizes, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# -- what cannot be done -----------------------------------------------------------------------


def refusal(capsys, *arguments):
    assert cli.main(["demo", *TINY, *arguments]) == 1
    line = capsys.readouterr().err.strip().splitlines()
    assert len(line) == 1, line
    return line[0]


def test_refusals(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = tmp_path / "short"
    short.write_bytes(b"b" * 31)
    (tmp_path / "empty").mkdir()
    checkpoint(tmp_path / "neox", transformers.GPTNeoXConfig)
    checkpoint(tmp_path / "opt", transformers.OPTConfig, ffn_dim=64, word_embed_proj_dim=64)
    capsys.readouterr()
    assert "nothing.txt" in refusal(capsys, "--text", "nothing.txt")
    assert "--text: needs 32 tokens, has 31" in refusal(capsys, "--text", str(short))
    assert "--model: nowhere is not a folder" in refusal(capsys, "--model", "nowhere")
    assert "cannot read empty" in refusal(capsys, "--model", "empty")
    line = refusal(capsys, "--model", "opt")
    assert "rope_fused.patch leaves OPTForCausalLM" in line
    assert "alone: its forward has no rotary embedding" in line
    assert "cannot take GPTNeoXForCausalLM apart" in refusal(capsys, "--model", "neox")
    assert not (tmp_path / "demo").exists()


# -- training ----------------------------------------------------------------------------------


def test_one_run_is_patched_and_the_other_is_not():
    plain, patched, _ = training.prepare(None, torch.float32, 2, 0, "exact")
    for a, b in zip(plain.model.parameters(), patched.model.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b
    ids = torch.arange(40)[None]
    assert entries(lambda: plain.model(ids))[1] == {}
    _, count = entries(lambda: patched.model(ids))
    assert sum(count.values()) == 2, count


class Recorder:
    """Stands in for a Run: writes down what it is asked to do."""

    def __init__(self, name, diary):
        self.name, self.diary, self.losses = name, diary, [0.0]

    def step(self, ids, lr):
        self.diary.append((self.name, ids, lr))


def recorded(**options):
    diary = []
    runs = [Recorder("a", diary), Recorder("b", diary)]
    options = {
        "steps": 22,
        "seconds": None,
        "batch": 3,
        "seqlen": 5,
        "lr": 1.0,
        "seed": 1,
    } | options
    training.train(runs, torch.arange(100), progress=Bar(), **options)
    return diary


def test_runs_take_turns_on_the_same_text():
    diary = recorded()
    assert [name for name, _, _ in diary] == list("abba") * 11
    for (_, first, rate), (_, second, same_rate) in zip(diary[::2], diary[1::2], strict=True):
        assert torch.equal(first, second) and rate == same_rate
        assert torch.equal(first - first[:, :1], torch.arange(5).expand(3, 5))
        assert first.min() >= 0 and first.max() < 100
    assert [rate for _, _, rate in diary[::2]] == [min(1, n / 20) for n in range(1, 23)]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(diary, recorded(), strict=True))
    assert not torch.equal(diary[0][1], recorded(seed=2)[0][1])


def test_the_last_window_of_a_text_counts():
    assert {x.min().item() for _, x, _ in recorded(seqlen=99, steps=40)} == {0, 1}
    assert {x.min().item() for _, x, _ in recorded(seqlen=100, steps=2)} == {0}


def test_training_ends_when_its_time_is_up():
    assert len(recorded(seconds=0.0)) == 2
    assert len(recorded(seconds=1e6, steps=4)) == 8


def test_the_standard_library_is_the_text():
    import argparse
    from pathlib import Path

    text = training.read_text()
    assert Path(argparse.__file__).read_bytes() in text
    assert len(text) > 1_000_000
    assert training.tokens(b"\x00a\xff").tolist() == [0, 97, 255]


# -- one layer ---------------------------------------------------------------------------------


def one_layer(precision="exact", dtype=torch.float32):
    return layer.Layer(training.build(None, dtype, 1, 0), precision)


def test_whoever_runs_the_layer_computes_the_same():
    """precision="hf" is bit-identical to transformers, so a difference would be one of operands."""
    one = one_layer("hf")
    inputs = one.inputs(70)
    for theirs, ours in zip(one.eager(*inputs), one.fused(*inputs), strict=True):
        assert torch.equal(theirs, ours.transpose(1, 2))
    for floor, ours in zip(one.project(inputs[0])[2:], one.fused(*inputs)[2:], strict=True):
        assert torch.equal(floor, ours.transpose(1, 2))
    assert one.shape == "d_model 384, 6 + 2 heads of 64"


@pytest.mark.slow
def test_compiled_layer_computes_the_same():
    one = one_layer()
    function, seconds = layer.compiled(one)
    assert seconds > 0
    inputs = one.inputs(70)
    with torch.no_grad():
        for theirs, ours in zip(one.eager(*inputs), function(*inputs), strict=True):
            torch.testing.assert_close(theirs, ours)
        times = layer.forward_times(one, function, [40, 80], 0.1, Bar())
    assert set(times[80]) == {"transformers", "torch.compile", "rope_fused", "projections alone"}


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
    assert layer.compiled(one_layer()) == (None, "no compiler")


def test_rounds_take_turns():
    diary = []
    calls = {name: (lambda name=name: diary.append(name)) for name in "abc"}
    times = layer.rounds(calls, end=0.0, least=3)
    assert "".join(diary) == "abc" + "abc" + "bca" + "cab"  # the first time does not count
    assert {name: len(series) for name, series in times.items()} == dict.fromkeys("abc", 3)
    times = layer.rounds(calls, end=time.monotonic() + 1e6, most=7)
    assert {len(series) for series in times.values()} == {7}
    slow = layer.rounds({"sleep": lambda: time.sleep(0.02)}, end=0.0, least=1)
    assert slow["sleep"][0] >= 0.02


def test_peak_counts_the_bytes_that_are_held_together():
    n = 1 << 20

    def three_then_one():
        a = torch.zeros(n)
        b = a * a
        c = b * b
        del a, b
        return c * c

    assert layer.peak(lambda: torch.zeros(n)) == 4 * n
    assert layer.peak(three_then_one) == 3 * 4 * n
    # Also what an operator needs inside: a copy of a transposed matrix, beside the result.
    wide = torch.zeros(1 << 10, 1 << 10)
    assert layer.peak(lambda: wide.t().reshape(-1).exp()) == 2 * 4 * n


def test_peaks_of_the_layer():
    """What is returned is held at the end; a rotation beside it costs transformers more."""
    one = one_layer()
    found = layer.peaks(one, 128)
    returned = 128 * (6 + 2 + 2) * 64 * 4
    weights = sum(w.numel() for w in one.weights) * 4
    for who in ("transformers", "rope_fused"):
        assert found[who]["forward"] >= returned
        assert found[who]["forward and backward"] >= returned + weights
    assert found["transformers"]["forward"] > found["rope_fused"]["forward"]


# -- what is said ------------------------------------------------------------------------------


def made_up(step, layer_times, peaks):
    """Results in which rope_fused takes so much of everything, and transformers 1."""
    return {
        "facts": {"processor": "p", "threads": 2},
        "arguments": {"dtype": "float32"},
        "model": {"class": "M", "millions": 1.0, "layer": "d_model 8"},
        "losses": {"transformers": [2.0, 1.0], "rope_fused": [2.0, 1.0000001]},
        "step_seconds": {"transformers": [1.0] * 3, "rope_fused": step},
        "layer_peak_bytes": {"transformers": {"forward": 100}, "rope_fused": {"forward": peaks}},
        "layer_seconds": {
            "512": {
                "transformers": [1.0] * 3,
                "torch.compile": [1.0] * 3,
                "projections alone": [0.5] * 3,
                "rope_fused": layer_times,
            }
        },
        "compile": 12.0,
    }


def test_what_is_behind_is_said_plainly():
    said = comparison.text(made_up([1.2, 1.3, 1.4], [0.5, 0.6, 0.7], 150))
    good, bad = said.split("NOT in our favour:")
    assert "time of a training step against transformers: 1.30" in bad
    assert "peak memory of projection + rotary against transformers: 1.50 (forward)" in bad
    assert "In our favour:" in good
    for rival in ("transformers", "torch.compile"):
        assert f"time of projection + rotary against {rival}: 0.60 (512 tokens)" in good
    assert "1.0e-07, at step 2" in good


def test_what_is_ahead_and_what_is_noise():
    said = comparison.text(made_up([0.8, 0.7, 0.6], [0.9, 1.0, 1.3], 50))
    assert "NOT" not in said
    good, even = said.split("No difference beyond the noise of this measurement:")
    assert "time of a training step against transformers: 0.70" in good
    assert "time of projection + rotary against torch.compile: 1.00 (512 tokens)" in even


def test_ratio_is_that_of_pairs():
    assert comparison.ratio([2, 4, 60], [1, 1, 10]) == (3.0, 4.0, 5.0)
    assert comparison.ratio([3], [2]) == (1.5, 1.5, 1.5)
    assert comparison.ratio([1, 2], [1, 1]).verdict == "behind"
    assert comparison.ratio([1, 2], [2, 1]).verdict == "even"
    assert comparison.ratio([1, 1], [2, 3]).verdict == "ahead"


def test_picture_of_equal_and_of_different_curves(tmp_path):
    results = made_up([1.0] * 3, [0.6] * 3, 50)
    picture.draw(results, tmp_path / "different.png")
    results["losses"]["rope_fused"] = results["losses"]["transformers"]
    del results["layer_seconds"]["512"]["torch.compile"]
    picture.draw(results, tmp_path / "equal.png")
    for name in ("different", "equal"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_library_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(training.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="--text"):
        training.read_text()
