"""rope-fused bench: how it times, checks, records, compares, predicts and draws."""

import contextlib
import copy
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rope_fused as rf
from doubling import Doubling, Telling
from rope_fused import cli, report
from rope_fused.cli.bench import (
    accuracy,
    baselines,
    compare,
    harness,
    picture,
    processes,
    projection,
    results,
    roofline,
    rotation,
    shapes,
    suite,
    table,
    timers,
)
from rope_fused.cli.bench.model import Block, TrainingStep
from tiny import one_thread  # noqa: F401

TINY = shapes.select(["4+2x16@64"])[0]
TWO = ("rope_fused", "hf-eager")
STEPS = ("hf-eager", "rope_fused")


# -- timing ------------------------------------------------------------------------------------


def test_timing():
    blocks = ((5.0, 1.0, 3.0, 2.0, 4.0), (9.0, 7.0, 8.0, 7.0, 9.0))
    least, pooled = harness.Timing(blocks, least=True), harness.Timing(blocks)
    assert least.medians == pooled.medians == [3.0, 8.0]
    assert least.seconds == 3.0 and pooled.seconds == 6.0
    assert least.quartiles == (2.0, 4.0) and pooled.quartiles == (3.25, 7.75)
    # Even rounds 5, 3, 4 and 9, 8, 9; odd ones 1, 2 and 7, 7.
    apart = ((4.0 / 1.5) * (9.0 / 7.0)) ** 0.5 - 1
    assert least.disagreement == pooled.disagreement == pytest.approx(apart)
    assert harness.Timing(((1.0, 2.0), (2.0, 1.0))).disagreement == pytest.approx(0.0)
    assert harness.Timing(((3.0,),)).disagreement == 0.0


