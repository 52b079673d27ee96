"""Where models come from: folders, fine-tuned ones, adapters, dispatched ones, mid-training checkpoints; no network."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoTokenizer

from pellucid import TransformerBridge
from pellucid.errors import HookValueError, InputError, PellucidWarning
from pellucid.model_bridge.running import loading
from pellucid.model_bridge.supported_architectures.bloom import BLOOM
from tests.models import is_pristine, make_bloom, random_tokens


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path, demo: TransformerBridge) -> Path:
    model = make_bloom(torch.bfloat16, vocab_size=2048)
    model.save_pretrained(tmp_path)
    demo.tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("no_network")
def test_a_folder_without_a_network(folder: Path) -> None:
    model = make_bloom(torch.bfloat16, vocab_size=2048)
    bridge = TransformerBridge.boot_transformers(folder)
    assert bridge.cfg.dtype == torch.bfloat16  # the checkpoint's own
    tokens = random_tokens(vocab=2048)
    assert torch.equal(bridge(tokens), model(tokens).logits)
    assert bridge("Everyone has").shape == (1, len(bridge.tokenizer("Everyone has")["input_ids"]), 2048)
    wide = TransformerBridge.boot_transformers(str(folder), dtype=torch.float32, device="cpu")
    assert wide.cfg.dtype == torch.float32
    assert not wide.hf_model.training


@pytest.mark.usefixtures("no_network")
def test_overrides_and_fresh_weights(folder: Path) -> None:
    bridge = TransformerBridge.boot_transformers(folder, hf_config_overrides={"n_layer": 2}, load_weights=False)
    assert bridge.cfg.n_layers == 2
    with pytest.warns(PellucidWarning, match=r"no place for.*\n  transformer\.h\.1\."):
        shorter = TransformerBridge.boot_transformers(folder, hf_config_overrides={"n_layer": 1})
    full = TransformerBridge.boot_transformers(folder)
    tokens = random_tokens(vocab=2048)
    assert torch.equal(shorter(tokens, stop_at_layer=1), full(tokens, stop_at_layer=1))
    given = AutoTokenizer.from_pretrained(folder)
    assert TransformerBridge.boot_transformers(folder, tokenizer=given).tokenizer is given


def test_pickle_files_need_the_users_word(folder: Path) -> None:
    state = make_bloom(torch.bfloat16, vocab_size=2048).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="use_safetensors=False"):
        TransformerBridge.boot_transformers(folder)
    bridge = TransformerBridge.boot_transformers(folder, use_safetensors=False)
    assert torch.equal(bridge.W_E, state["transformer.word_embeddings.weight"])


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    make_bloom().save_pretrained(tmp_path)
    with pytest.warns(PellucidWarning, match="no tokenizer that loads"):
        bridge = TransformerBridge.boot_transformers(tmp_path)
    assert bridge.tokenizer is None
    bridge(random_tokens())


def test_mid_training_checkpoints_take_the_familys_tokenizer(
    demo: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub cannot be reached here: its two answers are stood in for, the fallback is ours."""
    asked: list[tuple[str, Any]] = []

    def answer(name: str, **options: Any) -> Any:
        asked.append((name, options.get("revision")))
        if name.endswith("-intermediate"):
            raise OSError("Couldn't instantiate the backend tokenizer")
        return demo.tokenizer

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", answer)
    with pytest.warns(
        PellucidWarning, match="bloom-560m-intermediate has no tokenizer.*using the one of bigscience/bloom-560m"
    ):
        found = loading.load_tokenizer(
            "bigscience/bloom-560m-intermediate", BLOOM.tokenizer, revision="global_step1000", local_files_only=False
        )
    assert found is demo.tokenizer
    assert asked == [("bigscience/bloom-560m-intermediate", "global_step1000"), ("bigscience/bloom-560m", None)]


