"""Pictures of lenses and heads: what they hold, and that every token is visible as text in each way of drawing."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from pellucid.plots import head_map, heat_map, lens_table, save_picture
from pellucid.plots.layout import CELL_SIZE
from pellucid.plots.svg import svg_of
from tests.plots.test_plots import HOSTILE

LAYERS, TOP = 3, 2


def reading() -> xarray.Dataset:
    """A lens' reading of the hostile tokens, each of which is also somewhere the most probable one."""
    generator, size = np.random.default_rng(0), len(HOSTILE)
    share = np.sort(generator.random((LAYERS, size, TOP)))[..., ::-1]
    best = np.array(
        [[[HOSTILE[(pos + layer + n) % size] for n in range(TOP)] for pos in range(size)] for layer in range(LAYERS)]
    )
    place = ("layer", "pos")
    return xarray.Dataset(
        {
            "top_token": ((*place, "top"), best.astype(object)),
            "top_probability": ((*place, "top"), share),
            "kl": (place, generator.random((LAYERS, size)), {"units": "nats"}),
            "entropy": (place, generator.random((LAYERS, size))),
            "rank": ((*place, "token"), generator.integers(0, 90, (LAYERS, size, 1))),
        },
        {
            "layer": [0, 2, 5],
            "pos": range(size),
            "text": ("pos", HOSTILE),
            "token": [7],
            "token_text": ("token", np.array(["⟦<s>⟧"], dtype=object)),
        },
        {"analysis": "logit lens", "prompt": "<b>a prompt"},
    )


def test_a_lens_table_holds_its_numbers_and_its_tokens() -> None:
    given = reading()
    figure: Any = lens_table(given, "kl")
    (trace,) = figure.data
    assert np.array_equal(trace.z, given.kl.values)
    assert trace.textfont.size == CELL_SIZE, "Plotly would shrink every text to the size of the longest"
    written = [[html.unescape(text).replace("\u2068", "").replace("\u2069", "") for text in row] for row in trace.text]
    assert written[0][0] == "⟦<s>⟧"
    assert written[2][HOSTILE.index("<b>") - 2] == "<b>"
    assert written[0][HOSTILE.index("line\nfeed\ttab")].startswith("line⏎feed")
    said = html.unescape(trace.hovertext[1][0])
    assert "<b>" in said
    assert f"KL {given.kl.values[1, 0]:.3f}" in said
    assert figure.layout.title.text == "logit lens: &lt;b&gt;a prompt"
    ranks: Any = lens_table(given, "rank")
    assert np.array_equal(ranks.data[0].z, given["rank"].values[..., 0])
    assert "⟦&lt;s&gt;⟧" in ranks.layout.coloraxis.colorbar.title.text
    assert lens_table(given).data[0].z.max() <= 1


def test_every_token_is_text_in_svg_and_png(tmp_path: Path) -> None:
    given = reading()
    figure: Any = lens_table(given)
    drawn = svg_of(figure.picture)
    for token in ("⟦<s>⟧", "<b>", "&lt;", "नमस्ते", "·the"):
        assert html.escape(token, quote=False) in drawn
    assert "<script>document" not in drawn
    assert "\u2068·السلام\u2069" in drawn  # in the direction of its first letter
    for name in ("a.html", "a.svg"):
        save_picture(figure, tmp_path / name)
    page = (tmp_path / "a.html").read_text("utf-8")
    assert "<script>document" not in page


def test_a_head_map_has_a_panel_for_each_pattern_and_prior() -> None:
    generator = np.random.default_rng(1)
    dims = ("pattern", "prompt", "layer", "head")
    scores = xarray.Dataset(
        {"score": (dims, generator.random((2, 3, 4, 5))), "prior": (dims, generator.random((2, 3, 4, 5)))},
        {"pattern": ["induction", "my_own"]},
        {"prompts": "25 random tokens, 2 times"},
    )
    figure: Any = head_map(scores)
    assert [trace.name for trace in figure.data] == [
        "induction",
        "induction by position",
        "my own",
        "my own by position",
    ]
    assert np.array_equal(figure.data[3].z, scores["prior"].sel(pattern="my_own").mean("prompt").values)
    assert figure.layout.coloraxis.cmin == 0
    assert figure.layout.coloraxis.cmax == 1
    assert figure.picture.notes == ("by position: the same, with queries and keys replaced by their means",)
    alone: Any = head_map(scores.drop_vars("prior"))
    assert len(alone.data) == 2
    assert not alone.picture.notes


@pytest.mark.parametrize("show", ["top_probability", "entropy"])
def test_one_layer_and_one_position(show: Any) -> None:
    assert lens_table(reading().isel(layer=[0], pos=[3]), show).data[0].z.shape == (1, 1)


def test_whose_tokens_label_positions_is_said() -> None:
    """Two prompts that differ; one label of several tokens; nothing is said where there is nothing to say."""
    tokens = ["a", "⟦…⟧", "c"]
    result = xarray.DataArray(
        np.ones((2, 3)),
        dims=("layer", "pos"),
        coords={"pos": [4, 5, 6], "token": ("pos", tokens)},
        attrs={"base_run": "corrupted", "differs": [1, 5]},
    )
    whose = "Tokens are those of the corrupted run; the other run has others at pos 5."
    several = "⟦…⟧: several prompts, not all with the same token there."
    assert heat_map(result).picture.notes == (whose, several)
    assert heat_map(result, subtitle="Said").picture.notes == ("Said", whose, several)
    assert heat_map(result.isel(pos=[0, 2])).picture.notes == ()
    assert heat_map(result, labels={"pos": ["x", "y", "z"]}).picture.notes == ()
    assert heat_map(result.assign_attrs(differs=[])).picture.notes == (several,)
    both = xarray.concat([result, result], "run").assign_coords(run=["one", "two"])
    assert heat_map(both, facet="run").picture.notes == (whose, several)
