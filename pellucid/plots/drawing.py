"""A figure of this package drawn by matplotlib, with no browser.

Everything is read from the figure, so a title or a range that was changed is drawn changed. What is not drawn is refused
by name and never left out: other kinds of traces, shapes, arrows.
"""

from __future__ import annotations

import base64
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from plotly.graph_objects import Figure

from pellucid.errors import InputError
from pellucid.plots.extra import need
from pellucid.plots.fonts import fonts_for
from pellucid.plots.text import plain

_DPI = 100
_MOST_PIXELS = 200_000_000

_AXIS_KEYS = frozenset(
    "type tickmode tickvals ticktext showticklabels showgrid zeroline ticks domain anchor range tickangle automargin title "
    "gridcolor zerolinecolor zerolinewidth".split()
)
_KNOWN: Mapping[str, frozenset[str]] = {
    "heatmap": frozenset(
        "type z coloraxis hovertext hoverinfo hoverongaps text texttemplate xaxis yaxis name uid".split()
    ),
    "bar": frozenset("type x y hovertext hoverinfo marker name legendgroup showlegend xaxis yaxis uid".split()),
    "layout": frozenset(
        "template width height margin paper_bgcolor plot_bgcolor font hoverlabel hovermode title annotations coloraxis "
        "barmode bargap showlegend legend".split()
    ),
    "annotation": frozenset("text x y xref yref xanchor yanchor xshift yshift align borderpad showarrow font".split()),
    "coloraxis": frozenset("cmin cmax colorscale showscale colorbar".split()),
}
"""What is drawn, or has nothing to do with a drawing."""


def draw(figure: Figure, path: Path, kind: str, scale: float) -> None:
    """Draw a figure to a file.

    Args:
        figure: of heat maps or bars, as this package makes them.
        path: where to.
        kind: ``png`` or ``svg``.
        scale: pixels of a ``png`` for one of the figure's.

    Raises:
        InputError: the figure has something that is not drawn, or would have over 200 million pixels.
        MissingExtraError: matplotlib is not installed.
    """
    need("matplotlib")
    import matplotlib
    from matplotlib.style import context

    traces, layout = [_plain_arrays(trace.to_plotly_json()) for trace in figure.data], figure.layout.to_plotly_json()
    _check(traces, layout)
    if layout["width"] * layout["height"] * scale**2 > _MOST_PIXELS:
        raise InputError(
            f"A picture of {layout['width']} x {layout['height']} at scale {scale:g} has over {_MOST_PIXELS:,} pixels: "
            "give a smaller scale."
        )
    with context("default"), matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+", category=UserWarning)  # we say it once, below
        matplotlib.rcParams["font.family"] = fonts_for(_all_text(traces, layout))
        canvas = _Drawing(layout, Counter(trace["xaxis"] for trace in traces))
        for trace in traces:
            (canvas.heat_map if trace["type"] == "heatmap" else canvas.bars)(trace)
        canvas.finish()
        canvas.figure.savefig(
            path, format=kind, dpi=_DPI * scale, metadata={"Date": None} if kind == "svg" else None, bbox_inches="tight"
        )


def _plain_arrays(trace: dict[str, Any]) -> dict[str, Any]:
    """A trace whose numbers are arrays: in a copied figure Plotly has them as ``{"dtype", "bdata", "shape"}``, base64."""
    made = dict(trace)
    for key, value in trace.items():
        if isinstance(value, dict) and "bdata" in value:
            flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
            made[key] = flat.reshape([int(size) for size in str(value.get("shape", flat.size)).split(",")])
    return made


_STYLE = {"text.parse_math": False, "svg.hashsalt": "pellucid", "savefig.pad_inches": 0.1}


def _check(traces: list[dict[str, Any]], layout: Mapping[str, Any]) -> None:
    if not traces:
        raise InputError("There is nothing to draw: the figure has no traces.")
    for trace in traces:
        if trace["type"] not in ("heatmap", "bar"):
            raise _not_drawn(f"traces of type {trace['type']}")
        _only(trace, trace["type"], f"a {trace['type']}'s")
    _only(
        {key: value for key, value in layout.items() if not key.startswith(("xaxis", "yaxis"))},
        "layout",
        "the layout's",
    )
    for name, axis in layout.items():
        if name.startswith(("xaxis", "yaxis")) and set(axis) - _AXIS_KEYS:
            raise _not_drawn(f"{name}'s {', '.join(sorted(set(axis) - _AXIS_KEYS))}")
    for annotation in layout.get("annotations", ()):
        _only(annotation, "annotation", "an annotation's")
        if annotation.get("showarrow", True) or (annotation.get("xref"), annotation.get("yref")) != ("paper", "paper"):
            raise _not_drawn("annotations with an arrow or placed by data")
    _only(layout.get("coloraxis", {}), "coloraxis", "the colour axis'")
    if layout.get("title", {}).get("subtitle", {}).get("text"):
        raise _not_drawn("the title's subtitle")
    if "width" not in layout or "height" not in layout:
        raise _not_drawn("figures without a width and a height")


