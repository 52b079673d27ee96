"""Commands on a folder of another family than BLOOM: check, run, harvest, neurons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pellucid import TransformerBridge
from tests.command_line import invoke as cli
from tests.families import make_family
from tests.tiny_tokenizers import byte_level

FAMILIES = ("llama", "gpt2", "gemma2")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: Any, tmp_path_factory: Any) -> Path:
    """A model with its tokenizer; Llama's and Gemma's put a beginning-of-sequence token."""
    path: Path = tmp_path_factory.mktemp("models") / request.param
    tokenizer = byte_level("nothing" if request.param == "gpt2" else "bos")
    TransformerBridge(make_family(request.param), tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def languages(tmp_path: Path) -> list[str]:
    """Two languages' texts as the commands take them."""
    texts = {"one": "the cat sat on the mat, it was", "two": "0123 45 67 89 - 12, 34"}
    for label, line in texts.items():
        (tmp_path / f"{label}.txt").write_text("\n".join(f"{line} {number}" for number in range(24)))
    return [f"{label}={tmp_path / label}.txt" for label in texts]


def test_check(folder: Path) -> None:
    done = cli("check", folder, "--layers", "1", "--format", "json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["ok"]
    assert said["attn_implementation"] == "eager"


def test_run_keeps_what_hugging_face_computes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.safetensors"
    done = cli("run", folder, "the cat", "--hooks", "blocks.*.attn.hook_pattern", "--out", out, "--format", "json")
    assert done.exit_code == 0, done.output
    bridge = TransformerBridge.boot_transformers(folder)
    ids = torch.tensor([bridge.tokenizer("the cat")["input_ids"]])
    model: Any = bridge.hf_model
    patterns = model(ids, output_attentions=True, use_cache=False).attentions
    with safe_open(out, "pt") as file:
        assert torch.equal(file.get_tensor("tokens"), ids)
        for layer, pattern in enumerate(patterns):
            assert torch.equal(file.get_tensor(f"blocks.{layer}.attn.hook_pattern"), pattern)
    counts = {
        option: len(json.loads(cli("run", folder, "the", *option, "--format", "json").stdout)["tokens"])
        for option in ((), ("--prepend-bos",), ("--no-prepend-bos",))
    }
    assert list(counts.values()) == [3 if folder.name == "gpt2" else 4, 4, 3]


def test_run_with_a_fused_attention(folder: Path) -> None:
    done = cli("run", folder, "the cat", "--attn-implementation", "sdpa", "--format", "json")
    if folder.name == "gemma2":
        assert done.exit_code == 2
        assert "Gemma 2" in done.stderr
        assert "no sdpa" in done.stderr
    else:
        assert json.loads(done.stdout)["attn_implementation"] == "sdpa"


def test_harvest(folder: Path, tmp_path: Path, languages: list[str]) -> None:
    hooks = ("--hooks", "blocks.1.attn.hook_k", "--hooks", "blocks.0.mlp.hook_post")
    corpus = [part for language in languages for part in ("--corpus", language)]
    done = cli("harvest", folder, *corpus, *hooks, "--out", tmp_path / "store", "--context", "8")
    assert done.exit_code == 0, done.output


def test_neurons(folder: Path, tmp_path: Path, languages: list[str]) -> None:
    text = [part for language in languages for part in ("--text", language)]
    done = cli(
        "neurons", folder, *text, "--out", tmp_path / "study", "--context", "8", "--experts", "3", "--top-rate", "0.3"
    )
    assert done.exit_code == 0, done.output


def test_help_speaks_of_any_decoder() -> None:
    for command in ((), ("check",), ("run",), ("neurons",), ("patch",), ("steer",), ("harvest",), ("demo",)):
        said = " ".join(cli(*command, "--help").stdout.split())
        assert "BLOOM" not in said or command == ("demo",), said
