"""Heat maps of one number a head, as one SVG that needs nothing else: no script, no font, no style sheet beside it.

A cell is coloured by its value and says it when the pointer rests on it; large values are printed. Text is escaped, ink
is chosen by the cell's luminance, and the page follows the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

CELL = 46
MARGIN = 56
HEAD = 96
CAPTION_LINE = 19

_PALE = (0xF2, 0xF5, 0xFA)
_DEEP = (0x0B, 0x3C, 0x7D)
_PRINTED_FROM = 0.1
"""Share of the largest value from which a value is printed in its cell."""

_STYLE = """
svg { background: #fff; color: #1b1f24; font-family: system-ui, sans-serif; font-size: 13px; }
text { fill: currentColor; }
.title { font-size: 15px; font-weight: 600; }
.small { font-size: 12px; opacity: .75; }
.value { font-size: 12px; text-anchor: middle; dominant-baseline: central; font-variant-numeric: tabular-nums; }
.axis { text-anchor: middle; dominant-baseline: central; }
@media (prefers-color-scheme: dark) { svg { background: #14171b; color: #e8eaed; } }
"""


@dataclass(frozen=True)
class HeatMap:
    """One grid ``[layer][head]``: colours run from 0 (pale) to ``most`` (deep), by default its largest value."""

    title: str
    subtitle: str
    unit: str
    values: Sequence[Sequence[float]]
    most: float | None = None


def heat_maps_svg(title: str, maps: Sequence[HeatMap], caption: Sequence[str]) -> str:
    """Heat maps side by side under a title and over a caption.

    Args:
        title: of the whole picture, also for those who hear it.
        maps: grids of one size.
        caption: lines of text below.
    """
    layers, heads = len(maps[0].values), len(maps[0].values[0])
    column = MARGIN + heads * CELL + MARGIN // 2
    width, grid_end = len(maps) * column + MARGIN // 2, HEAD + layers * CELL
    height = grid_end + 30 + CAPTION_LINE * len(caption)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-labelledby="title">',
        f'<title id="title">{escape(title)}</title>',
        f"<style>{_STYLE}</style>",
    ]
    for number, heat_map in enumerate(maps):
        parts += _draw(heat_map, number * column)
    for number, line in enumerate(caption):
        parts.append(_text(MARGIN, grid_end + 34 + CAPTION_LINE * number, line, "small"))
    return "\n".join([*parts, "</svg>", ""])


def _draw(heat_map: HeatMap, left: int) -> list[str]:
    most = heat_map.most if heat_map.most is not None else max(max(row) for row in heat_map.values)
    parts = [
        _text(left + MARGIN, 26, heat_map.title, "title"),
        _text(left + MARGIN, 46, heat_map.subtitle, "small"),
    ]
    for head in range(len(heat_map.values[0])):
        parts.append(_text(left + MARGIN + head * CELL + CELL // 2, HEAD - 14, f"H{head}", "axis"))
    for layer, row in enumerate(heat_map.values):
        top = HEAD + layer * CELL
        parts.append(_text(left + MARGIN - 20, top + CELL // 2, f"L{layer}", "axis"))
        for head, value in enumerate(row):
            share = min(max(value / most, 0.0), 1.0) if most > 0 else 0.0
            parts += _cell(
                left + MARGIN + head * CELL,
                top,
                share,
                f"{round(value, 2) + 0.0:.2f}",
                f"L{layer}H{head}",
                heat_map.unit,
            )
    return parts


def _cell(x: int, y: int, share: float, value: str, name: str, unit: str) -> list[str]:
    colour = tuple(round(pale + share * (deep - pale)) for pale, deep in zip(_PALE, _DEEP, strict=True))
    red, green, blue = colour
    ink = "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 140 else "#1b1f24"
    parts = [
        f'<g><rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="3" '
        f'fill="#{red:02x}{green:02x}{blue:02x}"/>',
        f"<title>{escape(f'{name}: {value} {unit}')}</title>",
    ]
    if share >= _PRINTED_FROM:
        parts.append(
            f'<text class="value" x="{x + CELL // 2}" y="{y + CELL // 2}" style="fill:{ink}">{escape(value)}</text>'
        )
    return [*parts, "</g>"]


def _text(x: int, y: int, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x}" y="{y}">{escape(text)}</text>'
