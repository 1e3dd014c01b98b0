"""The README: its code runs, and what it calls equivalent is."""

import re
from pathlib import Path

import pytest
import torch

import rope_fused as rf
from helpers import assert_within_projection_budget
from tiny import make_model

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The namespace in which every block of Python in the README has run, in order."""
    text = README.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
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
