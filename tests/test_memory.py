"""What the CPU kernels touch: pages before and behind every buffer are forbidden."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rope_fused.dispatch import native

pytestmark = [
    pytest.mark.skipif(native is None, reason="the CPU kernels are not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="mprotect and SIGSEGV as on Linux"),
]
GUARDED = Path(__file__).with_name("guarded.py")


def run(*words, isa=None):
    env = os.environ | ({} if isa is None else {"ROPE_FUSED_CPU_ISA": isa})
    # A sanitizer would make an exit status of the signal.
    env |= {"ASAN_OPTIONS": f"{env.get('ASAN_OPTIONS', '')}:handle_segv=0"}
    command = [sys.executable, GUARDED, *words]
    return subprocess.run(command, env=env, capture_output=True, text=True)


OLDER = [pytest.param(isa, marks=pytest.mark.slow) for isa in ("x86_64_v3", "baseline")]


@pytest.mark.parametrize("isa", [None, *OLDER])
@pytest.mark.parametrize("side", ["ends", "starts"])
def test_no_kernel_touches_anything_beyond_its_buffers(side, isa):
    done = run(side, isa=isa)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    assert int(done.stdout) > 1000


@pytest.mark.parametrize("side", ["ends", "starts"])
def test_the_guard_is_one(side):
    assert run(side, "beyond").returncode == -signal.SIGSEGV
