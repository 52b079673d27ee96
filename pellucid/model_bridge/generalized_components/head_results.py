"""What each head writes to the residual stream, of any output projection: the projection of one head's values alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pellucid.hook_values import bits_differ
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, plain_weight, splice
from pellucid.model_bridge.generalized_components.random_numbers import Draws
from pellucid.run_context import hooks_suppressed

Project = Callable[[Tensor], Tensor]
"""The output projection: ``[batch, pos, n_heads * d_head]`` to ``[batch, pos, d_model]``."""


def bias_of(project: Project, z: Tensor, draws: Draws) -> Tensor:
    """``[1, 1, d_model]``: what the projection adds to whatever it is given."""
    with draws.again():
        return hooks_suppressed(project, torch.zeros_like(z[:1, :1].flatten(-2)))


def head_results(layer: nn.Module, project: Project, z: Tensor, draws: Draws) -> Tensor:
    """Each head's contribution without b_O, ``[batch, pos, n_heads, d_model]``.

    Args:
        layer: the projection's module, whose weight is read where it is a plain one.
        project: calls it.
        z: ``[batch, pos, n_heads, d_head]``.
        draws: where the generators stood before the layer was called.
    """
    n_heads = z.shape[2]
    if plain_weight(layer, nn.Linear):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return torch.einsum("bqnh,mnh->bqnm", z, weight.unflatten(1, (n_heads, -1)))
    # Conv1D, adapted, quantised or offloaded: it is called with one head at a time.
    bias = bias_of(project, z, draws)
    none = torch.zeros_like(z)
    heads = []
    for head in range(n_heads):
        only = none.clone()
        only[:, :, head] = z[:, :, head]
        with draws.again():
            heads.append(project(only.flatten(-2)) - bias)
    return torch.stack(heads, dim=2)


def with_results(
    component: GeneralizedComponent, layer: nn.Module, project: Project, z: Tensor, native: Tensor, draws: Draws
) -> Tensor:
    """Fire ``hook_result`` of ``component``; ``native`` is the projection's own output, kept where nothing was changed."""
    result = head_results(layer, project, z, draws)
    looks = component.only_reads("hook_result")
    edited = component.fire("hook_result", result, copy_before_edit=True)
    if looks:
        return native
    changed = bits_differ(edited, result).flatten(-2).any(-1, keepdim=True)
    return splice(native, edited.sum(dim=-2) + bias_of(project, z, draws), changed)
