"""The patching functions on other families: loops of whole forwards, heads of keys and values, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge, patching
from pellucid.errors import UnsupportedModelError
from tests.families import VOCAB, make_family
from tests.patching.sites import FAMILY, hooks_of, shape_of

LENGTH = 5
CLEAN = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
CORRUPTED = CLEAN.clone()
CORRUPTED[:, 1] = (CORRUPTED[:, 1] + 7) % (VOCAB - 1) + 1


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 5]).mean()


def function(name: str) -> Any:
    return vars(patching)[f"get_act_patch_{name}"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "attn_head_k_all_pos"),
        ("llama", "attn_head_v_by_pos"),
        ("llama", "attn_head_pattern_by_pos"),
        ("gemma2", "attn_head_k_by_pos"),
        ("gpt2", "resid_mid"),
        ("gpt_neox", "attn_head_q_all_pos"),
        ("olmo2", "mlp_out"),
    ],
)
def test_the_same_numbers_as_whole_forwards(family: str, name: str) -> None:
    bridge = TransformerBridge(make_family(family))
    clean, cfg = bridge.run_with_cache(CLEAN)[1], bridge.cfg
    shared = FAMILY[name].hook in ("attn.hook_k", "attn.hook_v")
    shape = shape_of(FAMILY[name], cfg.n_layers, cfg.n_key_value_heads if shared else cfg.n_heads, LENGTH)
    scores = [
        metric(bridge.run_with_hooks(CORRUPTED, fwd_hooks=hooks)) for hooks in hooks_of(FAMILY[name], shape, clean)
    ]
    expected = torch.stack(scores).unflatten(0, shape)
    found = function(name)(bridge, CORRUPTED, clean, metric)
    assert found.shape == expected.shape
    bound = 2e-6 * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound
    assert float((expected - metric(bridge(CORRUPTED))).abs().max()) > 100 * bound


def test_all_heads_in_one_table() -> None:
    bridge = TransformerBridge(make_family("gpt_neox"))
    clean = bridge.run_with_cache(CLEAN)[1]
    table = patching.get_act_patch_attn_head_all_pos_every(bridge, CORRUPTED, clean, metric)
    for row, part in zip(table, ("out", "q", "k", "v", "pattern"), strict=True):
        alone = function(f"attn_head_{part}_all_pos")(bridge, CORRUPTED, clean, metric)
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
    shared = TransformerBridge(make_family("llama"))
    for every in (patching.get_act_patch_attn_head_all_pos_every, patching.get_act_patch_attn_head_by_pos_every):
        with pytest.raises(UnsupportedModelError, match="This Llama has 6 heads of queries and 2 of keys and values"):
            every(shared, CORRUPTED, shared.run_with_cache(CLEAN)[1], metric)
    assert patching.get_act_patch_block_every(shared, CORRUPTED, shared.run_with_cache(CLEAN)[1], metric).shape[0] == 3


def test_no_residual_between_parallel_branches() -> None:
    bridge = TransformerBridge(make_family("gpt_neox"))
    with pytest.raises(UnsupportedModelError, match="Attention and MLP of GPT-NeoX .* both read what enters the block"):
        patching.get_act_patch_resid_mid(bridge, CORRUPTED, bridge.run_with_cache(CLEAN)[1], metric)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "granite"])
def test_direct_paths(family: str) -> None:
    bridge = TransformerBridge(make_family(family))
    clean, corrupted = (bridge.run_with_cache(tokens)[1] for tokens in (CLEAN, CORRUPTED))
    if "blocks.0.hook_q_input" not in bridge.hook_index:
        with pytest.raises(UnsupportedModelError, match="has no hook_q_input"):
            patching.get_act_patch_direct_path(bridge, CORRUPTED, clean, corrupted, metric, 0, 2)
        return
    found = patching.get_act_patch_direct_path(bridge, CORRUPTED, clean, corrupted, metric, 0, 2)
    bridge.set_use_attn_result(True)
    bridge.set_use_split_qkv_input(True)
    written = [bridge.run_with_cache(tokens)[1]["blocks.0.attn.hook_result"][:, :, 2] for tokens in (CLEAN, CORRUPTED)]
    expected = torch.zeros_like(found)
    for layer in (1, 2):
        for head in range(6):

            def add(tensor: Tensor, hook: Any, head: int = head) -> None:
                factor = getattr(bridge.hf_model.config, "residual_multiplier", 1.0)
                tensor[:, :, head] += (written[0] - written[1]) * factor

            logits = bridge.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{layer}.hook_q_input", add)])
            expected[layer, head] = metric(logits)
    assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("family", "component", "words"),
    [
        ("gemma2", "q", "Gemma 2 norms what all heads of a layer give together"),
        ("llama", "k", "component='k': this Llama has 6 heads and 2 of keys and values|has no hook_k_input"),
    ],
)
def test_direct_paths_that_there_are_not(family: str, component: Any, words: str) -> None:
    bridge = TransformerBridge(make_family(family))
    clean = bridge.run_with_cache(CLEAN)[1]
    with pytest.raises(UnsupportedModelError, match=words):
        patching.get_act_patch_direct_path(bridge, CORRUPTED, clean, clean, metric, 0, 2, component)
