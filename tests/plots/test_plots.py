"""Pictures: what a figure holds, that text stays text, and that files open anywhere."""

from __future__ import annotations

import html
import html.parser
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import xarray
from hypothesis import given
from hypothesis import strategies as st
from plotly.graph_objects import Figure, Scatter

from pellucid.errors import InputError, MissingExtraError, PellucidError, PellucidWarning
from pellucid.plots import (
    TokenExample,
    bars,
    check_picture_path,
    examples_page,
    fonts,
    heat_map,
    heat_maps,
    save_picture,
)
from pellucid.plots.saving import page_of
from pellucid.plots.text import cut, escaped, plain, visible, wrapped

HOSTILE = [
    "⟦<s>⟧",
    "<b>",
    "</script><script>document.title='run'</script>",
    "<img src=https://example.org/x.png onerror=alert(1)>",
    '<a href="https://example.org">',
    "&lt;",
    "·the",
    "·the",
    "·السلام",
    "नमस्ते",
    "◌́",
    "$x^2$",
    "%{z}",
    "line\nfeed\ttab",
    "\ufeffBOM\u202eRLO\u2028",
    "·",
]


def patched(layers: int = 3, **more: Any) -> xarray.DataArray:
    """A result ``[layer, pos]`` over the hostile tokens."""
    values = np.random.default_rng(0).normal(size=(layers, len(HOSTILE)))
    return xarray.DataArray(
        values, dims=("layer", "pos"), coords={"pos": range(len(HOSTILE)), "token": ("pos", HOSTILE), **more}
    )


def small(*shape: int, dims: tuple[str, ...] = ("layer", "head"), dtype: Any = np.float64) -> xarray.DataArray:
    return xarray.DataArray(np.arange(np.prod(shape)).reshape(shape).astype(dtype) - 2, dims=dims)


