"""``pellucid circuit``: what it prints and writes, and what it says where something is missing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from pellucid import TransformerBridge
from pellucid.circuits import Circuit, edge_attribution
from pellucid.cli.files import CIRCUIT_FILES
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo.prompts import PATCHING_PAIR
from tests.cli.interrupted import ctrl_c_after, interrupted
from tests.cli.test_cli import cli, one_line

HAS_PLOTS = importlib.util.find_spec("plotly") is not None
PAIR = PATCHING_PAIR
SENTENCE = "Everyone has the right to life and{0}. Everyone has the right to life and"


def test_the_numbers_are_the_librarys(demo: TransformerBridge, tmp_path: Path) -> None:
    done = cli("circuit", "--edges", "12", "--out", tmp_path / "out", "--format", "json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    wanted = edge_attribution(demo, PromptPairs([PAIR.clean], [PAIR.corrupted], [PAIR.answer], [PAIR.foil])).top(12)
    assert [(row["sender"], row["receiver"]) for row in document["edges"]] == wanted.edges
    assert document["edges"][0]["score"] == pytest.approx(float(wanted.dataset().score[0]), rel=1e-5)
    assert document["edges"][0]["error"] is None  # of one pair
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == sorted(CIRCUIT_FILES)
    assert Circuit.load(folder / "circuit.safetensors").edges == wanted.edges
    assert set(nx.read_graphml(folder / "circuit.graphml")) == set(wanted.nodes)
    again = cli("circuit", "--out", folder)
    assert again.exit_code == 2
    assert "--force" in one_line(again.stderr)


def table_of_pairs(folder: Path, sentences: Sequence[str] = (SENTENCE,)) -> Path:
    """Three pairs of each sentence."""
    words = [(" work", " freedom"), (" freedom", " work"), (" work", " religion")]
    rows = [
        {"clean": sentence.format(a), "corrupted": sentence.format(b), "answer": a, "foil": b}
        for sentence in sentences
        for a, b in words
    ]
    PromptPairs.from_rows(rows).to_csv(folder / "pairs.csv")
    return folder / "pairs.csv"


def test_a_table_of_pairs(tmp_path: Path) -> None:
    given = ["--pairs", table_of_pairs(tmp_path), "--edges", "20", "--prune"]
    if HAS_PLOTS:
        given += ["--picture", tmp_path / "circuit.svg"]
    done = cli("circuit", *given, "--curve", "--method", "eap-ig", "--points", "2")
    assert done.exit_code == 0, done.output
    shown = one_line(done.stdout)
    assert "by eap-ig, 3 pairs" in shown
    assert "the 20 strongest share" in shown
    assert "1,519 100.0% 1.00 1.00 1.00 1.00" in shown
    assert "CPR" in shown
    assert (tmp_path / "circuit.svg").exists() == HAS_PLOTS


def test_an_interrupted_command_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: Any) -> None:
    """Pairs of two lengths make two batches of either pass: Ctrl-C after the first one's scores, then in the curve."""
    pairs = table_of_pairs(tmp_path, (SENTENCE, SENTENCE.replace(" right", " right and freedom")))
    given = ["--pairs", pairs, "--edges", "20", "--curve", "--randoms", "0"]
    expected = cli("circuit", *given, "--out", tmp_path / "whole")
    assert expected.exit_code == 0, expected.output
    done, out = ctrl_c_after(1, 3, monkeypatch=monkeypatch), tmp_path / "out"
    for _ in range(2):
        interrupted("circuit", *given, out=out)
    other = cli("circuit", *given, "--method", "eap-ig", "--out", out)
    assert other.exit_code == 2
    assert 'method "eap" (asked for: "eap-ig")' in one_line(other.stderr)
    finished = cli("circuit", *given, "--out", out)
    assert done == ["edge attribution"] * 2 + ["faithfulness"] * 2, "no batch runs twice"
    for name in CIRCUIT_FILES:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in out.iterdir()) == sorted(CIRCUIT_FILES)
    assert finished.stdout.replace(str(out), "") == expected.stdout.replace(str(tmp_path / "whole"), "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--clean", PAIR.clean], "--corrupted is missing"),
        (["--clean", PAIR.clean, "--corrupted", PAIR.corrupted], "--answer is missing"),
        (["--clean", "a b", "--corrupted", "a", "--answer", " work"], "different numbers of tokens"),
        (["--pairs", "pairs.csv", "--foil", " work"], "--foil is of one pair, and --pairs is a table"),
        (
            ["--clean", PAIR.clean, "--corrupted", PAIR.corrupted, "--answer", "id:5", "--foil", "id:5"],
            "the same token",
        ),
    ],
)
def test_what_is_missing(given: list[str], words: str) -> None:
    done = cli("circuit", *given)
    assert done.exit_code == 2
    assert words in one_line(done.stderr)
