"""Thousands of random cases: shapes, masks, dtypes, subsets of hooks and edit styles, against Hugging Face."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.model_bridge.reference_edits import REBUILT, reference_edit
from pellucid.names import HookSpec
from tests.models import VOCAB, is_pristine, make_pair

SHARE = 1 if os.environ.get("PELLUCID_FAMILIES") == "all" else 3
"""Of the cases, one in so many is tried in the default run; ``scripts/check families`` tries all."""

CONFIGS: tuple[dict[str, Any], ...] = (
    {"n_head": 1},
    {"n_head": 4},
    {"n_head": 6},
    {"apply_residual_connection_post_layernorm": True},
    {"slow_but_exact": True, "pretraining_tp": 2},
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def pair(config: int, dtype: torch.dtype) -> tuple[TransformerBridge, Any]:
    bridge, model = make_pair(dtype, n_layer=2, **CONFIGS[config])
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        setattr(bridge.cfg, flag, True)
    return bridge, model


def edit_of(spec: HookSpec, seed: int) -> Callable[[Tensor], Tensor]:
    """A random change of a random part of a tensor."""

    def edit(tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if spec.kind == "int":
            return (tensor + 1 + seed) % VOCAB
        noise = torch.randn(tensor.shape, generator=generator)
        keep = torch.rand(tensor.shape, generator=generator) < 0.5
        noise = noise.abs() if spec.site == "hook_scale" else noise
        return tensor + (0.3 * noise * keep).to(tensor.dtype)

    return edit


@settings(max_examples=1200 // SHARE, deadline=None)
@given(
    config=st.integers(0, len(CONFIGS) - 1),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 3),
    length=st.integers(1, 8),
    data=st.data(),
)
def test_any_hooks_on_any_batch(config: int, dtype: torch.dtype, batch: int, length: int, data: st.DataObject) -> None:
    bridge, model = pair(config, dtype)
    tokens = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length), min_size=batch, max_size=batch
            )
        )
    )
    bits = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    mask = torch.tensor(bits).view(batch, length).long() if data.draw(st.booleans()) else None
    names = data.draw(st.lists(st.sampled_from(sorted(bridge.hook_dict)), max_size=3, unique=True))
    seed = data.draw(st.integers(0, 100))
    hooks: list[Any] = []
    exact = True
    with torch.no_grad(), ExitStack() as stack:
        for name in names:
            spec = bridge._tree.index[name]
            style = data.draw(st.sampled_from(["look", "return", "in place", "same"]))
            edit = edit_of(spec, seed)
            functions: dict[str, Any] = {
                "look": lambda t, hook: None,
                "same": lambda t, hook: t.clone(),
                "return": lambda t, hook, edit=edit: edit(t),
                "in place": lambda t, hook, edit=edit: write(t, edit(t)),
            }
            hooks.append((name, functions[style]))
        edited = [name for name, function in hooks if function.__defaults__]
        # Several edits on one module would meet in another order in the reference; one at a time is checked against it.
        if len(edited) > 1:
            hooks = [pair_ for pair_ in hooks if not pair_[1].__defaults__ or pair_[0] == edited[0]]
            edited = edited[:1]
        ours = bridge.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
        for name in edited:
            spec = bridge._tree.index[name]
            stack.enter_context(reference_edit(model, spec, edit_of(spec, seed), bridge.adapter))
            exact = exact and spec.site not in REBUILT
        native = model(tokens, attention_mask=mask).logits
    assert is_pristine(bridge.hf_model)
    if exact:
        assert torch.equal(ours, native)
    else:
        bound = 64 * 2 * torch.finfo(dtype).eps * float(native.abs().max())
        assert (ours.double() - native.double()).abs().max() <= bound


def write(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


@settings(max_examples=400 // SHARE, deadline=None)
@given(
    config=st.integers(0, len(CONFIGS) - 1),
    batch=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    left=st.integers(0, 3),
    hooked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_chunks_through_a_cache(
    config: int, batch: int, chunks: list[int], left: int, hooked: bool, seed: int
) -> None:
    from transformers import DynamicCache

    bridge, model = pair(config, torch.float32)
    length = sum(chunks)
    tokens = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[0, : min(left, length - 1)] = 0
    caches = DynamicCache(), DynamicCache()
    at = 0
    for size in chunks:
        part, seen = tokens[:, at : at + size], mask[:, : at + size]
        at += size
        with torch.no_grad():
            native = model(part, attention_mask=seen, past_key_values=caches[0], use_cache=True).logits
            hooks = [("*", lambda t, hook: None)] if hooked else []
            ours = bridge.run_with_hooks(part, fwd_hooks=hooks, attention_mask=seen, past_key_values=caches[1])
        assert torch.equal(ours, native)


@settings(max_examples=400 // SHARE, deadline=None)
@given(
    config=st.integers(0, len(CONFIGS) - 1),
    start=st.integers(0, 2),
    seed=st.integers(0, 1000),
    length=st.integers(1, 8),
)
def test_any_layer_to_start_and_stop(config: int, start: int, seed: int, length: int) -> None:
    bridge, model = pair(config, torch.float32)
    tokens = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.randint(0, 2, (2, length), generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        residual = bridge(tokens, attention_mask=mask, stop_at_layer=start)
        assert torch.equal(
            bridge(residual, attention_mask=mask, start_at_layer=start), model(tokens, attention_mask=mask).logits
        )
