"""How one call is timed: by the wall clock on a CPU, by CUDA graphs or events on a GPU."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from pathlib import Path

import torch

from .. import memory

LARGE = 1 << 28  # bytes of a call beyond which a launch costs nothing beside the work
_MOST_SETS = 64
_QUEUE_CYCLES = 1_000_000  # about half a millisecond, for the host to get ahead of the GPU


def cache_bytes(device: str) -> int:
    """The size of the last cache before memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [file.read_text().strip() for file in sizes]
    return max((int(t[:-1]) * units[t[-1]] for t in texts if t[-1:] in units), default=32 << 20)


def sets(bytes_of_a_call: int, device: str) -> int:
    """How many sets of inputs, used in turn, make every call find its own outside the caches."""
    return min(_MOST_SETS, max(1, math.ceil(2 * cache_bytes(device) / max(1, bytes_of_a_call))))


def timed(calls, device, *, capture, held, clock=time.perf_counter):
    """(method, {name: () -> seconds of one call}); each uses its calls, one per set, in turn.

    "wall": the clock around a call, nothing else being under way. "graph": the calls of all sets
    replayed from one CUDA graph between two events: no host, and the GPU's own gaps between
    kernels. "events": two events around a call that is queued behind a pause, so that the GPU waits
    for no launch. ``capture``: try graphs; where one variant cannot be captured all use events.
    ``held`` (ExitStack) keeps what the functions need until it is closed.
    """
    if device != "cuda":
        return "wall", {name: _wall(of_name, clock) for name, of_name in calls.items()}
    if capture:
        try:
            pool = torch.cuda.graph_pool_handle()
            graphs = {name: _graph(of_name, pool, held) for name, of_name in calls.items()}
            return "graph", graphs
        except RuntimeError:
            torch.cuda.synchronize()
    return "events", {name: _events(of_name) for name, of_name in calls.items()}


class _Turns:
    """The calls of the sets in turn. Results of several sets stay until the set's next turn, so
    that outputs rotate through memory as inputs do."""

    def __init__(self, calls):
        self.calls, self.results = calls, [None] * len(calls)
        self.turns = itertools.cycle(range(len(calls)))

    def next(self):
        self.at = next(self.turns)
        self.results[self.at] = None  # giving memory back is nobody's time
        return self.calls[self.at]

    def keep(self, result):
        if len(self.calls) > 1:
            self.results[self.at] = result


def _wall(calls, clock):
    turns = _Turns(calls)

    def measure():
        call = turns.next()
        start = clock()
        result = call()
        stop = clock()
        turns.keep(result)
        return stop - start

    return measure


def _events(calls):
    turns = _Turns(calls)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure():
        call = turns.next()
        torch.cuda.synchronize()
        torch.cuda._sleep(_QUEUE_CYCLES)
        start.record()
        turns.keep(call())
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return measure


def _graph(calls, pool, held):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # what is made once must not be made inside the capture
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = [call() for call in calls]
    held.callback(results.clear)
    held.callback(graph.reset)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure():
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / len(calls)

    return measure


def peak(call, device) -> int:
    """The most bytes that were held at once during a call, beyond what was held before."""
    if device != "cuda":
        return memory.peak(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches_and_host(calls, device, count=20):
    """(kernels and copies that a call launches, seconds the host takes for it); (None, None) on a
    CPU, where all of the time is the host's."""
    if device != "cuda":
        return None, None
    torch.cuda.synchronize()
    seconds = []
    for call in (calls * count)[:count]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    kernels = torch.profiler.ProfilerActivity.CUDA
    if kernels not in torch.profiler.supported_activities():
        return None, statistics.median(seconds)
    with torch.profiler.profile(activities=[kernels]) as profile:
        calls[0]()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_gpu), statistics.median(seconds)
