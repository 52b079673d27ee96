"""Pictures as files: a page that opens without a network (``.html``), or a drawing (``.png``, ``.svg``).

A page holds Plotly's program and forbids itself to ask any other place for anything. An SVG is written here, a PNG drawn by
matplotlib: Plotly's own way to one starts a Chrome, which a bare machine does not have.
"""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.arguments import check_number, check_path
from pellucid.errors import InputError
from pellucid.plots.extra import need
from pellucid.plots.picture import Picture
from pellucid.plots.png import draw_png
from pellucid.plots.sheet import LIGHT_PAGE
from pellucid.plots.svg import svg_of
from pellucid.plots.text import plain
from pellucid.storage.whole_files import whole_file

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DEFAULT_SCALE = 2.0
_SUFFIXES = (".html", ".png", ".svg")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
_CONFIG = {
    "displaylogo": False,
    "modeBarButtons": [["toImage", "resetScale2d"]],
    "plotlyServerURL": "",
    "responsive": False,
    "showTips": False,
    "typesetMath": False,
}
"""No button that leads off the page; no formulas."""


def check_picture_path(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """See, before anything is computed, that a picture can be written to ``path``.

    Args:
        path: a file whose name ends in ``.html``, ``.png`` or ``.svg``.
        overwrite: whether it may be there already.

    Returns:
        the path, resolved.

    Raises:
        InputError: another ending, a file or a folder that is there, no such folder, or one that cannot be written.
        MissingExtraError: Plotly is not installed, or matplotlib, which a ``.png`` needs.
    """
    place = check_path("path", path).expanduser().resolve()
    if place.suffix.lower() not in _SUFFIXES:
        raise InputError(f"path: a picture's name ends in {', '.join(_SUFFIXES)}; found {place.name!r}.")
    if place.is_dir():
        raise InputError(f"{path} is a folder: give a file in it.")
    if place.exists() and not overwrite:
        raise InputError(f"{path} exists: give another path, or overwrite=True.")
    if not place.parent.is_dir():
        raise InputError(f"There is no folder {place.parent}: make it first, or give another path.")
    if not os.access(place.parent, os.W_OK):
        raise InputError(f"The folder {place.parent} cannot be written: give another path.")
    need("plotly", *(["matplotlib"] if place.suffix.lower() == ".png" else []))
    return place


def save_picture(
    picture: Figure | str, path: str | os.PathLike[str], *, overwrite: bool = False, scale: float = DEFAULT_SCALE
) -> Path:
    """Write a picture to a file, whole or not at all.

    Args:
        picture: a figure of this package; or a page of :func:`examples_page`, only as ``.html``. ``.html`` takes any
            Plotly figure.
        path: the file; its ending says what is made. ``.html`` holds all it needs (about 5 MB, nearly all of it
            Plotly's program) and opens without a network.
        overwrite: replace a file that is there.
        scale: pixels of a ``.png`` for one of the figure's.

    Returns:
        the path, resolved.

    Raises:
        InputError: the path cannot be written (:func:`check_picture_path`), or the figure is not as this package made it,
            but for its title: what was changed is named.
        MissingExtraError: as :func:`check_picture_path`.
    """
    place = check_picture_path(path, overwrite)
    kind = place.suffix.lower()
    check_number("scale", scale, at_least=0.1, at_most=10)
    if kind != ".png" and scale != DEFAULT_SCALE:
        raise InputError(f"scale={scale} would have no effect: it is of a .png; found {place.name!r}.")
    if kind != ".html":
        if isinstance(picture, str):
            raise InputError(f"picture: a page of examples is saved as .html; found {place.name!r}.")
        described = _description(picture)
    elif not isinstance(picture, str) and not hasattr(picture, "to_html"):
        raise InputError(f"picture is a figure, or a page of examples_page; found {type(picture).__name__}.")
    with whole_file(place) as draft:
        if kind == ".png":
            draw_png(described, draft, scale)
        elif kind == ".svg":
            draft.write_text(svg_of(described), "utf-8")
        else:
            draft.write_text(picture if isinstance(picture, str) else page_of(picture), "utf-8")
    return place


def _description(figure: Figure) -> Picture:
    from pellucid.plots.figures import PictureFigure

    if not isinstance(figure, PictureFigure):
        raise InputError(
            "A drawing is made of what heat_map, heat_maps, bars or attention_pattern give; this figure is Plotly's own. "
            "Save as .html, or use its figure.write_image (it needs kaleido and Chrome)."
        )
    return figure.picture


def page_of(figure: Figure) -> str:
    """A page with one figure, which asks no other place for anything."""
    from plotly.offline import get_plotlyjs

    title = plain(str(figure.layout.title.text or "Picture")).replace("\n", " ")
    body = figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, config=_CONFIG)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{LIGHT_PAGE} body {{ margin: 0; }}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
