"""Pictures."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pellucid import plots
from pellucid.analysis.heads import head_scores
from pellucid.analysis.lens import LogitLens
from tests.arguments.bench import NAN, Call, Line, Of, a_path, choice, made, number, whole

RESULT = Of(lambda bench: bench.array)
TITLES = {"title": "t", "unit": "u"}
FOUND = xr.Dataset({"effect": ("layer", [1.0, 2.0, 3.0]), "patched": ("layer", [1.0, NAN, 2.0])})
READING = Of(lambda bench: LogitLens(bench.bridge).read(bench.ids, tokens=[5], positions=None))
SCORES = Of(lambda bench: head_scores(bench.bridge, bench.ids, prior=False))

EDGES = xr.Dataset(
    {"score": ("edge", [0.5, -1.0])},
    {
        "sender": ("edge", ["embed", "L0H1"]),
        "receiver": ("edge", ["L0H1.v", "final"]),
        "sender_layer": ("edge", [-1, 0]),
        "receiver_layer": ("edge", [0, -1]),
        "sender_head": ("edge", [-1, 1]),
        "receiver_head": ("edge", [1, -1]),
    },
    {"n_layers": 2, "n_heads": 4, "n_key_value_heads": 4, "units": "logits"},
)
CURVE = xr.Dataset(
    {
        **{name: ("size", [0.0, 0.5, 1.0]) for name in ("faithfulness", "low", "high")},
        "random_faithfulness": (("random", "size"), [[0.0, 0.1, 1.0]]),
    },
    {"size": [0, 3, 9]},
    {"cpr": 0.5, "cmd": 0.5},
)

CALLS: dict[str, Call] = {
    "heat_map": made(plots.heat_map, result=RESULT, **TITLES),
    "heat_maps": made(plots.heat_maps, result=Of(lambda bench: {"a": bench.array}), **TITLES),
    "head_map": made(plots.head_map, scores=SCORES),
    "circuit_diagram": made(plots.circuit_diagram, edges=EDGES),
    "circuit_map": made(plots.circuit_map, edges=EDGES),
    "faithfulness_bars": made(plots.faithfulness_bars, curve=CURVE),
    "lens_table": made(plots.lens_table, reading=READING),
    "agreement_map": made(plots.agreement_map, found=FOUND),
    "attention_pattern": made(plots.attention_pattern, cache=Of(lambda bench: bench.cache), layer=0),
    "bars": made(plots.bars, result=Of(lambda bench: bench.array[0]), **TITLES),
    "examples_page": made(plots.examples_page, examples={"a": [plots.TokenExample(["x"], [1.0])]}, **TITLES),
    "TokenExample": made(plots.TokenExample, tokens=["x"], values=[1.0]),
    "shown example": Call(
        plots.TokenExample,
        lambda _: lambda **given: plots.examples_page({"a": [plots.TokenExample(**given)]}, title="t", unit="u"),
        lambda _: {"tokens": ["x"], "values": [1.0]},
    ),
    "check_picture_path": made(plots.check_picture_path, path="out.html"),
    "save_picture": made(plots.save_picture, picture="<html></html>", path="out.html"),
}

REFUSED: list[Line] = [
    *(
        (name, {argument: wrong}, f"{argument} is a string")
        for name in ("heat_map", "heat_maps", "bars", "examples_page", "lens_table")
        for argument in ("title", "unit", "subtitle")
        for wrong in (3, True, [])
    ),
    *(
        line
        for name in ("heat_map", "heat_maps")
        for line in (
            *number(name, "centre"),
            (name, {"limits": 3}, "limits is a list"),
            (name, {"limits": (1, 0)}, "limits has to be"),
            (name, {"limits": (1,)}, "limits has to be two"),
            (name, {"limits": (NAN, 1)}, "an entry of limits must be finite"),
            (name, {"x": "nowhere"}, "no axis nowhere"),
            (name, {"y": "nowhere"}, "no axis nowhere"),
            (name, {"labels": 3}, "labels maps axes"),
            (name, {"labels": {"nowhere": ["a"]}}, "labels for nowhere"),
        )
    ),
    ("head_map", {"title": 3}, "title is a string"),
    ("head_map", {"subtitle": 3}, "subtitle is a string"),
    ("head_map", {"scores": 3}, "scores is what head_scores gives"),
    ("head_map", {"scores": xr.Dataset()}, "scores is what head_scores gives; found a data set of nothing"),
    *(
        (name, {argument: 3}, f"{argument} is a string")
        for name in ("circuit_diagram", "circuit_map", "faithfulness_bars")
        for argument in ("title", "subtitle")
    ),
    *(
        line
        for name in ("circuit_diagram", "circuit_map")
        for line in (
            (name, {"edges": 3}, "edges is what circuit.dataset"),
            (name, {"edges": xr.Dataset()}, "edges is what circuit.dataset.* found a data set of nothing"),
        )
    ),
    *whole("circuit_diagram", "most", 1),
    ("faithfulness_bars", {"curve": 3}, "curve is what faithfulness gives"),
    ("faithfulness_bars", {"curve": EDGES}, "curve is what faithfulness gives; found a data set of score"),
    ("lens_table", {"reading": 3}, "reading is what Lens.read gives"),
    ("lens_table", {"reading": xr.Dataset()}, "reading is what Lens.read gives; found a data set of nothing"),
    *choice("lens_table", "show"),
    ("lens_table", {"token": 5}, "token would have no effect"),
    ("lens_table", {"token": 6, "show": "rank"}, "token is one that was followed, 5; found 6"),
    ("lens_table", {"token": "x", "show": "rank"}, "token is a whole number"),
    ("heat_map", {"result": 3}, "the result is of type int"),
    ("agreement_map", {"found": 3}, "found is what attribution_patching gives"),
    ("agreement_map", {"found": xr.Dataset()}, "it has no effect and patched"),
    ("agreement_map", {"found": FOUND.isel(layer=[1])}, "has 0 cells that were patched"),
    ("agreement_map", {"estimator": "atp"}, "estimator would have no effect"),
    *whole("agreement_map", "bins", 2),
    ("agreement_map", {"title": 3}, "title is a string"),
    ("agreement_map", {"subtitle": 3}, "subtitle is a string"),
    ("attention_pattern", {"cache": 3}, "cache is the ActivationCache"),
    ("attention_pattern", {"layer": 99}, "The model has layers 0 to 3"),
    ("attention_pattern", {"row": 9}, "The cache has the rows 0 to 0; found 9"),
    ("attention_pattern", {"heads": [99]}, "has the heads 0 to"),
    ("attention_pattern", {"title": 3}, "title is a string"),
    ("attention_pattern", {"subtitle": 3}, "subtitle is a string"),
    ("heat_map", {"facet": "nowhere"}, "facet: there is no axis nowhere"),
    ("heat_maps", {"result": {}}, "the mapping of results"),
    ("heat_maps", {"result": {"a": 3}}, "'a' is of type int"),
    ("bars", {"result": 3}, "the result is of type int"),
    ("bars", {"result": {}}, "the mapping of results"),
    ("bars", {"facet": "nowhere"}, "facet: there is no axis nowhere"),
    ("bars", {"labels": 3}, "labels maps axes"),
    ("bars", {"interval": 3}, "interval is a list"),
    ("bars", {"result": np.zeros(2), "interval": (np.ones(2), np.zeros(2))}, "2 lower ends are above. Give the lower"),
    ("bars", {"interval": (RESULT,)}, "interval is .lower ends, upper ends.; found 1"),
    ("bars", {"interval": (3, 3)}, "the lower end of interval is of type int"),
    ("bars", {"interval": (np.zeros(99), np.ones(99))}, "the lower end of interval. has"),
    ("examples_page", {"examples": 3}, "examples maps headings"),
    ("examples_page", {"examples": {}}, "there are no examples"),
    ("examples_page", {"examples": {"a": 3}}, r"examples\['a'\] is a list"),
    ("examples_page", {"examples": {"a": [3]}}, r"an entry of examples\['a'\] is a TokenExample"),
    ("TokenExample", {"tokens": 3}, "tokens is a list"),
    ("TokenExample", {"tokens": "x"}, "tokens is a list"),
    ("TokenExample", {"tokens": [3]}, "an entry of tokens is a string"),
    ("TokenExample", {"note": 3}, "note is a string"),
    ("shown example", {"values": 3}, "values of another kind"),
    ("shown example", {"values": [1.0, 2.0]}, "a number for each of its tokens"),
    *a_path("check_picture_path", "path"),
    ("check_picture_path", {"path": "x.gif"}, "path: a picture's name ends in"),
    ("check_picture_path", {"path": "nowhere/x.html"}, "There is no folder"),
    ("save_picture", {"picture": 3}, "picture is a figure"),
    ("save_picture", {"path": "x.svg"}, "picture: a page of examples is saved as .html"),
    *a_path("save_picture", "path"),
    *number("save_picture", "scale", 0.0, 11.0),
    ("save_picture", {"scale": 3.0}, "scale=3.0 would have no effect"),
]
