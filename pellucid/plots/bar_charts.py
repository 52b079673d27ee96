"""Bars: one number a layer, head or language; several results side by side; a panel for each place of a second axis."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray
from plotly.graph_objects import Bar, Figure

from pellucid.arguments import check_mapping
from pellucid.errors import InputError
from pellucid.plots.axis import Axis, Labels, axis_of, check_labels, check_words
from pellucid.plots.figures import NotebookFigure
from pellucid.plots.panels import Panels, ValueAxis, axis_key, check_panels, layout
from pellucid.plots.text import escaped, lines, visible, width

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's colours (2008), which readers with any kind of colour vision tell apart."""

_HIGH, _WIDEST = 150.0, 1000.0


def bars(
    result: xarray.DataArray | Mapping[str, xarray.DataArray],
    *,
    title: str,
    unit: str,
    subtitle: str | None = None,
    facet: str | None = None,
    labels: Labels | None = None,
) -> Figure:
    """Bars of a result with one axis, or under each other, on one scale, for each place of a second.

    Args:
        result: numbers ``[x]``, or ``[facet, x]`` with ``facet``; or up to six such results by name, whose bars stand side
            by side: a measurement and its random control.
        title: what is shown: the metric and the prompt.
        unit: what the height of a bar means.
        subtitle: a smaller line below the title.
        facet: the axis that gets a panel for each of its places, at most 128.
        labels: for some axes, labels or the name of the coordinate that holds them, as in :func:`heat_map`.

    Returns:
        a figure with a trace for each panel and result.

    Raises:
        InputError: not these axes, complex numbers, nothing to draw, no finite number, results with different axes.
    """
    check_words(title, unit, subtitle)
    if not isinstance(result, xarray.DataArray):
        check_mapping("result", result, "names to results, or is an xarray.DataArray")
    results = {"": result} if isinstance(result, xarray.DataArray) else result
    if not 1 <= len(results) <= len(COLOURS):
        raise InputError(f"Bars are drawn of 1 to {len(COLOURS)} results; found {len(results)}.")
    first = next(iter(results.values()))
    along = _check(results, facet)
    check_labels(labels, [str(dim) for dim in first.dims])
    x_axis = axis_of(first, along, labels)
    facets = None if facet is None else axis_of(first, facet, labels)
    for name, other in results.items():
        if axis_of(other, along, labels) != x_axis or (facet is not None and axis_of(other, facet, labels) != facets):
            raise InputError(f"Results share their labels: those of {name!r} are not those of the first one.")
    order = [along] if facet is None else [facet, along]
    heights = {
        name: other.transpose(*order).values.astype(np.float64).reshape(-1, len(x_axis))
        for name, other in results.items()
    }
    everything = np.concatenate([grid.ravel() for grid in heights.values()])
    finite = everything[np.isfinite(everything)]
    if not finite.size:
        raise InputError(f"There is nothing to draw: none of the {everything.size:,} numbers is finite.")
    headings = [""] if facets is None else list(facets.headings)
    notes = [] if subtitle is None else [subtitle]
    if finite.size < everything.size:
        notes.append(f"No bar: no finite number ({everything.size - finite.size:,} of {everything.size:,}).")
    bar = max(14.0, 14.0 * len(results) + 8)
    panels = Panels(headings, 1, max(260.0, min(bar * len(x_axis), _WIDEST)), 2 * _HIGH if facet is None else _HIGH)
    keyed = any(results)
    right = 60.0 + max(width(name) for name in results) if keyed else 24.0
    settings = layout(
        panels, x_axis, ValueAxis(visible(unit), _ends(finite)), title=title, subtitle=notes, right=right, tall=0.0
    )
    settings |= {"barmode": "group", "bargap": 0.2, "showlegend": keyed}
    settings["legend"] = {"x": 1, "xanchor": "left", "y": 1, "yanchor": "top"}
    figure = NotebookFigure()
    for number, heading in enumerate(headings):
        for colour, (name, grid) in zip(COLOURS, heights.items(), strict=False):
            figure.add_trace(_trace(grid[number], x_axis, (heading, name), unit, number, colour, keyed))
    return figure.update_layout(settings)


def _check(results: Mapping[str, xarray.DataArray], facet: str | None) -> str:
    """The axis along."""
    first = next(iter(results.values()))
    for name, result in results.items():
        what = f"{name!r}" if name else "the result"
        if not isinstance(result, xarray.DataArray):
            raise InputError(f"A picture is drawn from an xarray.DataArray; {what} is of type {type(result).__name__}.")
        if result.dtype.kind not in "fiub":
            raise InputError(f"A picture is drawn from real numbers; {what} holds {result.dtype}.")
        if not result.size:
            raise InputError(f"There is nothing to draw: {what} has the sizes {dict(result.sizes)}.")
        if dict(result.sizes) != dict(first.sizes):
            raise InputError(
                f"Results share their axes: {what} has {dict(result.sizes)}, the first {dict(first.sizes)}."
            )
    dims = [str(dim) for dim in first.dims]
    if facet is not None and facet not in dims:
        raise InputError(
            f"facet: there is no axis {facet} to make panels of; the result has {', '.join(dims) or 'none'}."
        )
    left = [dim for dim in dims if dim != facet]
    if len(left) != 1:
        raise InputError(
            f"Bars have one axis; this leaves {len(left)}: {', '.join(left) or 'none'}. Choose places with "
            "result.isel(...), or give the axis that gets a panel for each place, facet=."
        )
    if facet is not None:
        check_panels(first.sizes[facet], f"the axis {facet}")
    return left[0]


def _ends(finite: np.ndarray) -> tuple[float, float]:
    """Ends of the upright axis: 0 and all bars, with a little room."""
    low, high = min(0.0, float(finite.min())), max(0.0, float(finite.max()))
    room = 0.05 * (high - low) or 1.0
    return (low - room if low < 0 else 0.0), (high + room if high > 0 or low == 0 else 0.0)


def _trace(row: np.ndarray, x: Axis, names: tuple[str, str], unit: str, number: int, colour: str, keyed: bool) -> Bar:
    above = [escaped(visible(name)) for name in names if name]
    named = escaped(visible(unit))
    key = axis_key(number)
    return Bar(
        x=list(range(len(x))),
        y=np.where(np.isfinite(row), row, math.nan),
        hovertext=[
            lines([*above, x.hover(place), f"{named}: {value:.6g}"]) for place, value in enumerate(row.tolist())
        ],
        hoverinfo="text",
        marker={"color": colour},
        name=escaped(visible(names[1])) or None,
        legendgroup=escaped(visible(names[1])) or None,
        showlegend=keyed and number == 0,
        xaxis=f"x{key}",
        yaxis=f"y{key}",
    )
