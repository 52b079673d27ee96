"""An MLP of two linear maps and an activation between them."""

from __future__ import annotations

from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site


class MLPBridge(GeneralizedComponent):
    """The hook points and weights of an MLP with children ``in`` and ``out``; subclasses run it."""

    runs_original = False

    hook_pre = Site("before the activation, ``[batch, pos, d_mlp]``")
    hook_post = Site("after the activation: the neurons, ``[batch, pos, d_mlp]``")
    hook_mlp_out = Site("the additive contribution, before the residual is added")

    def _child(self, key: str) -> GeneralizedComponent:
        return self.submodules[key]
