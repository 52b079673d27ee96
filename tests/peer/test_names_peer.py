"""docs/from_transformer_lens.md lists every public name of TransformerLens' bridge, cache and utilities, and says the truth."""

from __future__ import annotations

import re
from typing import Any

import pytest

import pellucid
from pellucid import TransformerBridge, utilities
from pellucid.peer_names import ANALYSIS, BRIDGE, CACHE, NOT_HERE, PACKAGE, UTILITIES
from pellucid.tools import analysis
from tests.models import make_bloom

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra 'peer')")

from scripts import make_peer_names_page as page

TEXT = page.PAGE.read_text("utf-8").partition(page.BEGIN)[2].partition(page.END)[0]
PARTS = dict(zip(page.TITLES, re.split(r"^### .*$", TEXT, flags=re.M)[1:], strict=False))
PLACES = [BRIDGE, CACHE, UTILITIES, PACKAGE, ANALYSIS]


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    return page.peers()


@pytest.mark.parametrize("place", PLACES)
def test_every_name_is_listed_where_it_belongs(place: str, names: dict[str, list[str]]) -> None:
    same, differ, absent, left = page.answers(place, names[place])
    assert not left
    line = next(line for line in PARTS[place].splitlines() if line.startswith("Here, and the same"))
    assert re.findall(r"`([^`]+)`", line) == same
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", PARTS[place], flags=re.M))
    assert rows == differ | absent
    assert set(page.DIFFERENT[place]) <= set(names[place])
    assert set(NOT_HERE[place]) <= set(names[place]) | {"component_mapping", "hook_aliases", "processor"}


@pytest.mark.parametrize("place", [BRIDGE, UTILITIES, PACKAGE, ANALYSIS])
def test_a_name_that_is_not_here_says_so(place: str) -> None:
    rooms = {UTILITIES: utilities, PACKAGE: pellucid, ANALYSIS: analysis}
    owner: Any = TransformerBridge(make_bloom()) if place == BRIDGE else rooms[place]
    for name in NOT_HERE[place]:
        with pytest.raises(AttributeError, match=f"has no {name}, a name of TransformerLens'"):
            getattr(owner, name)
