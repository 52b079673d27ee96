"""Bars: one number a layer, head or language; several results side by side; a panel for each place of a second axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xarray

from pellucid.arguments import check_list
from pellucid.errors import InputError
from pellucid.plots.axis import Labels, check_labels, check_words
from pellucid.plots.extra import need
from pellucid.plots.picture import SERIES, Panel, Picture, Scale
from pellucid.plots.results import Numbers, facets, finite_of, labelled, labelled_all, shared_axes, words
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
    interval: tuple[Numbers, Numbers] | None = None,
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
        interval: lower and upper ends, with the axes of the (first) result, drawn as a line at each of its bars: an error.
            What it is of, say in ``subtitle``.

    Returns:
        a figure with a trace for each panel and result.

    Raises:
        InputError: not these axes, complex numbers, nothing to draw, no finite number, results with different axes; an
            interval whose lower end is above its upper end.
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
    ends = _ends(interval)
    axes = shared_axes(results | ends, dims, labels)
    lines = [end.transpose(*dims).values.astype(np.float64).reshape(-1, len(axes[-1])) for end in ends.values()]
    if lines:  # half an interval is none
        lines = list(np.where(np.isfinite(lines).all(0), lines, np.nan))
    if lines and (lines[0] > lines[1]).any():
        count = int((lines[0] > lines[1]).sum())
        raise InputError(
            f"interval is (lower ends, upper ends): {count} lower ends are above. Give the lower ones first."
        )
    heights = np.stack(
        [one.transpose(*dims).values.astype(np.float64).reshape(-1, len(axes[-1])) for one in results.values()], axis=1
    )
    finite = finite_of([heights])
    notes = paragraphs(subtitle)
    if finite.size < heights.size:
        notes.append(f"No bar: no finite number ({heights.size - finite.size:,} of {heights.size:,}).")
    reach = np.concatenate([finite, *(line[np.isfinite(line)] for line in lines)])
    low, high = min(0.0, float(reach.min())), max(0.0, float(reach.max()))
    room = 0.05 * (high - low) or 1.0
    up = Scale(unit, low - room if low < 0 else 0.0, high + room if high > 0 or low == 0 else 0.0)
    headings = [""] if panels_of is None else panels_of.headings
    panels = tuple(
        _with_ends(Panel(heading, grid), [line[number] for line in lines])
        for number, (heading, grid) in enumerate(zip(headings, heights, strict=True))
    )
    need("plotly")
    from pellucid.plots.figures import figure_of

    return figure_of(Picture(title, tuple(notes), axes[-1], up, panels, tuple(results)))


def _ends(interval: tuple[Numbers, Numbers] | None) -> dict[str, xarray.DataArray]:
    """The lower and the upper ends, or none.

    Raises:
        InputError: not two, or no numbers.
    """
    if interval is None:
        return {}
    if len(check_list("interval", interval, "lower ends and upper ends")) != 2:
        raise InputError(f"interval is (lower ends, upper ends); found {len(interval)} entries.")
    names = ("the lower end of interval", "the upper end of interval")
    return {name: labelled(end, name) for name, end in zip(names, interval, strict=True)}


def _with_ends(panel: Panel, ends: list[np.ndarray]) -> Panel:
    """A panel with the interval of each bar of its first series, if there are any."""
    if not ends:
        return panel
    both = np.stack(ends)
    said = tuple((f"from {low:.6g} to {high:.6g}",) if np.isfinite(low) else () for low, high in both.T.tolist())
    return replace(panel, ends=both, said=(said,))


def _along(first: xarray.DataArray, facet: str | None) -> str:
    """The axis along."""
    left = [str(dim) for dim in first.dims if dim != facet]
    if len(left) != 1:
        raise InputError(
            f"Bars have one axis; this leaves {len(left)}: {', '.join(left) or 'none'}. Choose places with "
            "result.isel(...), or give the axis that gets a panel for each place, facet=."
        )
    return left[0]
