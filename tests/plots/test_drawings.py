"""Drawings of a described picture: the SVG of our own writer, and the PNG of the same marks."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from PIL import Image

from pellucid import ActivationCache
from pellucid.demo import load_demo_bridge
from pellucid.errors import InputError
from pellucid.plots import Picture, attention_pattern, bars, circuit_diagram, heat_map, heat_maps, save_picture
from pellucid.plots.axis import Axis
from pellucid.plots.layout import layout_of
from pellucid.plots.picture import GAP, Panel, Scale, rgb
from pellucid.plots.sheet import MOST_HOVERS
from pellucid.plots.svg import svg_of
from pellucid.plots.text import cut, visible
from tests.arguments.plots import EDGES
from tests.plots.test_plots import HOSTILE, patched

SVG = "{http://www.w3.org/2000/svg}"
RANDOM = np.random.default_rng(0)
GRID = xarray.DataArray(RANDOM.normal(size=(3, 4)), dims=("layer", "head"))
PATTERN = torch.softmax(torch.from_numpy(RANDOM.normal(size=(1, 2, 5, 5)).astype(np.float32)).tril(), -1)


class Cache(dict[tuple[str, int], torch.Tensor]):
    """What a pattern's picture needs of a cache."""

    tokens, has_batch_dim = torch.tensor([[5, 6, 7, 8, 9]]), True


