"""Panels of one size in a grid, with their axes, titles and margins: what all pictures here share.

Everything is placed in pixels that follow from the number of cells, so that a picture of 24 x 16 cells and one of 4 x 100
are both legible, and the files drawn from a figure look like the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pellucid.errors import InputError
from pellucid.plots.axis import Axis
from pellucid.plots.text import escaped, lines, visible, wrapped

FONTS = (
    "system-ui, 'Segoe UI', 'Noto Sans', 'Noto Sans Arabic', 'Noto Sans Devanagari', 'Nirmala UI', "
    "'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', 'DejaVu Sans', sans-serif"
)
"""Fonts of the reader's own machine; browsers take each script's characters from the first that has them."""

INK, FAINT_INK = "#1b1f24", "#57606a"
MOST_PANELS = 128
NARROWEST, PAD = 480, 16
TITLE_SIZE, SUBTITLE_SIZE, TEXT_SIZE = 16, 12, 12
_GAP, _PANEL_TITLE, _AXIS_TITLE = 18, 24, 26


@dataclass(frozen=True)
class ValueAxis:
    """An upright axis of numbers: what they are, and its two ends."""

    name: str
    ends: tuple[float, float]


@dataclass(frozen=True)
class Panels:
    """Panels of ``width`` x ``height`` pixels under their titles (empty: none), left to right, then down."""

    titles: Sequence[str]
    columns: int
    width: float
    height: float

    @property
    def rows(self) -> int:
        """Rows of panels, the last of which may not be full."""
        return math.ceil(len(self.titles) / self.columns)

    @property
    def gaps(self) -> tuple[float, float]:
        """Pixels between columns and between rows."""
        return _GAP, _GAP + (_PANEL_TITLE if any(self.titles) else 0)

    @property
    def total(self) -> tuple[float, float]:
        """Pixels of all panels with the gaps between them."""
        across, down = self.gaps
        return (
            self.columns * self.width + (self.columns - 1) * across,
            self.rows * self.height + (self.rows - 1) * down,
        )

    def place(self, number: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Left and right, bottom and top of a panel, as shares of the total."""
        row, column = divmod(number, self.columns)
        (total_width, total_height), (across, down) = self.total, self.gaps
        left, top = column * (self.width + across), total_height - row * (self.height + down)
        across_shares = (left / total_width, min(1.0, (left + self.width) / total_width))
        return across_shares, (max(0.0, (top - self.height) / total_height), min(1.0, top / total_height))


def best_columns(panels: int, width: float, height: float, most: int) -> int:
    """Columns that make a grid of panels of these pixels about as wide as a page is, with few places left empty.

    Args:
        panels: how many; up to three stand in a row.
        width: of one.
        height: of one.
        most: columns in which the labels of every cell can be written; two are always allowed.
    """
    if panels <= 3:
        return panels

    def badness(columns: int) -> float:
        rows = math.ceil(panels / columns)
        return abs(math.log(columns * width / (rows * height) / 1.4)) + (rows * columns - panels) / columns

    return min(range(1, max(2, min(panels, most)) + 1), key=badness)


def check_panels(panels: int, what: str) -> None:
    """Refuse a picture without panels, or with more than can be looked at.

    Raises:
        InputError: so it is.
    """
    if not panels:
        raise InputError(f"There is nothing to draw: {what} is empty.")
    if panels > MOST_PANELS:
        raise InputError(
            f"{what} would make {panels} panels; draw at most {MOST_PANELS}: take a part of the result first."
        )


