"""A picture as marks on a sheet: rectangles, lines, text, grids of cells. Whoever paints these paints every picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pellucid.plots.axis import Axis
from pellucid.plots.layout import (
    BAR_PAD,
    BAR_WIDTH,
    CELL_SIZE,
    HEADING_SIZE,
    LINE,
    PAD,
    TEXT_SIZE,
    TITLE_SIZE,
    Box,
    Layout,
    layout_of,
)
from pellucid.plots.picture import SERIES, Panel, Picture, Scale
from pellucid.plots.text import visible, width

INKS = {"paper": "#ffffff", "ink": "#1b1f24", "faint": "#57606a", "grid": "#e3e6ea"}
"""Colours that have a name, which a dark page may change. Others are written ``#rrggbb``."""

LIGHT_PAGE = f":root {{ color-scheme: only light; background: {INKS['paper']}; color: {INKS['ink']}; }}"
"""The ground of every HTML page. Pictures are made for a light one; a dark browser would give text of no colour, scrollbars
and focus rings its own, light on white, and one that darkens pages would turn the scale's colours round.
"""


@dataclass(frozen=True)
class Rect:
    """A rectangle of one colour, and what it says under the pointer."""

    box: Box
    colour: str
    hover: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """One line of text: where its ``anchor`` (start, middle, end) is on the line's foot, turned by ``angle`` degrees."""

    left: float
    foot: float
    text: str
    size: float = TEXT_SIZE
    colour: str = "ink"
    anchor: str = "start"
    angle: float = 0.0


@dataclass(frozen=True, eq=False)
class Cells:
    """A grid that fills a box: colours uint8 ``[row, column, 3]``; what each says, ``[row][column]`` lines, or nothing."""

    box: Box
    colours: np.ndarray
    hovers: list[list[list[str]]]


@dataclass(frozen=True, eq=False)
class Line:
    """A line through ``points`` ``[point, 2]`` (from the left, from the top), pixels wide, of a colour ``#rrggbb``."""

    points: np.ndarray
    width: float
    colour: str
    hover: tuple[str, ...]


Mark = Rect | Text | Cells | Line

THIN, CAP = 1.5, 4
"""Pixels of the line of an interval, and to each side of it at its ends."""

MOST_HOVERS = 5_000
"""Cells of a picture that say their number under the pointer; each is then an element of its own."""


@dataclass(frozen=True)
class Sheet:
    """A whole picture, painted in the order of its marks."""

    title: str
    width: int
    height: int
    marks: list[Mark]


def sheet_of(picture: Picture) -> Sheet:
    """A picture as marks."""
    layout = layout_of(picture)
    marks: list[Mark] = []
    for number, line in enumerate(layout.title):
        foot = PAD + TITLE_SIZE * (0.75 + LINE * number)
        marks.append(Text(PAD, foot, line, TITLE_SIZE))
    for number, line in enumerate(layout.notes):
        foot = layout.notes_top + TEXT_SIZE * (0.9 + LINE * number)
        marks.append(Text(PAD, foot, line, colour="faint"))
    for number, (panel, box) in enumerate(zip(picture.panels, layout.panels, strict=True)):
        if layout.headings[number]:
            across = box.left + box.width / 2
            marks.append(Text(across, box.top - 7, layout.headings[number], HEADING_SIZE, anchor="middle"))
        if panel.nodes:
            marks += _drawing(picture, panel, box)
        else:
            marks += _cells(picture, panel, box) if panel.scale is not None else _bars(picture, panel, box)
        marks += _axes(picture, layout, number)
    if len(picture.scales) == 1:
        marks += _colour_bar(picture.scales[0], layout)
    for number, name in enumerate(picture.series if any(picture.series) else ()):
        top = layout.area.top + 20 * number
        marks.append(Rect(Box(layout.area.right + 12, top, 12, 12), SERIES[number]))
        marks.append(Text(layout.area.right + 30, top + 10.5, name))
    return Sheet(" ".join(layout.title), layout.width, layout.height, marks)


def _cells(picture: Picture, panel: Panel, box: Box) -> list[Mark]:
    assert panel.scale is not None
    spoken = panel.values.size * len(picture.panels) <= MOST_HOVERS
    colours = panel.scale.colours(panel.values)
    marks: list[Mark] = [Cells(box, colours, picture.hovers(panel) if spoken else [])]
    if picture.printed:
        across, down = box.width / panel.values.shape[1], box.height / panel.values.shape[0]
        dark = colours @ np.array([0.2126, 0.7152, 0.0722]) < 0.45 * 255
        for row, texts in enumerate(picture.printed_in(panel)):
            for column, text in enumerate(texts):
                left, foot = box.left + (column + 0.5) * across, box.top + (row + 0.5) * down + 0.35 * CELL_SIZE
                ink = "#ffffff" if dark[row, column] else INKS["ink"]
                marks += [Text(left, foot, text, CELL_SIZE, ink, "middle")] if text else []
    return marks


