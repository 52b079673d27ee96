"""What a notebook keeps of a figure: enough to be shown where no Plotly is, so also in an export."""

from __future__ import annotations

import copy
import pickle
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import plotly.io
import pytest
import xarray

from pellucid.plots import bars, heat_map, heat_maps

GRID = xarray.DataArray(np.arange(12.0).reshape(3, 4), dims=("layer", "pos"))
FIGURES = {
    "heat_map": lambda: heat_map(GRID, title="t", unit="u"),
    "heat_maps": lambda: heat_maps({"a": GRID, "b": GRID}, title="t", unit="u"),
    "bars": lambda: bars(GRID, facet="layer", title="t", unit="u"),
}
EXPORTED = ("text/html", "image/svg+xml", "image/png")
"""What nbconvert and GitHub show of an output; Plotly's own form is not among them."""


@pytest.mark.parametrize("kind", FIGURES)
def test_a_figure_leaves_a_drawing_in_a_notebook(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")  # Plotly's choice in Jupyter
    figure: Any = FIGURES[kind]()
    assert not callable(getattr(figure, "_ipython_display_", None))  # IPython asks it first, and the bundle not at all
    bundle = figure._repr_mimebundle_()
    assert "application/vnd.plotly.v1+json" in bundle
    drawn = bundle["image/svg+xml"]
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert len(drawn) < 400_000
    for again in (copy.deepcopy(figure), pickle.loads(pickle.dumps(figure))):
        assert again._repr_mimebundle_()["image/svg+xml"] == drawn


def test_a_figure_that_cannot_be_drawn_leaves_a_page(monkeypatch: Any) -> None:
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")
    figure: Any = FIGURES["heat_map"]()
    figure.add_scatter(x=[0, 1], y=[0, 1])
    bundle = figure._repr_mimebundle_()
    assert set(bundle) & set(EXPORTED) == {"text/html"}
    assert "cdn" not in bundle["text/html"][:500]