KINDS: dict[str, Callable[[], Any]] = {
    "heat_map": lambda: heat_map(GRID),
    "facets": lambda: heat_map(RANDOM.normal(size=(3, 4, 5)), facet="panel", x="row"),
    "heat_maps": lambda: heat_maps({"silenced <b>": GRID, "random": GRID * 2}, title="t", unit="u"),
    "bars": lambda: bars({"a": GRID[0], "b": GRID[1]}, title="t", unit="u"),
    "circuit_diagram": lambda: circuit_diagram(EDGES),
    "attention_pattern": lambda: attention_pattern(Cache({("pattern", 0): PATTERN}), 0),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("suffix", [".svg", ".png", ".html"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_in_every_format(kind: str, suffix: str, tmp_path: Path) -> None:
    data = save_picture(KINDS[kind](), tmp_path / f"a{suffix}").read_bytes()
    assert {".svg": b"<?xml", ".png": b"\x89PNG", ".html": b"<!DOCTYPE html>"}[suffix] in data[:20]


def svg(figure: Any) -> ElementTree.Element:
    return ElementTree.fromstring(svg_of(figure.picture))


def texts(root: ElementTree.Element) -> list[str]:
    return [(element.text or "").strip("\u2068\u2069") for element in root.iter(f"{SVG}text")]


# --------------------------------------------------------------------------------------------------------------------
# SVG
# --------------------------------------------------------------------------------------------------------------------


def test_an_svg_has_the_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib, numpy as np; from pellucid.plots import heat_map; from pellucid.plots.svg import svg_of\n"
        "for rows in (4, 80):\n"
        "    grid = np.sin(np.arange(100.0 * rows)).reshape(rows, 100)\n"
        "    print(hashlib.sha256(svg_of(heat_map(grid, title='人 السلام').picture).encode()).hexdigest())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_an_svg_shows_hostile_text_as_text_and_asks_nothing() -> None:
    figure = heat_map(patched(), title="</svg><script>a & b</script>", unit='"u" <b>', subtitle="1 < 2 & 3")
    written = svg_of(figure.picture)
    root = ElementTree.fromstring(written)
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert tags == {"svg", "title", "style", "rect", "text", "g", "path"}
    found = texts(root)
    assert found[0] == "</svg><script>a & b</script>"
    assert found[1] == "1 < 2 & 3"
    assert '"u" <b>' in found
    for token in HOSTILE:
        assert cut(visible(token)) in found
    hovers = [element.text for element in root.iter(f"{SVG}title")]
    assert hovers[0] == "</svg><script>a & b</script>"
    assert any("</script><script>document.title='run'</script>" in (hover or "") for hover in hovers)
    rest = re.sub(r"<(title|text).*?</\1>", "", written.replace("http://www.w3.org/2000/svg", ""), flags=re.S)
    assert not re.search(r"http|href|src|url\(|import", rest)


def test_right_to_left_labels_keep_their_own_direction() -> None:
    names = ["·السلام", "abc", "人"]
    figure = heat_map(xarray.DataArray(np.eye(3), dims=("layer", "token"), coords={"token": names}))
    raw = [element.text for element in svg(figure).iter(f"{SVG}text")]
    assert "\u2068·السلام\u2069" in raw
    assert {"abc", "人"} <= set(raw)


def cells_of(root: ElementTree.Element) -> list[ElementTree.Element]:
    group = next(element for element in root.iter(f"{SVG}g") if element.get("shape-rendering") == "crispEdges")
    return list(group)


def test_cells_have_the_colours_and_places_of_the_numbers() -> None:
    grid = GRID.copy()
    grid[1, 2] = np.nan
    figure = heat_map(grid, title="t", unit="u")
    scale, box = figure.picture.panels[0].scale, layout_of(figure.picture).panels[0]
    assert scale is not None
    cells = cells_of(svg(figure))
    assert len(cells) == grid.size
    for place, cell in enumerate(cells):
        row, column = divmod(place, 4)
        assert float(cell.get("x", "")) == pytest.approx(box.left + column * box.width / 4, abs=0.01)
        assert float(cell.get("y", "")) == pytest.approx(box.top + row * box.height / 3, abs=0.01)
        value = float(grid[row, column])
        colour = GAP if np.isnan(value) else "#{:02x}{:02x}{:02x}".format(*scale.colours(np.array(value)))
        assert cell.get("fill") == colour
        (says,) = cell
        assert f"layer {row}" in (says.text or "").replace("\u2068", "").replace("\u2069", "")
        assert ("not a number" if np.isnan(value) else f"u: {value:.6g}") in (says.text or "")


def test_many_cells_are_a_path_for_each_colour() -> None:
    values = np.round(RANDOM.normal(size=(60, MOST_HOVERS // 60 + 1)))
    figure = heat_map(values, centre=None)
    (group,) = cells_of(svg(figure))
    found = np.full((*values.shape, 3), 0)
    for path in group:
        for start, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path.get("d", "")):
            found[int(row), int(start) : int(start) + int(length)] = rgb(path.get("fill", ""))
    scale = figure.picture.panels[0].scale
    assert scale is not None
    assert np.array_equal(found, scale.colours(values))


def test_panels_may_have_scales_of_their_own() -> None:
    rows, columns = Axis.counted("layer", 2), Axis.counted("head", 2)
    grid = np.array([[0.0, 0.5], [-1.0, 2.0]])
    panels = (Panel("<b>", grid, Scale("nats", 0.0, 2.0)), Panel("</svg>", grid * 0, Scale("", 0.0, 1.0)))
    picture = Picture("a < b & c", ("1 < 2 & 3",), columns, rows, panels, printed=True)
    root = ElementTree.fromstring(svg_of(picture))
    found = texts(root)
    assert {"a < b & c", "1 < 2 & 3", "<b>", "</svg>", "2.00", "-1.00"} <= set(found)
    assert "nats" not in found, "a colour bar would be of one of two scales"
    hovers = [(element.text or "").replace("\u2068", "").replace("\u2069", "") for element in root.iter(f"{SVG}title")]
    assert hovers[1:3] == ["<b>\nlayer 0\nhead 0\nnats: 0", "<b>\nlayer 0\nhead 1\nnats: 0.5"]
    fills = [element.get("fill") for element in cells_of(root)]
    assert fills[0] == fills[2] == Scale("", 0.0, 1.0).stops[0][1], "below the scale is pale"


# --------------------------------------------------------------------------------------------------------------------
# PNG
# --------------------------------------------------------------------------------------------------------------------


def test_a_png_has_each_cell_where_it_belongs(tmp_path: Path) -> None:
    figure = heat_map(GRID, title="t", unit="u", print_values=False)
    scale, box = figure.picture.panels[0].scale, layout_of(figure.picture).panels[0]
    assert scale is not None
    pixels = np.asarray(Image.open(save_picture(figure, tmp_path / "a.png", scale=1)).convert("RGB")).astype(int)
    for (row, column), value in np.ndenumerate(GRID.values):
        at = pixels[int(box.top + (row + 0.5) * box.height / 3), int(box.left + (column + 0.5) * box.width / 4)]
        assert np.abs(at - scale.colours(np.array(value))).max() <= 2, f"{row}, {column}"
    bar = pixels[:, int(box.right + 14 + 7)]
    assert np.abs(bar[int(box.top) + 2] - rgb(scale.stops[-1][1])).max() < 12, "the largest value is at the top"


def test_a_png_has_bars_of_the_right_height(tmp_path: Path) -> None:
    figure = bars(np.array([1.0, -1.0, 2.0]), title="t", unit="u")
    pixels = np.asarray(Image.open(save_picture(figure, tmp_path / "a.png", scale=1)).convert("RGB")).astype(int)
    covered = (np.abs(pixels - rgb("#0072B2")).max(-1) <= 2).sum(0)
    box = layout_of(figure.picture).panels[0]
    heights = [covered[int(box.left + (place + 0.5) * box.width / 3)] for place in range(3)]
    assert heights[0] == pytest.approx(heights[1], abs=2)
    assert heights[2] == pytest.approx(2 * heights[0], abs=3)


# --------------------------------------------------------------------------------------------------------------------
# Outliers
# --------------------------------------------------------------------------------------------------------------------


def outlying(value: float = 500.0) -> np.ndarray:
    grid = np.linspace(-2, 2, 60).reshape(6, 10)
    grid[2, 3] = value
    return grid


def test_an_interval_is_a_line_from_end_to_end(tmp_path: Path) -> None:
    low, high = np.array([1.0, -3.0, np.nan]), np.array([4.0, -1.0, 9.0])
    figure = bars(np.array([2.0, -2.0, 3.0]), title="t", unit="u", interval=(low, high))
    picture = figure.picture
    up, box = picture.y, layout_of(picture).panels[0]
    assert isinstance(up, Scale)
    lines = [
        {name: float(rect.get(name, "nan")) for name in ("x", "y", "width", "height")}
        for rect in svg(figure).iter(f"{SVG}rect")
        if rect.get("class") == "ink"
    ]
    upright = [line for line in lines if line["height"] > line["width"]]
    assert len(lines) == 6  # a line and two caps for each of two; the third has no lower end
    for line, ends in zip(upright, ((1.0, 4.0), (-3.0, -1.0)), strict=True):
        foot, top = (box.bottom - box.height * (end - up.low) / (up.high - up.low) for end in ends)
        assert (line["y"], line["y"] + line["height"]) == pytest.approx((top, foot), abs=0.02)
    assert picture.hovers(picture.panels[0])[0][0][-1] == "from 1 to 4"
    save_picture(figure, tmp_path / "a.png")
    assert 4.0 < up.high < 5.0  # an end is inside the picture, what is not drawn takes no room
    assert bars({"a": RANDOM.normal(size=3), "b": low}, interval=(low, high)).data[1].error_y.array is None


def test_an_outlier_does_not_flatten_the_rest_and_the_picture_says_so(tmp_path: Path) -> None:
    figure = heat_map(outlying(), title="t", unit="u")
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-2, 2)
    told = "Clipped: 1 of 60 numbers lie beyond the colour scale (-2 to 2), the farthest 500 at row 2, column 3."
    assert figure.layout.annotations[0].text.replace("<br>", " ") == told
    assert list(figure.layout.coloraxis.colorbar.ticktext)[-1] == "≥ 2"
    assert figure.data[0].hovertext[2][3].endswith("500")
    found = texts(svg(figure))
    assert told in " ".join(found)
    assert "≥ 2" in found
    assert not any(text.startswith("≤") for text in found)
    assert heat_map(outlying(), clip=False).layout.coloraxis.cmax == 500
    below = heat_map(outlying(-90.0), centre=None)
    assert (below.layout.coloraxis.cmin, below.layout.coloraxis.cmax) == (-2, 2)
    assert below.layout.coloraxis.colorbar.ticktext[0] == "≤ -2"


def test_limits_say_what_they_leave_out() -> None:
    figure = heat_map(GRID, limits=(-0.5, 0.5))
    outside = int((abs(GRID) > 0.5).sum())
    assert f"Clipped: {outside} of 12" in figure.layout.annotations[0].text
    assert not heat_map(GRID, limits=(-9, 9)).layout.annotations


@pytest.mark.parametrize(
    "grid",
    [
        outlying(9.0),  # not five times as far as the rest
        np.where(np.arange(60) % 20 == 0, 500.0, np.linspace(-2, 2, 60)).reshape(6, 10),  # three are no outlier
        outlying()[2:3],  # too few numbers
        np.where(outlying() > 100, 1.0, 1e-7 * outlying()),  # the rest may be rounding
        np.where(outlying() > 100, 1.0, 0.0),
    ],
)
def test_what_is_no_outlier_is_not_clipped(grid: np.ndarray) -> None:
    assert heat_map(grid).layout.coloraxis.cmax == grid.max()


# --------------------------------------------------------------------------------------------------------------------
# Tensors, and what a result says of itself
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_a_tensor_needs_nothing_else(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 2], [3, 4, -5]]).to(dtype).requires_grad_(dtype.is_floating_point)
    figure = heat_map(tensor)
    assert np.array_equal(figure.data[0].z, tensor.detach().double().numpy())
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == ("row", "column")
    assert figure.layout.title.text == "row × column"
    assert list(bars(tensor[0]).data[0].y) == tensor[0].tolist()
    with pytest.raises(InputError, match="real numbers"):
        heat_map(torch.ones(2, 2) * 1j)


def test_a_result_says_what_it_is() -> None:
    about = {"analysis": "activation patching", "site": "z", "direction": "denoising", "value": "normalized"}
    figure = heat_map(GRID.rename("logit difference").assign_attrs(about))
    assert figure.picture.title == "activation patching, z, denoising: logit difference"
    assert figure.picture.scales[0].unit == "logit difference (0 corrupted, 1 clean)"
    figure = bars(GRID[0].rename("effect").assign_attrs(units="nats"))
    assert (figure.layout.title.text, figure.layout.yaxis.title.text) == ("effect", "effect (nats)")


# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Any, ActivationCache]:
    bridge = load_demo_bridge()
    with torch.no_grad():
        return bridge.tokenizer, bridge.run_with_cache(["人人有权享有生命", "the cat"])[1]


def test_an_attention_pattern_of_a_real_cache(demo: tuple[Any, ActivationCache]) -> None:
    tokenizer, cache = demo
    figure = attention_pattern(cache, 1, tokenizer=tokenizer)
    assert len(figure.data) == 8
    for head, trace in enumerate(figure.data):
        assert np.array_equal(trace.z, cache["pattern", 1][0, head].numpy())
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert "人人" in figure.layout.yaxis.ticktext
    for box in layout_of(figure.picture).panels:
        assert box.width == pytest.approx(box.height), "cells are square"
    second = attention_pattern(cache, 1, heads=[7, 2], row=1)
    assert np.array_equal(second.data[0].z, cache["pattern", 1][1, 7].numpy())
    assert [note.text for note in second.layout.annotations] == ["head 7", "head 2"]
    first = {"blocks.1.attn.hook_pattern": cache["pattern", 1][:1]}
    alone = attention_pattern(ActivationCache(first, cache.index).remove_batch_dim(), 1)
    assert np.array_equal(alone.data[3].z, cache["pattern", 1][0, 3].numpy())


@pytest.mark.parametrize(
    ("change", "said"),
    [({"row": 2}, "rows 0 to 1; found 2"), ({"heads": [0, 8]}, r"heads 0 to 7; found \[8\]"), ({"heads": []}, "none")],
)
def test_rows_and_heads_that_are_not_there(demo: tuple[Any, ActivationCache], change: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        attention_pattern(demo[1], 1, **change)


def test_pos_by_key_pos_is_square_without_being_asked() -> None:
    squares = xarray.DataArray(np.eye(20), dims=("pos", "key_pos"))
    (box,) = layout_of(heat_map(squares, print_values=False).picture).panels
    assert box.width == pytest.approx(box.height)
    (box,) = layout_of(heat_map(squares, square=False, print_values=True).picture).panels
    assert box.width > box.height