def test_race_gives_everyone_every_place():
    order = []
    measures = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    timings = harness.race(measures, rounds=6)
    assert {name: len(timing.rounds) for name, timing in timings.items()} == dict.fromkeys("abc", 6)
    rounds = ["".join(order[6 + 3 * i : 9 + 3 * i]) for i in range(6)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert sorted(r[0] for r in rounds) == sorted(r[-1] for r in rounds) == list("aabbcc")


def test_race_repeats_what_its_orders_disagree_on():
    """A first attempt in which one order is slower is thrown away, and a mark stays if all are."""
    times = itertools.chain([1.0] * harness.WARMUP, [1.0, 1.2] * 4, itertools.repeat(2.0))
    timing = harness.race({"a": lambda: next(times)}, rounds=8)["a"]
    assert (timing.seconds, timing.disagreement) == (2.0, 0.0)
    times = itertools.cycle([1.0, 1.2])
    assert harness.race({"a": lambda: next(times)}, rounds=8)["a"].disagreement > harness.TOLERANCE


def test_wall_clock_counts_the_call_alone_and_takes_sets_in_turn():
    now, seen = [0.0], []

    def call(number):
        seen.append(number)
        now[0] += number
        return number

    def clock():
        now[0] += 100.0  # reading it is in nobody's time but once
        return now[0]

    calls = [lambda n=n: call(n) for n in (1, 2, 3)]
    method, measures = timers.timed({"a": calls}, "cpu", capture=True, held=None, clock=clock)
    assert method == "wall"
    assert [measures["a"]() for _ in range(4)] == [101.0, 102.0, 103.0, 101.0]
    assert seen == [1, 2, 3, 1]


def test_sets_of_inputs_go_beyond_the_cache(monkeypatch):
    monkeypatch.setattr(timers, "cache_bytes", lambda device: 1000)
    wanted = {1: 64, 100: 20, 1000: 2, 1500: 2, 2000: 1, 10**9: 1}
    assert {n: timers.sets(n, "cpu") for n in wanted} == wanted


class FakeGPU:
    """Stands in for torch.cuda: its clock counts calls of ours, in milliseconds."""

    def __init__(self, monkeypatch):
        self.now, self.slept = 0.0, 0
        graph = lambda graph, pool: contextlib.nullcontext()  # noqa: E731
        fakes = {
            "synchronize": lambda: None,
            "_sleep": lambda cycles: setattr(self, "slept", self.slept + 1),
            "graph_pool_handle": lambda: None,
            "Stream": lambda: FakeStream(),
            "current_stream": lambda: FakeStream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": lambda: FakeGraph(self),
            "graph": graph,
            "Event": lambda enable_timing: FakeEvent(self),
            "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 175,
            "reset_peak_memory_stats": lambda: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


class FakeStream:
    def wait_stream(self, other):
        pass


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def synchronize(self):
        pass

    def elapsed_time(self, stop):
        return stop.at - self.at


class FakeGraph:
    def __init__(self, gpu):
        self.gpu, self.replayed, self.gone = gpu, 0, False

    def replay(self):
        self.gpu.now += 30.0

    def reset(self):
        self.gone = True


def test_gpu_clocks(monkeypatch):
    """Graphs share a replay out among the sets; where one cannot be captured, events time all."""
    gpu = FakeGPU(monkeypatch)

    def call(milliseconds):
        gpu.now += milliseconds
        return milliseconds

    calls = {"a": [lambda: call(2.0), lambda: call(4.0)], "b": [lambda: call(1.0)] * 2}
    with contextlib.ExitStack() as held:
        method, measures = timers.timed(calls, "cuda", capture=True, held=held)
        assert method == "graph" and measures["a"]() == measures["b"]() == 0.015
    assert gpu.slept == 0
    method, measures = timers.timed(calls, "cuda", capture=False, held=None)
    assert method == "events" and gpu.slept == 0
    assert [measures["a"]() for _ in range(3)] == [0.002, 0.004, 0.002] and gpu.slept == 3

    def refuse(*arguments):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    assert timers.timed(calls, "cuda", capture=True, held=None)[0] == "events"
    assert timers.peak(calls["a"][0], "cuda") == 75
    if not torch.cuda.is_available():  # and so nothing that counts launches
        launches, seconds = timers.launches_and_host(calls["a"], "cuda")
        assert launches is None and seconds > 0
    assert timers.launches_and_host(calls["a"], "cpu") == (None, None)


# -- checking ----------------------------------------------------------------------------------


def doubling(**ways):
    case = Doubling(op="double", model=TINY)
    object.__setattr__(case, "ways", ways)
    return case


def test_only_equal_results_are_timed():
    def broken(x):
        raise RuntimeError("no such kernel\nand so on")

    case = doubling(
        rope_fused=lambda x: 2 * x,
        in_place_=lambda x: x.mul_(2),
        wrong=lambda x: 3 * x,
        broken=broken,
        absent=harness.Missing("not here"),
        again=lambda x: x + x,
    )
    outcomes = harness.run(case, timed=False)
    assert outcomes == {
        "rope_fused": None,
        "in_place_": None,
        "wrong": harness.Wrong("got [3.0, 3.0]"),
        "broken": harness.Failed("no such kernel"),
        "absent": harness.Missing("not here"),
        "again": None,
    }
    outcomes = harness.run(case, quick=True, only=("again",))
    assert list(outcomes) == ["again"] and len(outcomes["again"].timing.rounds) == 7


def test_a_wrong_result_of_ours_refuses_the_case():
    timed = []
    case = doubling(other=lambda x: timed.append(1) or 2 * x, rope_fused=lambda x: x)
    with pytest.raises(harness.Refused, match=r"double .*rope_fused: got \[1.0, 1.0\]"):
        harness.run(case)
    assert len(timed) == 1  # its own check


@pytest.mark.parametrize("name", shapes.MODELS)
@pytest.mark.parametrize("op", rotation.OPS)
def test_every_model_and_rotation_is_checked(name, op):
    case = rotation.Rotation(model=shapes.MODELS[name], op=op, seqlen=5, dtype=torch.float32)
    outcomes = harness.run(case, timed=False, only=(*TWO, "rope_fused-hf", "torch-onnx", "copy"))
    assert None in outcomes.values() and outcomes["hf-eager"] is None
    assert outcomes["clone"] is None and outcomes["rope_fused"] is None
    assert not any(isinstance(outcome, harness.Wrong) for outcome in outcomes.values())


@pytest.mark.parametrize(
    "variant",
    [
        {"layout": "bshd"},
        {"packed": True},
        {"partial": 0.5},
        {"interleaved": True},
        {"rope": "yarn"},
        {"rope": "longrope"},
        {"sequences": 3},
        {"seqlen": 1},
        {"warm": True},
    ],
    ids=str,
)
def test_every_variant_is_checked(variant):
    case = rotation.Rotation(model=TINY, **{"seqlen": 40} | variant)
    outcomes = harness.run(case, timed=False, only=TWO)
    assert outcomes == dict.fromkeys((*TWO, "clone")), outcomes
    assert str(case) != str(rotation.Rotation(model=TINY, seqlen=40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", projection.OPS)
@pytest.mark.parametrize("norm", [False, True])
def test_every_projection_is_checked(op, norm, dtype):
    case = projection.Projection(model=TINY, op=op, norm=norm, seqlen=40, dtype=dtype)
    ours = ("rope_fused", "rope_fused-packed", "linear-three")
    outcomes = harness.run(case, timed=False, only=(*ours, "hf-eager", "linear+rotate"))
    separate = op == "projection" and not norm
    assert outcomes.pop("linear+rotate", None) is None
    assert outcomes == dict.fromkeys((*ours, "linear", "hf-eager")), outcomes
    assert separate == ("linear+rotate" in case.variants(case.make()))


def test_block_and_training_step_are_checked():
    outcomes = harness.run(Block(model=TINY, seqlen=300), timed=False, only=TWO)
    assert outcomes == dict.fromkeys(TWO)
    step = TrainingStep(model=TINY, seqlen=32, layers=2, vocabulary=50)
    assert harness.run(step, timed=False, only=TWO) == dict.fromkeys(STEPS)


@pytest.mark.parametrize("case", suite.quick("cpu")[:1] + [rotation.Rotation(model=TINY)], ids=str)
def test_checks_see_a_wrong_rotation(case, monkeypatch):
    def off(q, k, *rest, **options):
        q2, k2 = rf.apply_rope(q, k, *rest, **options)
        return q2, k2 * (1 + 2.0**-6 if q.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(rotation, "apply_rope", off)
    with pytest.raises(harness.Refused, match="relative error"):
        harness.run(case, timed=False, only=TWO)


# -- other people's kernels, played by stand-ins of the same signature -------------------------


def _turned(x, cos, sin, interleaved=False):
    """x [..., d] turned by cos, sin [..., d / 2]."""
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    parts = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def _liger(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    assert cos.shape[-1] == q.shape[-1]
    cos, sin = (t[:, None, :, : t.shape[-1] // 2] for t in (cos, sin))
    return q.copy_(_turned(q, cos, sin)), k.copy_(_turned(k, cos, sin))


def _flash(x, cos, sin, interleaved=False, inplace=False):
    assert cos.shape == (x.shape[1], x.shape[-1] // 2)
    return _turned(x, cos[:, None], sin[:, None], interleaved)


def _transformer_engine(t, freqs, tensor_format="sbhd", interleaved=False, fused=False):
    assert freqs.shape == (t.shape[1], 1, 1, t.shape[-1]) and tensor_format == "bshd" and fused
    angle = freqs[:, 0, :, ::2] if interleaved else freqs[:, 0, :, : t.shape[-1] // 2]
    return _turned(t, angle.cos(), angle.sin(), interleaved)


def _unsloth(Q, K, cos, sin):
    assert cos.shape == (Q.shape[2], Q.shape[3])
    cos, sin = (t[:, : t.shape[-1] // 2] for t in (cos, sin))
    return Q.copy_(_turned(Q, cos, sin)), K.copy_(_turned(K, cos, sin))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    ("bind", "module", "function", "stand_in", "interleaves"),
    [
        ("liger", "liger_kernel.transformers.rope", "liger_rotary_pos_emb", _liger, False),
        ("flash", "flash_attn.layers.rotary", "apply_rotary_emb", _flash, True),
        (
            "transformer_engine",
            "transformer_engine.pytorch.attention.rope",
            "apply_rotary_pos_emb",
            _transformer_engine,
            True,
        ),
        ("unsloth", "unsloth.kernels.rope_embedding", "fast_rope_embedding", _unsloth, False),
    ],
)
def test_how_others_are_called(bind, module, function, stand_in, interleaves, layout, monkeypatch):
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    setattr(sys.modules[module], function, stand_in)
    for interleaved in (False, True) if interleaves else (False,):
        spec = TINY.spec(interleaved=interleaved)
        q, k = (torch.randn(1, n, 9, 16) for n in (4, 2))
        q, k = (t if layout == "bhsd" else t.transpose(1, 2) for t in (q, k))
        expected = rf.apply_rope(q.double(), k.double(), spec, layout=layout)
        problem = baselines.Problem(spec, torch.arange(9)[None], torch.float32, layout)
        actual = getattr(baselines, f"_bind_{bind}")(problem)(q.clone(), k.clone())
        for ours, theirs in zip(expected, actual, strict=True):
            torch.testing.assert_close(theirs.double(), ours, atol=1e-5, rtol=0)


def test_why_a_baseline_cannot_run(monkeypatch):
    monkeypatch.setattr(baselines, "_lacks", lambda package: "")

    def reasons(asked=(), **problem):
        spec = problem.pop("spec", TINY.spec())
        positions = problem.pop("positions", torch.arange(4, device="meta")[None])
        problem = baselines.Problem(spec, positions, torch.float32, **problem)
        monkeypatch.setattr(baselines.Problem, "device", "cuda")
        return {r.name: r.obstacle(problem) for r in baselines.rotaries({}, asked)}

    assert {n for n, reason in reasons().items() if reason} == {"unsloth"}
    assert not any(reasons(asked=("unsloth",)).values())
    scaled = reasons(("unsloth",), spec=TINY.spec(shapes.YARN))
    assert "attention factor" in scaled["liger"] and "attention factor" in scaled["unsloth"]
    assert "attention factor" in scaled["transformer-engine"] and not scaled["flash-attn"]
    assert "half-split" in reasons(spec=TINY.spec(interleaved=True))["liger"]
    assert "derivative" in reasons(derivative=True)["torch-onnx"]
    rows = reasons(positions=torch.zeros(2, 4, dtype=torch.long))
    assert "one table" in rows["flash-attn"] and not rows["liger"]


# -- processes ---------------------------------------------------------------------------------


def test_rounds_are_shared_out_over_processes():
    outcomes = processes.run(Telling(op="double", model=TINY, seqlen=1 << 20))
    assert isinstance(outcomes.pop("wrong"), harness.Wrong)
    assert list(outcomes) == ["rope_fused", "pid"]
    for outcome in outcomes.values():
        assert [len(block) for block in outcome.timing.blocks] == [4, 4]  # of 7


def test_what_a_process_says_and_when_it_says_nothing(tmp_path, capsys, monkeypatch):
    with pytest.raises(harness.Refused, match=r"lie .*rope_fused: got \[3.0, 3.0\]"):
        processes.run(Telling(op="lie", model=TINY))
    monkeypatch.setattr(suite, "grid", lambda *a: [Telling(op="die", model=TINY)])
    monkeypatch.setattr(suite, "memory", lambda device: 1 << 40)
    command = ["bench", "--seqlens", "8", "--out", str(tmp_path / "b.json")]
    assert cli.main(command) == 0
    assert "Left out: die 4+2x16@64" in (printed := capsys.readouterr().out)
    assert f"(its process ended with status {-signal.SIGKILL})" in printed


# -- results -----------------------------------------------------------------------------------


def measured(seconds, rounds=31, spread=0.0):
    times = [seconds * (1 + spread * (i % 3 - 1)) for i in range(rounds)]
    return harness.Measured(harness.Timing((tuple(times),)), "wall", 1, 1000)


def document(seconds=None, **changes):
    """A document of two sweeps, with times (us per token) of these variants."""
    seconds = seconds or {"rope_fused": 1.0, "clone": 0.9, "hf-eager": 9.0, "hf-compile": 5.0}
    run = results.Run(results.settings(False, "cpu"))
    for op, seqlen in itertools.product(("rotate", "unrotate"), (4096, 8192)):
        case = rotation.Rotation(model=shapes.MODELS["Llama-3-8B"], op=op, seqlen=seqlen)
        outcomes = {n: measured(s * seqlen * 1e-6, **changes) for n, s in seconds.items()}
        run.add(case, outcomes | {"liger": harness.Missing("not installed")})
    run.leave_out(rotation.Rotation(model=TINY, seqlen=1 << 20), "needs about 99 GB")
    return run.finish()


SCHEMA = {
    "machine": dict,
    "versions": dict,
    "settings": dict,
    "results": list,
    "targets": list,
    "missing": list,
    "left_out": list,
}
ROW = {
    **dict.fromkeys(("op", "impl", "shape", "variant", "dtype", "device", "limit", "method"), str),
    **dict.fromkeys(
        ("seqlen", "batch", "heads", "kv_heads", "head_dim", "sets", "peak_bytes"), int
    ),
    **dict.fromkeys(("median_us", "of_limit", "spread", "orders_disagree"), float),
    **dict.fromkeys(("rounds", "quartiles_us"), list),
    "marked": bool,
}


def test_schema():
    found = json.loads(json.dumps(document()))
    for name, kind in SCHEMA.items():
        assert isinstance(found[name], kind), name
    assert {"system", "processor", "cores", "gpu"} <= found["machine"].keys()
    assert {"python", "torch", "rope_fused"} <= found["versions"].keys()
    assert found["commit"] is None or len(found["commit"]["id"]) == 40
    assert len(found["results"]) == 16
    for row in found["results"]:
        for name, kind in ROW.items():
            assert isinstance(row[name], kind), (name, row[name])
    row = found["results"][0]
    assert (row["op"], row["impl"], row["seqlen"], row["limit"]) == (
        "rotate",
        "rope_fused",
        4096,
        "clone",
    )
    assert row["median_us"] == pytest.approx(4096) and row["of_limit"] == pytest.approx(0.9)
    # q and k in bfloat16, read and written, in 4096 us.
    assert row["gb_per_s"] == pytest.approx(2 * 2 * 40 * 128 / 1e3)
    assert len({table.key(row) for row in found["results"]}) == 16


def test_table_names_targets_marks_and_what_is_missing():
    found = document()
    found["results"][0]["marked"] = True
    text = table.text(found)
    assert "rotate Llama-3-8B bfloat16 seqlen 4,096; limit: clone" in text
    (ours,) = (
        line for line in text.splitlines() if line.startswith("  rope_fused") and "!" in line
    )
    assert "4.096 ms" in ours and "90.0%" in ours
    assert "speed-up over hf-eager" in text and "NOT MET" in text
    assert [
        line.split()[-1] for line in text.splitlines() if "hf-compile  " in line and "speed" in line
    ] == ["met"] * 2
    assert "Missing: liger (not installed): rotate, unrotate" in text
    assert "Left out: rotate 4+2x16@64 bfloat16 seqlen 1048576 (needs about 99 GB)" in text


def test_an_interrupted_run_resumes(tmp_path):
    out, cases = tmp_path / "r.json", [rotation.Rotation(model=TINY, seqlen=n) for n in (1, 2)]
    settings = results.settings(True, "cpu", ops=["rotate"])
    first = results.Run(settings, out)
    first.add(cases[0], {"rope_fused": measured(1.0)})
    assert not out.exists() and Path(f"{out}.partial").is_file()  # as if killed here
    again = results.Run(settings, out)
    assert again.resumed == 1 and [again.has(case) for case in cases] == [True, False]
    again.add(cases[1], {"rope_fused": measured(2.0)})
    again.finish()
    assert not Path(f"{out}.partial").exists()
    assert [row["seqlen"] for row in results.read(out)["results"]] == [1, 2]
    results.Run(settings, out).add(cases[0], {})
    with pytest.raises(OSError, match="is of another run"):
        results.Run(settings | {"threads": 99}, out)


# -- comparing ---------------------------------------------------------------------------------


def verdicts(old, new):
    return {(c.new["op"], c.new["impl"]): c.verdict for c in compare.changes(old, new)}


def planted(old, factor, impl="rope_fused"):
    new = copy.deepcopy(old)
    for row in new["results"]:
        if row["impl"] == impl and row["op"] == "rotate":
            row["median_us"] *= factor
            row["quartiles_us"] = [q * factor for q in row["quartiles_us"]]
    return new


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.02])
def test_compare_sees_a_planted_slowdown_and_nothing_else(spread):
    old = document(spread=spread)
    assert set(verdicts(old, copy.deepcopy(old)).values()) == {"same"}
    found = verdicts(old, planted(old, 1.1))
    assert found.pop(("rotate", "rope_fused")) == "slower"
    assert set(found.values()) == {"same"}
    assert verdicts(old, planted(old, 0.9))["rotate", "rope_fused"] == "faster"
    assert verdicts(old, planted(old, 1.04))["rotate", "rope_fused"] == "same"


def test_compare_knows_how_far_processes_are_apart():
    """Two of three processes met slow memory in one run, one in the other."""

    def run(seconds):
        blocks = tuple((s,) * 11 for s in seconds)
        outcome = harness.Measured(harness.Timing(blocks), "wall", 1)
        return {"results": results.rows(rotation.Rotation(model=TINY), {"hf-eager": outcome})}

    (change,) = compare.changes(run((1.0, 2.5, 1.0)), run((2.5, 1.0, 2.5)))
    assert change.ratio == 2.5 and change.verdict == "unclear"
    (change,) = compare.changes(run((1.0, 1.01, 1.0)), run((2.5, 2.51, 2.5)))
    assert change.verdict == "slower"


def test_compare_does_not_judge_what_is_too_noisy():
    old = document(spread=0.1, rounds=7)
    found = verdicts(old, planted(old, 1.1))
    assert set(found.values()) == {"unclear"}
    assert verdicts(old, planted(old, 4.0))["rotate", "rope_fused"] == "slower"


def test_compare_of_runs_of_the_same_noise_is_quiet():
    """Medians of 31 drawn from one distribution: of 400, one at most is called a change, where one
    in nine is more than the threshold away from the other."""
    generator = torch.Generator().manual_seed(1)

    def run():
        rows = []
        for seqlen in range(400):
            times = 1 + 0.1 * torch.randn(31, generator=generator)
            timing = harness.Timing((tuple(times.tolist()),))
            outcome = harness.Measured(timing, "wall", 1)
            rows += results.rows(rotation.Rotation(model=TINY, seqlen=seqlen), {"clone": outcome})
        return {"results": rows}

    found = compare.changes(run(), run())
    assert len(found) == 400
    assert sum(abs(change.ratio - 1) > compare.THRESHOLD for change in found) > 20
    assert sum(change.verdict in ("slower", "faster") for change in found) <= 1


def test_compare_command(tmp_path, capsys):
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    old = document()
    for file, content in zip(files, (old, planted(old, 1.1)), strict=True):
        file.write_text(json.dumps(content))
    old_file, new_file = map(str, files)
    assert cli.main(["bench", "--compare", old_file, old_file]) == 0
    assert "Regressions" not in capsys.readouterr().out
    assert cli.main(["bench", "--compare", old_file, new_file]) == 1
    out, err = capsys.readouterr()
    assert err == "rope-fused bench: 2 of 16 results became slower\n"
    assert "rope_fused  rotate Llama-3-8B bfloat16 seqlen 4,096  1.100 x" in out


def test_compare_names_what_one_run_alone_has(tmp_path, capsys):
    old, new = document(), document()
    old["results"] += old["results"][:7]  # twice in the file
    gone = new["results"].pop(3)
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, content in zip(files, (old, new), strict=True):
        file.write_text(json.dumps(content))
    assert cli.main(["bench", "--compare", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert f"Only in OLD\n  {gone['impl']}  {table.title(gone)}\n" in out
    assert "Only in NEW" not in out
    assert "15 of 15 results are the same" in out and "1 are in one run only" in out


STRANGE = [
    [1],
    {"results": [1]},
    {"results": {"a": 1}},
    *(
        {"median_us": value}
        for value in (None, "1", -1.0, 0, float("nan"), float("inf"), True, [], 10**400)
    ),
    {"quartiles_us": [None, 1.0]},
    {"quartiles_us": [1.0]},
    {"op": 3},
    {"seqlen": "4096"},
    {"seqlen": 0},
    {"spread": "much"},
    {"rounds": [0]},
    {"of_limit": "x"},
]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: str(value)[:40])
def test_what_is_no_result_is_one_line(strange, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    content = document()
    good.write_text(json.dumps(content))
    if not isinstance(strange, dict) or "results" in strange:
        content = strange
    else:
        content["results"][5] |= strange
    bad.write_text(json.dumps(content))
    for command in (["--compare", good, bad], ["--compare", bad, good], ["--plot", bad]):
        assert cli.main(["bench", *map(str, command)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(
            f"rope-fused bench: {bad} is no result of rope-fused bench: "
        )
        assert err.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"good.json", "bad.json"}


def test_there_may_be_nothing_to_draw(tmp_path, capsys):
    for content in (document() | {"results": []}, {"errors": []}):
        (tmp_path / "r.json").write_text(json.dumps(content))
        assert cli.main(["bench", "--plot", str(tmp_path / "r.json")]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err == (
            f"rope-fused bench: there is nothing to draw in {tmp_path / 'r.json'}\n"
        )
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


# -- the cost model ----------------------------------------------------------------------------


def test_costs_count_what_the_shapes_say():
    model = shapes.MODELS["Llama-3-8B"]
    costs = roofline.projection_costs(model, 16384, 2)
    assert costs["linear"] == (
        roofline.Kernel(2 * (16384 * 4096 + 4096 * 6144 + 16384 * 6144), 2 * 16384 * 4096 * 6144),
    )
    assert len(costs["hf-eager"]) == 13
    one = roofline.total(roofline.rotation_costs(model, 1000, 2)["rope_fused"]).bytes
    assert one == 2 * 2 * 1000 * 40 * 128
    eager = roofline.total(roofline.rotation_costs(model, 1000, 2)["hf-eager"])
    assert eager.bytes == 5 * one


def test_predictions_are_those_of_a_roofline():
    gpu = roofline.GPUS["H200"]
    costs = roofline.projection_costs(shapes.MODELS["Llama-3-8B"], 16384, 2)
    seconds = {name: gpu.seconds(cost, torch.bfloat16) for name, cost in costs.items()}
    assert seconds["linear"] == pytest.approx(2 * 16384 * 4096 * 6144 / (0.8 * 989e12))
    rotation_seconds = 4 * 16384 * 40 * 128 / (0.9 * 4.8e12)
    assert seconds["linear+rotate"] - seconds["linear"] == pytest.approx(rotation_seconds)
    assert gpu.seconds((roofline.Kernel(1.0),), torch.bfloat16) == roofline.LAUNCH_SECONDS
    assert roofline.gpu_named("NVIDIA H200 NVL") is gpu and roofline.gpu_named("T4") is None


def test_roofline_command(capsys):
    assert cli.main(["bench", "--roofline", "H200"]) == 0
    out = capsys.readouterr().out
    assert "Predicted, not measured" in out and "H100" not in out
    assert cli.main(["bench", "--roofline", "Z80"]) == 1
    assert "'Z80' is none of" in capsys.readouterr().err


# -- accuracy and pictures ---------------------------------------------------------------------


def test_accuracy_of_angles(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baselines, "compiled", lambda function, mode=None: function)
    errors, missing = accuracy.measure(positions=(1 << 12, 1 << 31))
    angles = {(e["impl"], e["position"]): e["angle"] for e in errors if e["dtype"] == "float32"}
    for position in (1 << 12, 1 << 31):
        assert angles["rope_fused", position] < 3e-7  # 2e-7 of each, cos and sin
        assert angles["hf-eager", position] == pytest.approx(
            angles["rope_fused, precision hf", position]
        )
    assert angles["hf-eager", 1 << 12] > 1e-4 and angles["hf-eager", 1 << 31] > 1
    assert {"liger", "flash-attn"} <= {entry["impl"] for entry in missing}
    file = tmp_path / "errors.json"
    file.write_text(json.dumps({"errors": errors, "missing": missing}))
    assert cli.main(["bench", "--plot", str(file)]) == 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"errors.png", "errors-dark.png"}
    table_text = accuracy.text({"errors": errors, "missing": missing})
    assert "below 2^31" in table_text and "Missing: liger" in table_text


def test_pictures(tmp_path, capsys):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(document()))
    assert cli.main(["bench", "--plot", str(file)]) == 0
    for name in ("r.png", "r-dark.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in capsys.readouterr().out or name == "r-dark.png"
    swept = picture.sweeps(document()["results"])
    assert list(swept) == ["rotate", "unrotate"]
    assert [row["seqlen"] for row in swept["rotate"]["rope_fused"]] == [4096, 8192]
    bars = picture.speedups(document()["results"])
    assert {(impl, round(ratio, 6)) for _, impl, ratio in bars} == {
        ("hf-eager", 9.0),
        ("hf-compile", 5.0),
    }
    assert all(case.endswith("Llama-3-8B, 8 k") for case, _, _ in bars)


# -- the command -------------------------------------------------------------------------------


def test_bench_command(tmp_path, capsys, monkeypatch):
    """A run with tiny shapes, stopped after its first case, and run again."""
    out = tmp_path / "b.json"
    command = ["bench", "--quick", "--shapes", "4+2x16@64", "--ops", "rotate", "projection"]
    command += ["--seqlens", "8", "--impls", *TWO, "--out", str(out)]
    real, started = harness.run, []

    def stop(case, **options):
        if started:
            raise KeyboardInterrupt
        started.append(case)
        return real(case, **options)

    monkeypatch.setattr(harness, "run", stop)
    assert cli.main(command) == 130
    assert not out.exists()
    monkeypatch.setattr(harness, "run", lambda case, **o: started.append(case) or real(case, **o))
    capsys.readouterr()
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "1 cases were done before" in printed.err
    assert [case.op for case in started] == ["rotate", "projection"]
    assert {p.name for p in tmp_path.iterdir()} == {"b.json", "b.png", "b-dark.png"}
    rows = json.loads(out.read_text())["results"]
    assert {(r["op"], r["impl"]) for r in rows} == {
        *itertools.product(["rotate"], (*TWO, "clone")),
        *itertools.product(["projection"], (*TWO, "linear")),
    }
    assert "rotate 4+2x16@64 bfloat16 seqlen 8; limit: clone" in printed.out


def test_a_wrong_result_is_status_1(tmp_path, capsys, monkeypatch):
    def refuse(case, **options):
        raise harness.Refused(f"{case}: rope_fused: off")

    monkeypatch.setattr(harness, "run", refuse)
    command = ["bench", "--quick", "--shapes", "4+2x16", "--seqlens", "8", "--ops", "rotate"]
    assert cli.main([*command, "--out", str(tmp_path / "b.json")]) == 1
    assert "a wrong result, so nothing is timed: rotate 4+2x16" in capsys.readouterr().err


def test_what_does_not_fit_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "memory", lambda device: 1000)
    command = ["bench", "--shapes", "4+2x16", "--seqlens", "8", "--ops", "rotate"]
    assert cli.main([*command, "--out", str(tmp_path / "b.json")]) == 0
    assert "Left out: rotate 4+2x16 bfloat16 seqlen 8 (needs about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shapes", "Llama-9"), "'Llama-9' is none of Llama-3.2-1B"),
        (("--shapes", "3+2x16"), "a multiple of kv_heads"),
        (("--ops", "fly"), "--ops: 'fly' is none of rotate"),
        (("--impls", "rope_fused", "foo"), "--impls: 'foo' is none of rope_fused, "),
        (("--shapes", "DeepSeek-V3-rope", "--ops", "projection"), "leave nothing to measure"),
        (("--device", "cuda"), "torch finds no GPU"),
        (("--accuracy", "--device", "cuda"), "torch finds no GPU"),
        (("--plot", "none.json"), "none.json"),
    ],
)
def test_bad_arguments(arguments, said, capsys, tmp_path, monkeypatch):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *arguments]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("rope-fused bench: ") and said in line


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--threshold", ("nan", "-0.1", "inf", "x")),
        ("--minutes", ("nan", "-1", "0", "inf", "x")),
    ],
)
def test_numbers_out_of_range_are_refused(option, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as leaving:
            cli.main(["bench", "--compare", "old", "new", f"{option}={value}"])
        assert leaving.value.code == 2
        assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_variants(device):
    """Those that --impls takes, and the baselines that are told about, are all there are."""
    modes = rotation.Rotation(model=TINY, device=device, autotune=True).compile_modes
    names = {rotary.name for rotary in baselines.rotaries(modes)}
    names |= {mode.replace("hf", "rope_fused") for mode in modes}
    for op in ("rotate", "unrotate", "norm-rotate"):
        case = rotation.Rotation(model=TINY, op=op, seqlen=8)
        names |= case.variants(case.make()).keys()
    for op in ("projection", "projection-backward"):
        case = projection.Projection(model=TINY, op=op, seqlen=8)
        names |= case.variants(case.make()).keys()
    missing = {f"rope_fused-{name}" for name in ("triton", "cuda", "compile-max-autotune")}
    missing |= {"hf-compile-max-autotune"}
    assert names | missing == {*suite.IMPLS}


def test_shapes_by_name():
    chosen = shapes.select(["llama-3-8b,QWEN3-0.6B", "8+2x64"])
    assert [(m.name, m.d_model) for m in chosen] == [
        ("Llama-3-8B", 4096),
        ("Qwen3-0.6B", 1024),
        ("8+2x64", None),
    ]
    with pytest.raises(report.UserError):
        shapes.select(["8+2x63"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suites(device):
    everything = suite.everything(device)
    names = [str(case) for case in everything]
    assert len(set(names)) == len(names)
    assert {case.op for case in everything} == set(suite.OPS)
    assert {case.seqlen for case in everything if case.op == "rotate"} >= set(suite.SWEEP)
    assert all(case.needs > 0 and case.effort > 0 and case.set_bytes > 0 for case in everything)
    assert set(map(str, suite.quick(device))) <= set(names) or device == "cpu"
    assert sum(bool(case.targets) for case in everything) > 4


@pytest.mark.slow
def test_under_pytest_benchmark(tmp_path):
    """bench/ hands the same measurements to pytest-benchmark."""
    out = tmp_path / "b.json"
    command = ["-m", "pytest", "bench", "--quick", "-q", "--json", str(out), "-k", "decode"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["op"] for row in results.read(out)["results"]} == {"rotate", "projection"}
