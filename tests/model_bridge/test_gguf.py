"""A GGUF file that is asked for by name opens through Hugging Face; tiny files are written here, by the package gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.errors import InputError, MissingExtraError, PellucidError
from pellucid.model_bridge.running import checkpoint
from tests.families import make_family
from tests.models import random_tokens
from tests.tiny_tokenizers import byte_level

gguf = pytest.importorskip("gguf", reason="the package gguf (extra 'gguf') writes and reads the files")


def write(model: Any, path: Path) -> None:
    """The float32 numbers of a Qwen2, whose file holds each tensor as Hugging Face does."""
    config = model.config
    file = gguf.GGUFWriter(str(path), "qwen2")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        owner, _, last = name.rpartition(".")
        file.add_tensor(f"{names.get_name(owner)}.{last}", tensor.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gguf")
    write(make_family("qwen2"), made / "tiny.gguf")
    return made


def test_it_opens_runs_and_is_saved_as_an_ordinary_folder(folder: Path, tmp_path: Path) -> None:
    native, tokens = make_family("qwen2"), random_tokens()
    bridge = TransformerBridge.boot_transformers(folder, gguf_file="tiny.gguf", tokenizer=byte_level())
    with torch.no_grad():
        assert torch.equal(bridge(tokens), native(tokens, use_cache=False).logits)
        assert torch.equal(bridge.run_with_cache(tokens)[0], bridge(tokens))
    assert torch.equal(bridge.W_in[0], native.model.layers[0].mlp.up_proj.weight.T)
    bridge.save_pretrained(tmp_path)
    again = TransformerBridge.boot_transformers(tmp_path)
    assert torch.equal(again(tokens), bridge(tokens))
    half = TransformerBridge.boot_transformers(
        folder, gguf_file="tiny.gguf", tokenizer=byte_level(), dtype=torch.bfloat16
    )
    assert half.cfg.dtype is torch.bfloat16


def test_it_opens_nothing_but_a_file_of_its_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    elsewhere = tmp_path / "elsewhere.gguf"
    elsewhere.write_bytes((folder / "tiny.gguf").read_bytes())
    for name in ("../elsewhere.gguf", str(elsewhere), "inner/../../elsewhere.gguf", "..\\elsewhere.gguf", "model.bin"):
        with pytest.raises(InputError, match=r"gguf_file=.* is the name of a \.gguf file inside"):
            TransformerBridge.boot_transformers(tmp_path / "inner", gguf_file=name)
    with pytest.raises(InputError, match=r"has no file 'other\.gguf'\. GGUF files there: tiny\.gguf\."):
        TransformerBridge.boot_transformers(folder, gguf_file="other.gguf")
    with pytest.raises(InputError, match=r"There is no folder"):
        TransformerBridge.boot_transformers(folder / "nowhere", gguf_file="tiny.gguf")
    with pytest.raises(InputError, match=r"gguf_file would have no effect"):
        TransformerBridge.boot_transformers(hf_model=make_family("qwen2"), gguf_file="tiny.gguf")


def test_a_damaged_file_is_named(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.gguf").write_bytes(b"this is no GGUF file")
    for name in ("cut.gguf", "none.gguf"):
        with pytest.raises(PellucidError, match=str(tmp_path)):
            TransformerBridge.boot_transformers(tmp_path, gguf_file=name, tokenizer=byte_level())


def test_without_the_package_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pellucid\[gguf\]'"):
        TransformerBridge.boot_transformers(folder, gguf_file="tiny.gguf")
