"""Heat maps: layer x position, layer x head, position x position, language x language; one, or several on one scale.

Colours are cmocean's (Thyng et al. 2016, "True colors of oceanography"): even steps of the value are even steps to the
eye, also to those who see few colours. ``balance`` runs from blue through near white to red around a middle value,
``dense`` from near white to purple between two ends. A place without a finite number is a grey gap, and hovering names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
from plotly.graph_objects import Figure, Heatmap

from pellucid.arguments import check_list, check_mapping, check_number
from pellucid.errors import InputError
from pellucid.plots.axis import Axis, Labels, axis_of, check_labels, check_words
from pellucid.plots.figures import NotebookFigure
from pellucid.plots.panels import Panels, axis_key, best_columns, check_panels, layout
from pellucid.plots.text import escaped, lines, visible, wrapped

BALANCE = ("#171c42", "#293a8f", "#0b66bd", "#4590b9", "#8eb5c2", "#d2d8db", "#f1eceb")
BALANCE_ABOVE = ("#f1eceb", "#e6d2cc", "#d59d89", "#c46548", "#ac2b24", "#780e28", "#3c0911")
DENSE = (
    *("#e6f0f0", "#bfdde5", "#9cc9e2", "#81b4e3", "#739ae4", "#757fdd"),
    *("#7864ca", "#774aaf", "#71328d", "#641f68", "#501442", "#360e24"),
)
GAP_COLOUR = "#b3b3b3"
MOST_CELLS = 300_000
"""Cells of one picture; each carries its hover text."""

_CELL, _PRINTED_CELL, _SMALLEST_PANEL = 30.0, 46.0, 120.0
_WIDEST, _HIGHEST, _NARROWEST_CELL = 1100.0, 1400.0, 14.0
_BAR_ROOM, _MOST_PRINTED = 120.0, 144


@dataclass(frozen=True)
class _Colours:
    """Two ends and the colours between them, the middle one given where they diverge."""

    low: float
    high: float
    middle: float | None

    def settings(self, unit: str, pixels: float) -> dict[str, Any]:
        shares = np.linspace(0.0, 0.5, len(BALANCE)).tolist()
        if self.middle is None:
            scale = list(zip(np.linspace(0.0, 1.0, len(DENSE)).tolist(), DENSE, strict=True))
        else:
            below = list(zip(shares, BALANCE, strict=True))
            scale = below + [(0.5 + s, colour) for s, colour in zip(shares[1:], BALANCE_ABOVE[1:], strict=True)]
        written = [escaped(line) for line in wrapped(visible(unit), pixels, 12)]
        return {
            "cmin": self.low,
            "cmax": self.high,
            "colorscale": scale,
            "showscale": True,
            "colorbar": {
                "title": {"text": lines(written), "side": "right"},
                "lenmode": "pixels",
                "len": pixels,
                "thickness": 14,
                "x": 1,
                "xanchor": "left",
                "xpad": 14,
                "y": 1,
                "yanchor": "top",
                "ypad": 0,
                "outlinewidth": 0,
            },
        }


def heat_map(
    result: xarray.DataArray,
    *,
    title: str,
    unit: str,
    subtitle: str | None = None,
    x: str | None = None,
    y: str | None = None,
    facet: str | None = None,
    labels: Labels | None = None,
    centre: float | None = 0.0,
    limits: tuple[float, float] | None = None,
    print_values: bool | None = None,
) -> Figure:
    """A heat map of a result with two axes, or one for each place of a third, all on one colour scale.

    Both axes count places 0, 1, 2, ...: labels are only the text of ticks, so the same token may stand twice. Row 0 is at
    the top. All text is shown as it is, never read as markup.

    Args:
        result: numbers ``[y, x]``, in any order of axes; ``[facet, y, x]`` with ``facet``.
        title: what is shown: the metric and the prompt.
        unit: what a colour means; the title of the colour bar.
        subtitle: a smaller line below the title.
        x: the axis along; by default the last one left.
        y: the axis down; by default the other.
        facet: the axis that gets a panel for each of its places, at most 128.
        labels: for some axes, labels or the name of the coordinate that holds them. By default the one coordinate with
            text along the axis, or its numbers.
        centre: the value in the middle of blue and red, whose ends are equally far from it; ``None`` for one hue from
            the least to the largest value.
        limits: ends of the colour scale, instead of those found in the result; with ``centre`` equally far from it.
        print_values: write values into cells; by default where the picture has at most 144 of them.

    Returns:
        a figure with a trace for each panel, its ``z`` the numbers ``[y, x]``.

    Raises:
        InputError: not these axes, complex numbers, no cell or over 300,000, no finite number, labels that do not fit,
            limits that do not.
    """
    check_words(title, unit, subtitle)
    _check_array(result, "the result")
    dims = [str(dim) for dim in result.dims]
    if facet is not None and facet not in dims:
        raise InputError(f"facet: there is no axis {facet} to make panels of; the result has {', '.join(dims)}.")
    if facet is None:
        panels = {"": result}
    else:
        check_panels(result.sizes[facet], f"the axis {facet}")
        names = axis_of(result, facet, labels)
        panels = {}
        for place, name in enumerate(names.headings):
            shown = name if name not in panels else f"{name} ({place})"
            panels[shown] = result.isel({facet: place}, drop=True)
    check_labels(labels, dims)
    left = {dim: texts for dim, texts in (labels or {}).items() if dim != facet}
    return _draw(panels, title, unit, subtitle, x, y, left, centre, limits, print_values)


def heat_maps(
    results: Mapping[str, xarray.DataArray],
    *,
    title: str,
    unit: str,
    subtitle: str | None = None,
    x: str | None = None,
    y: str | None = None,
    labels: Labels | None = None,
    centre: float | None = 0.0,
    limits: tuple[float, float] | None = None,
    print_values: bool | None = None,
) -> Figure:
    """Heat maps of results with the same axes, such as a measurement and its random control, on one colour scale.

    Args:
        results: a heading for each panel, and its numbers ``[y, x]``.
        title: as in :func:`heat_map`, and so are the others.
        unit: what a colour means.
        subtitle: a smaller line below the title.
        x: the axis along.
        y: the axis down.
        labels: for some axes, labels or the name of a coordinate.
        centre: the value in the middle of the colours, or ``None``.
        limits: ends of the colour scale.
        print_values: write values into cells.

    Raises:
        InputError: as :func:`heat_map`; results with different axes or labels.
    """
    check_words(title, unit, subtitle)
    check_mapping("results", results, "a heading to a result")
    check_panels(len(results), "the mapping of results")
    for heading, result in results.items():
        _check_array(result, f"{heading!r}")
    return _draw(results, title, unit, subtitle, x, y, labels, centre, limits, print_values)


def _check_array(result: xarray.DataArray, what: str) -> None:
    if not isinstance(result, xarray.DataArray):
        raise InputError(f"A picture is drawn from an xarray.DataArray; {what} is of type {type(result).__name__}.")
    if result.dtype.kind not in "fiub":
        raise InputError(f"A picture is drawn from real numbers; {what} holds {result.dtype}.")
    if not result.size:
        raise InputError(f"There is nothing to draw: {what} has the sizes {dict(result.sizes)}.")


def _draw(
    results: Mapping[str, xarray.DataArray],
    title: str,
    unit: str,
    subtitle: str | None,
    x: str | None,
    y: str | None,
    labels: Labels | None,
    centre: float | None,
    limits: tuple[float, float] | None,
    print_values: bool | None,
) -> Figure:
    first = next(iter(results.values()))
    down, along = _axes(first, x, y)
    check_labels(labels, (down, along))
    y_axis, x_axis = axis_of(first, down, labels), axis_of(first, along, labels)
    for heading, result in results.items():
        if set(result.dims) != {down, along} or result.sizes != first.sizes:
            raise InputError(
                f"Panels share their axes: {heading!r} has {dict(result.sizes)}, the first one {dict(first.sizes)}."
            )
        if (axis_of(result, down, labels), axis_of(result, along, labels)) != (y_axis, x_axis):
            raise InputError(f"Panels share their labels: those of {heading!r} are not those of the first one.")
    grids = [_numbers(result.transpose(down, along).values) for result in results.values()]
    cells = sum(grid.size for grid in grids)
    if cells > MOST_CELLS:
        raise InputError(
            f"The picture would have {cells:,} cells; at most {MOST_CELLS:,} are drawn: take a part of it."
        )
    finite = np.concatenate([grid[np.isfinite(grid)].ravel() for grid in grids]).astype(float)
    if not finite.size:
        raise InputError(f"There is nothing to draw: none of the {cells:,} numbers is finite.")
    colours = _colours(finite, centre, limits)
    printed = cells <= _MOST_PRINTED if print_values is None else print_values
    panels = _sized(list(results), x_axis, y_axis, printed)
    notes = [] if subtitle is None else [subtitle]
    if finite.size < cells:
        notes.append(f"Grey: no finite number ({cells - finite.size:,} of {cells:,}).")
    bar = max(140.0, min(panels.total[1], 420.0))
    settings = layout(panels, x_axis, y_axis, title=title, subtitle=notes, right=_BAR_ROOM, tall=bar)
    settings["coloraxis"] = colours.settings(unit, bar)
    figure = NotebookFigure()
    for number, (heading, grid) in enumerate(zip(results, grids, strict=True)):
        if not np.isfinite(grid).all():
            settings.update(plot_bgcolor=GAP_COLOUR)
        figure.add_trace(_trace(grid, x_axis, y_axis, heading, unit, axis_key(number), finite if printed else None))
    return figure.update_layout(settings)


def _axes(result: xarray.DataArray, x: str | None, y: str | None) -> tuple[str, str]:
    """The axes down and along."""
    dims = [str(dim) for dim in result.dims]
    if len(dims) != 2:
        raise InputError(
            f"A heat map has two axes; this has {len(dims)}: {', '.join(dims) or 'none'}. Choose places with "
            "result.isel(...), or give the axis that gets a panel for each place, facet=."
        )
    for asked in (x, y):
        if asked is not None and asked not in dims:
            raise InputError(f"There is no axis {asked} left to draw; there are {dims[0]} and {dims[1]}.")
    if x is not None and x == y:
        raise InputError(f"x and y are both {x}; the axes are {dims[0]} and {dims[1]}.")
    if x is None:
        x = dims[1] if y != dims[1] else dims[0]
    return (dims[0] if x == dims[1] else dims[1]), x


def _numbers(values: np.ndarray) -> np.ndarray:
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def _ends(limits: tuple[float, float]) -> tuple[float, float]:
    ends = check_list("limits", limits, "two numbers, the lower one first")
    if len(ends) != 2:
        raise InputError(f"limits has to be two finite numbers, the lower one first; found {limits!r}.")
    low, high = (check_number("an entry of limits", end) for end in ends)
    return low, high


def _colours(finite: np.ndarray, centre: float | None, limits: tuple[float, float] | None) -> _Colours:
    if centre is not None:
        centre = check_number("centre", centre)
    if limits is not None:
        low, high = _ends(limits)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InputError(f"limits has to be two finite numbers, the lower one first; found {limits}.")
        if centre is not None and not math.isclose(centre - low, high - centre, rel_tol=1e-9):
            raise InputError(
                f"limits {limits} are not equally far from centre {centre}: two colours as strong would mean different "
                "changes. Give other limits, or centre=None."
            )
        return _Colours(low, high, centre)
    low, high = float(finite.min()), float(finite.max())
    if centre is None:
        return _Colours(low, high if high > low else low + 1.0, None)
    most = max(abs(low - centre), abs(high - centre)) or 1.0
    return _Colours(centre - most, centre + most, centre)


def _sized(headings: Sequence[str], x: Axis, y: Axis, printed: bool) -> Panels:
    """Cells as large as the page allows."""
    cell = _PRINTED_CELL if printed else _CELL
    width = max(_SMALLEST_PANEL, min(cell * len(x), _WIDEST))
    height = max(_SMALLEST_PANEL / 2, min((0.75 if printed else 1.0) * cell * len(y), _HIGHEST))
    columns = best_columns(len(headings), width, height, int(_WIDEST / (_NARROWEST_CELL * len(x))))
    rows = math.ceil(len(headings) / columns)
    smallest = 40.0 if len(headings) > 1 else _SMALLEST_PANEL / 2
    if not printed:
        width = max(_SMALLEST_PANEL if len(headings) < 10 else 70.0, min(width, _WIDEST / columns))
        height = max(smallest, min(height, _HIGHEST / rows))
    return Panels(headings, columns, width, height)


def _trace(
    grid: np.ndarray, x: Axis, y: Axis, heading: str, unit: str, key: str, printed: np.ndarray | None
) -> Heatmap:
    """One panel; ``printed`` are all finite numbers of the picture, where they are written into the cells."""
    above = [escaped(visible(heading))] if heading else []
    rows, columns = ([axis.hover(place) for place in range(len(axis))] for axis in (y, x))
    named = escaped(visible(unit))
    hover = [
        [lines([*above, rows[i], columns[j], f"{named}: {_value(value)}"]) for j, value in enumerate(row)]
        for i, row in enumerate(grid.tolist())
    ]
    trace: dict[str, Any] = {"z": grid, "hovertext": hover, "hoverinfo": "text", "hoverongaps": True}
    if printed is not None:
        decimals = _decimals(float(np.abs(printed).max()))
        trace["text"] = [[_short(value, decimals) for value in row] for row in grid.tolist()]
        trace["texttemplate"] = "%{text}"
    return Heatmap(coloraxis="coloraxis", xaxis=f"x{key}", yaxis=f"y{key}", name=above[0] if above else None, **trace)


def _value(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.6g}"
    return "not a number (NaN)" if math.isnan(value) else f"{value:+}"


def _decimals(most: float) -> int | None:
    """Decimals that write numbers up to ``most`` in about three digits; ``None`` if only powers of ten can."""
    power = math.floor(math.log10(most)) if most > 0 else 0
    return None if power > 4 or power < -3 else max(0, min(4, 2 - power))


def _short(value: float, decimals: int | None) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:.1e}" if decimals is None else f"{round(value, decimals) + 0.0:.{decimals}f}"
