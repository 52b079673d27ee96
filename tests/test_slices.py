"""Slices: the same entries as NumPy's own indexing, and as TransformerLens' ``Slice`` takes (its docstring's examples)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from pellucid.errors import InputError
from pellucid.slices import Slice

AXIS = 7

TAKEN: tuple[tuple[Any, list[int]], ...] = (
    (3, [3]),
    (-1, [6]),
    (np.int64(2), [2]),
    (torch.tensor(2), [2]),
    ((3,), [0, 1, 2]),
    ((1, 5), [1, 2, 3, 4]),
    ((1, 5, 2), [1, 3]),
    ((-2, None), [5, 6]),
    (slice(4, None), [4, 5, 6]),
    ([1, 4, 5], [1, 4, 5]),
    ([5, -7], [5, 0]),
    (torch.tensor([6, 0]), [6, 0]),
    (np.array([True, False, False, True, False, False, False]), [0, 3]),
    (None, list(range(AXIS))),
)


@pytest.mark.parametrize(("given", "taken"), TAKEN, ids=[repr(given) for given, _ in TAKEN])
def test_takes_the_entries(given: Any, taken: list[int]) -> None:
    tensor = torch.arange(2 * AXIS).reshape(2, AXIS)
    expected = tensor[:, taken]
    assert torch.equal(Slice.unwrap(given).apply(tensor, 1), expected)
    assert torch.equal(tensor[:, Slice.unwrap(given).positions(AXIS)], expected)
    assert Slice.of(given).indices(AXIS).tolist() == taken
    dropped = Slice(given).apply(tensor, -1)
    assert torch.equal(dropped, expected[:, 0] if Slice(given).mode == "int" else expected)


def test_a_slice_stays_itself() -> None:
    one = Slice(2)
    assert Slice.of(one) is one
    assert Slice.unwrap(one) is one
    assert Slice.unwrap(2).mode == "array"
    assert repr(one) == "Slice(2)"
    assert one.indices().tolist() == [2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (True, "found True"),
        ("1:3", "found '1:3'"),
        (1.5, "found 1.5"),
        ((), "A tuple is a range"),
        ((1, 2, 3, 4), "A tuple is a range"),
        ((0, "b"), "A tuple is a range"),
        ((4, 0, -1), "steps forward"),
        ([1.5], "integers or booleans"),
        ([[1, 2]], "in one list"),
    ],
)
def test_what_takes_nothing_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Slice(given)


def test_entries_outside_are_refused() -> None:
    tensor = torch.zeros(2, AXIS)
    with pytest.raises(InputError, match=r"asks for \[7\]; axis 1 has 7, 0 to 6"):
        Slice(AXIS).apply(tensor, 1)
    with pytest.raises(InputError, match="a mask of 2; the run has 7"):
        Slice([True, False]).positions(AXIS)
    with pytest.raises(InputError, match="keeps none of the run's 7"):
        Slice((9, 12)).positions(AXIS)
    with pytest.raises(InputError, match="pos_slice is empty"):
        Slice([]).positions(AXIS)
    with pytest.raises(InputError, match="max_ctx"):
        Slice((1, 2)).indices()
    with pytest.raises(InputError, match="no axis"):
        Slice(1).apply(tensor, 2)
