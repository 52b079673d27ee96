"""Every family against an untouched copy of its model, to the bit: logits and what Hugging Face collects of its own accord.

A padded mask is given to Hugging Face with the position ids of its own ``generate``, as the bridge gives it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from pellucid import TransformerBridge
from pellucid.errors import UnsupportedModelError
from pellucid.hook_points import HookPoint
from tests.families import CONFIGS, in_full, make_family, mask_of, native_arguments, of_the_turn, opted_in
from tests.models import is_pristine, random_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDES = (None, "left", "right")


def look(tensor: Tensor, hook: HookPoint) -> None:
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", of_the_turn(CONFIGS))
def test_bits(family: str, dtype: torch.dtype) -> None:
    """Nothing hooked, every point cached, patterns and hidden states, with no, left and right padding."""
    native = make_family(family, dtype)
    bridge = TransformerBridge(make_family(family, dtype))
    tokens = random_tokens()
    for side in SIDES if in_full(family) else SIDES[:2]:
        mask = mask_of(tokens, side)
        given = native_arguments(native, mask, tokens.shape[1])
        with torch.no_grad():
            # First, for what comes with it: Hugging Face collects by torch hooks that it leaves on the model.
            plain = native(tokens, use_cache=False, **given).logits
            shown = native(tokens, use_cache=False, output_attentions=True, output_hidden_states=True, **given)
            assert torch.equal(bridge(tokens, attention_mask=mask), plain), side
            logits, cache = bridge.run_with_cache(tokens, attention_mask=mask)
        assert torch.equal(logits, plain), side
        for layer in range(bridge.cfg.n_layers):
            assert torch.equal(cache["pattern", layer], shown.attentions[layer]), (side, layer)
            assert torch.equal(cache["resid_pre", layer], shown.hidden_states[layer]), (side, layer)
        assert torch.equal(cache["ln_final.hook_out"], shown.hidden_states[-1]), side
        assert torch.equal(cache["hook_logits"], plain), side
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache], ids=("dynamic", "static"))
@pytest.mark.parametrize("family", of_the_turn(CONFIGS))
def test_bits_in_chunks(family: str, kind: Any) -> None:
    """With a key/value cache, in chunks of 4, 4 and 1, the second time padded on the left."""
    native = make_family(family)
    bridge = TransformerBridge(make_family(family))
    tokens = random_tokens()
    for mask in (None, mask_of(tokens, "left")):
        plain, hooked, own = (
            DynamicCache(config=native.config)
            if kind is DynamicCache
            else StaticCache(config=native.config, max_cache_len=12)
            for _ in range(3)
        )
        for start, stop in ((0, 4), (4, 8), (8, 9)):
            seen = None if mask is None else mask[:, :stop]
            given = native_arguments(native, seen, stop - start)
            chunk = tokens[:, start:stop]
            with torch.no_grad():
                wanted = native(chunk, past_key_values=own, use_cache=True, **given).logits
                assert torch.equal(bridge(chunk, past_key_values=plain, attention_mask=seen), wanted), start
                logits = bridge.run_with_cache(chunk, past_key_values=hooked, attention_mask=seen)[0]
            assert torch.equal(logits, wanted), start


@pytest.mark.parametrize("family", of_the_turn(CONFIGS))
def test_points_fire_once_in_the_order_of_the_index(family: str) -> None:
    bridge = TransformerBridge(make_family(family))
    fired: list[str] = []
    with opted_in(bridge):
        names = list(bridge.hook_dict)
        bridge.run_with_hooks(
            random_tokens(), fwd_hooks=[(lambda name: True, lambda tensor, hook: fired.append(str(hook.name)))]
        )
    assert fired == names


@pytest.mark.parametrize("family", of_the_turn(CONFIGS))
def test_shapes_are_those_of_the_axes(family: str) -> None:
    """Every point has the sizes that its axes say, and the dtype of its kind."""
    bridge = TransformerBridge(make_family(family, torch.bfloat16))
    tokens = random_tokens()
    sizes = {**bridge.cfg.sizes(), "batch": 2, "pos": 9, "key_pos": 9, "1": 1}
    wide = {"model": torch.bfloat16, "wide": torch.float32, "int": torch.int64}
    with opted_in(bridge):
        cache = bridge.run_with_cache(tokens)[1]
        for name in bridge.hook_dict:
            spec = bridge.hook_index[name]
            assert cache[name].shape == tuple(sizes[axis] for axis in spec.axes), name
            assert cache[name].dtype is wide[spec.kind], name


@pytest.mark.parametrize("family", of_the_turn(CONFIGS))
def test_a_run_from_a_layer_or_up_to_one(family: str) -> None:
    """A run that is given the residual of a block makes the full run's logits; one that stops gives that residual."""
    bridge = TransformerBridge(make_family(family))
    tokens = random_tokens()
    n_layers = bridge.cfg.n_layers
    for mask in (None, mask_of(tokens, "left")):
        logits, cache = bridge.run_with_cache(tokens, attention_mask=mask)
        for layer in range(n_layers + 1):
            residual = cache["resid_pre", layer] if layer < n_layers else cache["resid_post", layer - 1]
            stopped = bridge(tokens, attention_mask=mask, stop_at_layer=layer)
            assert torch.equal(stopped, residual), layer
            again = bridge(residual.clone(), attention_mask=mask, start_at_layer=layer)
            assert torch.equal(again, logits), layer
        begun = bridge(cache["resid_pre", 1].clone(), attention_mask=mask, start_at_layer=1, stop_at_layer=2)
        assert torch.equal(begun, cache["resid_post", 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", of_the_turn(CONFIGS))
def test_bits_of_a_fused_kernel(family: str, dtype: torch.dtype) -> None:
    """A model that runs sdpa has sdpa's bits while nobody looks at scores or pattern, eager's where all of them are."""
    native = make_family(family, dtype)
    if not type(native)._supports_sdpa:
        pytest.skip(f"{family} has no sdpa in Hugging Face")
    fused = make_family(family, dtype, "sdpa")
    bridge = TransformerBridge(make_family(family, dtype, "sdpa"))
    tokens = random_tokens()
    inside = ("hook_attn_scores", "hook_pattern")
    if bridge.adapter.family.attention.softmax_in != "function":  # Hugging Face's eager is another computation there
        with pytest.raises(UnsupportedModelError, match=r"set_attn_implementation\('eager'\)"):
            bridge.run_with_cache(tokens)
        return
    for side in SIDES if in_full(family) else SIDES[:2]:
        mask = mask_of(tokens, side)
        given = native_arguments(native, mask, tokens.shape[1])
        real = torch.ones_like(tokens).bool() if mask is None else mask.bool()
        with torch.no_grad():
            wanted = fused(tokens, use_cache=False, **given).logits
            assert torch.equal(bridge(tokens, attention_mask=mask), wanted), side
            outside = bridge.run_with_cache(
                tokens, attention_mask=mask, names_filter=lambda name: not name.endswith(inside)
            )[0]
            assert torch.equal(outside, wanted), side
            eager = native(tokens, use_cache=False, **given).logits
            logits, cache = bridge.run_with_cache(tokens, attention_mask=mask, names_filter="*.hook_pattern")
            assert torch.equal(logits[real], eager[real]), side
            shown = native(tokens, use_cache=False, output_attentions=True, **given)
        for layer in range(bridge.cfg.n_layers):
            at_real = cache["pattern", layer].transpose(1, 2)[real]
            assert torch.equal(at_real, shown.attentions[layer].transpose(1, 2)[real]), (side, layer)