def layout(
    panels: Panels, x: Axis, y: Axis | ValueAxis, *, title: str, subtitle: Sequence[str], right: float, tall: float
) -> dict[str, Any]:
    """Plotly's layout of a grid of panels that share their axes' labels.

    Args:
        panels: the grid.
        x: axis along.
        y: axis up; an :class:`Axis` counts downwards, as the rows of a matrix do.
        title: plain text.
        subtitle: paragraphs of plain text.
        right: pixels kept free to the right, for a colour bar or a legend.
        tall: pixels of what stands there, from the top of the panels.
    """
    total_width, total_height = panels.total
    x_pixels = panels.width / len(x)
    flat = x.widest + 8 <= x_pixels or x.widest <= 3 * TEXT_SIZE
    angle = 0 if flat else (-45 if x_pixels >= 18 else -90)
    below = (0.75 * x.widest + 12 if angle == -45 else x.widest + 8 if angle else 20) + _AXIS_TITLE + PAD
    beside = (y.widest if isinstance(y, Axis) else 56) + _AXIS_TITLE + PAD
    if angle == -45:
        beside = max(beside, 0.75 * x.widest + PAD)
    below = max(below, tall - total_height + PAD)
    wide = max(NARROWEST, beside + total_width + right)
    titles = _paragraph(title, wide - 2 * PAD, TITLE_SIZE)
    smaller = [line for paragraph in subtitle for line in _paragraph(paragraph, wide - 2 * PAD, SUBTITLE_SIZE)]
    above = PAD + len(titles) * TITLE_SIZE * 1.3 + len(smaller) * SUBTITLE_SIZE * 1.3 + 14
    above += _PANEL_TITLE if any(panels.titles) else 0
    high = round(above + total_height + below)
    made: dict[str, Any] = {
        "template": "none",
        "width": round(wide),
        "height": high,
        "margin": {
            "l": round(beside),
            "r": round(wide - beside - total_width),
            "t": round(above),
            "b": round(below),
            "pad": 0,
            "autoexpand": False,
        },
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": FONTS, "size": TEXT_SIZE, "color": INK},
        "hoverlabel": {"align": "left", "font": {"family": FONTS}, "bgcolor": "#ffffff"},
        "title": {
            "text": lines(titles),
            "font": {"size": TITLE_SIZE},
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            "y": 1 - (PAD + 0.75 * TITLE_SIZE) / high,
            "yanchor": "bottom",  # of the first line; Plotly puts the first of several lines elsewhere for "top"
            "yref": "container",
            "pad": {"l": PAD},
            "automargin": False,
        },
        "annotations": [],
    }
    if smaller:  # Plotly's own subtitle moves a title of several lines off the page
        made["annotations"].append(
            {
                "text": lines(smaller),
                "x": 0,
                "y": 1,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "top",
                "align": "left",
                "xshift": round(PAD - beside),
                "yshift": round(above - PAD - len(titles) * TITLE_SIZE * 1.3 - 3),
                "showarrow": False,
                "borderpad": 0,
                "font": {"size": SUBTITLE_SIZE, "color": FAINT_INK},
            }
        )
    for number, panel_title in enumerate(panels.titles):
        across, up = panels.place(number)
        lowest = number + panels.columns >= len(panels.titles)
        leftmost = number % panels.columns == 0
        key = axis_key(number)
        made[f"xaxis{key}"] = x.settings(x_pixels, shown=lowest, turned=angle != 0) | {
            "domain": list(across),
            "anchor": f"y{key}",
            "range": [-0.5, len(x) - 0.5],
            "tickangle": angle,
            "automargin": False,
            "title": {"text": escaped(x.name) if lowest else "", "standoff": 8},
        }
        made[f"yaxis{key}"] = _upright(y, panels.height, leftmost) | {
            "domain": list(up),
            "anchor": f"x{key}",
            "automargin": False,
            "title": {"text": escaped(y.name) if leftmost else "", "standoff": 8},
        }
        if panel_title:
            made["annotations"].append(_heading(panel_title, across, up, panels.width))
    return made


def axis_key(number: int) -> str:
    """What Plotly writes after ``x`` and ``y`` for the axes of a panel."""
    return "" if number == 0 else str(number + 1)


def _upright(y: Axis | ValueAxis, pixels: float, shown: bool) -> dict[str, object]:
    if isinstance(y, Axis):
        return y.settings(pixels / len(y), shown, turned=True) | {"range": [len(y) - 0.5, -0.5]}
    return {
        "type": "linear",
        "range": list(y.ends),
        "showticklabels": shown,
        "showgrid": True,
        "gridcolor": "#e3e6ea",
        "zeroline": True,
        "zerolinecolor": FAINT_INK,
        "zerolinewidth": 1,
        "ticks": "",
    }


def _heading(text: str, across: tuple[float, float], up: tuple[float, float], pixels: float) -> dict[str, object]:
    first, *rest = wrapped(visible(text), pixels, TEXT_SIZE + 1)
    return {
        "text": escaped(first + ("…" if rest else "")),
        "x": sum(across) / 2,
        "y": up[1],
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": TEXT_SIZE + 1},
    }


def _paragraph(text: str, pixels: float, size: float) -> list[str]:
    return [escaped(line) for line in wrapped(visible(text), pixels, size)]
