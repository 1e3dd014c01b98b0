"""Stops long runs at random moments, and sees that each goes on to the end it would have had.

    python tests/kills.py [--times 10] [--commands evaluate search extend bench] [--seed N]
                          [--log bench/results/kills.jsonl]

A run is stopped by SIGKILL, by Ctrl-C, or by a disk that is full from then on (no file may grow);
the same command is then given again, and stopped again, until it has come to its end. After every
stop each file that is there must be whole; at the end all must be as without a stop (of bench, all
but what was measured). Runs are forks of one process that has imported everything, so that a stop
hits the work and not the imports.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

# Before torch starts its threads, which a fork would lack.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}

import safetensors  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from checkpoints import save_checkpoint, text_of  # noqa: E402
from rope_fused import cli  # noqa: E402
from rope_fused.cli.bench import picture, results, suite  # noqa: E402, F401
from rope_fused.context import extend, pictures, progress, search, search_pictures  # noqa: E402, F401

ROOT = Path(__file__).resolve().parents[1]
STOPS = ("SIGKILL", "SIGINT", "full disk")
PATIENCE = 120  # seconds for a run that should end


def evaluate(files, folder):
    options = ["--text", files / "test.txt", "--window", 32, "--stride", 4, "--batch", 2]
    options += ["--out", folder / "e.json"]
    return ["evaluate", "perplexity", "--model", files / "model", *options]


def search_(files, folder):
    options = ["--text", files / "test.txt", "--factor", 2, "--window", 128, "--samples", 2]
    options += ["--evaluations", 80, "--out", folder / "s.json"]
    return ["search", "--model", files / "model", *options]


def extend_(files, folder):
    options = ["--text", files / "train.txt", "--test", files / "test.txt", "--factors", "2,4"]
    options += ["--steps", "4,3", "--sequences", 2, "--lr", 1e-2, "--trials", 1]
    return ["extend", "--model", files / "model", *options, "--out", folder / "x"]


def bench(files, folder):
    options = ["--quick", "--shapes", "2+1x16@32", "--ops", "rotate", "projection"]
    options += ["--seqlens", 4, 8, "--impls", "rope_fused", "hf-eager", "--device", "cpu"]
    return ["bench", *options, "--out", folder / "b.json"]


COMMANDS = {"evaluate": evaluate, "search": search_, "extend": extend_, "bench": bench}


# -- what a run leaves -------------------------------------------------------------------------


def files_in(folder):
    return {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}


def unfinished(name):
    """Files that are being written say so by their names, or by those of their folders."""
    *folders, file = Path(name).parts
    return file.startswith(".writing-") or any(
        part.endswith((".partial", ".training")) for part in folders
    )


def assert_whole(folder):
    for name, file in files_in(folder).items():
        if unfinished(name):
            continue
        if file.suffix in (".json", ".partial"):
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                assert names and all(tensors.get_tensor(one).numel() for one in names), name
        elif file.suffix == ".png":
            assert file.read_bytes().endswith(b"IEND\xaeB`\x82"), name


def outcome(command, folder):
    """{file: what must be the same however often the run was stopped}."""
    found = {}
    for name, file in files_in(folder).items():
        found[name] = file.read_bytes() if file.suffix != ".png" else None
    if command == "bench":
        document = json.loads(found["b.json"])
        kept = ("op", "impl", "shape", "dtype", "seqlen", "limit", "sets", "bytes", "flops")
        document["results"] = [{key: row[key] for key in kept} for row in document["results"]]
        document["targets"] = [(row["case"], row["impl"]) for row in document["targets"]]
        found["b.json"] = document
    return found


# -- runs --------------------------------------------------------------------------------------


class Run:
    """A fork of this process that runs a command line."""

    def __init__(self, argv):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _child([str(word) for word in argv], writing)
        os.close(writing)
        self.said, self.status = reading, None

    def wait(self, seconds):
        """Whether it has ended, after at most so many seconds."""
        end = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return False
            else:
                time.sleep(0.002)
        return True

    def stop(self, how):
        if how == "full disk":
            _, most = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (0, most))
        else:
            os.kill(self.pid, getattr(signal, how))
        if not self.wait(PATIENCE):
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"goes on {PATIENCE} s after {how}")

    def errors(self):
        with os.fdopen(self.said, "rb") as pipe:
            return pipe.read().decode(errors="replace")[-3000:]


def _child(argv, errors):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    try:
        status = cli.main(argv)
    except BaseException:
        traceback.print_exc()
        status = 99
    os._exit(status)


def examine(command, files, folder, times, draw):
    """Stop `command` so many times; {how: times}, and how many runs came to their end."""
    make, counts, ended = COMMANDS[command], dict.fromkeys(STOPS, 0), 0

    def finished(run):
        errors = run.errors()
        assert run.status == 0, f"status {run.status}: {errors}"

    start = time.monotonic()
    whole = Run(make(files, folder / "whole"))
    assert whole.wait(PATIENCE), "a run without a stop does not end"
    finished(whole)
    seconds = time.monotonic() - start
    expected = outcome(command, folder / "whole")
    assert_whole(folder / "whole")

    out, runs = folder / "0", 1
    while sum(counts.values()) < times or (out.exists() and any(out.iterdir())):
        run, how = Run(make(files, out)), draw.choice(STOPS)
        stopped = sum(counts.values()) < times and not run.wait(draw.uniform(0, seconds))
        if stopped:
            run.stop(how)
        else:
            assert run.wait(PATIENCE), "a run that goes on does not end"
        if stopped and run.status != 0:
            errors = run.errors()
            usual = {"SIGKILL": (-signal.SIGKILL,), "SIGINT": (130, 99)}.get(how, (1, 99))
            assert run.status in usual, f"{how}: status {run.status}: {errors}"
            counts[how] += 1
            if out.exists():
                assert_whole(out)
            continue
        finished(run)  # in time, or in spite of us
        found = outcome(command, out)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, value in found.items():
            assert value == expected[name], f"{name} is not what it is without a stop"
        shutil.rmtree(out)
        ended, runs, out = ended + 1, runs + 1, folder / str(runs)
    return counts | {"ended": ended, "seconds": round(time.monotonic() - start, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10, help="of each command (default: 10)")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=[*COMMANDS])
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--log", type=Path, help="a file that gets one line, if all went well")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where whoever runs this ignores it
    torch.set_num_threads(1)
    progress.Checkpoint.SHARE = 1e9  # write each time: these runs have little to say
    results.commit = lambda: None  # git would take most of the time
    line = {"seed": args.seed, "times": args.times, "commit": _git("rev-parse", "HEAD")}
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    line["changed"] = bool(status)
    line |= {"python": platform.python_version(), "torch": torch.__version__}
    line |= {"transformers": transformers.__version__, "commands": {}}
    with tempfile.TemporaryDirectory(prefix="rope_fused-kills-") as folder:
        files = Path(folder) / "files"
        save_checkpoint(files / "model")
        (files / "train.txt").write_text(text_of(6000))
        (files / "test.txt").write_text(text_of(12000)[6000:7500])
        for command in args.commands:
            draw = random.Random(f"{args.seed} {command}")
            place = Path(folder) / command
            place.mkdir()
            try:
                found = examine(command, files, place, args.times, draw)
            except AssertionError as error:
                sys.exit(f"--seed {args.seed}: {command}: {error}")
            line["commands"][command] = found
            print(f"{command}: {found}", flush=True)
    if args.log is not None:
        with open(args.log, "a") as log:
            log.write(json.dumps(line) + "\n")


def _git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
