"""What a fault is."""

from typing import NamedTuple


class Fault(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; each of `tests` then fails by a number."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(file, *faults):
    """Faults of one file: (what, old, new, *tests), where "x::y" is tests/test_x.py::y."""
    found = []
    for what, old, new, *tests in faults:
        paths = (test.replace("::", ".py::", 1) for test in tests)
        found.append(Fault(what, file, old, new, tuple(f"tests/test_{path}" for path in paths)))
    return found
