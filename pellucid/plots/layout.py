"""Where everything of a picture goes, in pixels from the top left: the same in Plotly's figures, in SVG and in PNG.

Sizes follow from the number of cells, so that a picture of 24 x 16 cells and one of 4 x 100 are both legible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pellucid.plots.axis import Axis
from pellucid.plots.picture import Picture
from pellucid.plots.text import visible, width, wrapped

TITLE_SIZE, HEADING_SIZE, TEXT_SIZE, CELL_SIZE = 16, 13, 12, 11
LINE = 1.3
"""Height of a line for its font size."""
PAD, BAR_PAD, BAR_WIDTH = 16, 14, 14

_NARROWEST, _GAP, _HEADING, _AXIS_TITLE, _BAR_ROOM = 480, 18, 24, 26, 120.0
_CELL, _PRINTED_CELL, _SMALLEST_PANEL = 30.0, 46.0, 120.0
_WIDEST, _HIGHEST, _NARROWEST_CELL = 1100.0, 1400.0, 14.0
_BAR_PANEL, _MOST_BARS = (260.0, 150.0), 1000.0
_DRAWN_COLUMN, _DRAWN_ROW = 60.0, 40.0


@dataclass(frozen=True)
class Box:
    """A rectangle: its left, its top, and its size."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right side."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """Its lower side."""
        return self.top + self.height


@dataclass(frozen=True)
class Layout:
    """Places of one picture.

    Attributes:
        width: of the whole.
        height: of the whole.
        title: lines.
        notes: lines below the title.
        panels: left to right, then down.
        headings: one line above each panel, empty for none.
        area: all panels.
        columns: of panels.
        angle: by which the labels of the axis along are turned: 0, -45 or -90.
        bar: pixels of the colour bar, from the top of the panels.
        unit: lines beside the colour bar.
    """

    width: int
    height: int
    title: tuple[str, ...]
    notes: tuple[str, ...]
    panels: tuple[Box, ...]
    headings: tuple[str, ...]
    area: Box
    columns: int
    angle: int
    bar: float
    unit: tuple[str, ...]

    @property
    def notes_top(self) -> float:
        """Where the first note begins."""
        return PAD + len(self.title) * TITLE_SIZE * LINE + 3

    def is_lowest(self, number: int) -> bool:
        """Whether there is no panel below it, so that the axis along is labelled there."""
        return number + self.columns >= len(self.panels)

    def is_leftmost(self, number: int) -> bool:
        """Whether the axis down is labelled there."""
        return number % self.columns == 0


def layout_of(picture: Picture) -> Layout:
    """Places of everything in a picture."""
    x, y = picture.x, picture.y
    columns, panel_width, panel_height = _sizes(picture)
    headed = any(panel.heading for panel in picture.panels)
    between = _GAP + (_HEADING if headed else 0)
    rows = math.ceil(len(picture.panels) / columns)
    total_width, total_height = columns * (panel_width + _GAP) - _GAP, rows * (panel_height + between) - between
    room, bar, unit = 24.0, 0.0, list[str]()
    if len(picture.scales) == 1:
        bar = max(140.0, min(total_height, 420.0))
        unit = wrapped(visible(picture.scales[0].unit), bar, TEXT_SIZE)
        ticks = max(width(text) for _, text in picture.scales[0].ticks)
        room = max(_BAR_ROOM, BAR_PAD + BAR_WIDTH + ticks + LINE * TEXT_SIZE * (1 + len(unit)) + PAD)
    if any(picture.series):
        room = 60.0 + max(width(name) for name in picture.series)

    x_pixels = panel_width / len(x)
    flat = x.widest + 8 <= x_pixels or x.widest <= 3 * TEXT_SIZE
    angle = 0 if flat else (-45 if x_pixels >= 18 else -90)
    below = (0.75 * x.widest + 12 if angle == -45 else x.widest + 8 if angle else 20) + _AXIS_TITLE + PAD
    beside = (y.widest if isinstance(y, Axis) else 56) + _AXIS_TITLE + PAD
    if angle == -45:
        beside = max(beside, 0.75 * x.widest + PAD)
    below = max(below, bar - total_height + PAD)
    wide = max(_NARROWEST, beside + total_width + room)
    title = wrapped(visible(picture.title), wide - 2 * PAD, TITLE_SIZE)
    notes = [line for note in picture.notes for line in wrapped(visible(note), wide - 2 * PAD, TEXT_SIZE)]
    above = PAD + LINE * (len(title) * TITLE_SIZE + len(notes) * TEXT_SIZE) + 14 + (_HEADING if headed else 0)
    area = Box(round(beside), round(above), total_width, total_height)
    panels = tuple(
        Box(
            area.left + number % columns * (panel_width + _GAP),
            area.top + number // columns * (panel_height + between),
            panel_width,
            panel_height,
        )
        for number in range(len(picture.panels))
    )
    headings = tuple(_one_line(panel.heading, panel_width) for panel in picture.panels)
    high = round(above + total_height + below)
    return Layout(
        round(wide), high, tuple(title), tuple(notes), panels, headings, area, columns, angle, bar, tuple(unit)
    )


def _one_line(text: str, pixels: float) -> str:
    first, *rest = wrapped(visible(text), pixels, HEADING_SIZE)
    return first + ("…" if rest else "")


def _sizes(picture: Picture) -> tuple[int, float, float]:
    """Columns of panels, and the size of a panel: cells as large as the page allows."""
    x, y, panels = picture.x, picture.y, len(picture.panels)
    if not isinstance(y, Axis):
        wide, high = _BAR_PANEL
        bar = max(14.0, 14.0 * len(picture.series) + 8)
        return 1, max(wide, min(bar * len(x), _MOST_BARS)), 2 * high if panels == 1 else high
    if picture.is_drawing:
        return 1, min(_DRAWN_COLUMN * len(x), _WIDEST), min(_DRAWN_ROW * len(y), _HIGHEST)
    cell = _PRINTED_CELL if picture.printed else _CELL
    widest = picture.widest_text  # a text has to fit, however wide the picture becomes
    wide = max(_SMALLEST_PANEL, min(cell * len(x), _WIDEST), (widest + 8.0) * len(x) if widest else 0.0)
    high = max(_SMALLEST_PANEL / 2, min((0.75 if picture.printed else 1.0) * cell * len(y), _HIGHEST))
    columns = _best_columns(panels, wide, high, int(_WIDEST / (_NARROWEST_CELL * len(x))))
    if not picture.printed:
        smallest = 40.0 if panels > 1 else _SMALLEST_PANEL / 2
        wide = max(_SMALLEST_PANEL if panels < 10 else 70.0, min(wide, _WIDEST / columns))
        high = max(smallest, min(high, _HIGHEST / math.ceil(panels / columns)))
    if picture.square:
        side = max(wide / len(x), high / len(y)) if picture.printed else min(wide / len(x), high / len(y))
        wide, high = side * len(x), side * len(y)
    return columns, wide, high


def _best_columns(panels: int, wide: float, high: float, most: int) -> int:
    """Columns that make a grid of panels of these pixels about as wide as a page is, with few places left empty.

    Args:
        panels: how many; up to three stand in a row.
        wide: of one.
        high: of one.
        most: columns in which the labels of every cell can be written; two are always allowed.
    """
    if panels <= 3:
        return panels

    def badness(columns: int) -> float:
        rows = math.ceil(panels / columns)
        return abs(math.log(columns * wide / (rows * high) / 1.4)) + (rows * columns - panels) / columns

    return min(range(1, max(2, min(panels, most)) + 1), key=badness)
