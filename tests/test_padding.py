"""Which positions are real: each function against a loop over the mask, and no second home of any of them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from pellucid import padding
from tests.test_house import PACKAGE

MASKS = [
    [[1, 1, 1, 1], [1, 1, 1, 1]],
    [[0, 0, 1, 1], [1, 1, 1, 1]],
    [[1, 1, 0, 0], [1, 0, 0, 0]],
    [[0, 1, 1, 0], [1, 0, 1, 1]],  # a hole: a position that nothing attends to
    [[0, 0, 0, 0], [0, 0, 0, 1]],
]


@pytest.fixture(params=MASKS, ids=str)
def rows(request: pytest.FixtureRequest) -> list[list[int]]:
    return request.param


@pytest.fixture(params=[torch.int64, torch.bool, torch.float32], ids=str)
def mask(rows: list[list[int]], request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(rows).to(request.param)


def test_places_count_the_real_positions_before(rows: list[list[int]], mask: Tensor) -> None:
    expected = [[sum(row[:i]) if row[i] else -1 for i in range(4)] for row in rows]
    assert padding.places(mask).tolist() == expected
    assert padding.counts(mask).tolist() == [sum(row) for row in rows]


def test_first_and_last_real_position(rows: list[list[int]], mask: Tensor) -> None:
    assert padding.last_real(mask).tolist() == [max((i for i in range(4) if row[i]), default=3) for row in rows]
    assert padding.before_first_real(mask).tolist() == [[not any(row[: i + 1]) for i in range(4)] for row in rows]


def test_predicted_positions_and_their_targets_are_real(rows: list[list[int]], mask: Tensor) -> None:
    assert padding.predicted(mask).tolist() == [[bool(row[i] and row[i + 1]) for i in range(3)] for row in rows]
    assert padding.has_padding(mask) == any(0 in row for row in rows)


def test_what_holds_no_token_is_no_target(rows: list[list[int]], mask: Tensor) -> None:
    tokens = torch.tensor([[padding.NO_TOKEN, padding.NO_TOKEN, 5, 6]] * 2)
    expected = [[False, bool(row[1] and row[2]), bool(row[2] and row[3])] for row in rows]
    assert padding.targets(tokens, mask).tolist() == expected
    assert padding.targets(tokens, None).tolist() == [[False, True, True]] * 2


def test_a_mask_over_cached_positions_ends_with_those_of_the_run(rows: list[list[int]], mask: Tensor) -> None:
    own = padding.last_columns(mask, 3)
    assert own is not None
    assert own.long().tolist() == [row[1:] for row in rows]
    assert padding.last_columns(None, 3) is None


def test_without_a_mask_everything_is_real() -> None:
    assert padding.real_positions(None, 2, 3).tolist() == [[True] * 3] * 2
    assert not padding.has_padding(None)


OTHER_HOMES = {
    "places": r"cumsum\([^)]*\)\s*-\s*1",
    "before_first_real": r"cumsum\([^)]*\)\s*==\s*0",
    "predicted": r"\[[^\]]*:-1\][^\n&]*&|&[^\n&]*\[[^\]]*:-1\]",
    "last_real": r"flip\(-1\)",
    "last_columns": r"mask\[:, -",
}


@pytest.mark.parametrize("rule", OTHER_HOMES)
def test_each_rule_has_one_home(rule: str) -> None:
    pattern = re.compile(OTHER_HOMES[rule])
    assert pattern.search((PACKAGE / "padding.py").read_text()) or rule == "last_columns"  # it would find a second one
    elsewhere = [
        str(path) for path in PACKAGE.rglob("*.py") if path.name != "padding.py" and pattern.search(path.read_text())
    ]
    assert not elsewhere, f"pellucid.padding.{rule} has this rule"
