"""The table of planted faults fits the package: what it changes is there, and the tests that have to notice."""

from __future__ import annotations

from functools import cache

from tests.oracles.planted_faults import FAULTS, ROOT


@cache
def source(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def test_every_fault_can_be_planted() -> None:
    assert not [fault.name for fault in FAULTS if fault.old not in source(fault.file) or fault.old == fault.new]


def test_every_fault_names_tests_that_are_there() -> None:
    files = {word.partition("::")[0] for fault in FAULTS for word in fault.tests.split() if word.startswith("tests/")}
    assert files
    assert not [file for file in files if not (ROOT / file).exists()]
