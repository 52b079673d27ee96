"""``pellucid attribute``: what it prints and writes, and what it says where something is missing."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import xarray as xr

from pellucid import TransformerBridge
from pellucid.analysis.attribution import logit_attribution
from pellucid.cli.attribute import CSV_FILE, JSON_FILE
from pellucid.demo.prompts import PATCHING_PAIR
from pellucid.experiments.labelled import from_document
from tests.cli.test_cli import cli, one_line

HAS_PLOTS = importlib.util.find_spec("plotly") is not None and importlib.util.find_spec("matplotlib") is not None
PAIR = PATCHING_PAIR


def test_the_numbers_are_the_librarys(demo: TransformerBridge, tmp_path: Path) -> None:
    done = cli("attribute", "--by", "head", "--check", "1", "--out", tmp_path / "out", "--format", "json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    wanted = logit_attribution(demo, PAIR.clean, PAIR.answer, PAIR.foil, by="head")
    xr.testing.assert_allclose(from_document(document["result"]), wanted)
    with torch.no_grad():
        logits = demo(PAIR.clean)[0, -1]
    answer, foil = demo.to_single_token(PAIR.answer), demo.to_single_token(PAIR.foil)
    assert document["logit"] == pytest.approx(float(logits[answer] - logits[foil]), abs=1e-4)
    assert document["strongest"][0] == {"layer": 1, "head": 4, "value": float(wanted.sel(layer=1, head=4))}
    assert json.loads((tmp_path / "out" / JSON_FILE).read_text("utf-8")) == document
    lines = list(csv.reader((tmp_path / "out" / CSV_FILE).open(encoding="utf-8")))
    assert lines[0] == ["layer", "head", "attribution"]
    assert len(lines) == 1 + wanted.size
    again = cli("attribute", "--out", tmp_path / "out")
    assert again.exit_code == 2
    assert "--force" in one_line(again.stderr)


def test_what_is_printed() -> None:
    shown = cli("attribute").stdout
    assert "·work less ·freedom: logit difference +3.919; constant -0.123" in one_line(shown)
    assert "1_attn_out +8.951" in one_line(shown)
    assert "largest disagreement" in shown
    shown = one_line(cli("attribute", "--by", "source", "--check", "0", "--top-k", "1").stdout)
    assert "L1 H4 7 ·work +4.288" in shown
    assert "Measured" not in shown
    shown = one_line(cli("attribute", "demo", "Everyone has the right", "--by", "neuron", "--positions", "all").stdout)
    assert "·to: logit" in shown  # by default the likeliest token


@pytest.mark.skipif(not HAS_PLOTS, reason="needs the extra 'plots'")
@pytest.mark.parametrize("arguments", [(), ("--by", "source"), ("--by", "head", "--positions", "all")])
def test_pictures(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = cli("attribute", *arguments, "--check", "0", "--picture", tmp_path / "it.html")
    assert done.exit_code == 0, done.output
    assert "work" in (tmp_path / "it.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("attribute", "demo", ""), "TEXT is empty"),
        (("attribute", "gpt2-folder/x/y"), "There is no folder"),
        (("attribute", "--answer", "workings and doings"), "--answer 'workings and doings' is"),
        (("attribute", "--answer", " work", "--foil", " work"), "answer and foil are the same token"),
        (("attribute", "--by", "source", "--positions", "all", "--picture", "x.html"), "up to three axes"),
        (("attribute", "--picture", "x.txt"), "x.txt"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], said: str) -> None:
    done = cli(*arguments)
    assert done.exit_code == 2, done.output
    assert said in one_line(done.stderr)
