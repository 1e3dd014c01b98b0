"""Perplexity and the command evaluate: against plain transformers, killed and resumed, refused."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers

from checkpoints import WINDOW, make_llama, save_checkpoint, text_of, train_tokenizer
from rope_fused import cli
from rope_fused.context import loading, long_perplexity, perplexity, progress
from tiny import one_thread  # noqa: F401

pytestmark = pytest.mark.no_poison

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + j / 2 for j in range(8)],
    "factor": 4.0,
    "original_max_position_embeddings": 48,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(text_of(900))
    return file


def independent(folder, text, window, stride, rope=None):
    """Perplexity by plain transformers: one window at a time, all logits, every token by itself."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if rope is not None:
        config.rope_parameters = dict(rope)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    nll = {}
    start = 0
    while True:
        end = min(start + window, len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:end]])).logits[0]
        for at in range(start + 1, end):
            if at not in nll:
                row = logits[at - start - 1].double()
                nll[at] = (row.logsumexp(0) - row[ids[at]]).item()
        if end == len(ids):
            mean = math.fsum(nll.values()) / len(nll)
            return {"perplexity": math.exp(mean), "nll": mean, "tokens": len(nll)}
        start += stride


def evaluate(*arguments, out):
    """The result that a command line leaves in ``out``."""
    assert cli.main(["evaluate", *map(str, arguments), "--out", str(out)]) == 0
    assert not out.with_name(f"{out.name}.partial").exists()
    return json.loads(out.read_text())


def complaint(capsys, *arguments):
    """The one line on stderr of an evaluation that cannot be done."""
    status = cli.main(["evaluate", *map(str, arguments)])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 1
    return line


# -- perplexity --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride", "rope", "batch"),
    [
        (64, 32, None, 1),
        (64, 16, None, 5),
        (50, 17, YARN, 3),
        (96, 96, YARN, 2),
        (32, 16, LONGROPE, 4),
        (80, 40, LONGROPE, 4),
        (5000, 100, None, 4),
    ],
)
def test_perplexity_is_that_of_plain_transformers(
    checkpoint, text, tmp_path, window, stride, rope, batch
):
    arguments = ["--model", checkpoint, "--text", text, "--window", window, "--stride", stride]
    arguments += ["--batch", batch] + (["--rope", json.dumps(rope)] if rope else [])
    got = evaluate("perplexity", *arguments, out=tmp_path / "out.json")
    want = independent(checkpoint, text.read_text(), window, stride, rope)
    assert got["tokens"] == want["tokens"]
    assert got["nll"] == pytest.approx(want["nll"], rel=1e-6, abs=0)
    assert got["perplexity"] == pytest.approx(want["perplexity"], rel=1e-6, abs=0)
    assert got["perplexity"] != pytest.approx(1.0)


def test_a_patched_model_has_the_same_perplexity(checkpoint, text, tmp_path):
    arguments = ["--model", checkpoint, "--text", text, "--window", 64, "--rope", json.dumps(YARN)]
    plain = evaluate("perplexity", *arguments, out=tmp_path / "plain.json")
    patched = evaluate("perplexity", *arguments, "--patch", out=tmp_path / "patched.json")
    assert patched["settings"]["patch"] is True
    assert patched["nll"] == pytest.approx(plain["nll"], rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 9, 64, 65, 100])
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (8, 3), (8, 8), (64, 32), (64, 1)])
def test_every_token_is_scored_once_with_enough_before_it(n, window, stride):
    found = perplexity.windows(n, window, stride)
    scored = [at for w in found for at in range(w.first, w.end)]
    unscored = range(window, n, window) if stride == window else ()
    assert scored == [at for at in range(1, n) if at not in unscored]
    assert [w.start for w in found] == [stride * i for i in range(len(found))]
    for w in found[1:]:
        assert w.first - w.start >= (window - stride or 1)
    assert all(w.end - w.start <= window for w in found)
    assert found[-1].end == n or n - 1 in unscored


def test_documents_are_apart_and_pooled():
    model, tokens = make_llama(), torch.arange(2, 330)
    a, b = tokens[:150], tokens[150:]
    parts = [perplexity.perplexity(model, d, 64, 16) for d in (a, b)]
    pooled = perplexity.perplexity(model, [a, b], 64, 16, batch_size=7)
    assert pooled["tokens"] == sum(part["tokens"] for part in parts) == 326
    total = sum(part["nll"] * part["tokens"] for part in parts)
    assert pooled["nll"] == pytest.approx(total / 326, rel=1e-6)


