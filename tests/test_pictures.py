"""Curves of a spec against their formulas, and pictures that are drawn from what was measured."""

import json
import math
import struct

import pytest
import torch

import rope_fused as rf
from rope_fused import cli
from rope_fused.context import pictures, rotation

YARN = rf.RopeSpec.yarn(
    head_dim=32, rope_theta=1e4, factor=8.0, original_max_position_embeddings=128
)
PLAIN = rf.RopeSpec.default(head_dim=32, rope_theta=1e4)


def test_decay_is_the_mean_cosine():
    distances = torch.tensor([0, 1, 17, 4095])
    angle = distances[:, None].double() * YARN.inv_freq()
    want = YARN.attention_factor**2 * angle.cos().mean(-1)
    got = rotation.decay_curve(YARN, distances)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert rotation.decay_curve(PLAIN, [0]).item() == 1.0
    partial = torch.exp(1j * angle).cumsum(-1).abs().mean(-1) * YARN.attention_factor**2
    torch.testing.assert_close(rotation.decay_bound(YARN, distances), partial, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"distances must be int \[n\], got torch.float32"):
        rotation.decay_curve(PLAIN, torch.rand(3))


def test_turns_and_coverage():
    turns = rotation.turns(PLAIN, 128)
    assert turns[0].item() == pytest.approx(128 / (2 * math.pi))
    assert rotation.critical_pair(PLAIN, 128) == 6  # of 16: ceil(16 * log(128 / 2 pi, 10^4))
    assert rotation.critical_pair(PLAIN, 10**6) == 16
    assert rotation.unscaled(YARN) == PLAIN
    plain = rotation.coverage(PLAIN, 1024, PLAIN, 128)
    yarn = rotation.coverage(YARN, 1024, PLAIN, 128)
    assert (plain["unseen"][6:] > 0.01).all() and (plain["unseen"][:6] == 0).all()
    # Pairs that YaRN interpolates in full meet no angle that training did not show.
    assert yarn["unseen"].max() < 0.35 and yarn["unseen"][-4:].max() < 1e-12


def png(file):
    """(width, height) of a PNG."""
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000
    return struct.unpack(">II", data[16:24])


def axes_of(monkeypatch):
    """Catches the figures that pictures draws, before they are closed."""
    kept = []
    monkeypatch.setattr(pictures.plt, "close", kept.append)
    return kept


def test_pictures_of_specs(tmp_path, monkeypatch):
    kept = axes_of(monkeypatch)
    pictures.decay({"none": PLAIN, "yarn": YARN}, tmp_path / "decay.png", length=1024)
    pictures.rotations(YARN, tmp_path / "turns.png", length=1024, original=128)
    assert png(tmp_path / "decay.png")[0] > 800 and png(tmp_path / "turns.png")[0] > 1200
    assert legend(kept[0].axes[0]) == ["as trained", "YaRN"]
    curve = kept[0].axes[0].lines[2].get_ydata()
    assert curve[0] == pytest.approx(rotation.decay_curve(YARN, [1]).item())
    assert legend(kept[1].axes[1])[:2] == ["in 1,024 tokens", "in training (128 tokens)"]


def test_inspect_draws_them(tmp_path, monkeypatch, capsys):
    kept = axes_of(monkeypatch)
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2}
    config |= {"rope_theta": 1e4, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    drawn = ["--decay", str(tmp_path / "d.png"), "--rotation", str(tmp_path / "a" / "r.png")]
    arguments = [str(tmp_path), "--compare", "yarn:8", "--seq-len", "1024", "--json", *drawn]
    assert cli.main(["inspect", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["rope_theta"] == 1e4
    assert png(tmp_path / "d.png") and png(tmp_path / "a" / "r.png")
    assert legend(kept[0].axes[0]) == ["this model", "yarn:8"]
    assert "angles not trained on" in legend(kept[1].axes[1])
    del config["max_position_embeddings"]
    config["model_type"] = "strange"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["inspect", str(tmp_path), "--pairs", "half", "--json", *drawn]) == 1
    assert "need --seq-len" in capsys.readouterr().err


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_plot_draws_what_results_say(tmp_path, monkeypatch, capsys):
    kept = axes_of(monkeypatch)

    def write(name, result):
        (tmp_path / name).write_text(json.dumps(result))
        return str(tmp_path / name)

    def plot(*results, out="out.png", status=0):
        assert cli.main(["evaluate", "plot", *results, "--out", str(tmp_path / out)]) == status
        return capsys.readouterr().err if status else png(tmp_path / out)

    windows = [
        write(f"p{n}.json", {"perplexity": p, "settings": {"window": n}})
        for n, p in ((128, 3.5), (256, 40.0))
    ]
    plot(*(f"YaRN={file}" for file in windows))
    (line,) = kept[-1].axes[0].lines
    assert line.get_label() == "YaRN" and line.get_xydata().tolist() == [[128, 3.5], [256, 40]]
    assert kept[-1].axes[0].get_yscale() == "log"

    cells = [
        {"length": n, "depth": d, "trials": 2, "accuracy": n / 1024 * d}
        for n in (512, 1024)
        for d in (0.0, 0.5, 1.0)
    ]
    needle = write("needle.json", {"task": "needle", "cells": cells})
    plot(needle)
    mesh = kept[-1].axes[0].collections[0]
    assert mesh.get_array().reshape(3, 2).tolist() == [[0, 0], [0.25, 0.5], [0.5, 1]]

    passkey = write("passkey.json", {"task": "passkey", "cells": cells})
    plot(f"plain={passkey}")
    (line,) = kept[-1].axes[0].lines
    assert line.get_xydata().tolist() == [[512, 0.25], [1024, 0.5]]

    assert "must be of one kind, got needle and passkey" in plot(needle, passkey, status=1)
    cell = {"length": 64, "depth": 0.5, "accuracy": 1.0}
    for strange in (
        {"a": 1},
        [1],
        7,
        None,
        {"curves": {}},
        {"curves": {"yarn": {"64": {"perplexity": None}}}},
        {"curves": {"yarn": {"many": {"perplexity": 2.0}}}},
        {"curves": {"yarn": {"64": {"perplexity": 2.0}}}, "original": "x"},
        {"task": "needle", "cells": []},
        {"task": "needle", "cells": [cell, cell | {"depth": None}]},
        {"task": "needle", "cells": [cell | {"accuracy": float("nan")}]},
        {"task": "ruler", "tasks": {"niah": {}}},
        {"curves": {"yarn": {"64": {"perplexity": 10**400}}}},
    ):
        told = plot(write("x.json", strange), status=1)
        assert told.endswith("x.json is no result of rope-fused evaluate\n"), strange
    (tmp_path / "broken.json").write_text("{")
    assert "is not JSON" in plot(str(tmp_path / "broken.json"), status=1)
