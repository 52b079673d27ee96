"""A picture as SVG: text that stays text, no script, no font and nothing asked of any place; the same bytes each time.

The reader's program finds the fonts, and a page that is dark by the reader's own setting gets light ink.
"""

from __future__ import annotations

import html
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from pellucid.plots.picture import Picture
from pellucid.plots.sheet import INKS, Cells, Line, Rect, Text, sheet_of
from pellucid.plots.text import FONTS, isolated

_DARK = {"paper": "#14171b", "ink": "#e8eaed", "faint": "#9aa4ae", "grid": "#30363d"}


def svg_of(picture: Picture) -> str:
    """The picture as the text of an SVG file."""
    sheet = sheet_of(picture)
    parts = [
        '<?xml version="1.0" encoding="utf-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{sheet.width}" height="{sheet.height}" '
        f'viewBox="0 0 {sheet.width} {sheet.height}" role="img" font-family="{FONTS}">',
        f"<title>{_escaped(sheet.title)}</title>",
        f"<style>{_style()}</style>",
        f'<rect width="100%" height="100%" {_fill("paper")}/>',
    ]
    for mark in sheet.marks:
        if isinstance(mark, Text):
            parts.append(_text(mark))
        elif isinstance(mark, Rect):
            box = mark.box
            parts.append(_rect(box.left, box.top, box.width, box.height, _fill(mark.colour), mark.hover))
        elif isinstance(mark, Line):
            parts.append(_line(mark))
        else:
            parts += _cells(mark)
    return "\n".join([*parts, "</svg>", ""])


def _style() -> str:
    def rules(colours: dict[str, str]) -> str:
        return " ".join(f".{name} {{ fill: {colour}; }}" for name, colour in colours.items())

    return f"text {{ pointer-events: none; }} @media (prefers-color-scheme: dark) {{ {rules(_DARK)} }}"


def _text(mark: Text) -> str:
    at = f'x="{_number(mark.left)}" y="{_number(mark.foot)}"'
    if mark.angle:
        at = f'transform="translate({_number(mark.left)} {_number(mark.foot)}) rotate({mark.angle:g})"'
    anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
    text = mark.text
    if any(unicodedata.bidirectional(char) in ("R", "AL") for char in text):
        text = isolated(text)  # the direction of its first letter, wherever it is drawn
    return f'<text {at} font-size="{mark.size:g}"{anchor} {_fill(mark.colour)}>{_escaped(text)}</text>'


def _cells(mark: Cells) -> list[str]:
    rows, columns, _ = mark.colours.shape
    across, down = mark.box.width / columns, mark.box.height / rows
    names = np.apply_along_axis(lambda channels: "#{:02x}{:02x}{:02x}".format(*channels), 2, mark.colours)
    if mark.hovers:
        cells = [
            _rect(
                mark.box.left + column * across,
                mark.box.top + row * down,
                across,
                down,
                f'fill="{names[row, column]}"',
                mark.hovers[row][column],
            )
            for row in range(rows)
            for column in range(columns)
        ]
    else:  # one path a colour, in which equal neighbours are one piece
        paths = defaultdict(list)
        for row in range(rows):
            ends = [0, *(np.flatnonzero(names[row, 1:] != names[row, :-1]) + 1).tolist(), columns]
            for start, end in pairwise(ends):
                paths[str(names[row, start])].append(f"M{start} {row}h{end - start}v1h{start - end}z")
        place = f"translate({_number(mark.box.left)} {_number(mark.box.top)}) scale({across:.6g} {down:.6g})"
        cells = [f'<g transform="{place}">']
        cells += [f'<path fill="{colour}" d="{"".join(pieces)}"/>' for colour, pieces in paths.items()]
        cells.append("</g>")
    return ['<g shape-rendering="crispEdges">', *cells, "</g>"]


def _rect(left: float, top: float, width: float, height: float, fill: str, hover: Sequence[str]) -> str:
    sizes = (("x", left), ("y", top), ("width", width), ("height", height))
    return _hovering("rect", " ".join([*(f'{name}="{_number(size)}"' for name, size in sizes), fill]), hover)


def _line(mark: Line) -> str:
    points = "L".join(f"{_number(left)} {_number(top)}" for left, top in mark.points.tolist())
    stroke = f'fill="none" stroke="{mark.colour}" stroke-width="{_number(mark.width)}" stroke-linejoin="round"'
    return _hovering("path", f'd="M{points}" {stroke}', mark.hover)


def _hovering(tag: str, attributes: str, hover: Sequence[str]) -> str:
    """An element, and what it says under the pointer."""
    if not hover:
        return f"<{tag} {attributes}/>"
    return f"<{tag} {attributes}><title>{_escaped(chr(10).join(hover))}</title></{tag}>"


def _fill(colour: str) -> str:
    return f'class="{colour}" fill="{INKS[colour]}"' if colour in INKS else f'fill="{colour}"'


def _number(size: float) -> str:
    return f"{round(size, 2):.10g}"


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)