def test_truncated_variant_reads_one_window_of_each_document():
    model, tokens = make_llama(), torch.arange(2, 302)
    documents = [tokens[:100], tokens[100:130], tokens[130:]]
    got = perplexity.truncated_perplexity(model, documents, 48, batch_size=2)
    heads = [perplexity.perplexity(model, documents[i][:48], 48, 48)["nll"] for i in (0, 2)]
    assert got["documents"] == 2 and got["tokens"] == 94
    assert got["nll"] == pytest.approx(sum(heads) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="documents must have one of at least 400 tokens"):
        perplexity.truncated_perplexity(model, documents, 400)


def test_dynamic_ntk_remembers_no_earlier_window():
    model = make_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    tokens = torch.arange(2, 140)
    alone = perplexity.perplexity(model, tokens[:80], 80, 80)
    perplexity.perplexity(model, tokens, 138, 138)
    assert perplexity.perplexity(model, tokens[:80], 80, 80) == alone


def test_a_model_that_gives_nan_is_no_result():
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="model must give numbers, got NaN"):
        perplexity.perplexity(model, torch.arange(2, 60), 32, 16)


def test_token_nll_in_pieces(monkeypatch):
    logits, targets = 30 * torch.randn(2, 7, 11), torch.randint(11, (2, 7))
    want = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    monkeypatch.setattr(perplexity, "_CHUNK", 2 * 11 * 3)
    torch.testing.assert_close(perplexity.token_nll(logits, targets), want, rtol=1e-15, atol=0)


