"""A picture as it is described, once, for every way of drawing it: panels of numbers, their axes, colours and words.

Plotly (:mod:`pellucid.plots.figures`), SVG (:mod:`pellucid.plots.svg`) and PNG (:mod:`pellucid.plots.png`) are three
readers of one :class:`Picture`. All text in it is plain: whoever writes markup escapes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pellucid.plots.axis import Axis
from pellucid.plots.text import cut, visible, width

BALANCE = ("#171c42", "#293a8f", "#0b66bd", "#4590b9", "#8eb5c2", "#d2d8db", "#f1eceb")
BALANCE_ABOVE = ("#f1eceb", "#e6d2cc", "#d59d89", "#c46548", "#ac2b24", "#780e28", "#3c0911")
DENSE = (
    *("#e6f0f0", "#bfdde5", "#9cc9e2", "#81b4e3", "#739ae4", "#757fdd"),
    *("#7864ca", "#774aaf", "#71328d", "#641f68", "#501442", "#360e24"),
)
"""Colours are cmocean's (Thyng et al. 2016, "True colors of oceanography"): even steps of the value are even steps to the
eye, also to those who see few colours. ``balance`` runs from blue through near white to red around a middle value,
``dense`` from near white to purple between two ends."""

SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito's colours (2008) for bars, which readers with any kind of colour vision tell apart."""

LONGEST_TEXT = 12
"""Characters of a text in a cell; what is under the pointer has all of them."""

GAP = "#b3b3b3"
"""A place without a finite number."""


