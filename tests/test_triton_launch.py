"""Launches that are looked up: they pass what Triton's own would, and go through it when they must.

Runs itself in a process where no kernel is interpreted, with a driver that compiles for sm_90 and
keeps what it is asked to launch.
"""

import contextlib
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import sass  # noqa: E402


class Recorder(sass.Driver):
    """Keeps every launch, and whether it went through Triton."""

    class utils:
        @staticmethod
        def load_binary(name, binary, shared, device):
            return None, name, 0, 0, 1024  # module, function, registers, spills, threads

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 1 << 20}

        @staticmethod
        def unload_module(module):
            pass

    def __init__(self):
        super().__init__(90)
        self.launches = []

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, data, enter, leave, *arguments):
            flat = list(_flat(arguments))
            self.launches.append({"function": function, "grid": [x, y, z], "arguments": flat})

        return launch

    @contextlib.contextmanager
    def watching(self):
        """Marks the launches that went through Triton."""
        from rope_fused.triton_kernels.launch import Launch

        real = Launch.start

        def start(launch, *tensors):
            done = real(launch, *tensors)
            self.launches[-1]["through_triton"] = True
            return done

        Launch.start = start
        try:
            yield
        finally:
            Launch.start = real


def _flat(arguments):
    for value in arguments:
        if isinstance(value, tuple):
            yield from _flat(value)
        elif hasattr(value, "block_shape"):
            yield from (value.base.data_ptr(), *value.shape, *value.strides, *value.block_shape)
            yield value.padding
        elif hasattr(value, "data_ptr"):
            yield value.data_ptr()
        elif hasattr(value, "value"):  # a tl.constexpr
            yield value.value
        else:
            yield value


def rotations():
    """Calls of the rotation: (name, call)."""
    import torch
    import triton

    from rope_fused import RopeSpec, ops, triton_backend

    spec = RopeSpec.default(head_dim=64, rope_theta=1e4)
    positions = torch.arange(3, 10)[None]
    rotation = ops.Rotation(spec.rows(), spec.turns(), spec.scale_rows(), positions=positions)

    def tensors(tokens=7, shift=0):
        rooms = [torch.empty(tokens * n * 64 + shift, dtype=torch.bfloat16) for n in (4, 4, 2, 2)]
        views = [r[shift:].view(1, tokens, n, 64) for r, n in zip(rooms, (4, 4, 2, 2), strict=True)]
        return views[::2], views[1::2]

    first, second, unaligned = tensors(), tensors(), tensors(shift=3)

    def turn(pair, **changes):
        (q, k), out = pair
        triton_backend.rotate(q, k, rotation._replace(**changes), out)

    def hooked():
        hook = triton.knobs.runtime.launch_enter_hook
        hook.add(print)
        try:
            turn(second)
        finally:
            hook.remove(print)

    yield "first", lambda: turn(first)
    yield "again", lambda: turn(first)
    yield "others", lambda: turn(second)
    yield "others, profiled", hooked
    yield "unaligned", lambda: turn(unaligned)
    yield "unaligned again", lambda: turn(unaligned)
    yield "conjugate", lambda: turn(first, conjugate=True)
    yield "longer", lambda: turn(tensors(8), positions=None)


def projections():
    import torch
    from rope_fused.triton_kernels import configs, plan

    from rope_fused import RopeSpec, ops, triton_backend

    plan.device_of = lambda device: plan.Device("none", 90, 132)
    spec = RopeSpec.default(head_dim=64, rope_theta=1e4)
    rotation = ops.Rotation(spec.rows(), spec.turns(), spec.scale_rows())
    tile = configs.Tile(64, 2, 64, 4, 2)
    half = {"dtype": torch.bfloat16}

    def project(shift=0):
        room = torch.empty(70 * 128 + shift, **half)
        x = room[shift:].view(1, 70, 128)
        weights = [torch.empty(n * 64, 128, **half) for n in (4, 2, 2)]
        outputs = [torch.empty(1, 70, n, 64, **half) for n in (4, 2, 2)] + [None, None]
        call = (x, weights, [None] * 3, outputs, 64, rotation, tile)
        return lambda: triton_backend.project_fused(*call)

    first, second = project(), project()
    yield "project", first
    yield "project again", first
    yield "project others", second
    yield "project unaligned", project(shift=1)


def main():
    driver = Recorder()
    from triton.runtime import driver as active

    active.set_active(driver)
    with driver.watching():
        for calls in (rotations(), projections()):
            for name, call in calls:
                call()
                driver.launches[-1]["name"] = name
    json.dump(driver.launches, sys.stdout)


def test_launches():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    launches = {launch.pop("name"): launch for launch in json.loads(done.stdout)}
    through = {name for name, launch in launches.items() if launch.pop("through_triton", False)}
    assert through == {
        "first", "others, profiled", "unaligned", "unaligned again", "conjugate", "longer",
        "project", "project unaligned",
    }  # fmt: skip
    assert launches["again"] == launches["first"]
    assert launches["others, profiled"] == launches["others"] != launches["first"]
    assert launches["unaligned again"] == launches["unaligned"]
    assert launches["project again"] == launches["project"]

    def differences(*names):
        arguments = (launches[name]["arguments"] for name in names)
        return [a == b for a, b in zip(*arguments, strict=True)].count(False)

    # Nothing but the addresses: of q, k and what they become; of x, the weights and the outputs.
    assert differences("first", "others") == 4
    assert differences("project", "project others") == 7


if __name__ == "__main__":
    main()
