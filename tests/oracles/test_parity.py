"""Logits and every hooked tensor that Hugging Face has too, equal to an untouched copy to the bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from pellucid import TransformerBridge
from tests.models import is_pristine, make_bloom, make_pair, random_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = (1, 4, 6, 12)
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "post_norm": {"apply_residual_connection_post_layernorm": True},
    "slow_but_exact": {"slow_but_exact": True, "pretraining_tp": 2},
}


def masks(batch: int, length: int) -> dict[str, Tensor | None]:
    left, right, gap, empty = (torch.ones(batch, length, dtype=torch.long) for _ in range(4))
    left[0, :3] = 0
    right[0, -2:] = 0
    gap[0, 2:4] = 0
    gap[-1, 0] = 0
    empty[0] = 0
    return {"none": None, "left": left, "right": right, "interior": gap, "row all padding": empty}


def native_tensors(model: Any, tokens: Tensor, mask: Tensor | None, cache: Any = None) -> dict[str, Tensor]:
    """What Hugging Face shows of its own accord and what torch hooks read off its modules, by our names."""
    kept: dict[str, Tensor] = {}
    handles = []

    def on_output(module: Any, name: str) -> None:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            kept[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        handles.append(module.register_forward_hook(hook))

    def on_input(module: Any, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, args: kept.__setitem__(name, args[0].clone())))

    backbone = model.transformer
    on_input(backbone.word_embeddings, "embed.hook_in")
    on_output(backbone.word_embeddings, "embed.hook_out")
    on_output(backbone.word_embeddings_layernorm, "hook_embed")
    on_output(backbone.ln_f, "ln_final.hook_out")
    on_output(model.lm_head, "hook_unembed")
    slow = model.config.slow_but_exact and model.config.pretraining_tp > 1
    for layer, block in enumerate(backbone.h):
        name = f"blocks.{layer}."
        on_input(block, name + "hook_resid_pre")
        on_output(block.input_layernorm, name + "ln1.hook_out")
        on_output(block.self_attention.query_key_value, name + "fused")
        on_output(block.self_attention.attention_dropout, name + "attn.hook_pattern")
        on_output(block.self_attention, name + "hook_resid_mid")
        on_output(block.post_attention_layernorm, name + "mlp.hook_in")
        on_output(block.mlp.dense_h_to_4h, name + "mlp.hook_pre")
        on_output(block.mlp.gelu_impl, name + "mlp.hook_post")
        on_output(block, name + "hook_resid_post")
        if not slow:
            on_input(block.self_attention.dense, name + "z")
            on_output(block.self_attention.dense, name + "hook_attn_out")
            on_output(block.mlp.dense_4h_to_h, name + "hook_mlp_out")
    try:
        with torch.no_grad():
            output = model(tokens, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
    finally:
        for handle in handles:
            handle.remove()
    n_heads = model.config.n_head
    for layer in range(model.config.n_layer):
        fused = kept.pop(f"blocks.{layer}.fused")
        by_head = fused.view(*fused.shape[:2], n_heads, 3, -1)
        for index, part in enumerate("qkv"):
            kept[f"blocks.{layer}.attn.hook_{part}"] = by_head[:, :, :, index]
            kept[f"blocks.{layer}.attn.{part}.hook_in"] = kept[f"blocks.{layer}.ln1.hook_out"]
        if not slow:
            z = kept.pop(f"blocks.{layer}.z")
            kept[f"blocks.{layer}.attn.hook_z"] = z.view(*z.shape[:2], n_heads, -1)
    kept["logits"] = output.logits
    return kept


def assert_equal_to(bridge: TransformerBridge, model: Any, tokens: Tensor, mask: Tensor | None) -> None:
    native = native_tensors(model, tokens, mask)
    with torch.no_grad():
        assert torch.equal(bridge(tokens, attention_mask=mask), native["logits"])
        logits, cache = bridge.run_with_cache(tokens, attention_mask=mask)
    assert torch.equal(logits, native.pop("logits"))
    for name, tensor in native.items():
        assert torch.equal(cache[name], tensor), name
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("n_head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mask(dtype: torch.dtype, n_head: int, config: str) -> None:
    bridge, model = make_pair(dtype, n_head=n_head, **CONFIGS[config])
    tokens = random_tokens(3, 9)
    for mask in masks(3, 9).values():
        assert_equal_to(bridge, model, tokens, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2])
def test_short(dtype: torch.dtype, length: int) -> None:
    for n_head in HEADS:
        bridge, model = make_pair(dtype, n_head=n_head)
        assert_equal_to(bridge, model, random_tokens(2, length), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_length_2048(dtype: torch.dtype) -> None:
    """ALiBi of far positions is coarse in half precision; ours is Hugging Face's, not a cleaner one."""
    bridge, model = make_pair(dtype, n_layer=1, n_head=3)
    tokens = random_tokens(1, 2048)
    mask = torch.ones_like(tokens)
    mask[0, :100] = 0
    for given in (None, mask):
        with torch.no_grad():
            native = model(tokens, attention_mask=given, output_attentions=True)
            logits, cache = bridge.run_with_cache(
                tokens, attention_mask=given, names_filter=["blocks.0.attn.hook_pattern", "blocks.0.hook_resid_mid"]
            )
        assert torch.equal(logits, native.logits)
        assert torch.equal(cache["pattern", 0], native.attentions[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("chunks", [(9,), (4, 5), (3, 1, 5), (1,) * 9])
def test_cache_in_chunks(dtype: torch.dtype, hooked: bool, chunks: tuple[int, ...]) -> None:
    bridge, model = make_pair(dtype, n_head=6)
    tokens = random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    for given, static in product((None, mask), (False, True)):
        caches = [
            StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
            for _ in range(2)
        ]
        if static and given is not None:
            continue  # a static cache's mask spans its whole capacity, which generate() makes; see test_generation
        at = 0
        for size in chunks:
            part = tokens[:, at : at + size]
            at += size
            part_mask = None if given is None else given[:, :at]
            with torch.no_grad():
                native = model(part, attention_mask=part_mask, past_key_values=caches[0], use_cache=True)
                if hooked:
                    logits, cache = bridge.run_with_cache(part, attention_mask=part_mask, past_key_values=caches[1])
                    assert cache["k", 1].shape[1] == size
                    assert cache["pattern", 1].shape[-1] == (12 if static else at)
                else:
                    logits = bridge(part, attention_mask=part_mask, past_key_values=caches[1])
            assert torch.equal(logits, native.logits)


def test_strings_make_their_own_mask(demo: TransformerBridge) -> None:
    texts = ["Everyone has the right to life.", "Toda persona"]
    for side in ("left", "right"):
        tokens, mask = demo._rules.encode(texts, padding_side=side)  # type: ignore[arg-type]
        assert mask is not None
        assert int(mask.sum()) < mask.numel()
        with torch.no_grad():
            assert torch.equal(demo(texts, padding_side=side), demo(tokens, attention_mask=mask))


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    bridge, model = make_pair()
    tokens = random_tokens(2, 7)
    mask = masks(2, 7)["interior"]
    assert mask is not None
    with torch.no_grad():
        assert torch.equal(bridge(tokens, attention_mask=mask.to(dtype)), model(tokens, attention_mask=mask).logits)


def test_rows_are_independent() -> None:
    """Real positions: to the bit when only other rows change; alone and on either side within rounding.

    Bound: two routes that round differently at each of L layers, a few ulps of the largest logit each.
    """
    bridge, _ = make_pair()
    bound = 64 * 3 * torch.finfo(torch.float32).eps
    row, others = random_tokens(1, 6, seed=1), random_tokens(4, 9, seed=2)
    with torch.no_grad():
        alone = bridge(row)[0]
        limit = bound * float(alone.abs().max())
        for side in ("left", "right"):
            tokens, mask = others.clone(), torch.ones_like(others)
            where = slice(3, 9) if side == "left" else slice(0, 6)
            tokens[1, where], mask[1] = row[0], 0
            mask[1, where] = 1
            batched = bridge(tokens, attention_mask=mask)[1, where]
            assert (batched - alone).abs().max() <= limit
            changed = tokens.clone()
            changed[[0, 2, 3]] = random_tokens(3, 9, seed=3)
            assert torch.equal(bridge(changed, attention_mask=mask)[1, where], batched)
            moved, moved_mask = tokens[[1, 0, 2, 3]], mask[[1, 0, 2, 3]]
            assert torch.equal(bridge(moved, attention_mask=moved_mask)[0, where], batched)


def test_a_row_of_padding_is_finite() -> None:
    for dtype in (*DTYPES, torch.float64):
        bridge = TransformerBridge(make_bloom(dtype))
        mask = masks(2, 5)["row all padding"]
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(random_tokens(2, 5), attention_mask=mask)
        assert torch.isfinite(logits).all()
        # Uniform over all keys, as Hugging Face has it.
        assert torch.allclose(cache["pattern", 0][0], torch.full((), 0.2, dtype=dtype))


def test_patterns_look_at_real_tokens_of_the_past() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens(2, 7)
    mask = masks(2, 7)["left"]
    assert mask is not None
    _, cache = bridge.run_with_cache(tokens, attention_mask=mask, names_filter="*hook_pattern")
    future = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
    for layer in range(3):
        pattern = cache["pattern", layer]
        real = mask.bool()[:, None, :, None]  # a padding query looks everywhere alike, as in Hugging Face
        assert pattern.masked_select(future & real).count_nonzero() == 0
        assert pattern[0, :, 3:, :3].count_nonzero() == 0
        sums = pattern.sum(-1)[mask.bool()[:, None].expand(-1, 4, -1)]
        # A sum of 7 rounded numbers below 1.
        assert (sums - 1).abs().max() <= 7 * torch.finfo(torch.float32).eps


def test_float64_is_a_microscope() -> None:
    """Ours stays in float64; Hugging Face's softmax passes through float32, and gives NaN with left padding."""
    bridge, model = make_pair(torch.float64)
    single = make_pair(torch.float32)[1]
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        ours, native = bridge(tokens), model(tokens).logits
        assert 0 < (ours - native).abs().max() < 1e-5
        assert (ours - single(tokens).logits).abs().max() < 1e-3
        mask = masks(2, 7)["left"]
        assert torch.isnan(model(tokens, attention_mask=mask).logits).any()
        assert torch.isfinite(bridge(tokens, attention_mask=mask)).all()
        alone = bridge(tokens[:1, 3:])
        assert (bridge(tokens, attention_mask=mask)[0, 3:] - alone[0]).abs().max() < 1e-12


@pytest.mark.parametrize("config", CONFIGS)
def test_residual_identities(config: str) -> None:
    bridge, _ = make_pair(**CONFIGS[config])
    _, cache = bridge.run_with_cache(random_tokens())
    post_norm = config == "post_norm"
    for layer in range(3):
        pre = cache[f"blocks.{layer}.ln1.hook_out"] if post_norm else cache["resid_pre", layer]
        mid = cache[f"blocks.{layer}.ln2.hook_out"] if post_norm else cache["resid_mid", layer]
        assert torch.equal(pre + cache["attn_out", layer], cache["resid_mid", layer])
        assert torch.equal(mid + cache["mlp_out", layer], cache["resid_post", layer])
