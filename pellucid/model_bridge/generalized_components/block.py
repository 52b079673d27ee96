"""A transformer block: residual in, residual out."""

from __future__ import annotations

from pellucid.hook_points import HookPoint
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site
from pellucid.tables import ranges


class Blocks(list[GeneralizedComponent]):
    """The blocks of a model, shown as one: they have the same hook points."""

    def __repr__(self) -> str:
        first = f"; the first:\n{self[0]!r}" if self else ""
        return f"{len(self)} blocks, {ranges(set(range(len(self))))}{first}"

    def _repr_html_(self) -> str:
        return f"<div>{len(self)} blocks; the first:</div>" + (self[0]._repr_html_() if self else "")


class BlockBridge(GeneralizedComponent):
    """The hook points of a block, under TransformerLens' names; its branches' points are linked here."""

    hook_attn_in = Site("``attn.hook_attn_in``")
    hook_q_input = Site("``attn.hook_q_input``")
    hook_k_input = Site("``attn.hook_k_input``")
    hook_v_input = Site("``attn.hook_v_input``")
    hook_attn_out = Site("``attn.hook_attn_out``")
    hook_resid_mid = Site("the residual between attention and MLP; feeds both the MLP branch and the stream")
    hook_mlp_in = Site("a copy of ``hook_resid_mid`` that feeds the MLP branch only (opt-in)")
    hook_mlp_out = Site("``mlp.hook_mlp_out``")

    @property
    def hook_resid_pre(self) -> HookPoint:
        """The residual that enters the block: ``hook_in``."""
        return self.hook_in

    @property
    def hook_resid_post(self) -> HookPoint:
        """The residual that leaves the block: ``hook_out``."""
        return self.hook_out
