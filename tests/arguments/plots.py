"""Pictures."""

from __future__ import annotations

import pytest

from pellucid import plots
from tests.arguments.bench import NAN, Bench, Call, Line, Of, a_path, a_text, choice, made, not_run, number, whole

RESULT = Of(lambda bench: bench.array)
TITLES = {"title": "t", "unit": "u"}

CALLS: dict[str, Call] = {
    "heat_map": made(plots.heat_map, result=RESULT, **TITLES),
    "heat_maps": made(plots.heat_maps, results=Of(lambda bench: {"a": bench.array}), **TITLES),
    "bars": made(plots.bars, result=Of(lambda bench: bench.array[0]), **TITLES),
    "examples_page": made(plots.examples_page, examples={"a": [plots.TokenExample(["x"], [1.0])]}, **TITLES),
    "TokenExample": made(plots.TokenExample, tokens=["x"], values=[1.0]),
    "check_picture_path": made(plots.check_picture_path, path="out.html"),
    "save_picture": made(plots.save_picture, picture="<html></html>", path="out.html"),
}

REFUSED: list[Line] = []
