"""Circuits drawn: nodes and lines, each edge's score where its part and its input cross; the curve's numbers as bars."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

pytest.importorskip("plotly")

from PIL import Image

from pellucid.plots import circuit_diagram, circuit_map, faithfulness_bars, save_picture
from pellucid.plots.layout import layout_of
from pellucid.plots.picture import SERIES, Link, Picture, rgb
from tests.arguments.plots import CURVE, EDGES


def edges(*rows: tuple[str, str, float], **about: int) -> xarray.Dataset:
    """Edges of a model of three layers with four heads, as ``circuit.dataset()`` labels them."""

    def number(name: str, letter: str) -> int:
        return int(name.partition(letter)[2].partition(".")[0].partition("H")[0] or -1) if letter in name else -1

    senders, receivers, scores = map(list, zip(*rows, strict=True))
    coords: dict[str, Any] = {}
    for end, names in (("sender", senders), ("receiver", receivers)):
        coords[end] = ("edge", names)
        coords[f"{end}_layer"] = ("edge", [number(name, "L") for name in names])
        coords[f"{end}_head"] = ("edge", [number(name, "H") for name in names])
    sizes = {"n_layers": 3, "n_heads": 4, "n_key_value_heads": 4, "units": "logits"}
    return xarray.Dataset({"score": ("edge", scores)}, coords, sizes | about)


def link(picture: Picture, said: str) -> Link:
    return next(each for each in picture.panels[0].links if each.said[0] == said)


def test_lines_run_upwards_from_part_to_input() -> None:
    """Places counted by hand: rows from final (0) over layers 2, 1, 0 to embed (4); columns heads 0 to 3 and the MLP."""
    picture = circuit_diagram(
        edges(
            ("embed", "L0H1.q", -2.0),
            ("L0H1", "L0.mlp_in", 1.0),
            ("L0.mlp_out", "L2.mlp_in", 0.5),
            ("L2H3", "final", 4),
        )
    ).picture
    boxes = {node.said[0]: node for node in picture.panels[0].nodes}
    assert set(boxes) == {"embed", "L0H1", "L0.mlp", "L2.mlp", "L2H3", "final"}
    assert (boxes["L0H1"].left + boxes["L0H1"].right) / 2 == pytest.approx(1)
    assert 2.5 < boxes["L0.mlp"].top < boxes["L0.mlp"].bottom < boxes["L0H1"].top < boxes["L0H1"].bottom < 3.5
    assert boxes["final"].left < 0 < 4 < boxes["final"].right
    for said, start, end in (
        ("embed → L0H1.q", "embed", "L0H1"),
        ("L0H1 → L0.mlp_in", "L0H1", "L0.mlp"),
        ("L0.mlp_out → L2.mlp_in", "L0.mlp", "L2.mlp"),
        ("L2H3 → final", "L2H3", "final"),
    ):
        points = link(picture, said).points
        assert points[0, 1] == pytest.approx(boxes[start].top)
        assert points[-1, 1] == pytest.approx(boxes[end].bottom)
        assert (np.diff(points[:, 1]) < 0).all()
        for place, box in ((0, boxes[start]), (-1, boxes[end])):
            assert box.left <= points[place, 0] <= box.right
    assert link(picture, "embed → L0H1.q").points[-1, 0] < 1, "queries are on the left"
    # What passes a node of its column passes it aside.
    assert link(picture, "L0.mlp_out → L2.mlp_in").points[:, 0].max() > 4.05


def test_width_is_the_size_and_colour_the_sign() -> None:
    picture = circuit_diagram(edges(("embed", "final", -4.0), ("L0H1", "final", 2.0), ("L1H1", "L2H0.v", -3.0))).picture
    (panel,) = picture.panels
    assert [each.said[1] for each in panel.links] == ["2 logits", "-3 logits", "-4 logits"], "the largest on top"
    widths = [each.width for each in panel.links]
    assert np.array(widths) / widths[-1] == pytest.approx([0.5, 0.75, 1])
    assert [picture.series[each.series] for each in panel.links] == ["score over 0", "score below 0", "score below 0"]
    assert picture.notes == ("Width of a line: size of the score, the widest 4 logits.",)


def test_the_largest_edges_first_and_how_many_are_left_out() -> None:
    rows = [("embed", f"L{layer}H{head}.v", float(layer - 4 * head)) for layer in range(3) for head in range(4)]
    picture = circuit_diagram(edges(*rows), most=2).picture
    assert [each.said[0] for each in picture.panels[0].links] == ["embed → L1H3.v", "embed → L0H3.v"]
    assert picture.notes[-1] == "Left out: the 10 edges of the smallest scores."


def test_shared_keys_are_a_bar_below_their_heads() -> None:
    picture = circuit_diagram(edges(("L0H0", "L1H1.k", 1.0), n_key_value_heads=2)).picture
    boxes = {node.said[0]: node for node in picture.panels[0].nodes}
    assert set(boxes) == {"L0H0", "L1H2", "L1H3", "keys and values of L1H1"}
    bar = boxes["keys and values of L1H1"]
    assert bar.left < boxes["L1H2"].left
    assert bar.right > boxes["L1H3"].right
    assert bar.top > boxes["L1H2"].bottom
    assert picture.panels[0].links[0].points[-1] == pytest.approx([2.5, bar.bottom])


def test_edges_without_scores_are_lines_of_one_width() -> None:
    nameless = edges(("embed", "L0H1.q", np.nan), ("L0H1", "final", np.nan))
    picture = circuit_diagram(nameless).picture
    assert len({each.width for each in picture.panels[0].links}) == 1
    assert picture.series == ("",)
    assert picture.notes == ()


def test_every_way_of_drawing_has_the_lines_where_they_are(tmp_path: Path) -> None:
    figure = circuit_diagram(edges(("embed", "L0H1.k", -2.0), ("L2H3", "final", 1.0)), title="<b>")
    picture, box = figure.picture, layout_of(figure.picture).panels[0]
    place = np.array([box.width / 5, box.height / 5])
    wanted = [np.array([box.left, box.top]) + place * (each.points + 0.5) for each in picture.panels[0].links]
    root = ElementTree.fromstring(save_picture(figure, tmp_path / "a.svg").read_text())
    paths = [each for each in root.iter("{http://www.w3.org/2000/svg}path") if each.get("stroke")]
    pixels = np.asarray(Image.open(save_picture(figure, tmp_path / "a.png", scale=1)).convert("RGB")).astype(int)
    for number, (path, points, each) in enumerate(zip(paths, wanted, picture.panels[0].links, strict=True)):
        drawn = np.array([part.split() for part in path.get("d", "")[1:].split("L")], dtype=float)
        assert drawn == pytest.approx(points, abs=0.01)
        assert path.get("stroke") == SERIES[each.series]
        assert (path[0].text or "").split("\n") == list(each.said)
        left, top = points.mean(0)
        assert (
            np.abs(pixels[int(top), int(left)] - rgb(SERIES[each.series])).max() <= 60
        )  # its edge is mixed with paper
        assert np.array_equal(np.stack([figure.data[number].x, figure.data[number].y], 1), each.points)
    assert [trace.name for trace in figure.data if trace.showlegend] == ["score over 0", "score below 0"]


def test_edges_cross_where_they_are(tmp_path: Path) -> None:
    figure = circuit_map(EDGES)
    grid = np.array(figure.data[0].z, dtype=float)
    # Down L0H1.v, final; along embed, L0H1.
    np.testing.assert_array_equal(grid, [[0.5, np.nan], [np.nan, -1.0]])
    assert list(figure.layout.xaxis.ticktext) == ["embed", "L0H1"]
    assert "2 edges" in figure.layout.title.text
    assert "<svg" in save_picture(figure, tmp_path / "a.svg").read_text()


def test_the_stream_orders_both_axes() -> None:
    names = ["L10H2", "L2.mlp_out", "L2H11", "embed", "L2H3"]
    ends = ["final", "L11.mlp_in", "L11H2.v", "L11H2.q", "L3H0.k"]
    figure = circuit_map(EDGES.isel(edge=[0] * 5).assign_coords(sender=("edge", names), receiver=("edge", ends)))
    assert list(figure.layout.xaxis.ticktext) == ["embed", "L2H3", "L2H11", "L2.mlp_out", "L10H2"]
    assert list(figure.layout.yaxis.ticktext) == ["L3H0.k", "L11H2.q", "L11H2.v", "L11.mlp_in", "final"]


def test_the_curve_as_bars() -> None:
    figure = faithfulness_bars(CURVE)
    heights = {trace.name: list(trace.y) for trace in figure.data}
    assert heights["strongest edges"] == [0, 0.5, 1]
    assert heights["random edges"] == [0, 0.1, 1]
    assert "CPR 0.50" in figure.layout.title.text
    assert "random edges" not in {trace.name for trace in faithfulness_bars(CURVE.isel(random=[])).data}


def test_the_curve_has_its_interval_and_says_so() -> None:
    curve = CURVE.assign(low=("size", [0.0, 0.25, 1.0]), high=("size", [0.0, 1.5, 1.0]))
    figure = faithfulness_bars(curve)
    strongest, random = figure.data
    assert list(strongest.y + strongest.error_y.array) == [0, 1.5, 1]
    assert list(strongest.y - strongest.error_y.arrayminus) == [0, 0.25, 1]
    assert random.error_y.array is None
    assert "95 % interval" in figure.picture.notes[0]
    of_one_pair = CURVE.assign(low=("size", [np.nan] * 3), high=("size", [np.nan] * 3))
    assert not faithfulness_bars(of_one_pair).picture.notes