def test_lora_on_the_fused_projection() -> None:
    model = make_bloom()
    tokens = random_tokens()
    plain = model(tokens).logits.detach()
    early = TransformerBridge(model)  # wrapped before the adapter is added
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["query_key_value", "dense"], r=4, init_lora_weights=False)
    ).eval()
    native = adapted(tokens).logits.detach()
    assert (native - plain).abs().max() > 1e-3
    late = TransformerBridge(adapted)
    for bridge in (early, late):
        assert torch.equal(bridge(tokens), native)
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(tokens)
        assert torch.equal(logits, native)
        assert cache["q", 0].shape == (2, 9, 4, 12)
        bridge.set_use_attn_result(True)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens)
            total = cache["result", 1].sum(2) + bridge.blocks[1].attn.module.dense(torch.zeros(1, 1, 48))
        assert torch.allclose(total, cache["attn_out", 1], atol=1e-5)
        with bridge.hooks([("blocks.1.attn.q.hook_in", lambda t, hook: t * 1.5)]):
            _, edited = bridge.run_with_cache(tokens, names_filter="blocks.1.attn.hook_q")
        _, clean = bridge.run_with_cache(tokens, names_filter="blocks.1.ln1.hook_out")
        fused = bridge.blocks[1].attn.module.query_key_value(clean["blocks.1.ln1.hook_out"] * 1.5)
        assert torch.equal(edited["q", 1], fused.view(2, 9, 4, 3, 12)[:, :, :, 0])
        bridge.set_use_attn_result(False)
        assert bridge.verify(layers=[1]).ok
    assert late.blocks[0].attn.W_Q.shape == (4, 48, 12)
    loss = late.run_with_hooks(tokens, fwd_hooks=[("*", lambda t, hook: None)], return_type="loss")
    loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert all(p.grad is None for name, p in adapted.named_parameters() if "lora" not in name)
    assert torch.equal(
        late.generate(tokens, do_sample=False, verbose=False),
        adapted.generate(tokens, do_sample=False, max_new_tokens=10),
    )
    assert late.detach() is adapted
    assert is_pristine(adapted)


def test_ia3_and_a_forward_hook_and_an_edit_on_the_fused_projection() -> None:
    tokens = random_tokens()
    adapted = get_peft_model(
        make_bloom(),
        IA3Config(
            target_modules=["query_key_value", "dense_4h_to_h"],
            feedforward_modules=["dense_4h_to_h"],
            init_ia3_weights=False,
        ),
    ).eval()
    bridge = TransformerBridge(adapted)
    with torch.no_grad():
        assert torch.equal(bridge.run_with_cache(tokens)[0], adapted(tokens).logits)
    model = make_bloom()
    bridge = TransformerBridge(model)
    fused = model.transformer.h[1].self_attention.query_key_value
    before = bridge(tokens)
    handle = fused.register_forward_hook(lambda m, a, out: out * 1.5)
    hooked = bridge.run_with_cache(tokens)[0]
    assert torch.equal(hooked, model(tokens).logits)
    assert not torch.equal(hooked, before)
    handle.remove()
    with torch.no_grad():
        fused.weight.mul_(2)
    edited = bridge.run_with_cache(tokens)[0]
    assert torch.equal(edited, model(tokens).logits)
    assert not torch.equal(edited, before)
    bridge(tokens, return_type="loss").backward()
    assert fused.weight.grad is not None


def test_a_resized_and_trained_model() -> None:
    model = make_bloom()
    model.resize_token_embeddings(120)
    bridge = TransformerBridge(model)
    assert bridge.cfg.d_vocab == 120
    assert bridge(torch.tensor([[119, 3]])).shape == (1, 2, 120)
    optimiser = torch.optim.SGD(bridge.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = bridge.run_with_hooks(random_tokens(), fwd_hooks=[("*", lambda t, hook: None)], return_type="loss")
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert torch.equal(bridge(random_tokens()), copy.deepcopy(model)(random_tokens()).logits)


def test_an_adapter_on_the_embedding() -> None:
    config = LoraConfig(target_modules=["word_embeddings"], r=4, init_lora_weights=False)
    model = get_peft_model(make_bloom(), config).eval()
    bridge, tokens = TransformerBridge(model), random_tokens()
    assert torch.equal(bridge(tokens), model(tokens).logits)
    flipped = bridge.run_with_hooks(tokens, fwd_hooks=[("embed.hook_in", lambda tensor, hook: tensor.flip(0))])
    assert torch.equal(flipped, model(tokens.flip(0)).logits)
    with pytest.raises(HookValueError, match="ids go from 0 to"):
        bridge.run_with_hooks(tokens, fwd_hooks=[("embed.hook_in", lambda tensor, hook: tensor + 1000)])
