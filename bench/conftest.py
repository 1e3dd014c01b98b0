"""Runs the cases under pytest-benchmark: options, one test item per case, tables at the end."""

from pathlib import Path

import pytest
import torch

from rope_fused.cli.bench import harness, processes, results, suite, table

RUN = pytest.StashKey[results.Run]()


class Replay:
    """A clock that moves only when a recorded time is played.

    pytest-benchmark times one thing after the other, while our variants ran in turn. By this clock,
    it sees what was measured of rope_fused; the others are in extra_info.
    """

    __name__ = "replay"

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def play(self, seconds):
        self.now += seconds


def pytest_addoption(parser):
    group = parser.getgroup("rope_fused benchmarks")
    group.addoption(
        "--quick", action="store_true", help="fewer cases, fewer rounds: a minute or two"
    )
    group.addoption("--json", type=Path, metavar="FILE", help="write the results there")


def pytest_configure(config):
    settings = results.settings(config.option.quick, _device())
    config.stash[RUN] = results.Run(settings)
    # Of torch.compile's own making.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")
    if not config.option.benchmark_verbose:
        # Our tables have the ratios; --benchmark-verbose prints both.
        config.option.benchmark_quiet = True


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    choose = suite.quick if metafunc.config.option.quick else suite.everything
    metafunc.parametrize(
        "case",
        [
            pytest.param(
                case,
                id=str(case).replace(" ", "-").replace(",", ""),
                marks=pytest.mark.benchmark(group=case.op, timer=Replay()),
            )
            for case in choose(_device())
            if case.op in metafunc.module.OPS
        ],
    )


@pytest.fixture
def measure(request, benchmark, case):
    """Runs the case, and hands the rounds of rope_fused to pytest-benchmark."""
    config = request.config
    clock = request.node.get_closest_marker("benchmark").kwargs["timer"]

    def run():
        if case.needs > suite.memory(case.device):
            pytest.skip("more memory than there is")
        announce(config, str(case))
        rounds = [0.0]  # disabled: one round of nothing
        if not benchmark.enabled:
            harness.run(case, timed=False)
        else:
            outcomes = processes.run(case, quick=config.option.quick)
            config.stash[RUN].add(case, outcomes)
            for row in results.rows(case, outcomes):
                benchmark.extra_info[row["impl"]] = row["median_us"]
            rounds = outcomes[harness.OURS].timing.rounds
        recorded = iter(rounds)
        benchmark.pedantic(clock.play, setup=lambda: ((next(recorded),), {}), rounds=len(rounds))

    return run


def announce(config, text):
    """Say what is being measured now, past pytest's capturing."""
    manager = config.pluginmanager
    reporter = manager.get_plugin("terminalreporter")
    if reporter.verbosity < 0:
        return
    with manager.get_plugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(text)


def pytest_terminal_summary(terminalreporter, config):
    run = config.stash[RUN]
    if not run.document["results"]:
        return
    terminalreporter.section("ratios")
    for line in table.text(run.document).splitlines():
        terminalreporter.write_line(line)
    if config.option.json:
        run.out = config.option.json
        run.finish()
        terminalreporter.write_line(f"Written to {config.option.json}")