def _only(found: Mapping[str, Any], kind: str, whose: str) -> None:
    unknown = sorted(set(found) - _KNOWN[kind])
    if unknown:
        raise _not_drawn(f"{whose} {', '.join(unknown)}")


def _not_drawn(what: str) -> InputError:
    return InputError(
        f".png and .svg are drawn without a browser, and {what} are not drawn. Save as .html, or use Plotly's own "
        "figure.write_image (it needs kaleido and Chrome)."
    )


class _Drawing:
    """matplotlib's figure while it is drawn; places are Plotly's, in pixels from the top left."""

    def __init__(self, layout: Mapping[str, Any], siblings: Mapping[str, int]) -> None:
        """An empty one.

        Args:
            layout: Plotly's.
            siblings: for each panel, how many traces it has.
        """
        from matplotlib.figure import Figure as Canvas

        self._layout = layout
        self._width, self._height = float(layout["width"]), float(layout["height"])
        self._margin = layout["margin"]
        self.figure = Canvas(
            figsize=(self._width / _DPI, self._height / _DPI),
            dpi=_DPI,
            facecolor=layout.get("paper_bgcolor", "#ffffff"),
        )
        self._ink = layout.get("font", {}).get("color", "#000000")
        self._panels: dict[str, Any] = {}
        self._siblings, self._bars_so_far = siblings, Counter[str]()
        self._colours = _colour_map(layout["coloraxis"]) if "coloraxis" in layout else None
        self._keys: dict[str, Any] = {}

    def heat_map(self, trace: Mapping[str, Any]) -> None:
        """One grid of cells."""
        if self._colours is None:
            raise _not_drawn("heat maps without a colour axis")
        colours, norm = self._colours
        grid = np.ma.masked_invalid(np.asarray(trace["z"], dtype=np.float64))
        panel = self._panel(trace)
        panel.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="none")
        self._set_up(panel, trace)
        for (row, column), value in np.ndenumerate(grid) if trace.get("text") is not None else ():
            text = plain(trace["text"][row][column])
            if text:
                ink = "#ffffff" if _luminance(colours(norm(value))) < 0.4 else self._ink
                panel.text(column, row, text, ha="center", va="center", color=ink, fontsize=_points(11))

    def bars(self, trace: Mapping[str, Any]) -> None:
        """One row of bars; those of one panel stand side by side."""
        panel, upright = self._panel(trace), self._axis(trace, "y")
        rank, siblings = self._bars_so_far[trace["xaxis"]], self._siblings[trace["xaxis"]]
        self._bars_so_far[trace["xaxis"]] += 1
        width = (1.0 - self._layout.get("bargap", 0.2)) / siblings
        places = np.asarray(trace["x"], dtype=np.float64) + (rank - (siblings - 1) / 2) * width
        drawn = panel.bar(places, np.asarray(trace["y"], dtype=np.float64), width=width, color=trace["marker"]["color"])
        if rank == 0:
            panel.axhline(0.0, color=upright.get("zerolinecolor", self._ink), linewidth=0.8)
            panel.grid(axis="y", color=upright.get("gridcolor", "#e3e6ea"), linewidth=0.8)
            panel.set_axisbelow(True)
        self._set_up(panel, trace)
        if trace.get("showlegend"):
            self._keys[plain(trace.get("name") or "")] = drawn

    def finish(self) -> None:
        """Titles, headings, the colour bar, the legend."""
        title = self._layout.get("title", {})
        pad = title.get("pad", {})
        down = (1 - float(title.get("y", 1.0))) * self._height
        size = float(title.get("font", {}).get("size", 16))
        for line in plain(title["text"]).split("\n") if title.get("text") else ():
            self._write(float(pad.get("l", 16)), down, line, size, self._ink, "left", "baseline")
            down += 1.3 * size
        for note in self._layout.get("annotations", ()):
            across, place = self._pixels(note["x"], note["y"])
            font = note.get("font", {})
            size, colour = float(font.get("size", 12)), font.get("color", self._ink)
            across, place = across + note.get("xshift", 0), place - note.get("yshift", 0)
            if note.get("yanchor") == "bottom":
                place -= 3
            for number, line in enumerate(plain(note["text"]).split("\n")):
                self._write(across, place + 1.3 * size * number, line, size, colour, note["xanchor"], note["yanchor"])
        if self._colours is not None and self._layout["coloraxis"].get("showscale", True):
            self._colour_bar(self._layout["coloraxis"]["colorbar"])
        if self._keys:
            right, top = self._pixels(1.0, 1.0)
            self.figure.legend(
                list(self._keys.values()),
                list(self._keys),
                loc="upper left",
                bbox_to_anchor=((right + 8) / self._width, 1 - top / self._height),
                frameon=False,
                fontsize=_points(12),
                borderaxespad=0,
            )

    def _colour_bar(self, bar: Mapping[str, Any]) -> None:
        from matplotlib.cm import ScalarMappable

        right, top = self._pixels(1.0, 1.0)
        length, thick = float(bar["len"]), float(bar["thickness"])
        box = self.figure.add_axes(self._box(right + float(bar["xpad"]), top, thick, length))
        colours, norm = self._colours or (None, None)
        drawn = self.figure.colorbar(ScalarMappable(norm, colours), cax=box)
        drawn.outline.set_visible(False)
        drawn.ax.tick_params(labelsize=_points(12), length=0, labelcolor=self._ink)
        drawn.set_label(plain(bar["title"]["text"]), fontsize=_points(12), color=self._ink, rotation=90)

    def _panel(self, trace: Mapping[str, Any]) -> Any:
        """matplotlib's axes of the panel that a trace belongs to."""
        name = trace["xaxis"]
        if name not in self._panels:
            (left, right), (bottom, top) = self._axis(trace, "x")["domain"], self._axis(trace, "y")["domain"]
            (x0, y0), (x1, y1) = self._pixels(left, top), self._pixels(right, bottom)
            self._panels[name] = self.figure.add_axes(
                self._box(x0, y0, x1 - x0, y1 - y0), facecolor=self._layout.get("plot_bgcolor", "#ffffff")
            )
        return self._panels[name]

    def _set_up(self, panel: Any, trace: Mapping[str, Any]) -> None:
        """Ranges, ticks and titles of a panel's axes."""
        for letter, axis in (("x", panel.xaxis), ("y", panel.yaxis)):
            settings = self._axis(trace, letter)
            (panel.set_xlim if letter == "x" else panel.set_ylim)(settings["range"])
            if "tickvals" in settings:
                axis.set_ticks(list(settings["tickvals"]), labels=[plain(text) for text in settings["ticktext"]])
            panel.tick_params(
                axis=letter,
                length=0,
                labelsize=_points(12),
                colors=self._ink,
                **{_SIDES[letter]: settings["showticklabels"]},
            )
            axis.set_label_text(plain(settings["title"]["text"]), fontsize=_points(13), color=self._ink)
            angle = settings.get("tickangle", 0)
            for label in axis.get_ticklabels() if angle else ():
                label.set(rotation=-angle, rotation_mode="anchor", ha="right", va="center" if angle == -90 else "top")
        for spine in panel.spines.values():
            spine.set_visible(False)

    def _axis(self, trace: Mapping[str, Any], letter: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._layout[f"{letter}axis{trace[f'{letter}axis'][1:]}"]
        return found

    def _pixels(self, across: float, up: float) -> tuple[float, float]:
        """From the left and the top, of a place given in shares of the plotting area."""
        margin = self._margin
        width, height = self._width - margin["l"] - margin["r"], self._height - margin["t"] - margin["b"]
        return margin["l"] + across * width, margin["t"] + (1 - up) * height

    def _box(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        """matplotlib's rectangle: shares of the figure from the bottom left."""
        return left / self._width, 1 - (top + height) / self._height, width / self._width, height / self._height

    def _write(self, left: float, top: float, text: str, size: float, colour: str, ha: str, va: str) -> None:
        place = (left / self._width, 1 - top / self._height)
        self.figure.text(*place, text, fontsize=_points(size), color=colour, ha=ha, va=va)


_SIDES = {"x": "labelbottom", "y": "labelleft"}


def _points(pixels: float) -> float:
    """matplotlib's font sizes are in points."""
    return pixels * 72 / _DPI


def _colour_map(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    stops = [(float(share), str(colour)) for share, colour in settings["colorscale"]]
    colours = LinearSegmentedColormap.from_list("pellucid", stops, N=1024)
    return colours.with_extremes(bad=(0, 0, 0, 0)), Normalize(settings["cmin"], settings["cmax"])


def _luminance(colour: tuple[float, float, float, float]) -> float:
    red, green, blue, _ = colour
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _all_text(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> str:
    """Every text that is drawn."""
    title = layout.get("title", {})
    found = [title.get("text")]
    found += [note.get("text") for note in layout.get("annotations", ())]
    found += [layout.get("coloraxis", {}).get("colorbar", {}).get("title", {}).get("text")]
    found += [trace.get("name") for trace in traces]
    for name, axis in layout.items():
        if name.startswith(("xaxis", "yaxis")):
            found += [axis.get("title", {}).get("text"), *axis.get("ticktext", ())]
    return plain("".join(text for text in found if text))
