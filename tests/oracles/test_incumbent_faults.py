"""Each fault measured in TransformerLens 4.3.0 on BLOOM: a test here that it would fail, with Hugging Face as the judge.

Many are also covered elsewhere; this file keeps the list whole. ``tests/peer`` runs TransformerLens itself beside us.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomForCausalLM, DynamicCache

from pellucid import TransformerBridge
from pellucid.errors import HookNameError, HookValueError, InputError
from tests.models import make_bloom, make_generator, make_pair, random_tokens

TOKENS = random_tokens()


def write(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


def test_returned_and_in_place_edits_of_resid_mid_agree() -> None:
    bridge, model = make_pair()
    name = "blocks.0.hook_resid_mid"
    returned = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda t, hook: t * 0)])
    in_place = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda t, hook: write(t, t * 0))])
    handle = model.transformer.h[0].self_attention.register_forward_hook(lambda m, a, o: (o[0] * 0, o[1]))
    native = model(TOKENS).logits
    handle.remove()
    assert torch.equal(returned, in_place)
    assert torch.equal(returned, native)


def test_contributions_fire_with_attn_result_on() -> None:
    bridge, _ = make_pair()
    _, before = bridge.run_with_cache(TOKENS)
    bridge.set_use_attn_result(True)
    _, cache = bridge.run_with_cache(TOKENS)
    assert set(before) < set(cache)
    for name in before:
        assert torch.equal(before[name], cache[name])
    edited = bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_attn_out", lambda t, hook: t * 0)])
    assert not torch.equal(edited, bridge(TOKENS))


def test_split_inputs_are_before_the_norm_and_mlp_in_fires() -> None:
    bridge, _ = make_pair()
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_hook_mlp_in(True)
    _, cache = bridge.run_with_cache(TOKENS)
    assert torch.equal(cache["blocks.1.hook_q_input"][:, :, 0], cache["resid_pre", 1])
    assert torch.equal(cache["blocks.1.hook_mlp_in"], cache["resid_mid", 1])
    assert "blocks.1.attn.q.hook_in" in cache
    moved = bridge.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.1.hook_mlp_in", lambda t, hook: t * 2 + 1)], assert_effect=True
    )
    assert moved.shape == (2, 9, 97)


def test_start_at_layer_is_the_full_run() -> None:
    bridge, model = make_pair()
    hidden = model(TOKENS, output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.equal(bridge(hidden[layer], start_at_layer=layer), model(TOKENS).logits)


def test_a_short_mask_with_a_cache_is_refused() -> None:
    bridge, _ = make_pair()
    past = DynamicCache()
    bridge(TOKENS, past_key_values=past)
    with pytest.raises(InputError, match="cached positions"):
        bridge(TOKENS[:, :2], past_key_values=past, attention_mask=torch.ones(2, 2))


def test_post_norm_models_state_their_residual() -> None:
    bridge, _ = make_pair(apply_residual_connection_post_layernorm=True)
    _, cache = bridge.run_with_cache(TOKENS)
    assert torch.equal(cache["blocks.0.ln1.hook_out"] + cache["attn_out", 0], cache["resid_mid", 0])
    assert "after the layer norm" in bridge.explain("blocks.0.hook_resid_pre")


def test_no_dead_points() -> None:
    bridge, _ = make_pair()
    fired: set[str] = set()
    bridge.run_with_hooks(TOKENS, fwd_hooks=[("*", lambda t, hook: fired.add(hook.name))])
    assert fired == set(bridge.hook_dict)
    with pytest.raises(HookNameError, match=r"blocks\.0\.attn\.qkv\.hook_out"):
        bridge.add_hook("blocks.0.attn.qkv.hook_out", lambda t, hook: None)
    with pytest.raises(HookNameError):
        bridge.blocks[0].attn.qkv.hook_out  # noqa: B018


def test_no_parameter_is_added_and_edits_of_the_fused_weight_count() -> None:
    bridge, model = make_pair()
    assert sum(p.numel() for p in bridge.parameters()) == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for net in (bridge.hf_model, model):
            net.transformer.h[0].self_attention.query_key_value.weight.mul_(1.5)
    assert torch.equal(bridge.run_with_cache(TOKENS)[0], model(TOKENS).logits)


def test_saving_loading_and_pickling(tmp_path: Any) -> None:
    bridge, model = make_pair()
    bridge.save_pretrained(tmp_path)
    assert torch.equal(BloomForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)
    other = make_bloom(scale=0.3)
    bridge.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(bridge.run_with_cache(TOKENS)[0], other(TOKENS).logits)
    assert torch.equal(pickle.loads(pickle.dumps(bridge))(TOKENS), other(TOKENS).logits)


def test_nothing_is_truncated(demo: TransformerBridge) -> None:
    text = "Everyone has the right to life. " * 240
    ids = demo.tokenizer(text)["input_ids"]
    assert len(ids) > 2048
    assert demo.to_tokens(text)[0].tolist() == ids
    with torch.no_grad():
        assert demo(text, stop_at_layer=1).shape[1] == len(ids)  # all four layers of so many columns take seconds


def test_misspelt_keywords_are_errors() -> None:
    bridge, _ = make_pair()
    for wrong in ({"return_typ": "loss"}, {"past_kv_cach": None}, {"use_cach": True}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            bridge(TOKENS, **wrong)


def test_frozen_parameters_stay_frozen() -> None:
    model = make_bloom()
    model.requires_grad_(False)
    bridge = TransformerBridge(model)
    bridge.run_with_cache(TOKENS)
    assert not any(p.requires_grad for p in bridge.parameters())


def test_the_configuration_does_not_lie() -> None:
    bridge = TransformerBridge(make_bloom(torch.bfloat16))
    assert bridge.cfg.dtype == torch.bfloat16
    assert bridge.cfg.act_fn == "gelu_fast"
    assert bridge.cfg.post_embedding_ln
    assert not bridge.cfg.default_prepend_bos
    with pytest.raises(InputError, match="dtype would have no effect"):
        TransformerBridge.boot_transformers(hf_model=make_bloom(), dtype=torch.bfloat16)
    assert not any("pos_embed" in name for name, _ in bridge.named_parameters())


def test_slow_but_exact_is_hugging_faces() -> None:
    bridge, model = make_pair(slow_but_exact=True, pretraining_tp=2)
    assert torch.equal(bridge.run_with_cache(TOKENS)[0], model(TOKENS).logits)


def test_a_list_with_one_misspelt_name() -> None:
    bridge, _ = make_pair()
    with pytest.raises(HookNameError, match="blocks.0.hook_resid_pree"):
        bridge.run_with_cache(TOKENS, names_filter=["hook_embed", "blocks.0.hook_resid_pree"])


def test_broadcasting_is_refused() -> None:
    bridge, _ = make_pair()
    for name, wrong in (
        ("blocks.0.hook_attn_out", lambda t, hook: t[:, :1]),
        ("blocks.0.hook_mlp_out", lambda t, hook: t.new_zeros(())),
        ("blocks.0.ln1.hook_scale", lambda t, hook: t[:, :1]),
    ):
        with pytest.raises(HookValueError, match=name):
            bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, wrong)])


def test_strings_are_tokenised_one_way(demo: TransformerBridge) -> None:
    tokenizer = demo.tokenizer
    text = "Everyone has"
    plain = tokenizer(text)["input_ids"]
    assert demo.to_tokens(text)[0].tolist() == plain
    output = demo.generate(text, do_sample=False, max_new_tokens=2, verbose=False, return_type="tokens")
    assert output[0, : len(plain)].tolist() == plain
    _, cache = demo.run_with_cache(text)
    assert cache.tokens[0].tolist() == plain
    assert demo.tokenizer is tokenizer


def test_the_name_is_the_one_that_was_asked_for() -> None:
    bridge, _ = make_pair()
    for asked in (
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_in",
        "blocks.0.ln1.hook_in",
        "embed_ln.hook_out",
        "hook_embed",
    ):
        seen: list[str] = []
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(asked, lambda t, hook: seen.append(hook.name))])
        assert seen == [asked]


def test_prepend() -> None:
    bridge, _ = make_pair()
    order: list[int] = []
    bridge.add_hook("hook_embed", lambda t, hook: order.append(2))
    bridge.add_hook("hook_embed", lambda t, hook: order.append(1), prepend=True)
    bridge(TOKENS)
    assert order == [1, 2]


def test_a_component_called_alone_is_not_silently_another_model() -> None:
    bridge, _ = make_pair()
    x = torch.randn(1, 4, 48)
    with pytest.raises(InputError, match="alibi"):
        bridge.blocks[0].attn(x)
    with pytest.raises(InputError, match="residual"):
        bridge.blocks[0].mlp(x)


def test_generation_pads_with_the_padding_token() -> None:
    model = make_generator()
    model.generation_config.eos_token_id = int(model.generate(TOKENS, do_sample=False, max_new_tokens=4)[0, -1])
    model.generation_config.pad_token_id = 3
    native = copy.deepcopy(model).generate(TOKENS, do_sample=False, max_new_tokens=15)
    assert (native == 3).any()
    assert torch.equal(
        TransformerBridge(model).generate(TOKENS, do_sample=False, max_new_tokens=15, verbose=False), native
    )