def test_key_tokens_are_those_that_gain_by_the_long_context():
    model, judge, tokens = make_llama(), make_llama(seed=1), torch.arange(2, 152) % 97
    short, window, stride = 8, 64, 32

    def nll(model, context, target):
        with torch.no_grad():
            row = model(context[None]).logits[0, -1].double()
        return (row.logsumexp(0) - row[target]).item()

    keys = []
    for w in perplexity.windows(150, window, stride):
        for at in range(w.first, w.end):
            # Short windows advance by half of one; the last of a window ends with it.
            end = min(w.first + ((at - w.first) // 4 + 1) * 4, w.end)
            long = nll(judge, tokens[w.start : at], tokens[at])
            alone = nll(judge, tokens[max(w.start, end - short) : at], tokens[at])
            if alone - long > 0.1 and -long > -6.0:
                keys.append(nll(model, tokens[w.start : at], tokens[at]))
    assert 5 < len(keys) < 100
    got = long_perplexity.key_token_perplexity(
        model, tokens, window, stride, short=short, judge=judge, gain=0.1, floor=-6.0, batch_size=3
    )
    assert got["key_tokens"] == len(keys) and got["tokens"] == 149
    assert got["nll"] == pytest.approx(sum(keys) / len(keys), rel=1e-5)


def test_every_task_runs_on_a_checkpoint(checkpoint, text, tmp_path):
    """The same commands as for a large model, and the same result twice."""
    common = ["--model", checkpoint, "--seed", 3, "--trials", 2]
    for number, (task, *options) in enumerate(
        [
            ("passkey", "--lengths", "140,400"),
            ("passkey", "--lengths", "400", "--depths", "0,50,100", "--prompt", "full"),
            ("needle", "--lengths", "200", "--depths", "0.25,1", "--text", text, "--batch", 1),
            ("ruler", "--lengths", "512", "--tasks", "niah_multikey,variable_tracking"),
        ]
    ):
        out = tmp_path / f"{number}.json"
        got = evaluate(task, *common, *options, out=out)
        assert evaluate(task, *common, *options, out=out) == got
        cells = [c for r in got.get("tasks", {"": got}).values() for c in r["cells"]]
        assert all(cell["trials"] == 2 for cell in cells)
        assert got["accuracy"] == sum(cell["accuracy"] for cell in cells) / len(cells)
        depths = {0: [None, None], 1: [0, 0.5, 1], 2: [0.25, 1], 3: [None, None]}[number]
        assert [cell["depth"] for cell in cells] == depths
        assert got.get("prompt") == {0: "brief", 1: "full"}.get(number)
    arguments = ["--model", checkpoint, "--text", text, "--windows", "64,128"]
    got = evaluate("compare", *arguments, "--methods", "none,yarn", out=tmp_path / "c.json")
    assert got["factor"] == 2.0 and got["original"] == WINDOW
    one = evaluate(
        *("perplexity", "--model", checkpoint, "--text", text, "--window", 128, "--batch", 3),
        *("--rope", '{"rope_type": "yarn", "factor": 2.0}'),
        out=tmp_path / "p.json",
    )
    assert got["curves"]["yarn"]["128"]["nll"] == pytest.approx(one["nll"], rel=1e-7)


# -- killed and resumed ------------------------------------------------------------------------

# Runs in an interpreter of its own, which is killed while it writes its n-th checkpoint.
KILLED = """
import os, signal, sys
from rope_fused.context import progress
from rope_fused.cli import main
progress.Checkpoint.SHARE = 1e9  # write each time, however long it takes
left, replace = [int(sys.argv[1])], os.replace
def killing(source, target):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killing
main(sys.argv[2:])
"""


def killed(count, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(count), "evaluate", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_killed_run_goes_on_to_the_same_result(checkpoint, text, tmp_path, monkeypatch, capsys):
    arguments = ["--model", checkpoint, "--text", text, "--window", 32, "--stride", 16]
    arguments += ["--batch", 2]
    whole = evaluate("perplexity", *arguments, out=tmp_path / "whole.json")
    out = tmp_path / "out.json"
    killed(4, "perplexity", *arguments, "--out", out)
    partial = json.loads((tmp_path / "out.json.partial").read_text())
    assert not out.exists() and partial["state"]["done"] == 3 * 2

    other = complaint(capsys, "perplexity", *arguments[:-1], 3, "--out", out)
    assert "out.json.partial is of another run (batch was 2, is 3)" in other

    calls, score = [], perplexity.score
    monkeypatch.setattr(perplexity, "score", lambda *args: calls.append(1) or score(*args))
    torch.set_num_threads(1)
    assert evaluate("perplexity", *arguments, out=out) == whole
    todo = windows_of(checkpoint, text, 32, 16)
    assert len(calls) == len(list(perplexity.batches(todo, 2, 6))) > 0


def windows_of(checkpoint, text, window, stride):
    ids = loading.load_tokenizer(checkpoint)(text.read_text())["input_ids"]
    return perplexity.windows(len(ids), window, stride)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("passkey", ["--lengths", "256,384", "--trials", 4]),
        ("ruler", ["--lengths", "512", "--trials", 2, "--nll"]),
        ("longppl", ["--window", 64]),
        ("compare", ["--windows", "64,128"]),
    ],
)
def test_every_task_resumes(checkpoint, text, tmp_path, task, options):
    source = ["--text", text] if task in ("longppl", "compare") else []
    arguments = [task, "--model", checkpoint, "--batch", 2, *source, *options]
    whole = evaluate(*arguments, out=tmp_path / "whole.json")
    killed(3, *arguments, "--out", tmp_path / "out.json")
    assert evaluate(*arguments, out=tmp_path / "out.json") == whole


def test_checkpoint_keeps_every_bit_and_refuses_others(tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    monkeypatch.setattr(progress.Checkpoint, "SHARE", 1e9)
    first = progress.Checkpoint(file, {"seed": 0, "lengths": (1, 2)})
    assert first.state == {}
    numbers = torch.randn(50, dtype=torch.float64).tolist()
    first.save({"numbers": numbers})
    first.part("b").save({"done": 1})
    again = progress.Checkpoint(file, {"lengths": [1, 2], "seed": 0})
    assert again.state == {"numbers": numbers, "b": {"done": 1}}
    assert again.part("b").state == {"done": 1} and again.part("c").state == {}
    with pytest.raises(progress.MismatchError, match="seed was 0, is 1"):
        progress.Checkpoint(file, {"lengths": [1, 2], "seed": 1})
    again.remove()
    assert list(tmp_path.iterdir()) == []
    file.write_text('{"settings": {}')
    with pytest.raises(progress.MismatchError, match="is no checkpoint"):
        progress.Checkpoint(file, {})


def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    now, writes = [0.0], []

    def slow(file, value):
        writes.append(value["state"]["step"])
        now[0] += 0.5

    monkeypatch.setattr(progress, "write_json", slow)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    checkpoint = progress.Checkpoint(tmp_path / "state", {})
    for step in range(40):
        now[0] += 1.0
        checkpoint.save({"step": step})
    assert writes == [0, 10, 20, 30] and checkpoint.state == {"step": 39}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "result.json"
    progress.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        progress.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["result.json"]


# -- loading -----------------------------------------------------------------------------------


def test_what_cannot_be_loaded_is_one_line(checkpoint, text, tmp_path, capsys):
    def told(folder, *more):
        arguments = ["perplexity", "--model", folder, "--text", text, "--window", 64, *more]
        return complaint(capsys, *arguments, "--out", tmp_path / "out.json")

    assert "nowhere is not a folder" in told(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in told(empty)

    bare = tmp_path / "bare"
    make_llama().save_pretrained(bare)
    assert "has no tokenizer" in told(bare)
    assert evaluate(
        *("perplexity", "--model", bare, "--tokenizer", checkpoint),
        *("--text", text, "--window", 64),
        out=tmp_path / "named.json",
    )["tokens"] == len(windows_of(checkpoint, text, 2, 1))
    assert "must go with the model, which has 200 embeddings" in told(
        save_checkpoint(tmp_path / "small", vocab_size=200)
    )

    (bare / "model.safetensors").unlink()
    torch.save({}, bare / "pytorch_model.bin")
    assert "has no weights in safetensors" in told(bare, "--tokenizer", checkpoint)

    foreign = tmp_path / "foreign"
    train_tokenizer().save_pretrained(foreign)
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "code.py").write_text("raise SystemExit('ran foreign code')")
    assert "cannot read" in told(foreign)

    assert "--rope: factr is not a rope key" in told(checkpoint, "--rope", '{"factr": 4}')
    assert "--rope: rope must be JSON" in told(checkpoint, "--rope", "{yarn}")
    nested = json.dumps({"full_attention": YARN})
    assert "--rope: rope must be one block for all layers" in told(checkpoint, "--rope", nested)
    assert "absent.json" in told(checkpoint, "--rope", "absent.json")
    for device in ("meta", "nonsense", *(() if torch.cuda.is_available() else ("cuda", "cuda:1"))):
        assert f"--device {device}: " in told(checkpoint, "--device", device)
    assert "stride must be from 1 to window 64" in told(checkpoint, "--stride", 65)
    text_file = tmp_path / "latin.txt"
    text_file.write_bytes("naïve".encode("latin-1"))
    line = complaint(
        capsys, "perplexity", "--model", checkpoint, "--text", text_file, "--window", 64
    )
    assert "is not UTF-8 at byte 2" in line
    assert not (tmp_path / "out.json").exists()


def test_a_rope_block_is_completed_from_the_model(checkpoint):
    config = loading.load_config(checkpoint, {"rope_type": "yarn", "factor": 4.0})
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": WINDOW,
    }
    block = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    assert loading.load_config(checkpoint, block).rope_parameters == block
    assert block == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}


