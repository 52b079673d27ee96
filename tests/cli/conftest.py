"""Tables are as wide as where nobody watches, whatever runs the tests (xdist sets a width of its own)."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
