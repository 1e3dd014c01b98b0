"""Cases of a benchmark that double two numbers, in ways that they are given or say."""

import os
import signal

import torch

from rope_fused.cli.bench import harness


class Doubling(harness.Case):
    """Variants that double two numbers, in their ways."""

    limit = "clone"
    ways = {}
    set_bytes = needs = 1 << 30

    def make(self):
        return torch.ones(2)

    def variants(self, inputs):
        def check(result):
            assert result.tolist() == [2.0, 2.0], f"got {result.tolist()}"

        return {
            name: way
            if isinstance(way, harness.Missing)
            else harness.Variant(lambda x, way=way: lambda: way(x), check, name.endswith("_"))
            for name, way in self.ways.items()
        }


class Telling(Doubling):
    """Doubles, but for the ``op`` that says otherwise; a class that processes can import."""

    processes = 2

    def make(self):
        if self.op == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(2)

    def variants(self, inputs):
        self.__dict__["ways"] = {
            "rope_fused": (lambda x: 3 * x) if self.op == "lie" else (lambda x: 2 * x),
            "pid": lambda x: 2 * x + 0 * os.getpid(),
            "wrong": lambda x: 3 * x,
        }
        return super().variants(inputs)
