"""Experiments on every shape of a block: each cell equals a whole hooked forward; what a family has not is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.experiments.ablation import ablation
from pellucid.experiments.activation_patching import activation_patching
from pellucid.experiments.path_patching import path_patching
from pellucid.experiments.paths import receivers_of, senders_of
from pellucid.sweep import LogitDifference
from tests.families import VOCAB, make_family

METRIC = LogitDifference(5, 9)
LENGTH = 7
BOUND = 2e-6
"""Part of the metric's size, in float32."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def ids(seed: int) -> Tensor:
    return torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def pair() -> tuple[Tensor, Tensor]:
    """Prompts that differ in two places."""
    original = ids(1)
    new = original.clone()
    new[:, [1, 4]] = ids(2)[:, [1, 4]]
    return original, new


def score(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def setting(value: Tensor, head: int | None = None, axis: int = 2) -> Callable[..., None]:
    """A hook that puts a value in, of one head alone if there is one."""

    def hook(tensor: Tensor, hook: Any) -> None:
        if head is None:
            tensor.copy_(value)
        else:
            tensor.select(axis, head).copy_(value.select(axis, head))

    return hook


def forward(bridge: TransformerBridge, tokens: Tensor, hooks: Mapping[str, Callable[..., Any]]) -> Tensor:
    return score(bridge.run_with_hooks(tokens, fwd_hooks=list(hooks.items())))


def same(found: Any, expected: Tensor, base: Tensor) -> None:
    size = float(expected.abs().max())
    assert found.values.shape == tuple(expected.shape)
    assert np.abs(found.values - expected.numpy()).max() <= BOUND * size
    assert float((expected - base).abs().max()) > 100 * BOUND * size


@pytest.mark.parametrize(
    ("name", "site", "axis"),
    [
        ("llama", "z", "head"),
        ("llama", "k", "kv_head"),
        ("gemma3", "v", "kv_head"),
        ("phi3", "attn.hook_rot_k", "kv_head"),
        ("gpt2", "k", "head"),
        ("gpt_neox", "q", "head"),
    ],
)
def test_patching_by_head(name: str, site: str, axis: str) -> None:
    bridge, (clean, corrupted) = TransformerBridge(make_family(name)), pair()
    found = activation_patching(bridge, clean, corrupted, METRIC, site, ("layer", "head"), normalize=False, rows="each")
    cfg = bridge.cfg
    heads = cfg.n_heads if axis == "head" else cfg.n_key_value_heads
    assert found.dims == ("layer", axis, "row")
    assert found.sizes[axis] == heads
    hook = site if "." in site else f"attn.hook_{site}"
    values = bridge.run_with_cache(clean)[1]
    expected = [
        forward(bridge, corrupted, {f"blocks.{layer}.{hook}": setting(values[f"blocks.{layer}.{hook}"], head)})
        for layer in range(cfg.n_layers)
        for head in range(heads)
    ]
    same(found, torch.stack(expected).unflatten(0, (cfg.n_layers, heads)), score(bridge(corrupted)))
    one = activation_patching(bridge, clean, corrupted, METRIC, site, ("layer", "pos"), heads=1, layers=[1])
    assert one.sizes["pos"] == LENGTH


def test_heads_are_the_sites_own() -> None:
    bridge, (clean, corrupted) = TransformerBridge(make_family("llama")), pair()
    with pytest.raises(InputError, match="heads: there are 2, 0 to 1; found 5"):
        activation_patching(bridge, clean, corrupted, METRIC, "k", ("layer", "head"), heads=5)


@pytest.mark.parametrize("name", ["mistral", "olmo2", "gpt_neox"])
def test_ablation_of_heads(name: str) -> None:
    bridge, tokens = TransformerBridge(make_family(name)), ids(1)
    found = ablation(bridge, tokens, METRIC, "z", ("layer", "head"), how="mean", change=False, rows="each")
    values, cfg = bridge.run_with_cache(tokens)[1], bridge.cfg
    expected = []
    for layer in range(cfg.n_layers):
        hook = f"blocks.{layer}.attn.hook_z"
        mean = values[hook].double().mean((0, 1)).float().expand(values[hook].shape)
        expected += [forward(bridge, tokens, {hook: setting(mean, head)}) for head in range(cfg.n_heads)]
    same(found, torch.stack(expected).unflatten(0, (cfg.n_layers, cfg.n_heads)), score(bridge(tokens)))


# -- path patching -----------------------------------------------------------------------------------------------------

SENDERS = ("embed", "L0.attn_out", "L0.mlp_out", "L1.attn_out", "L1.mlp_out")
SHAPES = ("llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "granite", "mpt")
"""One of each shape: sequential, with a table of positions, parallel, with four norms, with norms after alone, with
multipliers, with an MLP that adds the residual itself."""


def sent(sender: str) -> str:
    return "hook_embed" if sender == "embed" else f"blocks.{sender[1]}.hook_{sender[3:]}"


@pytest.mark.parametrize("name", SHAPES)
def test_a_path_to_the_end(name: str) -> None:
    """Straight, or through MLPs alone: a whole forward whose attentions all give what they gave in the original run."""
    bridge, (original, new) = TransformerBridge(make_family(name)), pair()
    usual, other = bridge.run_with_cache(original)[1], bridge.run_with_cache(new)[1]
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    for freeze in (True, False):
        found = path_patching(
            bridge, original, new, METRIC, list(SENDERS), "final", freeze_mlps=freeze, value="metric", rows="each"
        )
        expected = []
        for sender in SENDERS:
            hook = sent(sender)
            if freeze:
                hooks = {last: setting(usual[last] + other[hook] - usual[hook])}
            else:
                names = [f"blocks.{layer}.hook_attn_out" for layer in range(bridge.cfg.n_layers)]
                hooks = {each: setting(usual[each]) for each in names} | {hook: setting(other[hook])}
            expected.append(forward(bridge, original, hooks))
        same(found, torch.stack(expected), score(bridge(original)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_path_into_an_mlp(name: str) -> None:
    bridge, (original, new) = TransformerBridge(make_family(name)), pair()
    usual, other = bridge.run_with_cache(original)[1], bridge.run_with_cache(new)[1]
    found = path_patching(
        bridge, original, new, METRIC, list(SENDERS), "L1.mlp_in", freeze_mlps=True, value="metric", rows="each"
    )
    base, expected = score(bridge(original)), []
    parallel = bridge.cfg.parallel_attn_mlp
    bridge.set_use_hook_mlp_in(True)
    for sender in SENDERS:
        difference = other[sent(sender)] - usual[sent(sender)]
        reads = sender not in ("L1.mlp_out", *(("L1.attn_out",) if parallel else ()))
        add = {"blocks.1.hook_mlp_in": lambda tensor, hook, added=difference: tensor + added} if reads else {}
        expected.append(forward(bridge, original, add))
    same(found, torch.stack(expected), base)
    backwards = path_patching(bridge, original, new, METRIC, "L1.mlp_out", "L1.mlp_in", freeze_mlps=True)
    assert bool((backwards == 0).all())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "granite"])
def test_a_path_into_a_head(name: str) -> None:
    bridge, (original, new) = TransformerBridge(make_family(name)), pair()
    if "blocks.1.hook_k_input" not in bridge.hook_index:
        with pytest.raises(UnsupportedModelError, match="has no hook_k_input"):
            path_patching(bridge, original, new, METRIC, "embed", "L1H1.k", freeze_mlps=True)
        return
    receivers = ["L1H5.q", "L1H1.k", "L2H0.v"]
    found = path_patching(
        bridge,
        original,
        new,
        METRIC,
        ["L0H2", "L0.mlp_out"],
        receivers,
        freeze_mlps=True,
        each_receiver=True,
        value="metric",
        rows="each",
    )
    bridge.set_use_attn_result(True)
    bridge.set_use_split_qkv_input(True)
    usual, other = bridge.run_with_cache(original)[1], bridge.run_with_cache(new)[1]
    expected = []
    for sender, head in (("attn.hook_result", 2), ("hook_mlp_out", None)):
        difference = other[f"blocks.0.{sender}"] - usual[f"blocks.0.{sender}"]
        if head is not None:  # a part of what the projection gives, which Granite multiplies
            difference = difference[:, :, head] * getattr(bridge.hf_model.config, "residual_multiplier", 1.0)
        for receiver in receivers:

            def add(tensor: Tensor, hook: Any, to: int = int(receiver[3]), added: Tensor = difference) -> None:
                tensor[:, :, to] += added

            expected.append(forward(bridge, original, {f"blocks.{receiver[1]}.hook_{receiver[-1]}_input": add}))
    same(found, torch.stack(expected).unflatten(0, (2, 3)), score(bridge(original)))


def test_heads_of_receivers_and_places_follow_the_block() -> None:
    names = receivers_of(3, 6, 2)
    assert "L1H5.q" in names
    assert "L1H1.k" in names
    assert "L1H2.k" not in names
    for parallel in (False, True):
        sender, receiver = senders_of(3, 6, parallel)["L1.attn_out"], receivers_of(3, 6, 2, parallel)["L1.mlp_in"]
        assert receiver.comes_after(sender) is not parallel
        assert receivers_of(3, 6, 2, parallel)["L2H0.q"].comes_after(sender)


@pytest.mark.parametrize(
    ("name", "senders", "receivers", "words"),
    [
        ("gemma2", "L1H0", "final", "Gemma 2 norms what all heads of a layer give together"),
        ("olmo2", "L*H*", "final", "OLMo 2 norms what all heads of a layer give together"),
        ("olmo2", "embed", "L1.mlp_in", "OLMo 2 has no hook_mlp_in"),
    ],
)
def test_ends_that_a_family_has_not_are_refused(name: str, senders: str, receivers: str, words: str) -> None:
    bridge, (original, new) = TransformerBridge(make_family(name)), pair()
    with pytest.raises(UnsupportedModelError, match=words):
        path_patching(bridge, original, new, METRIC, senders, receivers, freeze_mlps=True)


def test_no_residual_between_parallel_branches() -> None:
    bridge, (clean, corrupted) = TransformerBridge(make_family("gpt_neox")), pair()
    with pytest.raises(UnsupportedModelError, match="Attention and MLP of GPT-NeoX .* both read what enters the block"):
        activation_patching(bridge, clean, corrupted, METRIC, "resid_mid")
