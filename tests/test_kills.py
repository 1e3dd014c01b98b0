"""Long runs that are stopped at random moments go on to the end they would have had (kills.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

KILLS = Path(__file__).with_name("kills.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits other processes")
@pytest.mark.parametrize("command", ["evaluate", "search", "extend", "bench"])
def test_ten_stops(command, request):
    seed = request.config.getoption("--seed")
    words = [KILLS, "--times", "10", "--commands", command, "--seed", str(seed)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
