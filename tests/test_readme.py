"""The README and the pages of docs/: their code runs, and what is called equivalent is."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import rope_fused as rf
from checkpoints import save_checkpoint, text_of
from helpers import assert_within_projection_budget
from rope_fused import cli
from tiny import make_model

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page, *languages):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for language, block in blocks if language in languages]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The namespace in which every block of Python in the README has run, in order."""
    blocks = blocks_of(README, "python")
    assert len(blocks) > 3
    ids = torch.randint(64, (8, 12))
    data = [{"input_ids": row, "labels": row} for row in ids]
    names = {"model": make_model(dtype=torch.float32), "data": data}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))  # Trainer makes folders
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    return names


def test_equivalent_lines_are_equivalent(done):
    x, spec = done["x"].double(), done["spec"]
    for name in "qkv":
        truth = torch.nn.functional.linear(x, done[f"w{name}"].double()).unflatten(-1, (-1, 64))
        if name != "v":
            truth, _ = rf.apply_rope(truth, None, spec, backend="reference")
        assert_within_projection_budget(done[name].detach(), truth, done[f"{name}_eager"])


def test_factors_have_gradients(done):
    assert done["inv_freq"].grad.shape == (32,)
    assert done["inv_freq"].grad.isfinite().all() and done["inv_freq"].grad.any()
    assert done["temperature"].grad.isfinite() and done["temperature"].grad


def test_the_model_is_patched(done):
    assert set(done["report"].levels.values()) == {2}


def test_the_trainers_have_trained(done):
    assert done["trainer"].state.global_step > 0 and done["lora"] is done["trainer"].model
    assert done["longer"]["max_position_embeddings"] == 131072
    assert done["y"].shape == done["x"].shape


def test_links_and_pictures_are_here():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    local = [link for link in links if "://" not in link]
    assert "docs/demo.png" in local
    for link in local:
        assert (README.parent / link).is_file(), link
    assert (README.parent / "docs/demo.png").stat().st_size < 300_000


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_pages_run(page, tmp_path, monkeypatch):
    """Every block of Python in a page, in order, in a namespace of its own."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks_of(page, "python"):
        exec(compile(block, str(page), "exec"), names)


# -- what is to be typed into a shell ------------------------------------------------------------


def lines():
    """(page, words) of every line of a block for the shell that starts a program of ours."""
    for page in PAGES:
        for block in blocks_of(page, "", "sh", "bash", "shell", "console"):
            for line in block.splitlines():
                if re.match(r"\s*(rope-fused|torchrun|make)\b", line):
                    yield page.name, shlex.split(line, comments=True)


LINES = list(lines())
# Cheap ones, which run as they stand but for the files and the number of tokens.
RUN = (
    ["rope-fused", "inspect"],
    ["rope-fused", "tune", "--dry-run"],
    ["rope-fused", "evaluate", "perplexity"],
    ["rope-fused", "evaluate", "compare"],
)


def test_lines_are_found():
    programs = {words[0] for _, words in LINES}
    assert programs == {"rope-fused", "torchrun", "make"} and len(LINES) > 20
    for start in RUN:
        assert any(words[: len(start)] == start for _, words in LINES), start


@pytest.mark.parametrize(
    ("page", "words"), LINES, ids=lambda value: value if isinstance(value, str) else None
)
def test_lines_can_be_typed(page, words, monkeypatch, capsys):
    """Commands, their options and the targets of make exist."""
    if words[0] == "make":
        rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= {*rules}
        return
    start = 1 if words[0] == "rope-fused" else words.index("rope_fused") + 1
    seen = []
    for module in cli.COMMANDS.values():
        monkeypatch.setattr(module, "run", seen.append)
    assert cli.main(words[start:]) == 0 and len(seen) == 1, capsys.readouterr().err


def test_cheap_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("DIR")
    Path("FILE").write_text(text_of(900))
    config = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4}
    Path("Qwen2.5-7B-Instruct").mkdir()
    Path("Qwen2.5-7B-Instruct/config.json").write_text(json.dumps(config))
    for _, words in LINES:
        if any(words[: len(start)] == start for start in RUN):
            tokens = {"8192": "64", "4096": "32", "4096,8192,16384": "32,64,128"}
            words = [tokens.get(word, word) for word in words]
            assert cli.main(words[1:]) == 0, capsys.readouterr().err
    assert json.loads(Path("ppl.json").read_text())["tokens"] > 100
