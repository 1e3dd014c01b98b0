"""Runs the cases under pytest-benchmark: options, one test item per variant, tables at the end."""

from pathlib import Path

import pytest

from . import harness, results

RESULTS = pytest.StashKey[results.Results]()


class Replay:
    """A clock that moves only when a recorded time is played.

    pytest-benchmark times one variant after the other, while ours ran in turn. By this clock, it
    sees what was measured.
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
    group.addoption(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the results, say to bench/results/NAME.json",
    )


def pytest_configure(config):
    config.stash[RESULTS] = results.Results()
    # Of torch.compile's own making.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")
    if not config.option.benchmark_verbose:
        # Our tables have the ratios; --benchmark-verbose prints both.
        config.option.benchmark_quiet = True


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    quick = metafunc.config.option.quick
    metafunc.parametrize(
        "case, impl",
        [
            pytest.param(
                case,
                impl,
                id=f"{case}-{impl}".replace(" ", "-").replace(",", ""),
                marks=pytest.mark.benchmark(group=str(case), timer=Replay()),
            )
            for case in metafunc.module.CASES
            if case.quick or not quick
            for impl in case.impls
        ],
    )


@pytest.fixture
def measure(request, benchmark, case, impl):
    """Runs the whole case, once, and hands the rounds of this variant to pytest-benchmark."""
    config = request.config
    outcomes = config.stash[RESULTS].outcomes
    clock = request.node.get_closest_marker("benchmark").kwargs["timer"]

    def run():
        if case not in outcomes:
            announce(config, str(case))
            outcomes[case] = harness.run(case, config.option.quick, timed=benchmark.enabled)
        outcome = outcomes[case][impl]
        if isinstance(outcome, harness.Missing):
            pytest.skip(outcome.reason)
        if isinstance(outcome, Exception):
            raise outcome
        rounds = outcome.rounds if outcome else [0.0]  # disabled: one round of nothing
        recorded = iter(rounds)
        if outcome:
            benchmark.extra_info["orders_disagree"] = outcome.disagreement
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
    for number, line in enumerate(config.stash[RESULTS].lines()):
        if number == 0:
            terminalreporter.section("ratios")
        terminalreporter.write_line(line)
    if config.option.json:
        config.stash[RESULTS].write_json(config.option.json, results.settings(config.option.quick))
        terminalreporter.write_line(f"Written to {config.option.json}")
