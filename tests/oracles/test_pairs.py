"""Two points at once: an edit at one and a backward hook at another, for every pair in a block, gradients on.

Points can share storage (queries, keys and values are parts of one tensor) and tensors (one block's output is the next
one's input). Whatever they share, an edit in place is the edit returned, a backward hook fires once, and what it is given
is the gradient: held against central differences in float64, made with forward edits alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import make_pair, random_tokens

TOKENS = random_tokens(2, 5)
WEIGHTS = torch.randn(2, 5, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def points() -> list[str]:
    bridge, _ = make_pair(n_layer=2)
    inside = ["hook_embed", "blocks.1.hook_resid_pre", "ln_final.hook_out"]
    return inside + [name for name in bridge.hook_dict if name.startswith("blocks.0.")]


POINTS = points()


def returned(tensor: Tensor, hook: Any) -> Tensor:
    return tensor * 1.01


def in_place(tensor: Tensor, hook: Any) -> None:
    tensor.mul_(1.01)


def loss_of(logits: Tensor) -> Tensor:
    return (logits * WEIGHTS.to(logits.dtype)).sum()


@pytest.mark.parametrize("edited", POINTS)
def test_an_edit_in_place_and_a_backward_hook_elsewhere(edited: str) -> None:
    bridge, _ = make_pair(n_layer=2)
    for watched in POINTS:
        found = []
        for style in (returned, in_place):
            seen: list[Tensor] = []
            logits = bridge.run_with_hooks(
                TOKENS,
                fwd_hooks=[(edited, style)],
                bwd_hooks=[(watched, lambda gradient, hook, seen=seen: seen.append(gradient.clone()))],
            )
            loss_of(logits).backward()
            assert len(seen) == 1, (
                f"{style.__name__} at {edited}: the backward hook at {watched} fired {len(seen)} times"
            )
            found.append((logits, seen[0]))
        assert torch.equal(found[0][0], found[1][0]), f"logits, {edited} and {watched}"
        assert torch.equal(found[0][1], found[1][1]), f"gradient, {edited} and {watched}"


@pytest.mark.parametrize("edited", POINTS)
def test_every_gradient_is_kept_beside_an_edit_in_place(edited: str) -> None:
    bridge, _ = make_pair(n_layer=2)
    kept = []
    for style in (returned, in_place):
        with bridge.hooks([(edited, style)]):
            _, cache = bridge.run_with_cache(TOKENS, names_filter=POINTS, incl_bwd=True)
        assert set(cache) == {*POINTS, *(f"{name}_grad" for name in POINTS)}
        kept.append(cache)
    for name in kept[0]:
        assert torch.equal(kept[0][name], kept[1][name]), name


ATTENTION = ["blocks.0.attn.hook_q", "blocks.0.attn.hook_k", "blocks.0.attn.hook_v"]


@pytest.mark.parametrize("style", [returned, in_place])
@pytest.mark.parametrize("watched", [*ATTENTION, "blocks.0.attn.hook_pattern", "blocks.0.hook_resid_pre"])
@pytest.mark.parametrize("edited", [*ATTENTION, "blocks.0.attn.hook_z", "blocks.0.hook_resid_mid"])
def test_the_gradient_beside_an_edit_is_the_slope(edited: str, watched: str, style: Any) -> None:
    bridge, _ = make_pair(torch.float64, n_layer=2)
    seen: list[Tensor] = []
    logits = bridge.run_with_hooks(
        TOKENS, fwd_hooks=[(edited, style)], bwd_hooks=[(watched, lambda g, hook: seen.append(g.clone()))]
    )
    loss_of(logits).backward()
    (gradient,) = seen
    direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    losses = []
    for step in (1e-5, -1e-5):
        # The gradient is with respect to what the point passes on, after the edit where it is the same point.
        hooks = [(edited, returned), (watched, lambda tensor, hook, step=step: tensor + step * direction)]
        losses.append(float(loss_of(bridge.run_with_hooks(TOKENS, fwd_hooks=hooks)).detach()))
    slope = (losses[0] - losses[1]) / 2e-5
    # Central differences: an error of the order of the step squared, and rounding of the loss over the step.
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-6)
