"""The list of planted faults fits the code; mutations.py, which plants them, takes its time."""

import re
from collections import Counter
from pathlib import Path

import mutations
from faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]


def test_every_fault_can_be_planted():
    """Code that a fault changes was itself changed: the fault moves along, in tests/faults."""
    assert list(mutations.complaints(FAULTS)) == []
    assert all(fault.old != fault.new and fault.tests for fault in FAULTS)
    assert len(FAULTS) >= 60 and max(Counter(FAULTS).values()) == 1


def test_the_tests_they_name_are_here():
    for test in {test.split("[")[0] for fault in FAULTS for test in fault.tests}:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test
