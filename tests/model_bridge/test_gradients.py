"""A gradient at every floating-point point, equal to a finite difference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from tests.models import make_bloom, make_pair, random_tokens
from tests.oracles.test_hook_table import TABLE, switch_on

FLOATING = [name for name, spec in TABLE.items() if spec.kind != "int"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FLOATING)
def test_equals_a_finite_difference(name: str, frozen: bool) -> None:
    bridge = TransformerBridge(make_bloom(torch.float64))
    switch_on(bridge, TABLE[name])
    bridge.hf_model.requires_grad_(not frozen)
    tokens = random_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    gradients: list[Tensor] = []

    def loss(change: Tensor | float = 0.0) -> Tensor:
        logits = bridge.run_with_hooks(
            tokens,
            attention_mask=mask,
            fwd_hooks=[(name, lambda t, hook: t + change)] if isinstance(change, Tensor) else [],
            bwd_hooks=[] if isinstance(change, Tensor) else [(name, lambda g, hook: gradients.append(g.clone()))],
        )
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return (logits * weights)[mask.bool()].sum()

    loss().backward()
    assert len(gradients) == 1
    gradient = gradients[0]
    assert torch.isfinite(gradient).all()
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if name.endswith("attn_scores"):
        future = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
        direction = direction.masked_fill(future, 0)
    step = 1e-5
    with torch.no_grad():
        difference = (loss(direction * step) - loss(-direction * step)) / (2 * step)
    analytic = (gradient * direction).sum()
    # Central difference: error of order step^2 times the third derivative, and 1e-16 / step of rounding.
    assert torch.allclose(difference, analytic, rtol=1e-6, atol=1e-6 * float(gradient.abs().max() + 1))


@pytest.mark.parametrize("name", FLOATING)
def test_backward_hooks_may_replace_the_gradient(name: str) -> None:
    bridge, _ = make_pair()
    switch_on(bridge, TABLE[name])
    tokens = random_tokens()

    def embedding_gradient(function: Any) -> Tensor:
        kept: list[Tensor] = []
        loss = bridge.run_with_hooks(
            tokens,
            return_type="loss",
            bwd_hooks=[(name, function), ("embed.hook_out", lambda g, hook: kept.append(g.clone()))],
        )
        loss.backward()
        return kept[0]

    plain = embedding_gradient(lambda g, hook: None)
    assert torch.equal(embedding_gradient(lambda g, hook: g.clone()), plain)
    doubled = embedding_gradient(lambda g, hook: g * 2)
    assert torch.equal(embedding_gradient(lambda g, hook: (g * 2,)), doubled)
    if name == "embed.hook_out":
        assert torch.allclose(doubled, plain * 2)
    else:
        assert not torch.equal(doubled, plain)


def test_incl_bwd_keeps_every_gradient() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    loss, cache = bridge.run_with_cache(tokens, incl_bwd=True)
    native = model(tokens, labels=tokens, output_hidden_states=True, output_attentions=True)
    for tensor in (*native.hidden_states[:3], *native.attentions):
        tensor.retain_grad()
    native.loss.backward()
    assert torch.allclose(loss, native.loss)
    for layer in range(3):
        assert torch.allclose(cache[f"blocks.{layer}.hook_resid_pre_grad"], native.hidden_states[layer].grad, atol=1e-6)
        assert torch.allclose(cache[f"blocks.{layer}.attn.hook_pattern_grad"], native.attentions[layer].grad, atol=1e-6)
    floating = [name for name in bridge.hook_dict if name != "embed.hook_in"]
    assert {name + "_grad" for name in floating} < set(cache)
    for name in floating:
        assert cache[name + "_grad"].shape == cache[name].shape
    assert "blocks.1.attn.o.hook_in_grad" in cache


def test_parameter_gradients_are_hugging_faces() -> None:
    bridge, model = make_pair()
    tokens = random_tokens()
    bridge.set_use_attn_result(True)
    bridge.set_use_split_qkv_input(True)
    for hooks in ([], [("*", lambda t, hook: None)]):
        bridge.zero_grad()
        model.zero_grad()
        bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss").backward()
        model(tokens, labels=tokens).loss.backward()
        for (name, ours), theirs in zip(bridge.named_parameters(), model.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


def test_a_tensor_kept_by_a_hook_is_part_of_the_graph() -> None:
    bridge, _ = make_pair()
    kept: dict[str, Tensor] = {}
    names = [name for name in bridge.hook_dict if name != "embed.hook_in"]
    loss = bridge.run_with_hooks(
        random_tokens(), fwd_hooks=[(names, lambda t, hook: kept.__setitem__(hook.name, t))], return_type="loss"
    )
    gradients = torch.autograd.grad(loss, list(kept.values()))
    assert len(gradients) == len(names)
    for name, gradient in zip(kept, gradients, strict=True):
        assert gradient.shape == kept[name].shape
        assert name == "hook_unembed" or gradient.abs().max() > 0, name


def test_backward_hooks_fire_after_the_run_and_are_gone() -> None:
    bridge, _ = make_pair()
    fired: list[int] = []
    loss = bridge.run_with_hooks(
        random_tokens(), bwd_hooks=[("hook_embed", lambda g, hook: fired.append(1))], return_type="loss"
    )
    assert not bridge.list_hooks()
    loss.backward()
    assert fired == [1]
    bridge(random_tokens(), return_type="loss").backward()
    assert fired == [1]


def test_a_wrong_gradient_is_refused() -> None:
    from pellucid.errors import HookValueError

    bridge, _ = make_pair()
    loss = bridge.run_with_hooks(
        random_tokens(), bwd_hooks=[("blocks.1.hook_attn_out", lambda g, hook: g[:, :1])], return_type="loss"
    )
    with pytest.raises(HookValueError, match=r"backward hook.*blocks\.1\.hook_attn_out"):
        loss.backward()
