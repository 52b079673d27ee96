"""Heat maps: layer x position, layer x head, position x position, language x language; one, or several on one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray

from pellucid.arguments import check_list, check_number
from pellucid.errors import InputError
from pellucid.plots.axis import Axis, Labels, check_labels, check_words
from pellucid.plots.extra import need
from pellucid.plots.picture import Panel, Picture, Scale
from pellucid.plots.results import (
    Numbers,
    check_panels,
    facets,
    finite_of,
    label_notes,
    labelled_all,
    shared_axes,
    words,
)
from pellucid.plots.text import paragraphs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_CELLS = 300_000
"""Cells of one picture; each carries its hover text."""

_MOST_PRINTED = 144
_FAR, _FEWEST, _LEAST_SHARE = 5.0, 16, 1e-5
"""An outlier lies over 5 times as far out as all the rest, of 16 numbers or more. Where the rest is less than 1e-5 of it,
the rest may be rounding, which no colour should bring out."""


def heat_map(
    result: Numbers | Mapping[str, Numbers],
    *,
    title: str | None = None,
    unit: str | None = None,
    subtitle: str | None = None,
    x: str | None = None,
    y: str | None = None,
    facet: str | None = None,
    labels: Labels | None = None,
    centre: float | None = 0.0,
    limits: tuple[float, float] | None = None,
    clip: bool = True,
    print_values: bool | None = None,
    square: bool | None = None,
) -> Figure:
    """A heat map of a result with two axes, or one for each place of a third, or of each of several results.

    All panels have one colour scale. Both axes count places 0, 1, 2, ...: labels are only the text of ticks, so the same
    token may stand twice. Row 0 is at the top. All text is shown as it is, never read as markup. A place without a finite
    number is a grey gap.

    Args:
        result: numbers ``[y, x]``, in any order of axes; ``[facet, y, x]`` with ``facet``. The axes of a tensor or a numpy
            array are called ``panel``, ``row`` and ``column``. Or a heading for each panel, and its numbers ``[y, x]``, such
            as a measurement and its random control: :func:`heat_maps` is this function.
        title: what is shown: the metric and the prompt; by default what the (first) result says of itself.
        unit: what a colour means; the title of the colour bar; by default the result's name and units.
        subtitle: smaller lines below the title; a line break begins another paragraph.
        x: the axis along; by default the last one left.
        y: the axis down; by default the other.
        facet: the axis that gets a panel for each of its places, at most 128.
        labels: for some axes, labels or the name of the coordinate that holds them. By default the one coordinate with
            text along the axis, or its numbers.
        centre: the value in the middle of blue and red, whose ends are equally far from it; ``None`` for one hue from
            the least to the largest value.
        limits: ends of the colour scale, instead of those found in the result; with ``centre`` equally far from it.
        clip: leave outliers out of the colour scale: of 16 numbers or more at most one in a hundred (one at least), each
            over five times as far from ``centre`` (the median where it is ``None``) as all the rest. They have the colour
            of the end, and the picture says how many there are and which is the farthest, as it does with ``limits``.
        print_values: write values into cells; by default where the picture has at most 144 of them.
        square: cells as high as wide; by default of ``pos`` by ``key_pos``.

    Returns:
        a figure with a trace for each panel, its ``z`` the numbers ``[y, x]``.

    Raises:
        InputError: not these axes, complex numbers, no cell or over 300,000, no finite number, labels that do not fit,
            limits that do not, results with different axes or labels.
        MissingExtraError: Plotly is not installed.
    """
    need("plotly")
    from pellucid.plots.figures import figure_of

    check_words(title, unit, subtitle)
    results, first = labelled_all(result)
    check_labels(labels, [str(dim) for dim in first.dims])
    title, unit = words(first, title, unit)
    if facet is not None:
        headings = facets(first, facet, labels).headings
        names = [name if name not in headings[:n] else f"{name} ({n})" for n, name in enumerate(headings)]
        results = {name: first.isel({facet: n}, drop=True) for n, name in enumerate(names)}
        labels = {dim: texts for dim, texts in (labels or {}).items() if dim != facet}
    check_panels(len(results), "the mapping of results")
    dims = _axes(next(iter(results.values())), x, y)
    y_axis, x_axis = shared_axes(results, dims, labels)
    grids = [_numbers(one.transpose(*dims).values) for one in results.values()]
    cells = sum(grid.size for grid in grids)
    if cells > MOST_CELLS:
        raise InputError(
            f"The picture would have {cells:,} cells; at most {MOST_CELLS:,} are drawn: take a part of it."
        )
    finite = finite_of(grids)
    scale = _scale(finite, unit, centre, limits, clip)
    panels = tuple(Panel(heading, grid, scale) for heading, grid in zip(results, grids, strict=True))
    notes = [*paragraphs(subtitle), *label_notes(first, (y_axis, x_axis), labels)]
    if scale.below or scale.above:
        notes.append(_beyond(scale, panels, y_axis, x_axis))
    if finite.size < cells:
        notes.append(f"Grey: no finite number ({cells - finite.size:,} of {cells:,}).")
    printed = cells <= _MOST_PRINTED if print_values is None else print_values
    if square is None:
        square = set(dims) == {"pos", "key_pos"}
    counts = all(one.dtype.kind in "iub" for one in results.values())
    return figure_of(
        Picture(title, tuple(notes), x_axis, y_axis, panels, printed=printed, square=square, counts=counts)
    )


heat_maps = heat_map
"""The same, for several results."""


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


def _scale(
    finite: np.ndarray, unit: str, centre: float | None, limits: tuple[float, float] | None, clip: bool
) -> Scale:
    if centre is not None:
        centre = check_number("centre", centre)
    if limits is not None:
        low, high = _ends(limits)
        if not low < high:
            raise InputError(f"limits has to be two finite numbers, the lower one first; found {limits}.")
        if centre is not None and not math.isclose(centre - low, high - centre, rel_tol=1e-9):
            raise InputError(
                f"limits {limits} are not equally far from centre {centre}: two colours as strong would mean different "
                "changes. Give other limits, or centre=None."
            )
    else:
        kept = _without_outliers(finite, centre) if clip else finite
        low, high = float(kept.min()), float(kept.max())
        if centre is not None:
            most = max(abs(low - centre), abs(high - centre)) or 1.0
            low, high = centre - most, centre + most
        elif high <= low:
            high = low + 1.0
    return Scale(unit, low, high, centre is not None, bool(finite.min() < low), bool(finite.max() > high))


def _without_outliers(finite: np.ndarray, centre: float | None) -> np.ndarray:
    """All numbers but the few that lie far beyond a gap: at the last such gap, if there are several."""
    if finite.size < _FEWEST:
        return finite
    away = np.abs(finite - (np.median(finite) if centre is None else centre))
    farthest = np.sort(away)[::-1][: max(1, finite.size // 100) + 1]
    nearer = farthest[1:]
    gaps = (farthest[: len(nearer)] > _FAR * nearer) & (nearer > _LEAST_SHARE * farthest[0])
    return finite[away <= farthest[np.flatnonzero(gaps)[-1] + 1]] if gaps.any() else finite


def _beyond(scale: Scale, panels: Sequence[Panel], y: Axis, x: Axis) -> str:
    """What the picture says of numbers beyond the colour scale: how many there are, and which is the farthest."""
    values = np.stack([panel.values for panel in panels]).astype(np.float64)
    values[~np.isfinite(values)] = scale.low
    out = np.maximum(values - scale.high, scale.low - values)
    panel, row, column = map(int, np.unravel_index(int(out.argmax()), out.shape))
    place = ", ".join(filter(None, (panels[panel].heading, y.headings[row], x.headings[column])))
    return (
        f"Clipped: {(out > 0).sum():,} of {out.size:,} numbers lie beyond the colour scale ({scale.low:.4g} to "
        f"{scale.high:.4g}), the farthest {values[panel, row, column]:.4g} at {place}."
    )
