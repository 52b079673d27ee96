"""``pellucid lens`` and ``pellucid heads``: what they print, what they write, and that it is what the library says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pellucid.analysis.heads import RandomRepeats, head_scores
from pellucid.analysis.labelled import data_set_from_document, data_set_to_document
from pellucid.analysis.lens import LogitLens, TunedLens, load_lens
from pellucid.demo import LENSES_FOLDER, load_demo_bridge
from tests.command_line import invoke as cli

TEXT = "Everyone has the right to"


def test_a_lens_from_the_shell(tmp_path: Path) -> None:
    out, picture = tmp_path / "lens.json", tmp_path / "lens.svg"
    done = cli(
        "lens",
        "demo",
        TEXT,
        "--lens",
        "tuned",
        "--token",
        " work",
        "--token",
        "id:9",
        "--out",
        out,
        "--picture",
        picture,
    )
    assert done.exit_code == 0, done.stderr
    bridge = load_demo_bridge()
    wanted = load_lens(LENSES_FOLDER / "tuned.safetensors", bridge).read(TEXT, tokens=[" work", 9], positions=None)
    found = data_set_from_document(json.loads(out.read_text("utf-8"))["reading"])
    assert found.drop_attrs().equals(wanted.drop_attrs())
    assert found.attrs["model"] == "demo"
    assert "rank of ·work" in done.stdout
    last = wanted.isel(pos=-1)
    for layer in range(5):
        assert f"{layer}  {last.top_token.values[layer, 0]}" in done.stdout
    assert "·right" in picture.read_text("utf-8")
    printed = cli("lens", "demo", TEXT, "--lens", "tuned", "--token", " work", "--token", "id:9", "--format", "json")
    assert json.loads(printed.stdout) == json.loads(out.read_text("utf-8"))


def test_some_layers_and_positions_and_a_file(tmp_path: Path) -> None:
    bridge = load_demo_bridge()
    TunedLens.zero(bridge).save(tmp_path / "zero.safetensors")
    call = ("lens", "demo", TEXT, "--layers", "0,-1", "--positions", "-1,1", "--format", "json", "--top-k", "2")
    plain = json.loads(cli(*call).stdout)
    zero = json.loads(cli(*call, "--lens", tmp_path / "zero.safetensors").stdout)
    assert plain["reading"]["variables"] == zero["reading"]["variables"]
    wanted = LogitLens(bridge).read(TEXT, layers=[0, -1], positions=[-1, 1], top_k=2)
    assert data_set_from_document(plain["reading"]).drop_attrs().equals(wanted.drop_attrs())
    refused = cli("lens", "demo", TEXT, "--lens", tmp_path / "zero.safetensors", "--dtype", "float64")
    assert refused.exit_code == 2
    assert "fitted on float32 weights, and these are float64" in refused.stderr


def test_heads_from_the_shell(tmp_path: Path) -> None:
    out, picture = tmp_path / "heads.json", tmp_path / "heads.svg"
    done = cli("heads", "demo", "--length", "12", "--prompts", "3", "--seed", "5", "--out", out, "--picture", picture)
    assert done.exit_code == 0, done.stderr
    wanted = head_scores(load_demo_bridge(), RandomRepeats(12, 2, 3, 5))
    document = json.loads(out.read_text("utf-8"))
    found = data_set_from_document(document["scores"])
    assert found.drop_attrs().equals(wanted.drop_attrs())
    best = document["strongest"]["induction"][0]
    mean = wanted["score"].sel(pattern="induction").mean("prompt")
    assert best["score"] == pytest.approx(float(mean.max()))
    assert best["score"] == pytest.approx(float(mean.sel(layer=best["layer"], head=best["head"])))
    assert f"L{best['layer']}H{best['head']}" in done.stdout
    assert "induction by position" in picture.read_text("utf-8")
    text = cli("heads", "demo", "Everyone has", "--pattern", "induction")
    assert text.exit_code == 0, text.stderr
    assert "no token of the prompts has any" in text.stdout
    assert text.stdout.startswith("1 prompt  Everyone")


def test_a_data_set_comes_back() -> None:
    bridge = load_demo_bridge()
    for made in (LogitLens(bridge).read(TEXT, tokens=[3]), head_scores(bridge, TEXT)):
        back = data_set_from_document(json.loads(json.dumps(data_set_to_document(made))))
        assert back.identical(made)
    assert np.isnan(made["score"].sel(pattern="induction").values).all()
