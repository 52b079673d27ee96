"""What every attention has in common: the hook points between its steps, and its weights per head."""

from __future__ import annotations

from pellucid.hook_points import HookPoint
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site


class AttentionBridge(GeneralizedComponent):
    """The hook points of a multi-head attention; subclasses run it.

    Axis letters in comments: ``b`` batch, ``q`` query position, ``k`` key position, ``n`` head, ``h`` d_head,
    ``m`` d_model.
    """

    runs_original = False
    widens = True

    hook_q = Site("queries, ``[batch, pos, n_heads, d_head]``")
    hook_k = Site("keys of the new positions")
    hook_v = Site("values of the new positions")
    hook_attn_scores = Site("scaled, biased and masked, before the softmax, ``[batch, n_heads, pos, key_pos]``")
    hook_pattern = Site("after the softmax, in the model's dtype; in training mode after dropout")
    hook_z = Site("pattern times values, ``[batch, pos, n_heads, d_head]``")
    hook_result = Site("each head's contribution, without b_O, ``[batch, pos, n_heads, d_model]`` (opt-in)")
    hook_attn_out = Site("the additive contribution, before the residual is added")
    hook_q_in = Site("a copy of the input that feeds the queries only (``q.hook_in``)")
    hook_k_in = Site("a copy of the input that feeds the keys only")
    hook_v_in = Site("a copy of the input that feeds the values only")
    hook_attn_in = Site("the residual before the norm, one copy a head, for all three (opt-in)")
    hook_q_input = Site("the residual before the norm, one copy a head, for the queries (opt-in)")
    hook_k_input = Site("the residual before the norm, one copy a head, for the keys (opt-in)")
    hook_v_input = Site("the residual before the norm, one copy a head, for the values (opt-in)")

    @property
    def hook_hidden_states(self) -> HookPoint:
        """The same point as ``hook_out``."""
        return self.hook_out
