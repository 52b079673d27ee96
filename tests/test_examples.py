"""The scripts in examples/ run, fit on a screen, and show what they say they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).parents[1]
SHOWN = {
    "ablate_head.py": r"second half: \d\.\d\d\n  without L\dH\d: \+\d",
    "generate_with_a_hook.py": r"as it is: Everyone has.*\npushed:   Everyone has the right to freedom",
    "read_attention.py": r"head 0 looks at position +\d+ .*%\n(.*\n)*  head 7 looks",
}
"""For each example, a pattern that its output has."""


def test_every_example_is_here() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == SHOWN.keys()


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_runs(name: str) -> None:
    path = ROOT / "examples" / name
    assert path.read_text("utf-8").count("\n") <= 60
    done = forked.run([str(path)])
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWN[name], done.stdout), done.stdout
