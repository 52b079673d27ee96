"""An MLP's weights: writable views of the projections' own parameters, whichever way they are kept."""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor

from pellucid.model_bridge.generalized_components.linear import FusedLinearBridge, LinearBridge
from pellucid.model_bridge.generalized_components.mlp import MLPBridge
from pellucid.model_bridge.generalized_components.weight_writes import WeightTargets

Part = Literal["in", "gate", "out"]


class MLPWeights(MLPBridge):
    """The weights of an MLP with children ``in``, ``out`` and perhaps ``gate``, or ``gate_up``; a subclass runs it."""

    def _weight(self, part: Part) -> Tensor:
        if part != "out" and "gate_up" in self.submodules:
            return cast(FusedLinearBridge, self._child("gate_up")).weights_of_parts()[part]
        return self._linear(part).W

    def _bias(self, part: Part) -> Tensor:
        if part != "out" and "gate_up" in self.submodules:
            return cast(FusedLinearBridge, self._child("gate_up")).biases_of_parts()[part]
        return self._linear(part).b

    def _linear(self, part: Part) -> LinearBridge:
        return cast(LinearBridge, self._child(part))

    @property
    def W_in(self) -> Tensor:
        """``[d_model, d_mlp]``, a writable view; in a gated MLP, of what the activated gate is multiplied with."""
        return self._weight("in")

    @property
    def _is_gated(self) -> bool:
        return "gate" in self.submodules or "gate_up" in self.submodules

    @property
    def W_gate(self) -> Tensor | None:
        """``[d_model, d_mlp]``, a writable view of the projection that is activated; ``None`` without a gate."""
        return self._weight("gate") if self._is_gated else None

    @property
    def W_out(self) -> Tensor:
        """``[d_mlp, d_model]``, a writable view."""
        return self._weight("out")

    @property
    def b_in(self) -> Tensor:
        """``[d_mlp]``; zeros of their own where the projection has no bias."""
        return self._bias("in")

    @property
    def b_gate(self) -> Tensor | None:
        """``[d_mlp]``; zeros of their own where the projection has no bias; ``None`` without a gate."""
        return self._bias("gate") if self._is_gated else None

    @property
    def b_out(self) -> Tensor:
        """``[d_model]``; zeros of their own where the projection has no bias."""
        return self._bias("out")

    def weight_targets(self) -> dict[str, WeightTargets]:
        """``in.weight`` ``[d_mlp, d_model]``, ``gate...`` where there is one, ``out...``, fused or not."""
        return {key.removeprefix("gate_up."): targets for key, targets in super().weight_targets().items()}
