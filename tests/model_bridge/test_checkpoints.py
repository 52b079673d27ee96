"""What people's folders hold: keys that nobody reads, missing weights, adapters, damaged and hostile files.

The oracle is Hugging Face: a key that we warn of must not change its numbers, one that we refuse must; an adapter's folder
must give what its Auto class gives.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, DynamicCache

from pellucid import TransformerBridge
from pellucid.config import HANDLED, IGNORED, REFUSED
from pellucid.errors import (
    HubError,
    InputError,
    MissingExtraError,
    PellucidError,
    PellucidWarning,
    UnsupportedModelError,
    WeightError,
)
from tests.models import make_bloom, make_generator, random_tokens

boot = TransformerBridge.boot_transformers
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_generator().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    make_bloom().save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def quietly(folder: Path, **arguments: Any) -> TransformerBridge:
    """Open a folder without a tokenizer, whatever is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PellucidWarning)
        return boot(folder, **arguments)


# -- keys of a configuration -------------------------------------------------------------------------------------------

UNREAD = {
    "dropout": 0.1,
    "end_token_id": 2,
    "unsloth_version": "2025.3",
    "hidden_act": "relu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 4,
    "head_dim": 7,
    "num_key_value_heads": 2,
    "is_decoder": True,
    "pruned_heads": {"0": [1]},
}
OBEYED = {"gradient_checkpointing": True, "chunk_size_feed_forward": 3, "torchscript": True, "n_positions": None}
CHANGING = {
    "is_causal": False,
    "sliding_window": 2,
    "attention_chunk_size": 2,
    "kv_sharing_modes": ["reuse"] * 3,
    "layer_types": ["moe"] * 3,
    "text_config": {"vocab_size": 3},
    "decoder": {"vocab_size": 3},
    "generator": {"vocab_size": 3},
    "per_layer_config": {"1": {"layer_norm_epsilon": 0.5}},
    "is_encoder_decoder": True,
}


def numbers(folder: Path) -> tuple[Tensor, Tensor]:
    """Logits and greedy tokens of Hugging Face's own model."""
    model, tokens = AutoModelForCausalLM.from_pretrained(folder), random_tokens()
    return model(tokens).logits.detach(), model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=3)


@pytest.mark.parametrize("key", UNREAD)
def test_a_key_that_nobody_reads_is_named_and_changes_no_number(folder: Path, key: str) -> None:
    logits, generated = numbers(folder)
    edit_json(folder / "config.json", **{key: UNREAD[key]})
    theirs = numbers(folder)
    assert torch.equal(theirs[0], logits)
    assert torch.equal(theirs[1], generated)
    with pytest.warns(PellucidWarning) as told:
        bridge = boot(folder, tokenizer=lambda text: {"input_ids": [1]})
    assert [f"{key} = " in str(warning.message) for warning in told] == [True]  # once, although the file is read twice
    assert torch.equal(bridge(random_tokens()), logits)


def test_several_unread_keys_make_one_warning_and_a_live_model_is_told_too() -> None:
    config = BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=11, dropout=0.1, unsloth_version="1")
    with pytest.warns(PellucidWarning, match="(?s)dropout = 0.1.*unsloth_version = '1'") as told:
        TransformerBridge(BloomForCausalLM(config))
    assert len(told) == 1


