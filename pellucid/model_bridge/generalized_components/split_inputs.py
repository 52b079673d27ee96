"""Inputs that feed one of queries, keys and values, or one head of it: copies that Hugging Face does not have.

A projection computes as it would. Beside it, the part of it that an edited copy feeds is computed again, and takes the
place of Hugging Face's numbers in the rows (of one head) that were changed; all others keep their bits. Upstream comes
first: the residual before the block's first norm, one copy a head, then what the norm gives. An edit downstream of another
adds what it alone would have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pellucid.conversion_utils.fused_qkv import PARTS, Part
from pellucid.errors import NotSetUpError
from pellucid.hook_values import bits_differ
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, splice

PRE_NORM: ContextVar[tuple[Tensor, Callable[[Tensor], Tensor]] | None] = ContextVar("pellucid_pre_norm", default=None)
"""The residual before the block's first norm, and that norm of any copy of it: what the per-head inputs are copies of."""

INPUT_SITE: Mapping[Part, str] = {part: f"hook_{part}_in" for part in PARTS}
PER_HEAD_SITE: Mapping[Part, str] = {part: f"hook_{part}_input" for part in PARTS}
PER_HEAD_SITES = ("hook_attn_in", *PER_HEAD_SITE.values())
INPUT_SITES = (*PER_HEAD_SITES, *INPUT_SITE.values())
"""Sites on inputs that feed one of queries, keys and values, or one head."""

HeadInputs: TypeAlias = "tuple[Tensor, Tensor]"
"""The edited residual ``[batch, pos, heads, d_model]`` and which ``[batch, pos, heads]`` of it were changed."""


@dataclass(frozen=True)
class PartAgain:
    """How one of queries, keys and values is computed a second time.

    Attributes:
        heads: how many it has.
        project: ``[batch, pos, d_model]`` to ``[batch, pos, heads, d_head]``: the layer is called again, and draws the same
            random numbers.
        plain: weight ``[heads, d_head, d_model]`` and bias ``[heads, d_head]`` of a layer that is nothing but those; else
            ``None``, and the layer is called.
    """

    heads: int
    project: Callable[[Tensor], Tensor]
    plain: Callable[[], tuple[Tensor, Tensor | None] | None]


def fire_per_head(component: GeneralizedComponent, site: str, heads: int) -> HeadInputs | None:
    """Fire a per-head input; ``None`` when nothing acts there, or only looks.

    Raises:
        NotSetUpError: the component is alone, outside a block.
    """
    if not component.is_live(site):
        return None
    source = PRE_NORM.get()
    if source is None:
        raise NotSetUpError(
            f"{site} holds the residual before the block's norm, which {component.path} on its own never sees. "
            "Hook it on a block or a bridge."
        )
    residual = source[0][:, :, None, :]
    looks = component.only_reads(site)
    edited = component.fire(site, residual.repeat(1, 1, heads, 1))
    return None if looks else (edited, bits_differ(edited, residual.expand_as(edited)).any(-1))


def fire_all_per_head(component: GeneralizedComponent, heads: Mapping[Part, int]) -> Mapping[Part, list[HeadInputs]]:
    """Fire the per-head inputs of an attention: for each part what hooks made of the residual, upstream first.

    Args:
        component: the attention.
        heads: how many each part has.
    """
    shared = fire_per_head(component, "hook_attn_in", heads["q"])
    own = {part: fire_per_head(component, PER_HEAD_SITE[part], heads[part]) for part in PARTS}
    return {part: [given for given in (shared, own[part]) if given is not None] for part in PARTS}


def with_head_inputs(part: PartAgain, native: Tensor, inputs: list[HeadInputs]) -> Tensor:
    """One part, computed again for the heads whose copy of the residual a hook changed."""
    for edited_bqnm, changed_bqn in inputs:
        if changed_bqn.any() or edited_bqnm.requires_grad:
            native = splice(native, _project_per_head(part, edited_bqnm), changed_bqn[..., None])
    return native


def with_own_input(
    component: GeneralizedComponent, site: str, part: PartAgain, plain: Tensor, native: Tensor, hidden_states: Tensor
) -> Tensor:
    """Fire the input that feeds one part alone; the part, computed again where a hook changed it.

    ``native`` differs from ``plain`` where a head's copy of the residual was edited; that edit stays.
    """
    if component.only_reads(site):
        component.fire(site, hidden_states)
        return native
    edited = component.fire(site, hidden_states, copy_before_edit=True)
    changed = bits_differ(edited, hidden_states).any(-1)[..., None, None]
    if changed.any() or edited.requires_grad:
        side = part.project(edited)
        native = splice(native, side if native is plain else _both(native, plain, side), changed)
    return native


def _both(native: Tensor, plain: Tensor, side: Tensor) -> Tensor:
    """``native`` and what ``side`` adds to ``plain``: the bits of ``side`` where a head's copy was only looked at."""
    return torch.where(bits_differ(native, plain), native + (side - plain), side + (native - plain))


def _project_per_head(part: PartAgain, residual_bqnm: Tensor) -> Tensor:
    source = PRE_NORM.get()
    assert source is not None
    normed = source[1](residual_bqnm)
    weights = part.plain()
    if weights is None:
        # Adapted, quantised or offloaded: the layer is called, never read around; once a head, and its part taken.
        heads = [part.project(normed[:, :, head])[:, :, head] for head in range(part.heads)]
        return torch.stack(heads, dim=2)
    weight_nhm, bias_nh = weights
    made = torch.einsum("bqnm,nhm->bqnh", normed, weight_nhm)
    return made if bias_nh is None else made + bias_nh