@dataclass(frozen=True)
class Scale:
    """Numbers as colours or heights: what they are, the two ends, and whether some lie beyond, which get the ends' colours.

    ``diverging`` colours have their middle in the middle between the ends.
    """

    unit: str
    low: float
    high: float
    diverging: bool = False
    below: bool = False
    above: bool = False

    @property
    def stops(self) -> list[tuple[float, str]]:
        """Colours at shares of the way from the lower end to the upper."""
        colours = BALANCE + BALANCE_ABOVE[1:] if self.diverging else DENSE
        return list(zip(np.linspace(0.0, 1.0, len(colours)).tolist(), colours, strict=True))

    def colours(self, values: np.ndarray) -> np.ndarray:
        """Red, green and blue ``[..., 3]`` of numbers ``[...]``, uint8; grey where one is not finite."""
        shares, names = zip(*self.stops, strict=True)
        where = (np.clip(np.nan_to_num(values), self.low, self.high) - self.low) / (self.high - self.low)
        made = np.stack([np.interp(where, shares, channel) for channel in zip(*map(rgb, names), strict=True)], -1)
        made[~np.isfinite(values)] = rgb(GAP)
        return made.round().astype(np.uint8)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers to write beside the colours. An end with numbers beyond it is one, and says so."""
        inside = self.round_numbers()
        space = 0.06 * (self.high - self.low)
        if self.below:
            inside = [(self.low, f"≤ {self.low:.4g}"), *(tick for tick in inside if tick[0] > self.low + space)]
        if self.above:
            inside = [*(tick for tick in inside if tick[0] < self.high - space), (self.high, f"≥ {self.high:.4g}")]
        return inside

    def round_numbers(self, most: int = 7) -> list[tuple[float, str]]:
        """Multiples of 1, 2 or 5 times a power of ten, at most so many, and how they are written."""
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / most))
        step = power * next(times for times in (1, 2, 5, 10) if span / (times * power) <= most)
        counts = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(count * step, f"{count * step:.10g}") for count in counts]


@dataclass(frozen=True)
class Node:
    """A box of a drawing, in places of the axes, 0 the middle of the first; and what it says under the pointer."""

    left: float
    right: float
    top: float
    bottom: float
    said: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Link:
    """A line of a drawing: through ``points`` ``[point, 2]`` (along, down) in places of the axes, ``width`` pixels wide, in
    the colour of a series; and what it says under the pointer.
    """

    points: np.ndarray
    width: float
    series: int
    said: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Panel:
    """One panel: its heading (empty for none), and numbers, or nodes and links between them.

    Attributes:
        heading: one line, cut where the panel ends.
        values: float ``[row, column]`` of cells, or heights of bars ``[series, column]``.
        scale: colours of cells.
        texts: what is written into cells instead of their numbers, ``[row][column]``, one line each.
        said: more lines under the pointer, ``[row][column]``.
        ends: of the first series' bars the lower and upper end of an interval, ``[2, column]``; NaN where there is none.
        nodes: of a drawing, which has no numbers.
        links: drawn before the nodes, in this order.
    """

    heading: str
    values: np.ndarray
    scale: Scale | None = None
    texts: tuple[tuple[str, ...], ...] = ()
    said: tuple[tuple[tuple[str, ...], ...], ...] = ()
    ends: np.ndarray | None = None
    nodes: tuple[Node, ...] = ()
    links: tuple[Link, ...] = ()


@dataclass(frozen=True, eq=False)
class Picture:
    """Panels of one size that share their axes: of cells or a drawing if ``y`` is an :class:`Axis`, of bars if it is a scale
    of heights.

    Attributes:
        title: what is shown.
        notes: paragraphs below the title: a subtitle, and what a reader must know of the numbers.
        x: the axis along.
        y: the axis down, or of the bars' heights.
        panels: in the order to show them. A colour bar is drawn if all have one scale.
        series: names of bars that stand side by side, or of the colours of links; one empty name for none.
        printed: whether numbers are written into the cells.
        square: whether a cell is as high as it is wide.
        counts: whether numbers are whole, and written so.
    """

    title: str
    notes: tuple[str, ...]
    x: Axis
    y: Axis | Scale
    panels: tuple[Panel, ...]
    series: tuple[str, ...] = ("",)
    printed: bool = False
    square: bool = False
    counts: bool = False

    @property
    def is_drawing(self) -> bool:
        """Whether it has nodes and links."""
        return any(panel.nodes for panel in self.panels)

    @property
    def widest_text(self) -> float:
        """Pixels of the widest text that is written into a cell, 0 where numbers are."""
        return max(
            (width(text) for panel in self.panels if panel.texts for row in self.printed_in(panel) for text in row),
            default=0.0,
        )

    @property
    def scales(self) -> list[Scale]:
        """The scales of the panels, each once."""
        return list(dict.fromkeys(panel.scale for panel in self.panels if panel.scale is not None))

    def hovers(self, panel: Panel) -> list[list[list[str]]]:
        """What each number says under the pointer, in lines of plain text, ``[row or series][column]``."""
        columns = [self.x.hover(place) for place in range(len(self.x))]
        rows = [self.y.hover(n) for n in range(len(self.y))] if isinstance(self.y, Axis) else list(self.series)
        scale = self.y if isinstance(self.y, Scale) else panel.scale
        named = f"{visible(scale.unit)}: " if scale is not None and scale.unit else ""
        above = [visible(panel.heading)] if panel.heading else []
        found = [
            [
                [*above, *([row] if row else []), column, named + _full(value)]
                for column, value in zip(columns, values, strict=True)
            ]
            for row, values in zip(rows, panel.values.tolist(), strict=True)
        ]
        for lines, more in zip(found, panel.said, strict=False):
            for at, line in enumerate(more):
                lines[at] += map(visible, line)
        return found

    def printed_in(self, panel: Panel) -> list[list[str]]:
        """What is written into the cells of a panel: its texts, cut, or its numbers.

        Numbers of all panels with one scale have the same decimals.
        """
        if panel.texts:
            return [[cut(visible(text), LONGEST_TEXT) for text in row] for row in panel.texts]
        shown = np.concatenate([one.values.ravel() for one in self.panels if one.scale == panel.scale])
        most = float(np.abs(shown[np.isfinite(shown)]).max(initial=0.0))
        decimals = 0 if self.counts else _decimals(most)
        return [[_short(value, decimals) for value in row] for row in panel.values.tolist()]


def rgb(colour: str) -> tuple[int, int, int]:
    """``#rrggbb`` as three numbers."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def _full(value: float) -> str:
    """A number under the pointer."""
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