def as_plotly_shows(markup: str) -> str:
    """A label as plotly.js draws it, after its svgTextUtils: known tags are styles, unknown ones dropped, then entities."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup.replace("<br>", "\n")))


# --------------------------------------------------------------------------------------------------------------------
# What a figure holds
# --------------------------------------------------------------------------------------------------------------------


def test_a_heat_map_holds_the_numbers_on_index_axes() -> None:
    result = patched()
    figure = heat_map(result, title="t", unit="u")
    (trace,) = figure.data
    assert np.array_equal(trace.z, result.values)
    assert trace.x is None
    assert trace.y is None
    layout = figure.layout
    assert layout.xaxis.type == layout.yaxis.type == "linear"
    assert list(layout.xaxis.tickvals) == list(range(len(HOSTILE)))
    assert list(layout.yaxis.ticktext) == ["0", "1", "2"]
    assert layout.yaxis.range[0] > layout.yaxis.range[1], "row 0 is at the top"
    assert layout.xaxis.title.text == "pos"
    assert layout.coloraxis.colorbar.title.text == "\u00a0<br>u", "the empty line keeps the title off the ticks"
    assert layout.paper_bgcolor == "#ffffff"


def test_repeated_tokens_keep_their_places() -> None:
    figure = heat_map(patched(), title="t", unit="u")
    assert [figure.layout.xaxis.ticktext[place] for place in (6, 7)] == ["·the", "·the"]
    assert "pos 6: " in figure.data[0].hovertext[0][6]
    assert "pos 7: " in figure.data[0].hovertext[0][7]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, bool])
def test_numbers_of_every_real_kind(dtype: Any) -> None:
    result = small(2, 3, dtype=dtype)
    assert np.array_equal(heat_map(result, title="t", unit="u").data[0].z, result.values.astype(np.float64))


def test_the_middle_colour_is_the_centre() -> None:
    axis = heat_map(small(2, 3), title="t", unit="u").layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-3, 3)
    assert [colour for share, colour in axis.colorscale if share == 0.5] == ["#f1eceb"]
    assert heat_map(small(2, 3), title="t", unit="u", centre=1.0).layout.coloraxis.cmin == -2
    plain_axis = heat_map(small(2, 3), title="t", unit="u", centre=None).layout.coloraxis
    assert (plain_axis.cmin, plain_axis.cmax) == (-2, 3)
    given_axis = heat_map(small(2, 3), title="t", unit="u", limits=(-1, 1)).layout.coloraxis
    assert (given_axis.cmin, given_axis.cmax) == (-1, 1)
    flat = heat_map(small(2, 3) * 0, title="t", unit="u").layout.coloraxis
    assert flat.cmin < 0 < flat.cmax


@pytest.mark.parametrize("centre", [0.0, None])
def test_a_colour_scale_gets_darker_evenly(centre: float | None) -> None:
    scale = heat_map(small(2, 3), title="t", unit="u", centre=centre).layout.coloraxis.colorscale
    shares = [share for share, _ in scale]
    assert shares == sorted(set(shares))
    assert (shares[0], shares[-1]) == (0, 1)
    light = np.array([lightness(colour) for _, colour in scale])
    middle = 0 if centre is None else len(light) // 2
    assert (np.diff(light[middle:]) < 0).all()
    assert (np.diff(light[: middle + 1]) > 0).all()


def lightness(colour: str) -> float:
    """CIE L* of sRGB."""
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16)


def test_axes_can_be_turned() -> None:
    result = small(2, 3)
    turned = heat_map(result, title="t", unit="u", x="layer")
    assert np.array_equal(turned.data[0].z, result.values.T)
    assert turned.layout.yaxis.title.text == "head"
    assert np.array_equal(heat_map(result, title="t", unit="u", y="head").data[0].z, result.values.T)
    assert np.array_equal(heat_map(result.T, title="t", unit="u", y="layer", x="head").data[0].z, result.values)


def test_a_third_axis_makes_panels_on_one_scale() -> None:
    result = xarray.DataArray(np.random.default_rng(1).normal(size=(3, 5, 2)), dims=("layer", "head", "pos"))
    figure = heat_map(result, title="t", unit="u", facet="head")
    assert len(figure.data) == 5
    for head, trace in enumerate(figure.data):
        assert np.array_equal(trace.z, result.isel(head=head).values)
        assert trace.coloraxis == "coloraxis"
    assert [note.text for note in figure.layout.annotations] == [f"head {head}" for head in range(5)]
    boxes = [(figure.layout[f"xaxis{n}"].domain, figure.layout[f"yaxis{n}"].domain) for n in ("", "2", "3", "4", "5")]
    for number, (x, y) in enumerate(boxes):
        assert 0 <= x[0] < x[1] <= 1
        assert 0 <= y[0] < y[1] <= 1
        for x2, y2 in boxes[:number]:
            assert x2[1] < x[0] or x[1] < x2[0] or y2[1] < y[0] or y[1] < y2[0], "panels overlap"


def test_results_side_by_side_share_a_scale() -> None:
    figure = heat_maps({"silenced <b>": small(2, 2), "random": small(2, 2) * 10}, title="t", unit="u")
    assert figure.layout.coloraxis.cmax == 20
    assert [as_plotly_shows(note.text) for note in figure.layout.annotations] == ["silenced <b>", "random"]
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]
    assert list(figure.data[0].text[1]) == ["0.0", "1.0"]


def test_what_is_not_finite_is_a_gap_with_a_name() -> None:
    result = small(2, 3).copy()
    result[0, 1], result[1, 0], result[1, 1] = np.nan, np.inf, -np.inf
    figure = heat_map(result, title="t", unit="u")
    (trace,) = figure.data
    assert "not a number" in trace.hovertext[0][1]
    assert trace.hovertext[1][0].endswith("+inf")
    assert trace.hovertext[1][1].endswith("-inf")
    assert trace.hoverongaps
    assert (trace.text[0][1], trace.text[1][0]) == ("", "")
    assert figure.layout.coloraxis.cmax == 3
    assert "3 of 6" in figure.layout.annotations[0].text
    assert figure.layout.plot_bgcolor != heat_map(small(2, 3), title="t", unit="u").layout.plot_bgcolor


def test_where_labels_come_from() -> None:
    result = xarray.DataArray(
        np.zeros((2, 2)),
        dims=("layer", "language"),
        coords={"layer": [8, 11], "language": ["en", "fr"], "name": ("language", ["English", "French"])},
    )
    with pytest.raises(InputError, match="Several coordinates hold text along language: language, name"):
        heat_map(result, title="t", unit="u")
    named = heat_map(result, title="t", unit="u", labels={"language": "name"}).layout
    assert list(named.xaxis.ticktext) == ["English", "French"]
    assert list(named.yaxis.ticktext) == ["8", "11"]
    given_labels = heat_map(result.drop_vars("name"), title="t", unit="u", labels={"language": ["a", "b"]})
    assert list(given_labels.layout.xaxis.ticktext) == ["a", "b"]


def test_many_places_are_labelled_in_part_and_named_in_full() -> None:
    result = xarray.DataArray(np.zeros((2, 300)), dims=("layer", "pos"))
    figure = heat_map(result, title="t", unit="u", labels={"pos": ["·a_token_of_a_good_length"] * 300})
    assert 10 < len(figure.layout.xaxis.tickvals) < 150
    assert len(figure.data[0].hovertext[0]) == 300
    assert figure.layout.width < 2000


def test_bars() -> None:
    counts = xarray.DataArray([[1, 5, 0], [2, 2, 2]], dims=("language", "layer"), coords={"language": ["en", "fr"]})
    figure = bars({"LAPE": counts, "random": counts * 0 + 1}, title="t", unit="neurons", facet="language")
    assert [list(trace.y) for trace in figure.data] == [[1, 5, 0], [1, 1, 1], [2, 2, 2], [1, 1, 1]]
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range
    assert [note.text for note in figure.layout.annotations] == ["language en", "language fr"]
    assert [trace.showlegend for trace in figure.data] == [True, True, False, False]
    signed = bars(xarray.DataArray([-1.0, np.nan, 3.0], dims="layer"), title="t", unit="u")
    low, high = signed.layout.yaxis.range
    assert low < -1
    assert high > 3
    assert "1 of 3" in signed.layout.annotations[0].text


REFUSED: list[tuple[str, Any]] = [
    ("sizes", lambda: heat_map(small(0, 3), title="t", unit="u")),
    ("none of the 6 numbers", lambda: heat_map(small(2, 3) * np.nan, title="t", unit="u")),
    ("of type list", lambda: heat_map([[1.0, 2.0], [3.0, 4.0]], title="t", unit="u")),  # type: ignore[arg-type]
    (r"up to three axes; .* ndarray\[1, 2, 3, 4\]", lambda: heat_map(np.zeros((1, 2, 3, 4)), title="t", unit="u")),
    ("complex128", lambda: heat_map(small(2, 3) * 1j, title="t", unit="u")),
    ("two axes", lambda: heat_map(small(2, 3, 4, dims=("a", "b", "c")), title="t", unit="u")),
    ("no axis pos", lambda: heat_map(small(2, 3), title="t", unit="u", facet="pos")),
    ("no axis pos left", lambda: heat_map(small(2, 3), title="t", unit="u", x="pos")),
    ("both head", lambda: heat_map(small(2, 3), title="t", unit="u", x="head", y="head")),
    ("3 places, and there are 1", lambda: heat_map(small(2, 3), title="t", unit="u", labels={"head": ["a"]})),
    ("labels for pos", lambda: heat_map(small(2, 3), title="t", unit="u", labels={"pos": ["a"]})),
    ("no such coordinate", lambda: heat_map(small(2, 3), title="t", unit="u", labels={"head": "name"})),
    ("equally far", lambda: heat_map(small(2, 3), title="t", unit="u", limits=(0, 1))),
    ("lower one first", lambda: heat_map(small(2, 3), title="t", unit="u", limits=(1, -1))),
    ("centre must be finite", lambda: heat_map(small(2, 3), title="t", unit="u", centre=np.nan)),
    ("300,000", lambda: heat_map(small(600, 600), title="t", unit="u")),
    ("at most 128", lambda: heat_map(small(129, 2, 2, dims=("a", "b", "c")), title="t", unit="u", facet="a")),
    ("empty", lambda: heat_maps({}, title="t", unit="u")),
    ("share their axes", lambda: heat_maps({"a": small(2, 3), "b": small(3, 2)}, title="t", unit="u")),
    (
        "share their labels",
        lambda: heat_maps({"a": small(2, 3), "b": small(2, 3).assign_coords(head=[1, 2, 3])}, title="t", unit="u"),
    ),
    ("one axis", lambda: bars(small(2, 3), title="t", unit="u")),
    ("1 to 6 results", lambda: bars(dict.fromkeys("abcdefg", small(2, dims=("a",))), title="t", unit="u")),
    ("is empty", lambda: bars({}, title="t", unit="u")),
    ("none of the 2 numbers", lambda: bars(small(2, dims=("a",)) * np.nan, title="t", unit="u")),
    ("no examples", lambda: examples_page({}, title="t", unit="u")),
    ("2 tokens", lambda: examples_page({"n": [TokenExample(["a", "b"], [1.0])]}, title="t", unit="u")),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_what_cannot_be_drawn_is_refused(message: str, call: Any) -> None:
    with pytest.raises(InputError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------------------
# Text stays text
# --------------------------------------------------------------------------------------------------------------------


def test_hostile_labels_are_shown_as_they_are() -> None:
    figure = heat_map(
        patched(),
        title="<b>title</b> $x$",
        unit="<script>",
        subtitle="<i>&amp;",
        labels={"layer": ["<s>", "<s>", "&gt;"]},
    )
    shown = [as_plotly_shows(text) for text in figure.layout.xaxis.ticktext]
    assert shown == [cut(visible(token)) for token in HOSTILE]
    assert [as_plotly_shows(text) for text in figure.layout.yaxis.ticktext] == ["<s>", "<s>", "&gt;"]
    for place, token in enumerate(HOSTILE):
        hover = as_plotly_shows(figure.data[0].hovertext[0][place])
        assert visible(token) in hover
        assert hover.count("\n") == 2
    assert as_plotly_shows(figure.layout.title.text) == "<b>title</b> $x$"
    assert as_plotly_shows(figure.layout.coloraxis.colorbar.title.text) == "\u00a0\n<script>"
    assert as_plotly_shows(figure.layout.annotations[0].text) == "<i>&amp;"
    assert not re.search(r"\$.*\$", str(figure.layout.xaxis.ticktext)), "MathJax would read a formula"
    assert figure.data[0].hovertemplate is None, "%{z} in a token would be read as a number's place"


@given(st.text())
def test_any_text_survives_escaping(text: str) -> None:
    shown = visible(text)
    assert all(char.isprintable() or char in "\u200c\u200d" for char in shown)
    assert as_plotly_shows(escaped(shown)) == shown
    assert plain(escaped(shown)) == shown
    assert "<" not in escaped(shown)
    assert "$" not in escaped(shown)
    assert len(cut(shown)) <= 24
    assert "".join(wrapped(shown, 80)).replace(" ", "") == shown.replace(" ", "")


def test_a_subtitle_has_paragraphs_and_breaks_between_tokens() -> None:
    given: Any = heat_map(small(2, 3), title="t", unit="u", subtitle="clean: a\ncorrupted: b")
    assert given.picture.notes == ("clean: a", "corrupted: b")
    assert bars(small(3, dims=("layer",)), title="t", unit="u", subtitle="a\nb").picture.notes == ("a", "b")  # type: ignore[attr-defined]
    broken = wrapped("Everyone·has·the·right", 100)
    assert "".join(broken) == "Everyone·has·the·right"
    assert len(broken) > 1
    assert all(line.startswith("·") for line in broken[1:])
    assert wrapped("a ·b c", 1000) == ["a ·b c"]


def test_counts_are_written_without_decimals() -> None:
    figure: Any = heat_map(xarray.DataArray([[8, 0], [3, 43]], dims=("language", "other")), title="t", unit="u")
    assert figure.picture.printed_in(figure.picture.panels[0]) == [["8", "0"], ["3", "43"]]
    half: Any = heat_map(xarray.DataArray([[8.5, 0.0]], dims=("language", "other")), title="t", unit="u")
    assert half.picture.printed_in(half.picture.panels[0]) == [["8.50", "0.00"]]


def test_invisible_characters_are_written_out() -> None:
    assert visible("\ufeffa\u202eb\nc\x00") == "⟨U+FEFF⟩a⟨U+202E⟩b⏎c⟨U+0000⟩"
    assert visible("क\u200dष") == "क\u200dष"
    assert visible("\u200d") == "⟨U+200D⟩"
    assert cut("a" * 22 + "e\u0301" + "b" * 9) == "a" * 22 + "…"


class Page(html.parser.HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.texts: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_of_examples_shows_hostile_tokens_as_text() -> None:
    values = np.linspace(-1, 2, len(HOSTILE))
    values[3] = np.nan
    page = examples_page(
        {"layer 3 <b>": [TokenExample(HOSTILE, values, "row <5>")], "silent": []},
        title="<title>",
        unit='"act" & more',
        subtitle="<s>",
    )
    found = Page(page)
    assert set(found.tags) <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "ol", "li", "span"}
    assert not found.asked
    assert "default-src 'none'" in found.policy
    assert "script-src" not in found.policy
    for token in HOSTILE:
        assert visible(token) in found.texts
    assert {"layer 3 <b>", "row <5>", "<title>", "<s>"} <= set(found.texts)
    assert page.count('class="t most"') == 1
    assert page.count('class="t gap"') == 1
    assert "background:rgb(196,101,72)" in page, "the largest has the full colour"


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def test_a_page_asks_nothing_of_any_place(tmp_path: Path) -> None:
    text = save_picture(heat_map(patched(), title="</script><b>", unit="u"), tmp_path / "map.html").read_text("utf-8")
    program = max(re.findall(r"<script>(.*?)</script>", text, re.S), key=len)
    assert len(program) > 1_000_000, "Plotly's program is in the page"
    rest = text.replace(program, "")
    assert not Page(rest).asked
    assert not re.search(r"https?://(?!www\.w3\.org)", rest.replace("https:\\u002f\\u002fexample", "")), rest[:2000]
    assert "default-src 'none'" in Page(rest).policy
    assert set(Page(rest).tags) == {"html", "head", "meta", "title", "style", "script", "body", "div"}
    assert text.count("</script>") == text.count("<script"), "no token closes the script"


def test_a_page_says_its_ground_and_its_ink() -> None:
    """Else a dark browser gives what has no colour of its own light ink, on our white."""
    figure = heat_map(small(2, 3), title="t", unit="u")
    examples = examples_page({"h": [TokenExample(["a", "b"], [1.0, 0.0])]}, title="t", unit="u")
    for page in (page_of(figure), examples):
        style = re.search(r"<style>(.*?)</style>", page, flags=re.S)
        assert style
        (root,) = re.findall(r":root {(.*?)}", style.group(1))
        said = dict(each.split(": ") for each in root.strip(" ;").split("; "))
        assert said == {"color-scheme": "only light", "background": "#ffffff", "color": "#1b1f24"}


def test_a_planted_request_is_found() -> None:
    assert Page('<script src="https://cdn.plot.ly/plotly.js"></script>').asked
    figure = heat_map(small(2, 3), title="t", unit="u")
    assert Page(figure.to_html(include_plotlyjs="cdn")).asked
    assert not Page(re.sub(r"<script>.*?</script>", "", page_of(figure), flags=re.S)).asked


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return np.asarray(image.convert("RGB"))


def test_a_png_shows_the_cells_in_the_figures_colours(tmp_path: Path) -> None:
    result = xarray.DataArray([[-1.0, 0.0, 1.0], [np.nan, 0.5, -0.5]], dims=("layer", "head"))
    figure = heat_map(result, title="t", unit="u", print_values=False)
    found = pixels(save_picture(figure, tmp_path / "map.png"))
    colours = {tuple(colour) for colour in np.unique(found.reshape(-1, 3), axis=0)}
    scale, layout, margin = dict(figure.layout.coloraxis.colorscale), figure.layout, figure.layout.margin
    x, y = layout.xaxis.domain, layout.yaxis.domain
    panel = (layout.width - margin.l - margin.r) * (layout.height - margin.t - margin.b) * (x[1] - x[0]) * (y[1] - y[0])
    cell = 4 * panel / 6  # two pixels for one of the figure's, both ways
    for colour in (scale[0.0], scale[0.5], scale[1.0], "#b3b3b3", "#ffffff"):
        wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
        covered = (np.abs(found.astype(int) - wanted).max(-1) <= 2).sum()
        assert covered > 0.9 * cell, f"{colour} covers {covered} pixels, a cell has {cell}"
    assert len(colours) > 20


def test_the_png_follows_the_figure(tmp_path: Path) -> None:
    figure = heat_map(small(2, 3), title="t", unit="u")
    first = pixels(save_picture(figure, tmp_path / "1.png"))
    assert np.array_equal(first, pixels(save_picture(figure, tmp_path / "2.png")))
    figure.update_layout(title_text="another")
    again = pixels(save_picture(figure, tmp_path / "3.png"))
    assert first.shape != again.shape or not np.array_equal(first, again)


def test_every_kind_of_picture_can_be_drawn(tmp_path: Path) -> None:
    faceted = xarray.DataArray(np.random.default_rng(1).normal(size=(5, 3, 4)), dims=("head", "layer", "pos"))
    counts = xarray.DataArray([[1, 5, 0], [2, 2, 2]], dims=("language", "layer"))
    for number, figure in enumerate(
        [
            heat_map(faceted, title="t", unit="u", facet="head"),
            heat_maps({"a": small(2, 2), "b": small(2, 2)}, title="t", unit="u"),
            bars({"LAPE": counts, "random": counts}, title="t", unit="neurons", facet="language"),
        ]
    ):
        found = pixels(save_picture(figure, tmp_path / f"{number}.png", scale=1))
        assert len(np.unique(found.reshape(-1, 3), axis=0)) > 20


@pytest.mark.filterwarnings("ignore::pellucid.errors.PellucidWarning")  # of fonts this machine lacks
def test_an_svg_is_xml_and_the_same_each_time(tmp_path: Path) -> None:
    figure = heat_map(patched(), title="<b> & $x$", unit="u")
    first = save_picture(figure, tmp_path / "1.svg").read_text("utf-8")
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert first == save_picture(figure, tmp_path / "2.svg").read_text("utf-8")


def test_characters_without_a_font_are_named() -> None:
    assert fonts.fonts_for("abc") == ["DejaVu Sans"]
    with pytest.warns(PellucidWarning, match="1 of the picture's characters.*𓀀" if not has("𓀀") else ""):
        fonts.fonts_for("a𓀀" if not has("𓀀") else "\U0003134a")


def has(char: str) -> bool:
    from matplotlib import font_manager

    names = (entry for entry in font_manager.fontManager.ttflist if not entry.name.startswith("Last Resort"))
    return any(char in fonts._characters(entry.fname) for entry in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda figure: figure.add_trace(Scatter(x=[0], y=[0])), r"figure\.data\.1 \(scatter\)"),
        (lambda figure: figure.add_shape(type="line", x0=0, x1=1, y0=0, y1=1), r"figure\.layout\.shapes"),
        (lambda figure: figure.add_annotation(x=0, y=0, text="here"), r"figure\.layout\.annotations"),
        (lambda figure: figure.update_traces(xgap=3), r"figure\.data\.0\.xgap"),
        (lambda figure: figure.update_traces(z=[[0, 0, 0], [0, 0, 0]]), r"figure\.data\.0\.z"),
        (lambda figure: figure.update_xaxes(side="top"), r"figure\.layout\.xaxis\.side"),
    ],
)
def test_what_is_not_drawn_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    figure = heat_map(small(2, 3), title="t", unit="u")
    change(figure)
    with pytest.raises(InputError, match=message):
        save_picture(figure, tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []
    save_picture(figure, tmp_path / "map.html")
    with pytest.raises(InputError, match="Plotly's own"):
        save_picture(Figure(figure), tmp_path / "map.svg")


def test_paths_are_seen_to_before_anything_is_written(tmp_path: Path) -> None:
    figure = heat_map(small(2, 3), title="t", unit="u")
    (tmp_path / "there.svg").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        save_picture(figure, tmp_path / "there.svg")
    assert (tmp_path / "there.svg").read_text() == "mine"
    save_picture(figure, tmp_path / "there.svg", overwrite=True)
    assert (tmp_path / "there.svg").read_text().startswith("<?xml")
    (tmp_path / "folder.png").mkdir()
    for name, message in (("a.jpg", ".html, .png, .svg"), ("no/a.png", "no folder"), ("folder.png", "is a folder")):
        with pytest.raises(InputError, match=message):
            check_picture_path(tmp_path / name)
    assert check_picture_path(tmp_path / "x" / ".." / "A.PNG") == tmp_path / "A.PNG"
    with pytest.raises(InputError, match=r"saved as \.html"):
        save_picture("<!DOCTYPE html>", tmp_path / "a.png")
    with pytest.raises(InputError, match="scale"):
        save_picture(figure, tmp_path / "a.png", scale=0)


def test_a_drawing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        save_picture(heat_map(small(2, 3), title="t", unit="u"), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------------
# What it needs
# --------------------------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_no_torch_and_matplotlib_only_for_drawings() -> None:
    heavy = ("torch", "transformers", "matplotlib", "plotly")
    assert run(f"import sys, pellucid.plots; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_a_missing_package_says_how_to_get_it(tmp_path: Path) -> None:
    hide = "import sys, importlib.util as u; find = u.find_spec; u.find_spec = lambda name: None if name == {!r} else find(name)\n"
    told = (
        "from pellucid.errors import MissingExtraError\ntry:\n    {}\nexcept MissingExtraError as error: print(error)"
    )
    asked = (
        "heat_map(numpy.eye(2))",
        "bars(numpy.ones(2))",
        "check_picture_path('a.svg')",
        "check_picture_path('a.html')",
    )
    for call in asked:
        found = run(hide.format("plotly") + "import numpy\nfrom pellucid.plots import *\n" + told.format(call))
        assert "Pictures need plotly" in found
        assert "pip install 'pellucid[plots]'" in found
    path = str(tmp_path / "a.png")
    found = run(hide.format("matplotlib") + told.format(f"from pellucid.plots import *; check_picture_path({path!r})"))
    assert "Pictures need matplotlib" in found
    assert issubclass(MissingExtraError, (PellucidError, ImportError))
