"""``pellucid patch``: what it prints and writes, and what it says where something is missing."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from pellucid import TransformerBridge
from pellucid.cli import tokens
from pellucid.cli.patch import CSV_FILE, JSON_FILE
from pellucid.demo.prompts import PATCHING_PAIR
from pellucid.experiments.activation_patching import activation_patching
from pellucid.experiments.labelled import from_document
from pellucid.sweep import KLDivergence, LogitDifference, LogProbability
from pellucid.sweep.packing import PackedModel
from tests.cli.test_cli import ROOT, cli, one_line

HAS_PLOTS = importlib.util.find_spec("plotly") is not None and importlib.util.find_spec("matplotlib") is not None
needs_plots = pytest.mark.skipif(not HAS_PLOTS, reason="needs the extra 'plots'")


def document(*arguments: str | Path) -> Any:
    done = cli("patch", *arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def by_library(demo: TransformerBridge, metric: Any = None, **keywords: Any) -> xr.DataArray:
    pair = PATCHING_PAIR
    if metric is None:
        metric = LogitDifference(demo.to_single_token(pair.answer), demo.to_single_token(pair.foil))
    return activation_patching(demo, pair.clean, pair.corrupted, metric, **keywords)


def test_the_default_pair_works_on_the_embedded_model(demo: TransformerBridge) -> None:
    """Both answers are what the model expects first, and the logit difference turns round."""
    with torch.no_grad():
        for prompt, token in (
            (PATCHING_PAIR.clean, PATCHING_PAIR.answer),
            (PATCHING_PAIR.corrupted, PATCHING_PAIR.foil),
        ):
            assert demo(prompt)[0, -1].argmax().item() == demo.to_single_token(token)
    found = by_library(demo)
    assert found.attrs["clean_metric"][0] > 3
    assert found.attrs["corrupted_metric"][0] < -3
    assert found.attrs["differs"] == [7]
    # The story that the page tells: it is kept at the word until layer 1 and at the end from layer 2 on.
    assert found.sel(layer=1, pos=7) > 0.9
    assert found.sel(layer=2, pos=7) < 0.2
    assert found.sel(layer=2, pos=16) > 0.9


@pytest.mark.parametrize("arguments", [(), ("--metric", "kl-divergence"), ("--plan",), ("--direction", "noising")])
def test_each_prompt_is_run_once(arguments: tuple[str, ...], entered: list[int]) -> None:
    assert cli("patch", *arguments).exit_code == 0
    assert entered == [17, 17]


def test_the_table() -> None:
    done = cli("patch")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("clean      Everyone ·has ·the")
    assert "logit difference 3.919; next: ·work 86%" in lines[1]
    assert any(re.fullmatch(r"7 ·freedom←·work +1\.00 +0\.97 +0\.09 +0\.08", line) for line in lines)
    assert "-0.00" not in done.stdout
    strongest = lines[next(i for i, line in enumerate(lines) if line.startswith("Strongest")) + 2]
    assert re.fullmatch(r"L0 +7 ·freedom←·work +1\.000 +\+1\.000", strongest)
    assert "68 edits" in done.stderr
    assert "one forward an edit" in done.stderr
    assert "68 edits" not in done.stdout


def test_numbers_are_the_librarys(demo: TransformerBridge) -> None:
    found = document("--site", "z", "--by", "layer,head", "--layers", "1,2")
    expected = by_library(demo, site="z", layers=[1, 2])
    result = from_document(found["result"])
    assert np.abs(result.values - expected.values).max() < 1e-6
    assert result.coords["layer"].values.tolist() == [1, 2]
    assert found["answer"] == {"id": demo.to_single_token(" work"), "token": "·work"}
    assert found["complete"] is True
    assert found["strongest"][0]["layer"] == 1
    assert found["strongest"][0]["value"] == pytest.approx(float(expected.max()), abs=1e-6)
    assert found["corrupted"]["next_tokens"][0]["token"] == "·freedom"
    noised = document("--direction", "noising")["strongest"]  # strong is far from 1, the clean run
    assert (noised[0]["layer"], noised[0]["pos"], noised[0]["token"]) == (0, 7, "·work←·freedom")
    assert abs(noised[0]["value"]) < 1e-5


@pytest.mark.parametrize("metric", ["log-probability", "kl-divergence"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_other_metrics(demo: TransformerBridge, metric: str, direction: Any) -> None:
    found = document("--metric", metric, "--direction", direction, "--no-normalize")
    with torch.no_grad():
        ours: Any = {
            "log-probability": LogProbability(demo.to_single_token(" work")),
            "kl-divergence": KLDivergence(demo(PATCHING_PAIR.clean)),
        }[metric]
    expected = by_library(demo, ours, direction=direction, normalize=False)
    assert np.abs(from_document(found["result"]).values - expected.values).max() < 1e-5
    assert ("answer" in found) == (metric == "log-probability")
    assert "foil" not in found


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "patched"
    done = cli("patch", "--out", folder)
    assert done.exit_code == 0
    assert f"Written: {folder / JSON_FILE}, {folder / CSV_FILE}" in done.stdout
    result = from_document(json.loads((folder / JSON_FILE).read_text("utf-8"))["result"])
    with (folder / CSV_FILE).open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["layer", "pos", "token", "value"]
    assert len(lines) == result.size
    for line in lines[:40]:
        value = np.float32(line["value"])
        assert value == result.sel(layer=int(line["layer"]), pos=int(line["pos"])).item()
    assert lines[7]["token"] == "·freedom←·work"
    assert {path.name for path in folder.iterdir()} == {JSON_FILE, CSV_FILE}
    again = cli("patch", "--out", folder)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert cli("patch", "--out", folder, "--force").exit_code == 0


@needs_plots
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("x.html", ()),
        ("x.png", ("--site", "z")),
        ("x.svg", ("--by", "layer")),
        ("x.html", ("--site", "z", "--by", "layer,head,pos", "--layers", "1,2", "--direction", "noising")),
    ],
)
def test_a_picture(tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    done = cli("patch", "--picture", tmp_path / name, *more)
    assert done.exit_code == 0, done.output
    data = (tmp_path / name).read_bytes()
    assert {"html": b"<!DOCTYPE html>", "png": b"\x89PNG", "svg": b"<?xml"}[name.partition(".")[2]] in data[:100]
    if name == "x.html" and not more:
        assert "·freedom←" in data.decode() or "\\u00b7freedom\\u2190" in data.decode()
    again = cli("patch", "--picture", tmp_path / name, *more)
    assert again.exit_code == 2
    assert "--force" in again.stderr


@needs_plots
def test_a_picture_that_cannot_be_is_refused_before_the_sweep(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(PackedModel, "run", lambda *args: pytest.fail("the sweep was run"))
    for arguments, said in (
        (("--picture", tmp_path / "x.pdf"), ".html"),
        (("--picture", tmp_path / "no" / "x.html"), "no folder"),
        (("--picture", tmp_path / "x.html", "--site", "pattern", "--by", "layer,head,pos,key_pos"), "three axes"),
    ):
        done = cli("patch", *arguments)
        assert done.exit_code == 2
        assert said in one_line(done.stderr)


def test_without_the_extra_the_message_says_how_to_get_it(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'plotly': raise ModuleNotFoundError(name)\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'plotly' else real(name, package)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        f"sys.argv = ['pellucid', 'patch', '--picture', {str(tmp_path / 'x.html')!r}]\n"
        "from pellucid.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "pip install 'pellucid[plots]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_is_shown_and_nothing_is_run(monkeypatch: Any) -> None:
    monkeypatch.setattr(PackedModel, "run", lambda *args: pytest.fail("the sweep was run"))
    done = cli("patch", "--plan", "--site", "z")
    assert done.exit_code == 0
    assert done.stdout.startswith("32 edits: ")
    plan = document("--plan", "--site", "z")
    assert plan["n_edits"] == 32
    assert plan["flops"] < plan["flops_whole"]
    limited = document("--plan", "--memory-limit", "200")["memory_limit"]  # MiB, less what the kept run takes
    assert 199 * 2**20 < limited < 200 * 2**20


def test_an_interrupt_shows_what_was_done(monkeypatch: Any, tmp_path: Path) -> None:
    def stop(self: Any, runs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(PackedModel, "run", stop)  # what is the base run itself is done by then
    done = cli("patch", "--site", "z", "--by", "layer,head,pos", "--out", tmp_path)
    assert done.exit_code == 130
    assert re.search(r"Interrupted: \d+ of 544 cells are done", done.stdout)
    saved = json.loads((tmp_path / JSON_FILE).read_text("utf-8"))
    assert saved["complete"] is False
    values = from_document(saved["result"]).values
    assert 0 < np.isnan(values).sum() < values.size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--answer", "freedom"), "3 tokens, f re edom; the metric reads one. With its leading space it is one"),
        (("--answer", " leisure", "--foil", " le"), "it begins with ·le (id:353). The model expects next: ·work 86%"),
        (("--answer", "leisure", "--foil", " le"), "it begins with ·le (id:353)"),
        (("--answer", ""), "is empty"),
        (("--answer", "id:9999"), "ids 0 to 2047"),
        (("--answer", "id:x"), "a whole number"),
        (("--answer", "\udcff"), "not UTF-8"),
        (("--answer", " work"), "--foil is missing: the token that is right after the corrupted prompt"),
        (("--answer", " work", "--foil", "id:1710"), "the same token, ·work"),
        (("--metric", "kl-divergence", "--answer", " work"), "--answer has no meaning for --metric kl-divergence"),
        (("--metric", "probability", "--answer", " work", "--foil", " law"), "--foil has no meaning"),
        (("--clean", "Everyone"), "--corrupted is missing"),
        (("--clean", "", "--corrupted", "a"), "--clean is empty"),
        (("--clean", "Everyone is", "--corrupted", "Everyone has"), "--answer is missing"),
        (("--clean", "Everyone", "--corrupted", "Everyone has"), "different numbers of tokens, 1 and 2: Everyone and"),
        (("--site", "resid_per"), "Nearest: resid_pre"),
        (("--by", "layer,head"), "can lie along layer, pos"),
        (("--layers", "a"), "0,5,11"),
        (("--heads", "1"), "no heads"),
        (("--positions", "1.5"), "--positions takes numbers"),
        (("--neurons", "5"), "goes with"),
        (("--metric", "loss"), "logit-difference"),
        (("./nowhere",), "There is no folder ./nowhere"),
        (("./nowhere", "--clean", "a", "--corrupted", "b"), "no folder ./nowhere"),
        (
            ("--clean", PATCHING_PAIR.clean, "--corrupted", PATCHING_PAIR.clean, "--answer", " work", "--foil", " law"),
            "differ",
        ),
        (("--out", "pyproject.toml"), "pyproject.toml"),
    ],
)
def test_a_mistake_is_told_on_standard_error(arguments: tuple[str, ...], said: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    done = cli("patch", *arguments)
    assert done.exit_code == 2, done.output
    assert said in one_line(done.stderr or done.output)
    assert "Traceback" not in done.output
    assert not done.stdout


@pytest.mark.filterwarnings("default::pellucid.errors.PellucidWarning")
def test_a_token_without_its_space_is_taken_with_a_warning(demo: TransformerBridge) -> None:
    logits = torch.zeros(demo.cfg.d_vocab)
    bare, spaced = demo.to_single_token("a"), demo.to_single_token(" a")
    logits[spaced] = 1
    with pytest.warns(UserWarning, match="--answer ' a'"):
        assert tokens.read_token(demo.tokenizer, "a", "--answer", logits) == bare
    assert tokens.read_token(demo.tokenizer, " a", "--answer", logits) == spaced
    assert tokens.read_token(demo.tokenizer, f"id:{spaced}", "--answer", logits) == spaced
    logits[bare] = 2
    assert tokens.read_token(demo.tokenizer, "a", "--answer", logits) == bare


def test_a_table_is_text_whatever_the_tokens_are() -> None:
    done = cli(
        "patch",
        *("--clean", "[bold]is [/x] 人", "--corrupted", "[bold]as [/x] 人", "--metric", "kl-divergence", "--site", "z"),
    )
    assert done.exit_code == 0, done.output
    assert "[bold]as·[/x]·人" in done.stdout.replace(" ", "")
