"""Fine-tuning for a longer window: plans, training that goes on after a kill, and the command."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import rope_fused as rf
from checkpoints import WINDOW, make_llama, save_checkpoint, text_of
from rope_fused import cli
from rope_fused.context import extend, loading, presets, training
from tiny import entries, one_thread  # noqa: F401

pytestmark = pytest.mark.no_poison


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extend")
    save_checkpoint(folder / "model")
    (folder / "train.txt").write_text(text_of(6000))
    (folder / "test.txt").write_text(text_of(12000)[6000:6900])
    return folder


def weights(folder):
    return loading.load(folder)[0].state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# -- recipes -----------------------------------------------------------------------------------


def test_presets_are_the_published_numbers():
    """YaRN's train.sh and LongRoPE's section 4.1, in original windows of 4096 tokens."""
    yarn = presets.PRESETS["yarn"]
    assert [(s.factor, s.length * 4096, s.recipe.steps, s.batch) for s in yarn.stages] == [
        (16, 65536, 400, 64),
        (32, 65536, 200, 64),
    ]
    assert all(
        (s.recipe.learning_rate, s.recipe.warmup_steps, s.recipe.schedule, s.recipe.betas)
        == (2e-5, 20, "linear", (0.9, 0.95))
        for s in yarn.stages
    )
    longrope = presets.PRESETS["longrope"]
    assert [(s.factor * 4096, s.recipe.steps, s.batch) for s in longrope.stages] == [
        (131072, 400, 32),
        (262144, 600, 32),
    ]
    for name, preset in presets.PRESETS.items():
        assert len(preset.source) > 20, name
        assert [s.factor for s in preset.stages] == sorted(s.factor for s in preset.stages)


def test_plans():
    config = make_llama().config
    stages = presets.PRESETS["two-stages"].stages
    plans = extend.plans(config, stages, "yarn", mixed=True)
    assert [plan.window for plan in plans] == [4 * WINDOW, 16 * WINDOW]
    assert plans[0].lengths == (256, 128, 64) and plans[1].lengths[:2] == (1024, 512)
    assert plans[0].block["factor"] == 4.0
    assert plans[1].block["original_max_position_embeddings"] == WINDOW
    assert extend.plans(config, stages, "yarn")[0].lengths == (256,)
    with pytest.raises(ValueError, match="longrope needs a block"):
        extend.plans(config, stages, "longrope")
    with pytest.raises(ValueError, match="blocks must be one for each of 2 stages, got 1"):
        extend.plans(config, stages, "yarn", blocks=[{}])


# -- training ----------------------------------------------------------------------------------


class Enough(Exception):
    pass


def drawn(generator):
    seqlen = (16, 24)[torch.randint(2, (), generator=generator).item()]
    return torch.randint(2, 60, (48 // seqlen, seqlen), generator=generator)


def test_training_that_was_stopped_ends_the_same(tmp_path):
    recipe = training.Recipe(9, 1e-2, "cosine", warmup_steps=2, accumulation=2)

    def run(folder, stop=None):
        model = make_llama()
        seen = []

        def said(step, steps, loss):
            seen.append(step)
            if step == stop:
                raise Enough

        try:
            losses = training.train(model, drawn, recipe, folder, seed=3, save_every=2, said=said)
        except Enough:
            losses = None
        return model.state_dict(), losses, seen

    whole, losses, _ = run(tmp_path / "whole")
    assert len(losses) == 9 and losses[-1] < losses[0]
    run(tmp_path / "stopped", stop=3)
    # What a kill in the middle of writing leaves: a folder without its mark.
    broken = tmp_path / "stopped" / "checkpoint-3"
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{")
    _, _, seen = run(tmp_path / "stopped", stop=5)
    assert seen == [3, 4, 5]
    resumed, told, seen = run(tmp_path / "stopped")
    assert seen == [5, 6, 7, 8, 9]
    assert same(resumed, whole) and told == losses
    # A kill between the last checkpoint and what comes after the training.
    resumed, told, seen = run(tmp_path / "stopped")
    assert seen == [] and same(resumed, whole) and told == losses


def test_micro_batches_depend_on_seed_and_index_alone():
    data = training.MicroBatches(drawn, 5, 1)
    again = training.MicroBatches(drawn, 5, 1)
    other = training.MicroBatches(drawn, 5, 2)
    assert torch.equal(data[3]["input_ids"], again[3]["input_ids"])
    assert data[3]["input_ids"].numel() == other[3]["input_ids"].numel() == 48
    assert len({tuple(data[i]["input_ids"].flatten()[:16].tolist()) for i in range(5)}) == 5


def test_the_patched_model_is_what_is_trained(files, tmp_path):
    """The loss of the first step is that of the stretched model, by our operators."""
    ids = torch.arange(2000) % 300
    config = loading.load_config(files / "model")
    recipe = training.Recipe(1, 1e-3)
    stage = presets.Stage(2, 2, recipe, 2)
    plan = extend.plans(config, [stage], "yarn")
    counted = []

    def prepare(model):
        rf.patch(model, strict=True)
        counted.append(entries(lambda: model(ids[None, :20]))[1])

    (folder,) = extend.extend(files / "model", ids, plan, tmp_path, prepare=prepare, micro_batch=2)
    assert sum(counted[0].values()) == 2
    batch = training.MicroBatches(extend._draw(plan[0], ids, 2), 1, 1)[0]
    model, _ = loading.load(files / "model", rope=plan[0].block)
    assert extend.losses_of(folder)[0] == pytest.approx(model(**batch).loss.item(), rel=1e-4)
    saved = loading.load_config(folder)
    assert saved.max_position_embeddings == 2 * WINDOW
    assert saved.rope_parameters["factor"] == 2.0
    assert saved.rope_parameters["original_max_position_embeddings"] == WINDOW
    assert not same(weights(folder), weights(files / "model"))


# -- the command -------------------------------------------------------------------------------


def arguments(files, out, *rest):
    given = {"model": "model", "text": "train.txt", "test": "test.txt"}
    fixed = [word for name, file in given.items() for word in (f"--{name}", str(files / file))]
    fixed += ["--factors", "2,4", "--steps", "3,2", "--sequences", "2", "--lr", "1e-2"]
    return ["extend", *fixed, "--trials", "2", "--out", str(out), *rest]


def test_command(files, tmp_path, capsys):
    assert cli.main(arguments(files, tmp_path, "--mixed", "--seed", "1")) == 0
    printed = capsys.readouterr().out
    assert "2309.00071" in printed and "after stage 2" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert [len(losses) for losses in report["losses"]] == [3, 2]
    curves = report["perplexity"]
    assert set(curves["before, as it was"]) == {"64", "128", "256"}
    assert curves["after stage 2"]["256"] < curves["before, stretched"]["256"]
    for name in ("perplexity.png", "passkey.png"):
        shown = name in (tmp_path / "README.md").read_text()
        assert shown == (tmp_path / name).exists()
    # What it measured is what evaluate measures on the folders it leaves.
    out = tmp_path / "ppl.json"
    words = ["evaluate", "perplexity", "--model", str(tmp_path / "stage-2"), "--text"]
    words += [str(files / "test.txt"), "--window", "256", "--out", str(out)]
    assert cli.main(words) == 0
    told = json.loads(out.read_text())["perplexity"]
    assert told == pytest.approx(curves["after stage 2"]["256"], rel=1e-6)
    # The same command again has nothing to do; another one does not go on in its folder.
    before = weights(tmp_path / "stage-2")
    assert cli.main(arguments(files, tmp_path, "--mixed", "--seed", "1")) == 0
    assert same(before, weights(tmp_path / "stage-2"))
    capsys.readouterr()
    assert cli.main(arguments(files, tmp_path, "--seed", "2")) == 1
    assert "is of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (("--preset", "longrope"), "longrope needs a block"),
        (("--steps", "3"), "--steps: must be 2 numbers"),
        (("--dtype", "bfloat16"), "--dtype: training keeps"),
        (("--micro-batch", "3"), "batch must be a multiple of micro-batch x processes = 3"),
        (("--factors", "2,400"), "text must have at least 25600 tokens"),
    ],
)
def test_refusals(rest, said, files, tmp_path, capsys):
    steps = ("--steps", "1,1") if "--factors" in rest else ()
    assert cli.main([*arguments(files, tmp_path / "x"), *steps, *rest]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("rope-fused extend: ") and said in line
    assert not (tmp_path / "x").exists()  # so that it can be called again, put right


def test_texts_are_checked_before_anything_is_written(files, tmp_path, capsys):
    short = tmp_path / "short.txt"
    for option, words, said in (("--text", "A few words", "text must"), ("--test", "", "--test: ")):
        short.write_text(words)
        command = arguments(files, tmp_path / "x", option, str(short))
        assert cli.main(command) == 1
        assert f"rope-fused extend: {said}" in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_killed_run_ends_the_same(files, tmp_path):
    """Killed in the first stage and in the second, each time with a complete checkpoint there."""
    rest = ("--steps", "30,30")
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def command(out):
        return [sys.executable, "-m", "rope_fused", *arguments(files, out, *rest)]

    for stage in (1, 2):
        process = subprocess.Popen(
            command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            if list(killed.glob(f"stage-{stage}.training/checkpoint-*/complete")):
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed / f"stage-{stage}").exists()
    run = functools.partial(subprocess.run, timeout=600, stdout=subprocess.DEVNULL)
    assert run(command(killed)).returncode == 0
    assert run(command(whole)).returncode == 0
    for stage in ("stage-1", "stage-2"):
        assert same(weights(killed / stage), weights(whole / stage))
    reports = [json.loads((out / "report.json").read_text()) for out in (killed, whole)]
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
