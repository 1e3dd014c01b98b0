"""Where results go: whole files; links, pipes and devices stay what they are."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from complaints import complaint
from rope_fused import cli, files
from rope_fused.context import progress


def piped(file, work):
    """What a reader of the pipe ``file`` gets while ``work`` runs."""
    got = []
    reader = threading.Thread(target=lambda: got.append(file.read_text()), daemon=True)
    reader.start()
    work()
    reader.join(60)
    return got[0]


def test_a_link_stays_and_leads_to_the_new_content(tmp_path):
    target, link = tmp_path / "there" / "kept.json", tmp_path / "link.json"
    target.parent.mkdir()
    link.symlink_to(target)
    for value in (1, 2):  # to nothing yet, and to a file
        progress.write_json(link, value)
        assert link.is_symlink() and json.loads(target.read_text()) == value
    with pytest.raises(TypeError):
        progress.write_json(link, object())
    assert json.loads(target.read_text()) == 2
    assert [f.name for f in target.parent.iterdir()] == ["kept.json"]


def test_measurements_follow_a_link(tmp_path):
    configs = pytest.importorskip("rope_fused.triton_kernels.configs")
    link = tmp_path / "projection.json"
    link.symlink_to(tmp_path / "shared.json")
    configs.save("a GPU", [], link)
    assert link.is_symlink() and json.loads((tmp_path / "shared.json").read_text())["gpus"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert json.loads(piped(pipe, lambda: progress.write_json(pipe, [1]))) == [1]
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]
    assert files.beside(pipe, ".partial") is None
    assert files.beside(tmp_path / "new", ".partial") == tmp_path / "new.partial"


def test_a_device_is_written_to(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_text("")
    except OSError:
        pytest.skip("making a device is not permitted here")
    progress.write_json(device, [1])
    assert stat.S_ISCHR(device.stat().st_mode) and os.listdir(tmp_path) == ["null"]


def test_standard_output_goes_on_behind_what_is_written(tmp_path):
    """Where it is a file, too, which must not be replaced under the one who prints."""
    code = (
        "import sys; from rope_fused.context.progress import write_json\n"
        "print('before'); write_json(sys.argv[1], 7); print('after')"
    )
    link, out = tmp_path / "stdout", tmp_path / "out.txt"
    link.symlink_to("/proc/self/fd/1")
    if not link.exists():
        pytest.skip("no /proc here")
    with open(out, "w") as printed:
        subprocess.run([sys.executable, "-c", code, str(link)], stdout=printed, check=True)
    assert out.read_text() == "before\n7\nafter\n"


@pytest.mark.parametrize("kind", ["folder", "below a file", "circle"])
def test_what_no_file_can_take_the_place_of(kind, tmp_path):
    file = tmp_path / "there"
    if kind == "folder":
        file.mkdir()
    elif kind == "circle":
        file.symlink_to(file)
    else:
        file.write_text("")
        file = file / "result.json"
    with pytest.raises(OSError), files.replacing(file):
        raise AssertionError("the work was done")


# Options that name files, in command lines that would fail later, were these let through.
TAKES_FILES = [
    ("evaluate", "perplexity", "--model", "none", "--text", "none", "--window", "8", "--out"),
    ("evaluate", "passkey", "--model", "none", "--lengths", "64", "--out"),
    ("search", "--model", "none", "--text", "none", "--factor", "2", "--window", "8", "--out"),
]
TAKES_PICTURES = [
    ("evaluate", "plot", "none", "--out"),
    (
        *("evaluate", "compare", "--model", "none", "--text", "none", "--windows", "8"),
        "--plot",
    ),
    ("inspect", "none", "--out"),
    ("inspect", "none", "--decay"),
    ("inspect", "none", "--rotation"),
]
MAKES_FOLDERS = [
    ("demo", "--out"),
    ("lab", "--out"),
    ("extend", "--model", "none", "--text", "none", "--test", "none", "--out"),
]


@pytest.mark.parametrize("command", [*TAKES_FILES, *TAKES_PICTURES], ids=" ".join)
def test_a_folder_is_no_result_and_is_left_alone(command, tmp_path, capsys):
    assert f"{tmp_path} is a folder" in complaint(capsys, *command, str(tmp_path))[1]
    assert f"{tmp_path}/new/ is a folder" in complaint(capsys, *command, f"{tmp_path}/new/")[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("bench",), ("bench", "--accuracy")])
def test_a_folder_is_no_result_of_bench(command, tmp_path, capsys):
    assert "is a folder" in complaint(capsys, *command, "--out", str(tmp_path))[1]


@pytest.mark.parametrize("command", TAKES_PICTURES, ids=" ".join)
def test_formats_of_pictures_are_named(command, tmp_path, capsys):
    _, line = complaint(capsys, *command, str(tmp_path / "x.xyz"))
    assert "must end in one of .png, .pdf, .svg" in line and "x.xyz" in line


@pytest.mark.parametrize("command", MAKES_FOLDERS, ids=" ".join)
def test_a_file_is_no_folder(command, tmp_path, capsys):
    (tmp_path / "there").write_text("kept")
    assert "is a file, not a folder" in complaint(capsys, *command, str(tmp_path / "there"))[1]
    assert (tmp_path / "there").read_text() == "kept"


def test_a_picture_is_in_the_file_that_is_named(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    for name, start in (("pic", b"\x89PNG"), ("pic.PDF", b"%PDF"), ("pic.svg", b"<?xml")):
        assert cli.main(["inspect", "config.json", "--out", name]) == 0
        assert f"Written: {name}\n" in capsys.readouterr().out
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 4
