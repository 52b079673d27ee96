"""A picture as PNG: the marks of its sheet, painted by matplotlib, with no browser and no Plotly."""

from __future__ import annotations

import warnings
from pathlib import Path

from pellucid.errors import InputError
from pellucid.plots.extra import need
from pellucid.plots.fonts import fonts_for
from pellucid.plots.picture import Picture
from pellucid.plots.sheet import INKS, Line, Rect, Text, sheet_of

_DPI = 100
_MOST_PIXELS = 200_000_000
_ANCHORS = {"start": "left", "middle": "center", "end": "right"}


def draw_png(picture: Picture, path: Path, scale: float) -> None:
    """Draw a picture to a file.

    Args:
        picture: what to draw.
        path: where to.
        scale: pixels of the file for one of the picture's.

    Raises:
        InputError: the drawing would have over 200 million pixels.
        MissingExtraError: matplotlib is not installed.
    """
    need("matplotlib")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.style import context

    sheet = sheet_of(picture)
    if sheet.width * sheet.height * scale**2 > _MOST_PIXELS:
        raise InputError(
            f"A picture of {sheet.width} x {sheet.height} at scale {scale:g} has over {_MOST_PIXELS:,} pixels: "
            "give a smaller scale."
        )
    written = "".join(mark.text for mark in sheet.marks if isinstance(mark, Text))
    style = {"text.parse_math": False, "font.family": fonts_for(written)}
    with context("default"), matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+", category=UserWarning)  # fonts_for says it once
        figure = Figure((sheet.width / _DPI, sheet.height / _DPI), dpi=_DPI, facecolor=INKS["paper"])
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for order, mark in enumerate(sheet.marks):
            if isinstance(mark, Text):
                colour, size = INKS.get(mark.colour, mark.colour), mark.size * 72 / _DPI
                line = axes.text(mark.left, mark.foot, mark.text, size=size, color=colour, rotation=-mark.angle)
                line.set(ha=_ANCHORS[mark.anchor], va="baseline", rotation_mode="anchor", zorder=order)
                continue
            if isinstance(mark, Line):
                across, down = mark.points.T
                stroke = Line2D(across, down, color=mark.colour, linewidth=mark.width * 72 / _DPI, zorder=order)
                axes.add_line(stroke).set_solid_capstyle("butt")
                continue
            box = mark.box
            if isinstance(mark, Rect):
                colour = INKS.get(mark.colour, mark.colour)
                patch = Rectangle((box.left, box.top), box.width, box.height, color=colour, linewidth=0)
                axes.add_patch(patch).set_zorder(order)
            else:
                sides = (box.left, box.right, box.bottom, box.top)
                axes.imshow(mark.colours, extent=sides, aspect="auto", interpolation="nearest", zorder=order)
        axes.set(xlim=(0, sheet.width), ylim=(sheet.height, 0))  # imshow moves them
        figure.savefig(path, format="png", dpi=_DPI * scale)
