"""An MLP that Hugging Face computes; its points are inputs and outputs of its projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site
from pellucid.model_bridge.generalized_components.mlp_weights import MLPWeights


class HuggingFaceMLPBridge(MLPWeights):
    """Stands for an MLP whose forward runs as Hugging Face wrote it.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        submodules: ``in`` and ``out``, in a gated MLP ``gate`` too, or ``gate_up`` in the place of ``gate`` and ``in``.
        input_is_stream: whether it is given the residual stream itself (OLMo 2 has no norm before it), so that an edit of it
            is written into the stream.
    """

    runs_original = True

    hook_pre_linear = Site("what the activated gate is multiplied with, ``[batch, pos, d_mlp]``")

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        submodules: Mapping[str, GeneralizedComponent] | None = None,
        input_is_stream: bool = False,
    ) -> None:
        super().__init__(name, config, submodules)
        self.input_is_stream = input_is_stream
        if "gate_up" in self.submodules:
            self.link("hook_pre", self._child("gate_up"), "hook_pre")
            self.link("hook_pre_linear", self._child("gate_up"), "hook_pre_linear")
        elif "gate" in self.submodules:
            self.link("hook_pre", self._child("gate"), "hook_out")
            self.link("hook_pre_linear", self._child("in"), "hook_out")
        else:
            self.link("hook_pre", self._child("in"), "hook_out")
        self.link("hook_post", self._child("out"), "hook_in")
        self.link("hook_mlp_out", self._child("out"), "hook_out")
        self.link("hook_out", self._child("out"), "hook_out")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's arguments to Hugging Face's output."""
        original = self.original()
        if self.input_is_stream:
            self.fire_into("hook_in", hidden_states)
        else:
            hidden_states = self.fire("hook_in", hidden_states)
        return original(hidden_states, *args, **kwargs)
