"""Benchmarks under pytest-benchmark: what `rope-fused bench` measures, one test item for each case.

    make bench                        # everything: half an hour or more on two cores
    make bench ARGS="--quick"         # what matters most, in a minute or two
    make bench ARGS="--json FILE -k 'unrotate and bfloat16'"
    pytest bench --benchmark-disable  # compares the results and times nothing

What measures is rope_fused/cli/bench. Here its rounds are handed to pytest-benchmark, so that
--benchmark-json, --benchmark-compare and its other options work. No time ever fails a test.
"""
