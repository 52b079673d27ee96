"""Checkpoints of every family: configurations as published, folders, shards, adapters; no network."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pellucid import TransformerBridge
from pellucid.errors import InputError, PellucidWarning, UnsupportedModelError, WeightError
from pellucid.model_bridge.running import loading
from pellucid.model_bridge.supported_architectures import architecture_of
from pellucid.model_bridge.supported_architectures.gpt2 import GPT2
from tests.families import CONFIGS, make_family, of_the_turn
from tests.models import random_tokens
from tests.published import CHECKPOINTS, small
from tests.tiny_tokenizers import byte_level

boot = TransformerBridge.boot_transformers


def write(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_published_configuration_opens_without_a_word(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, **small(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PellucidWarning)
        bridge = boot(folder, load_weights=False, tokenizer=byte_level())
    model: Any = bridge.hf_model
    tokens = random_tokens()
    assert torch.equal(bridge(tokens), model(tokens, use_cache=False).logits)
    assert bridge.cfg.n_ctx == (CHECKPOINTS[name].get("max_position_embeddings") or CHECKPOINTS[name]["n_positions"])
    assert bridge.cfg.n_key_value_heads == small(name).get("num_key_value_heads", 4)


@pytest.mark.parametrize("name", ["gpt2", "Llama-3.2-1B", "gemma-2-2b", "Phi-3-mini-4k"])
def test_a_key_that_nobody_reads_is_named_once(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, **small(name), unsloth_version="1", dropout_everywhere=0.5)
    with pytest.warns(PellucidWarning) as told:
        boot(folder, load_weights=False, tokenizer=byte_level())
    lines = [str(warning.message) for warning in told if "never reads" in str(warning.message)]
    assert len(lines) == 1
    assert "unsloth_version = '1'" in lines[0]
    assert "dropout_everywhere" in lines[0]


@pytest.mark.parametrize("name", of_the_turn(CONFIGS))
def test_no_key_that_transformers_reads_is_called_unread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attribute that running and generating asks the configuration for may be set without a warning."""
    model = make_family(name)
    kind, read = type(model.config), set()
    plain = kind.__getattribute__

    def note(self: Any, key: str) -> Any:
        read.add(key)
        return plain(self, key)

    monkeypatch.setattr(kind, "__getattribute__", note)
    tokens = random_tokens()
    model(tokens, labels=tokens)
    for options in ({"do_sample": False}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        model.generate(tokens, max_new_tokens=2, pad_token_id=3, **options)
    monkeypatch.undo()
    assert "use_cache" in read  # it listens
    vision = {
        "vision_aspect_ratio",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    }  # by validators, of any model
    asked = {key for key in read if not key.startswith("_") and not hasattr(kind, key)} - vision
    given = {key: getattr(model.config, key, None) for key in asked}
    model.config.to_dict = lambda: {**given, "nobody": 1}  # as if the file had had them all
    with pytest.warns(PellucidWarning) as told:
        loading.warn_of_unread(model, architecture_of(model.config.model_type, name))
    assert str(told[0].message).splitlines()[1:] == ["  nobody = 1"]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("Llama-3.2-1B", {"rope_theta": 1.0}, "rope_theta.*no effect"),
        ("Llama-3.2-1B", {"n_layers": 2}, "num_hidden_layers"),
        ("gemma-3-1b", {"sliding_window_pattern": 2}, "sliding_window_pattern.*no effect"),
        ("gpt2", {"apply_residual_connection_post_layernorm": True}, "no effect"),
        ("Qwen3-0.6B", {"slow_but_exact": True}, "no effect"),
    ],
)
def test_an_override_without_effect_is_refused(name: str, overrides: Any, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, **small(name))
    with pytest.raises(InputError, match=f"(?s){message}"):
        boot(folder, load_weights=False, hf_config_overrides=overrides)


@pytest.mark.parametrize(("name", "key"), [("gpt2", "num_hidden_layers"), ("Llama-3.2-1B", "num_hidden_layers")])
def test_an_override_takes_effect_under_each_of_its_names(name: str, key: str, tmp_path: Path) -> None:
    folder = write(tmp_path, **small(name))
    assert boot(folder, load_weights=False, hf_config_overrides={key: 1}, tokenizer=byte_level()).cfg.n_layers == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "gemma3", "olmo2", "phi3", "qwen3"])
