"""Bars: one number a layer, head or language; several results side by side; a panel for each place of a second axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import xarray

from pellucid.errors import InputError
from pellucid.plots.axis import Labels, check_labels, check_words
from pellucid.plots.extra import need
from pellucid.plots.picture import SERIES, Panel, Picture, Scale
from pellucid.plots.results import Numbers, facets, finite_of, labelled_all, shared_axes, words
from pellucid.plots.text import paragraphs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def bars(
    result: Numbers | Mapping[str, Numbers],
    *,
    title: str | None = None,
    unit: str | None = None,
    subtitle: str | None = None,
    facet: str | None = None,
    labels: Labels | None = None,
) -> Figure:
    """Bars of a result with one axis, or under each other, on one scale, for each place of a second.

    Args:
        result: numbers ``[x]``, or ``[facet, x]`` with ``facet``; or up to six such results by name, whose bars stand side
            by side: a measurement and its random control.
        title: what is shown: the metric and the prompt; by default what the (first) result says of itself.
        unit: what the height of a bar means; by default the result's name and units.
        subtitle: smaller lines below the title; a line break begins another paragraph.
        facet: the axis that gets a panel for each of its places, at most 128.
        labels: for some axes, labels or the name of the coordinate that holds them, as in :func:`heat_map`.

    Returns:
        a figure with a trace for each panel and result.

    Raises:
        InputError: not these axes, complex numbers, nothing to draw, no finite number, results with different axes.
        MissingExtraError: Plotly is not installed.
    """
    check_words(title, unit, subtitle)
    results, first = labelled_all(result)
    check_labels(labels, [str(dim) for dim in first.dims])
    if len(results) > len(SERIES):
        raise InputError(f"Bars are drawn of 1 to {len(SERIES)} results; found {len(results)}.")
    title, unit = words(first, title, unit)
    panels_of = None if facet is None else facets(first, facet, labels)
    dims = ([] if facet is None else [facet]) + [_along(first, facet)]
    axes = shared_axes(results, dims, labels)
    heights = np.stack(
        [one.transpose(*dims).values.astype(np.float64).reshape(-1, len(axes[-1])) for one in results.values()], axis=1
    )
    finite = finite_of([heights])
    notes = paragraphs(subtitle)
    if finite.size < heights.size:
        notes.append(f"No bar: no finite number ({heights.size - finite.size:,} of {heights.size:,}).")
    low, high = min(0.0, float(finite.min())), max(0.0, float(finite.max()))
    room = 0.05 * (high - low) or 1.0
    up = Scale(unit, low - room if low < 0 else 0.0, high + room if high > 0 or low == 0 else 0.0)
    headings = [""] if panels_of is None else panels_of.headings
    panels = tuple(Panel(heading, grid) for heading, grid in zip(headings, heights, strict=True))
    need("plotly")
    from pellucid.plots.figures import figure_of

    return figure_of(Picture(title, tuple(notes), axes[-1], up, panels, tuple(results)))


def _along(first: xarray.DataArray, facet: str | None) -> str:
    """The axis along."""
    left = [str(dim) for dim in first.dims if dim != facet]
    if len(left) != 1:
        raise InputError(
            f"Bars have one axis; this leaves {len(left)}: {', '.join(left) or 'none'}. Choose places with "
            "result.isel(...), or give the axis that gets a panel for each place, facet=."
        )
    return left[0]