@pytest.mark.parametrize("key", OBEYED)
def test_a_key_that_changes_nothing_by_itself_opens_without_a_word(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", **({key: OBEYED[key]} if OBEYED[key] is not None else {}))
    boot(folder, tokenizer=lambda text: {"input_ids": [1]})


@pytest.mark.parametrize("key", CHANGING)
def test_a_key_that_changes_numbers_is_refused_and_can_be_taken_back(folder: Path, key: str) -> None:
    logits, generated = numbers(folder)
    edit_json(folder / "config.json", **{key: CHANGING[key]})
    try:
        theirs = numbers(folder)
        changed = not torch.equal(theirs[0], logits) or not torch.equal(theirs[1], generated)
    except Exception:  # it does not run any more: as many classes of error as keys
        changed = True
    assert changed
    with pytest.raises(UnsupportedModelError, match=key):
        boot(folder)
    if key in ("is_causal", "sliding_window", "attention_chunk_size", "kv_sharing_modes"):
        bridge = quietly(folder, hf_config_overrides={key: True if key == "is_causal" else None})
        assert torch.equal(bridge(random_tokens()), logits)


@pytest.mark.parametrize("key", ["transformers_weights", "fusion_config", "text_encoder", "tie_last_hidden_states"])
def test_other_keys_that_transformers_reads_are_refused(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", **{key: {"x": 1} if key == "fusion_config" else "adapter_model.bin"})
    with pytest.raises(UnsupportedModelError, match=key):
        boot(folder)


def test_no_key_that_transformers_reads_is_called_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attribute that loading, running and generating asks the configuration for has its place in our lists."""
    read: set[str] = set()
    plain = BloomConfig.__getattribute__

    def note(self: Any, name: str) -> Any:
        read.add(name)
        return plain(self, name)

    monkeypatch.setattr(BloomConfig, "__getattribute__", note)
    model, tokens = BloomForCausalLM.from_pretrained(folder), random_tokens()
    model(tokens, labels=tokens)
    for options in ({"do_sample": False}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        model.generate(tokens, max_new_tokens=3, pad_token_id=3, **options)
    monkeypatch.undo()
    assert "sliding_window" in read  # it listens
    assert "n_layer" in read
    standard = set(BloomConfig().to_dict()) | set(dir(BloomConfig()))
    generation = set(model.generation_config.to_dict())
    checked_only = {"rope_parameters", "mtp_layer_types", "head_dim", "gguf_file", "max_position_embeddings"}
    known = standard | generation | HANDLED | IGNORED | REFUSED.keys() | {"layer_types"} | checked_only
    assert {name for name in read if not name.startswith("_")} - known == set()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_layers": 2}, "no 'n_layers'.*n_layer"),
        ({"hidden_dropout": "a"}, "hidden_dropout='a'"),
        ({"nope": None}, "nope"),
    ],
)
def test_an_override_without_effect_is_refused(folder: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        boot(folder, hf_config_overrides=overrides)


# -- weights that are missing, too many or of another size -------------------------------------------------------------

LOST = "transformer.h.1.mlp.dense_h_to_4h.weight"


def test_a_missing_weight_is_refused_and_an_opt_in_fails_the_check(folder: Path) -> None:
    edit_weights(folder, lambda state: {name: value for name, value in state.items() if name != LOST})
    with pytest.raises(WeightError, match=LOST):
        boot(folder)
    with pytest.warns(PellucidWarning) as told:
        bridge = boot(folder, allow_missing_weights=True)
    assert any(LOST in str(warning.message) for warning in told)
    report = bridge.verify(layers=[0])
    assert [(line.name, line.detail) for line in report.failed] == [("weights come from the checkpoint", LOST)]
    bridge.load_state_dict(make_generator().state_dict())
    assert bridge.verify(layers=[0]).ok


def test_all_weights_missing_or_under_other_names(folder: Path) -> None:
    edit_weights(folder, lambda state: {f"other.{name}": value for name, value in state.items()})
    with pytest.raises(WeightError, match="lacks 42 of"):
        boot(folder)


def test_a_head_may_only_be_missing_where_it_is_tied(folder: Path) -> None:
    edit_weights(folder, lambda state: {name: value for name, value in state.items() if name != "lm_head.weight"})
    with pytest.raises(WeightError, match=r"lm_head\.weight"):
        boot(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    bridge = quietly(folder)
    assert torch.equal(bridge.W_U.T, bridge.W_E)


def test_a_weight_too_many_is_named(folder: Path) -> None:
    edit_weights(folder, lambda state: state | {"lm_head.bias": torch.ones(97)})
    with pytest.warns(PellucidWarning) as told:
        bridge = boot(folder)
    assert any("lm_head.bias" in str(warning.message) for warning in told)
    assert torch.equal(bridge(random_tokens()), make_generator()(random_tokens()).logits)


def test_a_weight_of_another_size_is_named(folder: Path) -> None:
    edit_weights(folder, lambda state: state | {"transformer.ln_f.weight": torch.ones(3)})
    with pytest.raises(WeightError, match=r"transformer\.ln_f\.weight: \(3,\) there, \(48,\) here"):
        boot(folder)
    with pytest.raises(WeightError, match="hf_config_overrides"):
        boot(folder, hf_config_overrides={"vocab_size": 50})


def test_a_quantisation_that_transformers_does_not_know(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "unheard-of"})
    with pytest.raises(UnsupportedModelError, match="unheard-of"):
        boot(folder)


# -- adapters ----------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=2, target_modules=["query_key_value", "dense"], init_lora_weights=False, task_type="CAUSAL_LM")
IA3 = IA3Config(
    target_modules=["query_key_value"], feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"
)


def save_adapter(folder: Path, base: Path, config: Any = LORA) -> Path:
    adapted = get_peft_model(BloomForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
def test_an_adapters_folder_is_what_the_auto_class_gives(
    tmp_path: Path, demo: TransformerBridge, dtype: torch.dtype, config: Any
) -> None:
    base = tmp_path / "base"
    make_bloom(dtype, vocab_size=2048).save_pretrained(base)
    demo.tokenizer.save_pretrained(base)
    adapter, tokens = save_adapter(tmp_path / "adapter", base, config), random_tokens(vocab=2048)
    native = AutoModelForCausalLM.from_pretrained(adapter)(tokens).logits
    bridge = boot(adapter)
    assert isinstance(bridge.hf_model, PeftModel)
    assert torch.equal(bridge(tokens), native)
    assert not torch.equal(native, BloomForCausalLM.from_pretrained(base)(tokens).logits)
    assert bridge.to_tokens("Everyone").shape[0] == 1  # the base model's tokenizer
    if dtype is torch.float32:
        bridge.save_pretrained(tmp_path / "again")
        assert torch.equal(boot(tmp_path / "again")(tokens), native)


def test_an_adapter_beside_its_model_and_one_on_virtual_tokens(folder: Path, tmp_path: Path) -> None:
    tokens = random_tokens()
    save_adapter(folder, folder)
    native = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert torch.equal(quietly(folder)(tokens), native)
    prompt = save_adapter(tmp_path / "prompt", folder, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    base = json.loads((prompt / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder)
    (folder / "adapter_config.json").unlink()
    native = PeftModel.from_pretrained(BloomForCausalLM.from_pretrained(folder), prompt)(input_ids=tokens).logits
    assert torch.equal(quietly(prompt).hf_model(input_ids=tokens).logits, native)


def test_what_an_adapters_folder_may_lack(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path / "adapter", folder)
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    state = load_file(weights)
    lost = sorted(state)[0]
    save_file({name: value for name, value in state.items() if name != lost}, weights)
    with pytest.raises(WeightError, match=lost.replace(".", r"\.")):
        boot(adapter)
    assert quietly(adapter, allow_missing_weights=True).verify(layers=[0]).failed[0].detail == lost
    save_file(state | {lost: torch.ones(3)}, weights)
    with pytest.raises(WeightError, match="adapter"):
        boot(adapter)
    torch.save(state, adapter / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match="use_safetensors=None"):
        boot(adapter)
    assert torch.equal(
        quietly(adapter, use_safetensors=None)(random_tokens()),
        PeftModel.from_pretrained(BloomForCausalLM.from_pretrained(folder), adapter)(random_tokens()).logits,
    )
    kind = json.loads(settings.read_text())
    for changes, error, message in (
        ({"peft_type": "NOPE"}, UnsupportedModelError, "adapter"),
        ({"base_model_name_or_path": None}, InputError, "base_model_name_or_path is None"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, InputError, "base model that .* names cannot be found"),
        ({"base_model_name_or_path": str(adapter)}, InputError, "no config.json"),
    ):
        edit_json(settings, **changes)
        with pytest.raises(error, match=message):
            boot(adapter, use_safetensors=None)
        settings.write_text(json.dumps(kind))
    settings.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        boot(adapter)
    settings.write_text(json.dumps(kind))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pellucid\[adapters\]'"):
        boot(adapter)


def test_an_adapter_on_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as Hugging Face's cache is; nothing is asked of a network."""
    adapter = save_adapter(tmp_path / "adapter", folder)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/base")
    hub = tmp_path / "hub"
    for name, files in (("base", folder), ("adapter", adapter)):
        shutil.copytree(files, hub / f"models--someone--{name}" / "snapshots" / "abc")
        (hub / f"models--someone--{name}" / "refs").mkdir()
        (hub / f"models--someone--{name}" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    model = PeftModel.from_pretrained(BloomForCausalLM.from_pretrained(folder), adapter)
    bridge = boot("someone/adapter", tokenizer=lambda text: {"input_ids": [1]})
    assert torch.equal(bridge(random_tokens()), model(input_ids=random_tokens()).logits)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            "GatedRepoError",
            r"'someone/model' is gated: accept its terms at https://huggingface.co/someone/model, and log",
        ),
        ("RepositoryNotFoundError", r"'someone/model' is no folder here, and the hub has no model of this name that"),
        ("RevisionNotFoundError", r"'someone/model' has no revision 'step7' on the hub"),
        ("LocalEntryNotFoundError", r"the hub cannot be asked for it: .*nothing of it was fetched before"),
    ],
)
def test_why_the_hub_gives_nothing(reason: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's own function says it, of a download that fails so; one request, not five for each file."""
    import httpx
    import huggingface_hub.errors

    kind, asked = getattr(huggingface_hub.errors, reason), []

    def fail(*arguments: Any, **keywords: Any) -> Any:
        asked.append(keywords.get("filename", arguments))
        if reason == "LocalEntryNotFoundError":
            raise kind("no network")
        raise kind("no", response=httpx.Response(404, request=httpx.Request("HEAD", "https://huggingface.co")))

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match=said) as caught:
        boot("someone/model", revision="step7")
    assert isinstance(caught.value, OSError)
    assert len(asked) == 1