def test_a_rope_block_for_one_kind_of_layers():
    own = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    }
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=6, max_position_embeddings=64, rope_parameters=own
    )
    done = loading.complete_rope(config, {"full_attention": {"rope_type": "yarn", "factor": 2.0}})
    assert done["sliding_attention"] == own["sliding_attention"]
    assert done["full_attention"] == {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    }
    for block in ({"rope_type": "yarn", "factor": 2.0}, {"half_attention": {}}):
        with pytest.raises(ValueError, match="rope must be nested by layer type"):
            loading.complete_rope(config, block)


def test_rope_is_read_from_a_file_or_the_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": YARN, "x": 1}))
    assert loading.read_rope(str(tmp_path / "config.json")) == YARN
    assert loading.read_rope(json.dumps(YARN)) == YARN
    with pytest.raises(ValueError, match="rope must be a JSON object"):
        (tmp_path / "list.json").write_text("[1]")
        loading.read_rope(str(tmp_path / "list.json"))


def test_byte_tokenizer_reads_bytes(tmp_path):
    loading.byte_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (loading.byte_tokenizer(), loading.load_tokenizer(tmp_path)):
        text = "Zwölf Boxkämpfer\t\n  🥊 \x00\x7f ¡­ÿ"
        ids = loading.encode(tokenizer, text)
        assert bytes(ids.tolist()) == text.encode()
        assert tokenizer.decode(ids) == text


def test_results_are_in_the_schema_of_the_harness(checkpoint, text, tmp_path):
    arguments = ["--model", checkpoint, "--text", text, "--window", 64]
    got = evaluate("perplexity", *arguments, out=tmp_path / "out.json")
    (task,) = got["results"]
    assert got["results"][task]["token_perplexity,none"] == got["perplexity"]
    assert got["higher_is_better"][task]["token_perplexity"] is False
    assert got["n-samples"][task]["effective"] == got["tokens"]
    assert set(got["versions"]) == set(got["configs"]) == set(got["n-shot"]) == {task}
