"""One process in which TransformerLens is imported, for all modules that measure something there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import forked

MEASURED = ("cache_methods_peer", "edges_peer", "families_peer", "readings_peer")
"""Modules of :mod:`tests.peer.beside`; what each finds is shown by the file of tests that has its name."""


@pytest.fixture(scope="session")
def measured_beside(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What each module finds, of those whose tests are run."""
    files = {item.path.stem for item in request.session.items}
    names = [name for name in MEASURED if f"test_{name}" in files]
    done = forked.run(["-m", "tests.peer.beside", *names])
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.rpartition("\n")[2])
    return found
