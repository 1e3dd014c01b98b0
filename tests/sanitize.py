"""The tests and random calls on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [--minutes 10] [arguments of pytest]   # what `make asan` runs
    python tests/sanitize.py --plant                                # faults that must be found

`--plant` copies the sources, puts an error by one into each kernel in turn, builds the copy and
sees that the sanitizers stop it, and that they let the copy without a fault run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# They test how the package is built, and kernels for other machines.
ELSEWHERE = ("test_package", "test_cuda", "test_triton_aot", "test_bench", "test_demo", "test_lab")

FAULTS = {
    "a pair beyond a row": (
        "csrc/cpu/forward.h",
        "A a = load(x[in(ia)]), b = load(x[in(ib)]);",
        "A a = load(x[in(ia)]), b = load(x[in(ib + 1)]);",
    ),
    "a table's pair beyond a row": (
        "csrc/cpu/forward.h",
        "table_pair<T, kTranspose>(load(x[in(ia)]), load(x[in(ib)]),",
        "table_pair<T, kTranspose>(load(x[in(ia)]), load(x[in(ib + 1)]),",
    ),
    "a column beyond a head": (
        "csrc/cpu/forward.h",
        "if (end < r.head_dim) carry(end, r.head_dim);",
        "if (end < r.head_dim) carry(end, r.head_dim + 1);",
    ),
    "a chunk beyond the sums": (
        "csrc/cpu/backward.h",
        ": q.norm_grad + chunk * r.head_dim",
        ": q.norm_grad + (chunk + 1) * r.head_dim",
    ),
    "a table beyond the tables": (
        "csrc/cpu/rows.h",
        "least(row, r.tables - 1)",
        "least(row, r.tables) + 1",
    ),
    "a shift by the width of a word": (
        "csrc/rotate.h",
        "((quadrant + 1u) & 2u) ? -c : c",
        "((quadrant + 1u) & 2u) ? -c : c + 0.0 * (1 << (31 + (quadrant | 1)))",
    ),
}

# Rows that end where their memory ends, rotated, normed and differentiated.
PROBE = """
import torch, rope_fused as rf
full = rf.RopeSpec.default(head_dim=18, rope_theta=1e4)
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    spec = rf.RopeSpec.longrope(head_dim=24, rope_theta=1e4, partial_rotary_factor=0.75,
        short_factor=[1.0] * 9, long_factor=[2.0] * 9, factor=4.0,
        original_max_position_embeddings=8)
    x, w = torch.randn(2, 9, 48, dtype=dtype), torch.randn(24, 48, dtype=dtype)
    norm = torch.ones(24, dtype=dtype, requires_grad=True)
    lengths = torch.tensor([9, 9])
    q, k, _ = rf.qkv_rope(x, w, w, spec=spec, seq_lens=lengths, q_norm_weight=norm,
                          k_norm_weight=norm)
    (q.sum() + k.sum()).backward()
    rf.apply_rope(q.detach(), k.detach(), spec, seq_lens=lengths)
    q = torch.randn(2, 9, 1, 18, dtype=dtype)
    rf.apply_rope(q, None, full)
    rf.apply_rotary_pos_emb(q, None, *torch.randn(2, 2, 9, 18).to(dtype), unsqueeze_dim=2)
print("done", rf.dispatch.native._cpu.isa)
"""


def build(tree: Path, folder: Path) -> Path:
    """Build the package in `tree`, sanitized, into `folder`; where its modules are then."""
    lib = folder / "lib"
    options = {"ROPE_FUSED_SANITIZE": "1", "ROPE_FUSED_CUDA": "0"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        folder,
        "--build-lib",
        lib,
    ]
    subprocess.run(command, cwd=tree, env=os.environ | options, check=True)
    return lib


def environment(lib: Path) -> dict:
    """For programs that import the package from `lib`."""
    cxx = os.environ.get("CXX", "c++").split()[0]
    # The sanitizer looks for the C++ runtime when it starts, and Python brings none.
    found = [
        subprocess.run(
            [cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Python keeps what it has until the end: no leaks are looked for.
    return os.environ | {
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": f"{lib}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONSAFEPATH": "1",  # else the folder that one stands in comes first
    }


def test(arguments, minutes) -> int:
    """The suite and the random calls; an exit status."""
    done = environment(build(ROOT, ROOT / "build" / "sanitized"))
    pytest = [sys.executable, "-m", "pytest", "-m", "not slow and not gpu", "-q"]
    pytest += [f"--ignore=tests/{name}.py" for name in ELSEWHERE]
    fuzz = [sys.executable, "tests/fuzz.py", "--minutes", str(minutes)]
    fuzz += ["--log", "bench/results/fuzz.jsonl"]
    for command in ([*pytest, *arguments], fuzz):
        status = subprocess.run(command, cwd=ROOT, env=done).returncode
        if status:
            return status
    return 0


def compiler(folder: Path) -> str:
    """A compiler that knows one instruction set only: the kernels are compiled once for each."""
    script = folder / "c++"
    real = shutil.which(os.environ.get("CXX", "c++").split()[0])
    script.write_text(f'#!/bin/sh\ncase "$*" in *-march=*) exit 1;; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    return str(script)


def plant() -> int:
    """Each fault in a copy of the sources: how many of them were missed."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        ignore = shutil.ignore_patterns(".*", "build", "*.so", "bench", "docs", "*.egg-info")
        shutil.copytree(ROOT, tree, ignore=ignore, symlinks=True)
        os.environ |= {"CXX": compiler(Path(folder)), "DEBUG": "1"}
        for name, (file, before, after) in {"nothing": (None, "", ""), **FAULTS}.items():
            if file is not None:
                source = (tree / file).read_text()
                assert source.count(before) == 1, f"{name}: {file} has changed"
                (tree / file).write_text(source.replace(before, after))
            lib = build(tree, Path(folder, "built"))
            command = [sys.executable, "-c", PROBE]
            done = subprocess.run(
                command, cwd=folder, env=environment(lib), capture_output=True, text=True
            )
            told = [
                line
                for line in done.stderr.splitlines()
                if "ERROR: " in line or ": runtime error: " in line
            ]
            found = done.returncode != 0 and bool(told)
            right = found == (file is not None)
            missed += not right
            print(
                f"{'' if right else 'WRONG: '}{name}: {(told or [done.stdout.strip()])[0]}",
                flush=True,
            )
            if file is not None:
                (tree / file).write_text(source)
    return missed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--plant", action="store_true")
    args, rest = parser.parse_known_args()
    sys.exit(plant() if args.plant else test(rest, args.minutes))


if __name__ == "__main__":
    main()
