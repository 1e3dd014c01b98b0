"""The command rope-fused: what it prints, its exit statuses, and what doctor says is here."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import rope_fused as rf
from complaints import complaint
from rope_fused import cli, report


def hear_ctrl_c():
    """What runs in the background of a shell, this test perhaps, ignores it, and so would its
    children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*arguments, code=None, cwd=None, **environment):
    """The finished `python -m rope_fused`, or `python -c code`, in a fresh interpreter."""
    command = ["-m", "rope_fused"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=hear_ctrl_c,
    )


# -- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "rope-fused: the following arguments are required: command"),
        (("explode",), "invalid choice: 'explode'"),
        (("doctor", "--jsn"), "unrecognized arguments: --jsn"),
        (("demo", "--steps", "0"), "argument --steps: must be at least 1, got 0"),
        (("demo", "--steps", "many"), "argument --steps"),
        (("demo", "--dtype", "int8"), "argument --dtype"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments, said, capsys):
    status, line = complaint(capsys, *arguments)
    assert status == 2
    assert line.startswith("rope-fused") and said in line


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help"), ("doctor", "--help")])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(arguments))
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: rope-fused" in printed
    if arguments == ("--help",):
        for name, module in cli.COMMANDS.items():
            assert name in printed and module.__doc__.splitlines()[0].rstrip(".")[:20] in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out.split() == ["rope_fused", rf.__version__]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (report.UserError("two\n  lines"), 1, "rope-fused doctor: two lines"),
        (FileNotFoundError(2, "No such file", "x.txt"), 1, "x.txt"),
        (KeyboardInterrupt(), 130, "rope-fused doctor: interrupted"),
    ],
)
def test_what_stops_a_command_is_one_line(error, status, said, capsys, monkeypatch):
    def fail(args):
        raise error

    monkeypatch.setattr(cli.doctor, "run", fail)
    got, line = complaint(capsys, "doctor")
    assert got == status and said in line


@pytest.mark.parametrize("started", ["-m", "rope-fused", "script.py"])
def test_ctrl_c_during_the_imports_is_one_line(started, tmp_path):
    """A torch that gets a Ctrl-C while it is imported; the traceback of other scripts stays."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    command = ["-m", "rope_fused"]
    if started != "-m":
        (tmp_path / started).write_text("from rope_fused.cli import main; main()")
        command = [str(tmp_path / started)]
    done = subprocess.run(
        [sys.executable, *command, "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=50,
        preexec_fn=hear_ctrl_c,
    )
    if started == "script.py":
        assert done.returncode not in (0, 130) and "KeyboardInterrupt" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (130, "rope-fused: interrupted\n")


def test_ctrl_c_belongs_to_the_command_when_it_runs():
    code = (
        "import os, signal, sys; sys.argv[0] = 'rope-fused'\n"
        "from rope_fused import cli\n"
        "def run(args): os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(60)\n"
        "cli.doctor.run = run; sys.exit(cli.main(['doctor']))"
    )
    done = run(code=code)
    assert (done.returncode, done.stderr) == (130, "rope-fused doctor: interrupted\n")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise ValueError("ours")

    monkeypatch.setattr(cli.doctor, "run", fail)
    with pytest.raises(ValueError, match="ours"):
        cli.main(["doctor"])


@pytest.mark.parametrize("missing", ["transformers", "matplotlib", "tqdm"])
def test_demo_names_its_extra(missing, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    status, line = complaint(capsys, "demo", "--out", str(tmp_path))
    assert status == 1
    assert line.startswith(f"rope-fused demo: the demo needs {missing} ")
    assert "rope_fused[demo]" in line
    assert list(tmp_path.iterdir()) == []


# -- doctor ------------------------------------------------------------------------------------


def test_doctor_json_is_what_is_here(capsys, monkeypatch):
    monkeypatch.setenv("ROPE_FUSED_CHECK", "1")
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rope_fused"] == rf.__version__
    assert facts["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert facts["backends"] == rf.backends()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["transformers"] == importlib.metadata.version("transformers")
    assert facts["environment"]["ROPE_FUSED_CHECK"]["value"] == "1"
    if rf.backends()["cpu"] == "ready":
        from rope_fused import _cpu

        assert _cpu.isa in facts["kernels"]["instruction_set"]
        assert facts["kernels"]["compiler"] == _cpu.compiler
        assert facts["kernels"]["flags"] == _cpu.flags


def test_doctor_for_people(capsys):
    assert cli.main(["doctor"]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rope_fused", rf.__version__] in words
    for name, state in rf.backends().items():
        assert [name, *state.split()] in words
    for variable in ("ROPE_FUSED_CPU_ISA", "ROPE_FUSED_CHECK", "ROPE_FUSED_PURE"):
        assert any(line[:1] == [variable] for line in words)


def test_python_m_is_doctor(tmp_path):
    done = run(cwd=tmp_path, ROPE_FUSED_CPU_ISA="baseline")
    assert done.returncode == 0 and done.stderr == ""
    assert f"rope_fused  {rf.__version__}" in done.stdout
    assert ["ROPE_FUSED_CPU_ISA", "baseline"] in [s.split()[:2] for s in done.stdout.splitlines()]
    if rf.backends()["cpu"] == "ready":
        assert "(baseline)" in done.stdout
    assert run("doctor", cwd=tmp_path, ROPE_FUSED_CPU_ISA="baseline").stdout == done.stdout
    assert run("explode", cwd=tmp_path).returncode == 2


def test_doctor_imports_nothing_heavy(tmp_path):
    """Versions come from metadata; a broken or slow package is none of doctor's business."""
    code = (
        "import sys, torch; sys.modules.update(triton=None, transformers=None, matplotlib=None)\n"
        "from rope_fused.cli import main; sys.exit(main(['doctor', '--json']))"
    )
    done = run(code=code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    installed = importlib.metadata.version("transformers")
    assert json.loads(done.stdout)["packages"]["transformers"] == installed


def test_doctor_without_kernels(tmp_path):
    """A build with ROPE_FUSED_PURE has no _cpu; doctor says what that means."""
    code = (
        "import sys; sys.modules['rope_fused._cpu'] = None\n"
        "from rope_fused.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = run("doctor", code=code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout
    said = " ".join(done.stdout.split())
    assert "every call runs through the reference" in said and "is slow" in said
    facts = json.loads(run("doctor", "--json", code=code, cwd=tmp_path).stdout)
    assert facts["kernels"] is None
    assert facts["backends"]["cpu"].startswith("not built")


def test_columns():
    rows = [("a", 1, "x"), ("bcd", 22, "")]
    assert report.columns(rows) == "a    1   x\nbcd  22"
    assert report.columns(rows, "<>", indent=1) == " a     1  x\n bcd  22"
