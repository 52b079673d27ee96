"""``pellucid circuit``: what it prints and writes, and what it says where something is missing."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import networkx as nx
import pytest

from pellucid import TransformerBridge
from pellucid.circuits import Circuit, edge_attribution
from pellucid.cli.files import CIRCUIT_FILES
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo.prompts import PATCHING_PAIR
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


def test_a_table_of_pairs(tmp_path: Path) -> None:
    rows = [(" work", " freedom"), (" freedom", " work"), (" work", " religion")]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clean", "corrupted", "answer", "foil"])
        writer.writerows([SENTENCE.format(a), SENTENCE.format(b), a, b] for a, b in rows)
    given = ["--pairs", tmp_path / "pairs.csv", "--edges", "20", "--prune"]
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
