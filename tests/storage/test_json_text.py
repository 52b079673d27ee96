"""JSON in one spelling, and back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pellucid.errors import StorageFullError, StoreError
from pellucid.storage.json_text import (
    finite,
    json_errors,
    read_exact_json,
    sha256_of_json,
    to_json,
    to_line,
    with_nan,
    write_json_file,
)
from tests.storage.test_safetensors_files import largest_file

VALUE = {"z": [1, 2.5, None, "é"], "a": {"y": True, "x": {}}}


def test_a_file_has_a_value_a_line_and_ends_its_last() -> None:
    assert to_json(VALUE).startswith('{\n "z": [\n  1,')
    assert to_json(VALUE, sort_keys=True).startswith('{\n "a": {\n  "x": {},')
    assert to_json("é", ascii_only=True) == '"\\u00e9"\n'
    assert json.loads(to_json(VALUE)) == VALUE


def test_a_line_does_not_depend_on_the_order_of_keys() -> None:
    assert to_line(VALUE) == '{"a": {"x": {}, "y": true}, "z": [1, 2.5, null, "é"]}'
    assert to_line(VALUE, compact=True) == '{"a":{"x":{},"y":true},"z":[1,2.5,null,"é"]}'
    assert to_line(VALUE, ascii_only=True).endswith('"\\u00e9"]}')
    assert sha256_of_json(VALUE) == sha256_of_json(dict(reversed(list(VALUE.items()))))


def test_numbers_that_json_does_not_know() -> None:
    given = {"a": [float("nan"), 1.5, float("inf")], "b": "NaN"}
    assert json.loads(to_json(finite(given))) == {"a": [None, 1.5, None], "b": "NaN"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(given)
    back = with_nan(finite([[1.0, math.nan], [2.0, 3.0]]))
    assert math.isnan(back[0][1])
    assert back[1] == [2.0, 3.0]


def test_a_file_that_was_changed_by_hand_is_told(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(to_json(VALUE, sort_keys=True), "utf-8")
    assert read_exact_json(path) == VALUE
    for text in (to_json(VALUE), json.dumps(VALUE), "{"):
        path.write_text(text, "utf-8")
        with pytest.raises(StoreError, match=r"job\.json is damaged"), json_errors(path):
            read_exact_json(path)
    with pytest.raises(StoreError, match=r"none\.json is missing"), json_errors(tmp_path / "none.json"):
        read_exact_json(tmp_path / "none.json")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_file(path, {"a": math.inf})
    assert path.read_text() == '{\n "a": null\n}\n'
    with largest_file(1_000), pytest.raises(StorageFullError, match="No space for"):
        write_json_file(path, ["x" * 2_000])
    assert path.read_text() == '{\n "a": null\n}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
