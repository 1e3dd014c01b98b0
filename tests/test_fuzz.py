"""Some random calls against the reference; `make fuzz MINUTES=n` makes more of them."""

import pytest

import fuzz

CALLS = 1500


def test_random_calls(request):
    first = request.config.getoption("--seed") * 10**6
    for number in range(first, first + CALLS):
        try:
            fuzz.run(number)
        except Exception as error:
            raise AssertionError(f"{error}\n{fuzz.describe(number)}") from error


# Kinds of calls that the reference once got wrong: positions of no tokens; negative positions of a
# LongRoPE sequence whose first tokens have no table of their own.
@pytest.mark.parametrize("number", [2, 131])
def test_what_went_wrong_once(number):
    fuzz.run(number)
