"""``pellucid attribute --method``: what it prints and writes, and what it says where something is missing."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from pellucid import TransformerBridge
from pellucid.analysis.labelled import data_set_from_document
from pellucid.attribution import attribution_patching
from pellucid.cli.attribution_patching import CSV_FILE, JSON_FILE
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo.prompts import PATCHING_PAIR
from tests.cli.interrupted import ctrl_c_after, interrupted
from tests.cli.test_cli import cli, one_line

HAS_PLOTS = importlib.util.find_spec("plotly") is not None and importlib.util.find_spec("matplotlib") is not None
PAIR = PATCHING_PAIR


def test_the_numbers_are_the_librarys(demo: TransformerBridge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("attribute", "--method", "relp", "--check", "3", "--out", out, "--format", "json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    pairs = PromptPairs([PAIR.clean], [PAIR.corrupted], [PAIR.answer], [PAIR.foil])
    wanted = attribution_patching(demo, pairs, check=3)
    found = data_set_from_document(document["result"])
    for name in ("effect", "patched"):
        assert np.allclose(found[name].values, wanted[name].values, atol=1e-5, equal_nan=True)  # type: ignore[call-overload]
    assert document["summary"] == wanted.attrs["summary"].splitlines()
    assert document["strongest"][0]["patched"] == pytest.approx(document["strongest"][0]["effect"], abs=0.3)
    assert json.loads((out / JSON_FILE).read_text("utf-8")) == document
    lines = list(csv.reader((out / CSV_FILE).open(encoding="utf-8")))
    assert lines[0] == ["layer", "head", "effect", "standard_error", "patched"]
    assert len(lines) == 1 + found.effect.size
    assert sum(bool(line[-1]) for line in lines[1:]) == 6
    again = cli("attribute", "--method", "atp", "--out", out)
    assert again.exit_code == 2
    assert "--force" in one_line(again.stderr)


def test_a_table_of_pairs_and_what_is_printed(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clean", "corrupted", "answer", "foil"])
        writer.writerow([PAIR.clean, PAIR.corrupted, PAIR.answer, PAIR.foil])
        writer.writerow([PAIR.corrupted, PAIR.clean, PAIR.foil, PAIR.answer])
    shown = one_line(cli("attribute", "--method", "atp", "--pairs", table, "--site", "mlp_out", "--check", "2").stdout)
    assert "AtP of mlp_out by layer, pos; pairs: 2." in shown
    assert "AtP against patching, 4 cells: Pearson" in shown
    assert "Jaccard of the top 20" in shown


def test_an_interrupted_command_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of two lengths make two batches: Ctrl-C after the first."""
    table = tmp_path / "pairs.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clean", "corrupted", "answer", "foil"])
        writer.writerow([PAIR.clean, PAIR.corrupted, PAIR.answer, PAIR.foil])
        writer.writerow(["To be, " + PAIR.clean, "To be, " + PAIR.corrupted, PAIR.answer, PAIR.foil])
    given = ["--method", "atp", "--pairs", table, "--check", "0"]
    expected = cli("attribute", *given, "--out", tmp_path / "whole")
    assert expected.exit_code == 0, expected.output
    done, out = ctrl_c_after(1, monkeypatch=monkeypatch), tmp_path / "out"
    interrupted("attribute", *given, out=out)
    other = cli("attribute", *given, "--method", "relp", "--out", out)
    assert other.exit_code == 2
    assert "asked for" in one_line(other.stderr)
    finished = cli("attribute", *given, "--out", out)
    assert finished.exit_code == 0, finished.output
    assert len(done) == 2, "no batch runs twice"
    assert sorted(path.name for path in out.iterdir()) == sorted((CSV_FILE, JSON_FILE))
    for name in (CSV_FILE, JSON_FILE):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.skipif(not HAS_PLOTS, reason="needs the extra 'plots'")
@pytest.mark.parametrize("axes", ["layer", "layer,pos", "layer,head,pos"])
def test_pictures(axes: str, tmp_path: Path) -> None:
    done = (
        cli("attribute", "--method", "atp", "--axes", axes, "--check", "1", "--picture", tmp_path / "it.svg")
        if (axes != "layer,pos")
        else cli(
            "attribute", "--method", "atp", "--site", "resid_pre", "--check", "1", "--picture", tmp_path / "it.svg"
        )
    )
    assert done.exit_code == 0, done.output
    assert "AtP of" in (tmp_path / "it.svg").read_text("utf-8")


@pytest.mark.skipif(not HAS_PLOTS, reason="needs the extra 'plots'")
def test_estimates_against_patching(tmp_path: Path) -> None:
    done = cli("attribute", "--method", "relp", "--check", "4", "--agreement", tmp_path / "it.svg")
    assert done.exit_code == 0, done.output
    assert "relp of z against patching: 8 cells" in (tmp_path / "it.svg").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--clean", "x"), "--clean has no meaning with --method direct"),
        (("--site", "z"), "--site has no meaning with --method direct"),
        (("--method", "atp", "--by", "head"), "--by has no meaning with --method atp"),
        (("--method", "atp", "--n-points", "3"), "--n-points has no meaning with --method atp"),
        (("--method", "atp", "--clean", "x"), "--corrupted is missing"),
        (("--method", "atp", "--clean", "x", "--corrupted", ""), "--corrupted is empty"),
        (("--method", "atp", "--clean", "a law", "--corrupted", "a right"), "--answer is missing"),
        (("--method", "atp", "--pairs", "x.csv", "--answer", "x"), "--pairs has prompts and answers"),
        (("--method", "atp", "--pairs", "nowhere.csv"), "nowhere.csv cannot be read as a table"),
        (("--method", "relp", "--site", "q"), "nothing flows back to q"),
        (("--method", "atp", "--axes", "head"), "leaves layer out"),
        (("--method", "atp", "--check", "0", "--agreement", "x.svg"), "--agreement has no meaning with --check 0"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], said: str) -> None:
    done = cli("attribute", *arguments)
    assert done.exit_code == 2
    assert said in one_line(done.stderr)
