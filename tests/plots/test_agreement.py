"""Estimates against measurements: what is counted where, and the line of identity."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from pellucid.errors import InputError
from pellucid.plots import agreement_map

pytest.importorskip("plotly", reason="needs the extra 'plots'")

NAN = float("nan")


def test_cells_lie_where_their_numbers_are() -> None:
    found = xr.Dataset(
        {
            "effect": (("estimator", "layer"), [[0.0, 1.0, 2.0, 3.0, 4.0], [4.0, 4.0, 4.0, 4.0, 0.0]]),
            "patched": ("layer", [0.0, 1.0, 4.0, NAN, 4.0]),
        },
        {"estimator": ["atp", "relp"]},
        {"site": "z", "summary": "said first\nsaid second"},
    )
    picture = agreement_map(found, estimator="atp", bins=4).picture  # type: ignore[attr-defined]
    (panel,) = picture.panels
    expected = np.full((4, 4), NAN)
    np.fill_diagonal(expected, 0.0)
    expected[0, 0], expected[1, 1], expected[2, 3], expected[3, 3] = 1, 1, 1, 1  # [estimated, patched], from below
    assert np.array_equal(panel.values, expected[::-1], equal_nan=True)
    assert picture.title == "atp of z against patching: 4 cells"
    assert picture.notes[0] == "said first"
    with pytest.raises(InputError, match="estimator is one of atp, relp; found None"):
        agreement_map(found)
