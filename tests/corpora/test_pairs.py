"""Pairs of prompts as tables: what goes out comes back, and what is no pair is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pellucid.corpora import PromptPairs
from pellucid.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"clean": 'a, "b"\nc', "corrupted": "[1, 2]", "answer": " x", "foil": " y", "kind": 3, "note": "é"},
    {"clean": "", "corrupted": " \r\n", "answer": "1", "foil": "null", "kind": 4, "note": ""},
]
SETS: list[dict[str, Any]] = [
    {"clean": [1, 2], "corrupted": [3, 4], "answer": [" x", 7], "foil": 8},
    {"clean": [1], "corrupted": [3], "answer": 5, "foil": ["8", " 9"]},
]


@pytest.mark.parametrize(
    "rows", [ROWS, SETS, [{"clean": "a", "corrupted": "b"}]], ids=["texts", "ids and sets", "bare"]
)
def test_tables_come_back(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pairs = PromptPairs.from_rows(rows, "mine")
    pairs.to_csv(tmp_path / "mine.csv")
    for again in (
        PromptPairs.from_csv(tmp_path / "mine.csv"),
        PromptPairs.from_dataframe(pairs.to_dataframe(), "mine"),
        PromptPairs.from_rows(pairs.rows(), "mine"),
    ):
        assert list(again.rows()) == rows
        assert again.content_hash == pairs.content_hash
        assert again.name == "mine"
    assert list(pairs[-1:].rows()) == rows[-1:]
    assert list(pairs[[0, 0]].rows()) == [rows[0]] * 2


def test_a_plain_table_is_read_as_texts(tmp_path: Path) -> None:
    (tmp_path / "plain.csv").write_text("clean,corrupted,answer,foil,year\na,b,1,2,1741\n\n", "utf-8")
    pairs = PromptPairs.from_csv(tmp_path / "plain.csv")
    assert list(pairs.rows()) == [{"clean": "a", "corrupted": "b", "answer": "1", "foil": "2", "year": "1741"}]
    assert not pairs.has_sets


def test_the_hash_is_of_what_is_run() -> None:
    pairs = PromptPairs.from_rows(ROWS)
    assert pairs.content_hash == PromptPairs.from_rows([row | {"note": "other"} for row in ROWS]).content_hash
    for column in ("clean", "corrupted", "answer", "foil"):
        assert pairs.content_hash != PromptPairs.from_rows([ROWS[0] | {column: "other"}, ROWS[1]]).content_hash


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are no rows"),
        ("clean,corrupted\n", "there are no rows"),
        ("clean,corrupted\na,b\nc\n", "row 1 has 1 cells, and there are 2 columns"),
        ("clean,corrupted\na,b,c\n", "row 0 has 3 cells"),
        ("clean,clean,corrupted\na,b,c\n", "two columns 'clean'"),
        ("clean,answer\na,b\n", "row 0 has no 'corrupted'"),
        ("clean,corrupted,answer:json\na,b,[1\n", "row 0 has a cell that is no JSON"),
        ("clean,corrupted,answer:json\na,b,[]\n", "row 0 of answer is a token"),
        ("clean,corrupted,answer:json\na,b,[1.5]\n", "row 0 of answer is a token"),
        ('clean,corrupted\n"a,b\n', "cannot be read as a table of pairs"),
    ],
)
def test_a_bad_table_is_told(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(text, "utf-8")
    with pytest.raises(InputError, match=said):
        PromptPairs.from_csv(tmp_path / "bad.csv")


def test_a_label_that_is_no_json_leaves_the_file(tmp_path: Path) -> None:
    PromptPairs(["a"], ["b"]).to_csv(tmp_path / "mine.csv")
    before = (tmp_path / "mine.csv").read_bytes()
    with pytest.raises(InputError, match="The label 'what' cannot be written as JSON"):
        PromptPairs(["a"], ["b"], labels={"what": [object()]}).to_csv(tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_bytes() == before