def test_saved_and_opened_again(name: str, tmp_path: Path) -> None:
    bridge = TransformerBridge(make_family(name), byte_level("bos"))
    bridge.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PellucidWarning)
        again = boot(tmp_path)
    tokens = random_tokens()
    assert torch.equal(again(tokens), bridge(tokens))
    assert again.weights_hash() == bridge.weights_hash()
    assert again.to_tokens("a cat").tolist() == bridge.to_tokens("a cat").tolist()
    assert torch.equal(boot(tmp_path, dtype=torch.float64)(tokens).float().argmax(-1), bridge(tokens).argmax(-1))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shards_a_lost_one_and_a_hostile_index(name: str, tmp_path: Path) -> None:
    model = make_family(name)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists()
    tokens = random_tokens()
    assert torch.equal(boot(tmp_path, tokenizer=byte_level())(tokens), model(tokens, use_cache=False).logits)
    said = json.loads(index.read_text())
    lost = next(iter(said["weight_map"].values()))
    index.write_text(json.dumps(said | {"weight_map": said["weight_map"] | {"x": "../other.safetensors"}}))
    with pytest.raises(WeightError, match="outside its folder"):
        boot(tmp_path)
    index.write_text(json.dumps(said))
    (tmp_path / lost).unlink()
    with pytest.raises(WeightError, match="no such file"):
        boot(tmp_path)


@pytest.mark.parametrize(("name", "target"), [("llama", "q_proj"), ("gpt2", "c_attn"), ("phi3", "qkv_proj")])
def test_an_adapters_folder_is_what_the_auto_class_gives(name: str, target: str, tmp_path: Path) -> None:
    make_family(name).save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=2, target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora).save_pretrained(tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    bridge = boot(tmp_path / "adapter", tokenizer=byte_level())
    tokens = random_tokens()
    assert torch.equal(bridge(tokens), theirs(tokens, use_cache=False).logits)
    assert not torch.equal(bridge(tokens), make_family(name)(tokens).logits)


def test_a_revision_and_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached here: its answers are stood in for, each by what is in a folder."""
    make_family("llama").save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    asked: list[tuple[str, Any]] = []
    for kind in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        plain = kind.from_pretrained

        def answer(name: str, *, _plain: Any = plain, _kind: Any = kind, **options: Any) -> Any:
            asked.append((_kind.__name__, options.pop("revision", None)))
            options["local_files_only"] = True
            return _plain(tmp_path if name == "owner/model" else name, **options)

        monkeypatch.setattr(kind, "from_pretrained", answer)
    monkeypatch.setattr("pellucid.model_bridge.running.checkpoint._find_file", lambda *_: None)
    monkeypatch.setattr("pellucid.model_bridge.running.checkpoint._refuse_unreached", lambda *_: None)
    bridge = boot("owner/model", revision="step1000")
    assert torch.equal(bridge(random_tokens()), make_family("llama")(random_tokens()).logits)
    assert dict(reversed(asked)) == dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "step1000")


def test_only_a_family_that_shares_a_tokenizer_lends_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(name: str, **options: Any) -> Any:
        asked.append(name)
        raise OSError("no tokenizer")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", answer)
    with pytest.raises(OSError, match="no tokenizer"):
        loading.load_tokenizer("owner/model-intermediate", GPT2.tokenizer, local_files_only=False)
    assert asked == ["owner/model-intermediate"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("falcon", {"alibi": True}, "alibi = True: Hugging Face's eager attention adds ALiBi twice"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False: the stream itself would be normed"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16: tokens would enter and leave the stream by"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True: the unembedding would read"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False: norms would have no"),
        ("opt", {"layerdrop": 0.1}, "layerdrop = 0.1: layers would be left out at random"),
    ],
)
def test_a_layout_of_a_family_that_is_not_opened_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        TransformerBridge(make_family(name, **settings))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_folders_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = make_family(name)
    config = model.config.to_dict()
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    with pytest.raises(InputError, match="no safetensors"):
        boot(write(tmp_path / "none", **config))
    with pytest.raises(UnsupportedModelError, match="is_encoder_decoder = True"):
        boot(write(tmp_path / "other", **(config | {"is_encoder_decoder": True})))
    with pytest.raises(UnsupportedModelError):
        boot(write(tmp_path / "zero", **(config | {layers: 0})), load_weights=False)
    model.save_pretrained(tmp_path / "short")
    path = tmp_path / "short" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(WeightError, match="damaged"):
        boot(tmp_path / "short")
    write(tmp_path / "short", **{key: value for key, value in config.items() if key != "model_type"})
    with pytest.raises(UnsupportedModelError, match="model_type=None"):
        boot(tmp_path / "short")


def test_the_configurations_are_those_of_their_families() -> None:
    assert {said["model_type"] for said in CHECKPOINTS.values()} >= {
        AutoConfig.for_model(kind).model_type
        for kind in ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma", "gemma2", "olmo2", "phi3")
    }
