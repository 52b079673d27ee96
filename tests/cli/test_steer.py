"""``pellucid steer``: what it shows is what the library gives, its file is read again, and it says what is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.demo.texts import written_text
from pellucid.steering import Add, Direction, Edit, Steering, contrast_pairs, difference_of_means, direction_of
from tests.cli.test_cli import cli
from tests.models import make_bloom

TEXT = "Everyone has the right to"
QUICK = ("--max-new-tokens", "4", "--top-k", "2")
PAIR = ("--positive", "Toute personne a droit", "--negative", "Everyone has the right")
HAS_PLOTS = importlib.util.find_spec("plotly") is not None and importlib.util.find_spec("matplotlib") is not None


def document(*arguments: str | Path) -> Any:
    done = cli("steer", "demo", TEXT, *QUICK, *arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def by_library(demo: TransformerBridge, direction: Direction, strength: float, **where: Any) -> str:
    with Steering(Edit(Add(direction, strength), **where)).on(demo):
        return str(demo.generate(TEXT, 4, do_sample=False, verbose=False))


def test_the_embedded_model_has_a_direction_of_its_own(demo: TransformerBridge) -> None:
    found = document("--strength", "2,-1")
    texts = written_text()
    direction = difference_of_means(demo, texts["fr"][:24], texts["en"][:24], layers=2, position="mean")
    assert [each["text"] for each in found["steered"]] == [
        by_library(demo, direction, strength) for strength in (2, -1)
    ]
    assert [each["strength"] for each in found["steered"]] == [2, -1]
    assert found["unsteered"]["text"] == demo.generate(TEXT, 4, do_sample=False, verbose=False)
    with torch.no_grad():
        expected = demo(TEXT)[0, -1].softmax(-1).topk(2)
    assert [token["id"] for token in found["unsteered"]["next_tokens"]] == expected.indices.tolist()
    assert found["direction"]["norms"] == pytest.approx(direction.norms.tolist(), rel=1e-5)
    assert not Path(found["direction"]["model"]["name"]).is_absolute()


def test_texts_files_and_a_saved_direction(demo: TransformerBridge, tmp_path: Path) -> None:
    (tmp_path / "fr.txt").write_text("Toute personne a droit\n\nNul ne sera\n", "utf-8")
    (tmp_path / "en.txt").write_text("Everyone has the right\nNo one shall be\n", "utf-8")
    out = tmp_path / "french.safetensors"
    files = ("--positive-file", tmp_path / "fr.txt", "--negative-file", tmp_path / "en.txt")
    where = ("--site", "resid_pre", "--layers", "1,3", "--position", "-2", "--method", "pairs", "--positions", "-1,-2")
    first = document(*files, *where, "--out", out)
    pairs = [("Toute personne a droit", "Everyone has the right"), ("Nul ne sera", "No one shall be")]
    direction = contrast_pairs(demo, pairs, "resid_pre", [1, 3], -2, name="positive - negative")
    saved = Direction.load(out)
    assert (saved.vectors - direction.vectors).abs().max() < 1e-5
    assert saved.origin.made_by == direction.origin.made_by
    assert first["steered"][0]["text"] == by_library(demo, direction, 1, positions=[-1, -2])
    again = document("--direction", out, "--positions", "-1,-2")
    assert again["steered"] == first["steered"]
    only = document("--direction", out, "--layers", "3", "--strength", "3")
    assert only["steered"][0]["text"] == by_library(demo, direction.only(3), 3)
    assert cli("steer", "demo", TEXT, *PAIR, "--out", out).exit_code == 2  # it is there
    assert cli("steer", "demo", TEXT, *QUICK, *PAIR, "--out", out, "--force").exit_code == 0


def test_the_table() -> None:
    done = cli("steer", "demo", TEXT, *QUICK, *PAIR, "--strength", "2")
    assert done.exit_code == 0
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0].startswith("positive - negative  hook_resid_post, layers 2; length ")
    assert lines[3].startswith("unsteered  Everyone has the right to")
    assert lines[4].strip().startswith("2  Everyone has the right to")
    assert "%" in lines[7]


@pytest.mark.skipif(not HAS_PLOTS, reason="needs the extra 'plots'")
def test_the_picture(tmp_path: Path) -> None:
    picture = tmp_path / "steered.svg"
    assert cli("steer", "demo", TEXT, *QUICK, *PAIR, "--strength", "1,2", "--picture", picture).exit_code == 0
    drawn = picture.read_text("utf-8")
    assert "steered along positive - negative" in drawn
    assert "·freedom" in drawn
    assert not re.search(r">-0?\.\d", drawn), "a probability has no colours below 0"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    other, damaged = tmp_path / "other.safetensors", tmp_path / "damaged.safetensors"
    direction_of(TransformerBridge(make_bloom()), torch.ones(48), layers=1).save(other)
    damaged.write_bytes(b"x" * 64)
    for arguments, words in (
        (("--positive", "a"), "--negative is missing"),
        (("--negative-file", str(tmp_path / "no")), "no file"),
        (("--direction", str(other)), "of another model"),
        (("--direction", str(damaged)), "damaged"),
        (("--direction", str(other), *PAIR), "leave --positive"),
        (("--direction", str(tmp_path / "no")), "no file"),
        ((*PAIR, "--method", "pairs", "--positive", "b"), "takes pairs"),
        ((*PAIR, "--out", "x.pt"), "x.safetensors"),
        ((*PAIR, "--layers", "9"), "there are 4"),
        ((*PAIR, "--positions", "77"), "positions=[77]"),
        (("--strength", "0"), "--strength 0"),
    ):
        done = cli("steer", "demo", TEXT, *QUICK, *arguments)
        assert done.exit_code == 2, arguments
        assert words in " ".join(done.stderr.split()), (arguments, done.stderr)
    done = cli("steer", str(tmp_path), TEXT)
    assert done.exit_code == 2


def test_another_model_has_no_texts_of_its_own(tmp_path: Path) -> None:
    make_bloom().save_pretrained(tmp_path / "model")
    done = cli("steer", tmp_path / "model", TEXT)
    assert done.exit_code == 2
    assert "--positive is missing" in done.stderr
