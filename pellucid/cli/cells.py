"""Labelled results as CSV, for spreadsheets: a line for each cell."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.storage.whole_files import whole_file


def write_cells(
    path: Path,
    places: Mapping[str, Sequence[Any]],
    tokens: Mapping[str, tuple[str, Sequence[str]]],
    numbers: Mapping[str, np.ndarray],
) -> None:
    """Write the place of each cell on each axis, the token there, and its numbers, empty where there is none.

    Args:
        path: the file, written whole or not at all.
        places: of each axis, in order.
        tokens: for an axis of positions the name of a column, and the token at each place.
        numbers: columns ``[*axes]``.
    """
    with whole_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        named = [[axis, *([tokens[axis][0]] if axis in tokens else [])] for axis in places]
        writer.writerow([*itertools.chain(*named), *numbers])
        said = [
            [[place, *([tokens[axis][1][at]] if axis in tokens else [])] for at, place in enumerate(along)]
            for axis, along in places.items()
        ]
        values = zip(*(column.ravel().tolist() for column in numbers.values()), strict=True)
        for cell, found in zip(itertools.product(*said), values, strict=True):
            writer.writerow([*itertools.chain(*cell), *("" if math.isnan(value) else repr(value) for value in found)])