# -- damaged and hostile folders ---------------------------------------------------------------------------------------


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def replace_config(kind: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir() if kind == "folder" else (folder / "config.json").symlink_to("config.json")

    return change


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:900])


def first_shard(name: str, copied: bool = True) -> Callable[[Path], None]:
    """Let the index call its first shard ``name``, and put it there."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        old = sorted(set(index["weight_map"].values()))[0]
        new = name.format(folder=folder)
        index["weight_map"] = {key: new if file == old else file for key, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))
        if copied and name.endswith(".bin"):
            torch.save(load_file(folder / old), folder / new)
        elif copied:
            shutil.copy(folder / old, folder / new)

    return change


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


ONE_FILE: dict[str, tuple[Callable[[Path], Any], type[PellucidError], str]] = {
    "empty": (empty, InputError, "it is empty"),
    "no config": (lambda folder: (folder / "config.json").unlink(), InputError, "no config.json"),
    "config not JSON": (write("config.json", '{"a": '), InputError, "config.json is not JSON"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), InputError, "is not JSON"),
    "config nested": (write("config.json", "[" * 100000), InputError, "is not JSON"),
    "config a list": (write("config.json", "[]"), InputError, "a JSON object"),
    "config null": (write("config.json", "null"), InputError, "a JSON object"),
    "config a folder": (replace_config("folder"), InputError, "cannot be read: Is a directory"),
    "config a loop": (replace_config("loop"), InputError, "cannot be read: Too many levels"),
    "no model_type": (set_config(model_type=None), UnsupportedModelError, "model_type=None"),
    "model_type a list": (set_config(model_type=[]), UnsupportedModelError, r"model_type=\[\]"),
    "size a string": (set_config(hidden_size="48"), UnsupportedModelError, "hidden_size"),
    "size a truth": (set_config(n_layer=True), UnsupportedModelError, "n_layer"),
    "no heads": (set_config(n_head=0), UnsupportedModelError, "n_head = 0"),
    "layers below zero": (set_config(n_layer=-1), UnsupportedModelError, "n_layer = -1"),
    "no vocabulary": (set_config(vocab_size=0), UnsupportedModelError, "vocab_size = 0"),
    "eps a string": (set_config(layer_norm_epsilon="x"), UnsupportedModelError, "layer_norm_epsilon"),
    "dtype unknown": (set_config(dtype="float99"), UnsupportedModelError, "float99"),
    "dtype no dtype": (set_config(dtype="Tensor"), UnsupportedModelError, "a floating-point dtype"),
    "dtype a number": (set_config(dtype=5), UnsupportedModelError, "dtype = 5"),
    "labels a list": (set_config(id2label=[1]), UnsupportedModelError, "cannot be used"),
    "quantisation a number": (set_config(quantization_config=5), UnsupportedModelError, "cannot be used"),
    "generation not JSON": (write("generation_config.json", "{"), InputError, "generation_config.json is not JSON"),
    "generation a list": (write("generation_config.json", "[]"), InputError, "a JSON object"),
    "weights cut off": (cut("model.safetensors"), WeightError, "damaged or cut off"),
    "weights empty": (write("model.safetensors", ""), WeightError, "damaged or cut off"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), InputError, "no safetensors"),
}
SHARDS: dict[str, tuple[Callable[[Path], Any], type[PellucidError], str]] = {
    "index not JSON": (write(INDEX, "{"), WeightError, "is not JSON"),
    "index a list": (write(INDEX, "[]"), WeightError, "a JSON object"),
    "index without a map": (write(INDEX, '{"metadata": {}}'), WeightError, "is no index"),
    "index with an empty map": (write(INDEX, '{"metadata": {}, "weight_map": {}}'), WeightError, "is no index"),
    "index without metadata": (write(INDEX, '{"weight_map": {"a": "b"}}'), WeightError, "is no index"),
    "index names no string": (write(INDEX, '{"metadata": {}, "weight_map": {"a": 5}}'), WeightError, "'5'"),
    "a shard that is gone": (first_shard("gone.safetensors", copied=False), WeightError, "no such file"),
    "a pickle": (first_shard("weights.bin"), WeightError, "weights.bin.*run code"),
    "a pickle without an ending": (first_shard("weights", copied=True), WeightError, "run code"),
    "outside": (first_shard("../outside.safetensors"), WeightError, "outside its folder"),
    "outside by a detour": (
        first_shard("x/../../outside.safetensors", copied=False),
        WeightError,
        "outside its folder",
    ),
    "an absolute path": (first_shard("{folder}/../outside.safetensors"), WeightError, "outside its folder"),
    "a shard cut off": (cut("model-00001-of-00009.safetensors"), WeightError, "damaged or cut off"),
}


@pytest.mark.parametrize("case", ONE_FILE)
def test_a_damaged_folder_is_refused_by_name(folder: Path, case: str) -> None:
    change, kind, message = ONE_FILE[case]
    change(folder)
    with pytest.raises(kind, match=message) as caught:
        boot(folder)
    assert type(caught.value) is kind
    assert str(folder) in str(caught.value) or "This BLOOM configuration" in str(caught.value)


@pytest.mark.parametrize("case", SHARDS)
def test_a_hostile_index_of_shards(sharded: Path, case: str) -> None:
    assert torch.equal(quietly(sharded)(random_tokens()), make_bloom()(random_tokens()).logits)
    change, kind, message = SHARDS[case]
    change(sharded)
    with pytest.raises(kind, match=message):
        boot(sharded)
    if "pickle" not in case:
        with pytest.raises(kind, match=message):
            boot(sharded, use_safetensors=None)


def test_a_pickled_index_may_not_lead_outside_either(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    torch.save(make_bloom().state_dict(), sharded.parent / "outside.bin")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../outside.bin")
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightError, match="outside its folder"):
        boot(sharded, use_safetensors=False)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\x00"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named_and_tokens_run(
    tmp_path: Path, demo: TransformerBridge, name: str, content: str
) -> None:
    if (name, content) == ("tokenizer_config.json", "{}"):
        pytest.skip("nothing is wrong with an empty one")
    make_bloom(vocab_size=2048).save_pretrained(tmp_path)
    demo.tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.warns(PellucidWarning, match="no tokenizer that loads"):
        bridge = boot(tmp_path)
    assert bridge.tokenizer is None
    assert bridge(random_tokens()).shape == (2, 9, 2048)


def test_what_is_no_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in (folder / "config.json", tmp_path / "loop"):
        with pytest.raises(InputError, match="is not a folder"):
            boot(path)
    with pytest.raises(InputError, match="There is no folder"):
        boot(os.path.join(tmp_path, "nothing"))


# -- saving, and caches of earlier releases ----------------------------------------------------------------------------


def test_the_tokenizer_is_saved_with_the_model(demo: TransformerBridge, tmp_path: Path) -> None:
    demo.save_pretrained(tmp_path)
    again = boot(tmp_path)
    text = "Everyone has the right to life"
    assert torch.equal(again.to_tokens(text), demo.to_tokens(text))
    assert torch.equal(again(text), demo(text))


def test_a_cache_given_as_tuples(folder: Path) -> None:
    bridge, tokens = quietly(folder), random_tokens()
    cache = DynamicCache()
    bridge(tokens[:, :5], past_key_values=cache)
    pairs = tuple((layer.keys, layer.values) for layer in cache.layers)
    for given in (pairs, list(pairs), "cache"):
        for call in (bridge, bridge.run_with_cache, bridge.run_with_hooks, bridge.generate):
            with pytest.raises(InputError, match="DynamicCache"):
                call(tokens[:, 5:], past_key_values=given)
    logits = bridge(tokens[:, 5:], past_key_values=DynamicCache(pairs))  # what the message says
    assert torch.equal(logits, bridge(tokens[:, 5:], past_key_values=cache))