def _bars(picture: Picture, panel: Panel, box: Box) -> list[Mark]:
    up = picture.y
    assert isinstance(up, Scale)

    def height(value: float) -> float:
        return box.bottom - box.height * (value - up.low) / (up.high - up.low)

    marks: list[Mark] = [
        Rect(Box(box.left, height(value) - 0.5, box.width, 1), "grid") for value, _ in up.round_numbers(_most(box))
    ]
    place = box.width / len(picture.x)
    wide = 0.8 * place / len(picture.series)
    hovers = picture.hovers(panel)
    for series, values in enumerate(panel.values.tolist()):
        for column, value in enumerate(values):
            if math.isfinite(value):
                left, top = box.left + (column + 0.1) * place + series * wide, height(max(value, 0.0))
                bar = Box(left, top, wide, height(min(value, 0.0)) - top)
                marks.append(Rect(bar, SERIES[series], tuple(hovers[series][column])))
    for column, (low, high) in enumerate(() if panel.ends is None else panel.ends.T.tolist()):
        if math.isfinite(low) and math.isfinite(high):
            middle, top, foot = box.left + (column + 0.1) * place + wide / 2, height(high), height(low)
            marks.append(Rect(Box(middle - THIN / 2, top, THIN, foot - top), "ink"))
            cap = min(0.5 * wide, 2 * CAP)
            marks += [Rect(Box(middle - cap / 2, at - THIN / 2, cap, THIN), "ink") for at in (top, foot)]
    return [*marks, Rect(Box(box.left, height(0.0) - 0.5, box.width, 1), "faint")]


def _drawing(picture: Picture, panel: Panel, box: Box) -> list[Mark]:
    assert isinstance(picture.y, Axis)
    place = np.array([box.width / len(picture.x), box.height / len(picture.y)])
    corner = np.array([box.left, box.top]) + 0.5 * place
    marks: list[Mark] = [
        Rect(Box(box.left, box.top + row * place[1] - 0.5, box.width, 1), "grid") for row in range(len(picture.y) + 1)
    ]
    for link in panel.links:
        marks.append(Line(corner + place * link.points, link.width, SERIES[link.series], link.said))
    for node in panel.nodes:
        left, top = corner + place * (node.left, node.top)
        wide, high = place * (node.right - node.left, node.bottom - node.top)
        marks.append(Rect(Box(left, top, wide, high), "faint", node.said))
    return marks


def _most(box: Box) -> int:
    """Numbers that can be written along its height."""
    return int(box.height / 25)


def _axes(picture: Picture, layout: Layout, number: int) -> list[Mark]:
    """Labels and titles of a panel's axes, where it has any."""
    marks: list[Mark] = []
    box, x, y = layout.panels[number], picture.x, picture.y
    if layout.is_lowest(number):
        pixels = box.width / len(x)
        for place in x.shown(pixels, turned=layout.angle != 0):
            marks.append(_below(box.left + (place + 0.5) * pixels, box.bottom, x.ticks[place], layout.angle))
        depth = {0: 20.0, -45: 0.75 * x.widest + 12, -90: x.widest + 8}[layout.angle]
        marks.append(Text(box.left + box.width / 2, box.bottom + depth + 17, x.name, HEADING_SIZE, anchor="middle"))
    if layout.is_leftmost(number):
        if isinstance(y, Axis):
            pixels = box.height / len(y)
            written = [(box.top + (place + 0.5) * pixels, y.ticks[place]) for place in y.shown(pixels, turned=True)]
            widest = y.widest
        else:
            share = box.height / (y.high - y.low)
            written = [(box.bottom - share * (value - y.low), text) for value, text in y.round_numbers(_most(box))]
            widest = 48.0
        marks += [Text(box.left - 6, at + 0.35 * TEXT_SIZE, text, anchor="end") for at, text in written]
        name = y.name if isinstance(y, Axis) else visible(y.unit)
        marks.append(_upright(box.left - 6 - widest - 10, box.top + box.height / 2, name))
    return marks


def _below(left: float, bottom: float, text: str, angle: int) -> Text:
    """A label of the axis along: its end at the cell where it is turned."""
    if angle == 0:
        return Text(left, bottom + 6 + 0.8 * TEXT_SIZE, text, anchor="middle")
    turn, half = math.radians(angle), 0.35 * TEXT_SIZE
    return Text(left - half * math.sin(turn), bottom + 8 + half * math.cos(turn), text, anchor="end", angle=angle)


def _upright(left: float, middle: float, text: str) -> Text:
    return Text(left, middle, text, HEADING_SIZE, anchor="middle", angle=-90)


def _colour_bar(scale: Scale, layout: Layout) -> list[Mark]:
    box = Box(layout.area.right + BAR_PAD, layout.area.top, BAR_WIDTH, layout.bar)
    steps = np.linspace(scale.high, scale.low, 256)[:, None]
    marks: list[Mark] = [Cells(box, scale.colours(steps), [])]
    for value, text in scale.ticks:
        share = (value - scale.low) / (scale.high - scale.low)
        marks.append(Text(box.right + 5, box.bottom - share * box.height + 0.35 * TEXT_SIZE, text))
    beside = box.right + 5 + max(width(text) for _, text in scale.ticks)
    for number, line in enumerate(layout.unit):
        marks.append(_upright(beside + LINE * TEXT_SIZE * (number + 1), box.top + box.height / 2, line))
    return marks
