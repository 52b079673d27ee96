"""Circuits drawn: each edge's score where its part and its input cross; the curve's numbers as bars."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly")

from pellucid.plots import circuit_map, faithfulness_bars, save_picture
from tests.arguments.plots import CURVE, EDGES


def test_edges_cross_where_they_are(tmp_path: Path) -> None:
    figure = circuit_map(EDGES)
    grid = np.array(figure.data[0].z, dtype=float)
    # Down L0H1.v, final; along embed, L0H1.
    np.testing.assert_array_equal(grid, [[0.5, np.nan], [np.nan, -1.0]])
    assert list(figure.layout.xaxis.ticktext) == ["embed", "L0H1"]
    assert "2 edges" in figure.layout.title.text
    assert "<svg" in save_picture(figure, tmp_path / "a.svg").read_text()


def test_the_stream_orders_both_axes() -> None:
    names = ["L10H2", "L2.mlp_out", "L2H11", "embed", "L2H3"]
    ends = ["final", "L11.mlp_in", "L11H2.v", "L11H2.q", "L3H0.k"]
    figure = circuit_map(EDGES.isel(edge=[0] * 5).assign_coords(sender=("edge", names), receiver=("edge", ends)))
    assert list(figure.layout.xaxis.ticktext) == ["embed", "L2H3", "L2H11", "L2.mlp_out", "L10H2"]
    assert list(figure.layout.yaxis.ticktext) == ["L3H0.k", "L11H2.q", "L11H2.v", "L11.mlp_in", "final"]


def test_the_curve_as_bars() -> None:
    figure = faithfulness_bars(CURVE)
    heights = {trace.name: list(trace.y) for trace in figure.data}
    assert heights["strongest edges"] == [0, 0.5, 1]
    assert heights["random edges"] == [0, 0.1, 1]
    assert "CPR 0.50" in figure.layout.title.text
    assert "random edges" not in {trace.name for trace in faithfulness_bars(CURVE.isel(random=[])).data}


def test_the_curve_has_its_interval_and_says_so() -> None:
    curve = CURVE.assign(low=("size", [0.0, 0.25, 1.0]), high=("size", [0.0, 1.5, 1.0]))
    figure = faithfulness_bars(curve)
    strongest, random = figure.data
    assert list(strongest.y + strongest.error_y.array) == [0, 1.5, 1]
    assert list(strongest.y - strongest.error_y.arrayminus) == [0, 0.25, 1]
    assert random.error_y.array is None
    assert "95 % interval" in figure.picture.notes[0]
    of_one_pair = CURVE.assign(low=("size", [np.nan] * 3), high=("size", [np.nan] * 3))
    assert not faithfulness_bars(of_one_pair).picture.notes
