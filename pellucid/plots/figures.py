"""A picture as a Plotly figure, which shows in an exported notebook too.

Plotly reads text as markup and merges equal categories, which silently moves data: here every text is escaped and every
axis counts places, with the labels as the text of its ticks.

In Jupyter, Plotly leaves only its own data in the notebook: a viewer without Plotly's extension, and every export
(``jupyter nbconvert``, GitHub), shows nothing in its place. Ours leave a drawing beside it, which needs neither a network
nor a program.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from plotly.graph_objects import Bar, Figure, Heatmap, Scatter

from pellucid.errors import InputError
from pellucid.plots.axis import Axis
from pellucid.plots.layout import (
    BAR_PAD,
    BAR_WIDTH,
    CELL_SIZE,
    HEADING_SIZE,
    PAD,
    TEXT_SIZE,
    TITLE_SIZE,
    Layout,
    layout_of,
)
from pellucid.plots.picture import GAP, SERIES, Panel, Picture
from pellucid.plots.sheet import CAP, INKS, THIN
from pellucid.plots.svg import svg_of
from pellucid.plots.text import FONTS, escaped, lines, plain, visible


class PictureFigure(Figure):  # type: ignore[misc]
    """What :func:`~pellucid.plots.heat_map` and :func:`~pellucid.plots.bars` give: a Plotly figure in all else."""

    _picture: Picture
    _ipython_display_ = None
    """Plotly's would go before the bundle, and leave the drawing out."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (*super().__reduce__(), {"_picture": self._picture})

    @property
    def picture(self) -> Picture:
        """What the figure shows, to be drawn without Plotly; with the title that it has now.

        Raises:
            InputError: something else was changed, which is named.
        """
        made, title = figure_of(self._picture), self.layout.title.text
        described = self._picture
        if title != made.layout.title.text:
            described = replace(described, title=plain(title or "").replace("\n", " "))
            made.update_layout(title_text=title)
        changed = _differences(json.loads(self.to_json()), json.loads(made.to_json()), "figure")
        if changed:
            raise InputError(
                "A drawing shows what heat_map or bars was asked for, and the title; the figure was changed since then: "
                f"{', '.join(changed[:5])}. Give its arguments instead, save as .html, or use Plotly's own "
                "figure.write_image (it needs kaleido and Chrome)."
            )
        return described

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Plotly's own forms; and a drawing, or a page with Plotly's program where the user changed the figure."""
        bundle: dict[str, Any] = dict(super()._repr_mimebundle_(include, exclude, **kwargs) or {})
        if "text/html" not in bundle and "image/png" not in bundle:
            try:
                bundle["image/svg+xml"] = svg_of(self.picture)
            except InputError:
                bundle["text/html"] = self.to_html(full_html=False, include_plotlyjs=True, include_mathjax=False)
        return bundle


def _differences(found: Any, made: Any, name: str) -> list[str]:
    """Names of what is in one of two values of JSON and not the same in the other."""
    if isinstance(found, list) and isinstance(made, list) and any(isinstance(one, dict) for one in (*found, *made)):
        found, made = dict(enumerate(found)), dict(enumerate(made))
    if isinstance(found, dict) and isinstance(made, dict):
        keys = sorted({*found, *made}, key=str)
        return [each for key in keys for each in _differences(found.get(key), made.get(key), f"{name}.{key}")]
    return (
        [] if found == made else [f"{name} ({found['type']})" if isinstance(found, dict) and "type" in found else name]
    )


def figure_of(picture: Picture) -> PictureFigure:
    """A picture as a Plotly figure, with a trace for each panel, or for each panel and series of bars."""
    layout = layout_of(picture)
    figure = PictureFigure()
    figure._picture = picture
    for number, panel in enumerate(picture.panels):
        if panel.nodes:
            figure.add_traces(_drawing(picture, panel))
        else:
            figure.add_traces(
                _heat_map(picture, panel, number) if panel.scale is not None else _bars(picture, panel, number)
            )
    figure.update_layout(_settings(picture, layout))
    return figure


def _key(number: int) -> str:
    """What Plotly writes after ``x`` and ``y`` for the axes of a panel."""
    return "" if number == 0 else str(number + 1)


def _heat_map(picture: Picture, panel: Panel, number: int) -> Heatmap:
    assert panel.scale is not None
    shown: dict[str, Any] = {"hovertext": _hovers(picture, panel), "hoverinfo": "text", "hoverongaps": True}
    if picture.printed:
        texts = [[escaped(text) for text in row] for row in picture.printed_in(panel)]
        # Of a size: else Plotly makes all of them as small as the longest needs, if that is cut off or not.
        shown |= {"text": texts, "texttemplate": "%{text}", "textfont": {"size": CELL_SIZE}}
    axes = {"xaxis": f"x{_key(number)}", "yaxis": f"y{_key(number)}"}
    colours = f"coloraxis{_key(picture.scales.index(panel.scale))}"
    return Heatmap(z=panel.values, coloraxis=colours, name=escaped(visible(panel.heading)) or None, **shown, **axes)


def _bars(picture: Picture, panel: Panel, number: int) -> list[Bar]:
    keyed = any(picture.series) and number == 0
    axes = {"xaxis": f"x{_key(number)}", "yaxis": f"y{_key(number)}"}
    made = []
    for series, heights in enumerate(panel.values):
        name = escaped(visible(picture.series[series])) or None
        shown = {"hovertext": _hovers(picture, panel)[series], "hoverinfo": "text", "marker": {"color": SERIES[series]}}
        places = {"x": list(range(len(picture.x))), "y": np.where(np.isfinite(heights), heights, np.nan)}
        if panel.ends is not None and series == 0:
            low, high = panel.ends
            beyond = {"type": "data", "symmetric": False, "array": high - heights, "arrayminus": heights - low}
            shown["error_y"] = {**beyond, "color": INKS["ink"], "thickness": THIN, "width": CAP}
        made.append(Bar(name=name, legendgroup=name, showlegend=keyed, **places, **shown, **axes))
    return made


def _drawing(picture: Picture, panel: Panel) -> list[Scatter]:
    """A trace for each link, then for each node; of the one panel of a picture."""
    made, keyed = [], set[int]()
    for link in panel.links:
        across, down = link.points.T
        name = escaped(visible(picture.series[link.series])) or None
        shown = {"line": {"width": link.width, "color": SERIES[link.series]}, **_said(link.said)}
        first = name is not None and link.series not in keyed
        keyed.add(link.series)
        made.append(Scatter(x=across, y=down, mode="lines", name=name, legendgroup=name, showlegend=first, **shown))
    for node in panel.nodes:
        sides = [node.left, node.right, node.right, node.left], [node.top, node.top, node.bottom, node.bottom]
        filled = {"fill": "toself", "fillcolor": INKS["faint"], "line": {"width": 0}, **_said(node.said)}
        made.append(Scatter(x=sides[0], y=sides[1], mode="lines", showlegend=False, **filled))
    return made


def _said(said: tuple[str, ...]) -> dict[str, str]:
    return {"hovertext": lines(escaped(visible(line)) for line in said), "hoverinfo": "text"}


def _hovers(picture: Picture, panel: Panel) -> list[list[str]]:
    return [[lines(map(escaped, hover)) for hover in row] for row in picture.hovers(panel)]


def _settings(picture: Picture, layout: Layout) -> dict[str, Any]:
    """Plotly's layout."""
    area, x, y = layout.area, picture.x, picture.y
    paper, ink = INKS["paper"], INKS["ink"]
    gaps = any(panel.scale is not None and not np.isfinite(panel.values).all() for panel in picture.panels)
    sides = {"l": area.left, "r": layout.width - area.right, "t": area.top, "b": layout.height - area.bottom}
    made: dict[str, Any] = {
        "template": "none",
        "width": layout.width,
        "height": layout.height,
        "margin": {**{side: round(pixels) for side, pixels in sides.items()}, "pad": 0, "autoexpand": False},
        "paper_bgcolor": paper,
        "plot_bgcolor": GAP if gaps else paper,
        "font": {"family": FONTS, "size": TEXT_SIZE, "color": ink},
        "hoverlabel": {"align": "left", "font": {"family": FONTS}, "bgcolor": paper},
        "title": {
            "text": lines(map(escaped, layout.title)),
            "font": {"size": TITLE_SIZE},
            "automargin": False,
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            "pad": {"l": PAD},
            # The foot of the first line; Plotly puts the first of several lines elsewhere for "top".
            "y": 1 - (PAD + 0.75 * TITLE_SIZE) / layout.height,
            "yanchor": "bottom",
            "yref": "container",
        },
        "annotations": [],
    }
    if layout.notes:  # Plotly's own subtitle moves a title of several lines off the page
        place = {"x": 0, "y": 1, "xanchor": "left", "yanchor": "top", "align": "left", "borderpad": 0}
        shift = {"xshift": round(PAD - area.left), "yshift": round(area.top - layout.notes_top)}
        font = {"size": TEXT_SIZE, "color": INKS["faint"]}
        made["annotations"].append(_note(lines(map(escaped, layout.notes)), **place, **shift, font=font))
    for number, box in enumerate(layout.panels):
        across = [(side - area.left) / area.width for side in (box.left, box.right)]
        up = [1 - (side - area.top) / area.height for side in (box.bottom, box.top)]
        key, lowest, leftmost = _key(number), layout.is_lowest(number), layout.is_leftmost(number)
        along = _places(x, x.shown(box.width / len(x), turned=layout.angle != 0), [-0.5, len(x) - 0.5])
        made[f"xaxis{key}"] = {**along, **_frame(x.name, lowest, across, f"y{key}"), "tickangle": layout.angle}
        if isinstance(y, Axis):
            down = _places(y, y.shown(box.height / len(y), turned=True), [len(y) - 0.5, -0.5])
        else:
            down = {"type": "linear", "showgrid": True, "gridcolor": INKS["grid"], "range": [y.low, y.high]}
            down |= {"zeroline": True, "zerolinecolor": INKS["faint"], "zerolinewidth": 1}
        made[f"yaxis{key}"] = {
            **down,
            **_frame(y.name if isinstance(y, Axis) else visible(y.unit), leftmost, up, f"x{key}"),
        }
        if layout.headings[number]:
            place = {"x": sum(across) / 2, "y": up[1], "xanchor": "center", "yanchor": "bottom"}
            made["annotations"].append(_note(escaped(layout.headings[number]), **place, font={"size": HEADING_SIZE}))
    for number, scale in enumerate(picture.scales):
        bar = {
            # An empty line first: Plotly places a title as if the ticks' labels were not there, and it runs into them.
            "title": {"text": lines(["\u00a0", *map(escaped, layout.unit)]), "side": "right"},
            "tickvals": [value for value, _ in scale.ticks],
            "ticktext": [text for _, text in scale.ticks],
            "lenmode": "pixels",
            "len": layout.bar,
            "thickness": BAR_WIDTH,
            "outlinewidth": 0,
            "x": 1,
            "xanchor": "left",
            "xpad": BAR_PAD,
            "y": 1,
            "yanchor": "top",
            "ypad": 0,
        }
        ends = {"cmin": scale.low, "cmax": scale.high, "colorscale": scale.stops}
        made[f"coloraxis{_key(number)}"] = {**ends, "showscale": len(picture.scales) == 1, "colorbar": bar}
    if not isinstance(y, Axis):
        made |= {"barmode": "group", "bargap": 0.2}
    if not isinstance(y, Axis) or picture.is_drawing:
        made["showlegend"] = any(picture.series)
        made["legend"] = {"x": 1, "xanchor": "left", "y": 1, "yanchor": "top"}
    return made


def _note(text: str, **settings: Any) -> dict[str, Any]:
    return {"text": text, "xref": "paper", "yref": "paper", "showarrow": False, **settings}


def _places(axis: Axis, places: range, ends: list[float]) -> dict[str, Any]:
    """An axis of places: an index axis with labels as text."""
    ticks = {"tickvals": list(places), "ticktext": [escaped(axis.ticks[place]) for place in places]}
    return {"type": "linear", "tickmode": "array", **ticks, "showgrid": False, "zeroline": False, "range": ends}


def _frame(name: str, shown: bool, domain: list[float], anchor: str) -> dict[str, Any]:
    title = {"text": escaped(name) if shown else "", "standoff": 8}
    domain = [min(max(side, 0.0), 1.0) for side in domain]
    return {
        "showticklabels": shown,
        "ticks": "",
        "domain": domain,
        "anchor": anchor,
        "automargin": False,
        "title": title,
    }
