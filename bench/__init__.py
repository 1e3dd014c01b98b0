"""Benchmarks: rope_fused beside what one would use instead and beside the limit, in one run.

    make bench                        # everything: half an hour or more on two cores
    make bench ARGS="--quick"         # what matters most, in a minute or two
    make bench ARGS="--json bench/results/NAME.json -k 'unrotate and bfloat16'"
    pytest bench --benchmark-disable  # compares the results and times nothing

A case is measured as a whole: its variants first have to give equal results, then they run in turn,
round after round, in both orders. Each variant is a test item, whose rounds are handed to
pytest-benchmark, so that --benchmark-json, --benchmark-compare and its other options work.
No time ever fails a test.
"""
