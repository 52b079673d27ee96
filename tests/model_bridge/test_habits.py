"""Habits from TransformerLens and of a newcomer's first hour: filters for gradients, a cache made by hand, an estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import ActivationCache, TransformerBridge
from pellucid.errors import GradientError, InputError
from tests.models import make_pair, random_tokens


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return make_pair()[0]


@pytest.mark.parametrize(
    "names_filter",
    ["*", lambda name: True, True, "*hook_in", ["*", "hook_embed"]],
    ids=["all", "predicate", "True", "glob", "list"],
)
def test_filters_of_backward_hooks_mean_points_with_a_gradient(bridge: TransformerBridge, names_filter: Any) -> None:
    tokens = random_tokens()
    expected = [
        name
        for name in bridge.hook_dict
        if name != "embed.hook_in" and (names_filter != "*hook_in" or _matches(bridge, name))
    ]
    with bridge.hooks(bwd_hooks=[(names_filter, lambda gradient, hook: None)]):
        attached = {str(handle.point.name) for handle in bridge.live_hooks()}
    assert attached == set(expected)
    bridge.add_hook(names_filter, lambda gradient, hook: None, dir="bwd")
    assert "embed.hook_in" not in bridge.list_hooks()
    bridge.reset_hooks()
    fired: list[str] = []

    def note(gradient: Tensor, hook: Any) -> None:
        fired.append(hook.name)

    bridge.run_with_hooks(tokens, bwd_hooks=[(names_filter, note)], return_type="loss").backward()
    assert fired


def _matches(bridge: TransformerBridge, name: str) -> bool:
    return any(one.endswith("hook_in") for one in (name, *bridge.hook_spec(name).aliases))


@pytest.mark.parametrize("named", ["embed.hook_in", ["hook_embed", "embed.hook_in"], "embed.hook_i?"])
def test_ids_that_are_named_have_no_gradient(bridge: TransformerBridge, named: Any) -> None:
    with pytest.raises(GradientError, match=r"embed\.hook_in holds token ids"):
        bridge.run_with_hooks(random_tokens(), bwd_hooks=[(named, lambda gradient, hook: None)])


def test_forward_hooks_of_true_are_on_every_point(bridge: TransformerBridge) -> None:
    seen: list[str] = []
    bridge.run_with_hooks(random_tokens(), fwd_hooks=[(True, lambda tensor, hook: seen.append(hook.name))])  # type: ignore[list-item]
    assert sorted(seen) == sorted(bridge.hook_dict)


def test_a_cache_made_by_hand(bridge: TransformerBridge) -> None:
    tokens = random_tokens()
    _, cache = bridge.run_with_cache(tokens)
    ours = ActivationCache(dict(cache), bridge)
    assert torch.equal(ours["pattern", 1], cache["pattern", 1])
    assert list(ours) == list(cache)
    other = ActivationCache({"blocks.0.hook_in": cache["resid_pre", 0]}, bridge, tokens=tokens)
    assert list(other) == ["blocks.0.hook_resid_pre"]
    assert torch.equal(other["resid_pre", 0], other["blocks.0.hook_in"])
    assert torch.equal(other.real, torch.ones_like(tokens, dtype=torch.bool))
    assert other.model is bridge
    alone = ActivationCache({"hook_embed": cache["hook_embed"][0]}, bridge, False)  # TransformerLens' third argument
    assert not alone.has_batch_dim
    with pytest.raises(InputError, match="has_batch_dim is True or False; found tensor"):
        ActivationCache({}, bridge, tokens)  # type: ignore[arg-type]


def test_an_estimate_reads_well(bridge: TransformerBridge) -> None:
    plan = bridge.estimate_cache(random_tokens())
    assert plan.total == sum(plan.values()) == bridge.run_with_cache(random_tokens())[1].nbytes
    name, size = plan.largest(1)[0]
    assert size == max(plan.values()) == plan[name]
    lines = str(plan).splitlines()
    assert lines[0] == f"{plan.total / 1024:.3g} KiB in {len(plan)} entries"
    assert len(lines) == 7
    assert name in lines[1]
    assert lines[-1] == f"  and {len(plan) - 5} more"
    one = bridge.estimate_cache(random_tokens(1, 1), "hook_embed")
    assert str(one) == "192 B in 1 entries\n       192 B  hook_embed"
    with pytest.raises(InputError, match="count must be at least 1"):
        plan.largest(0)
