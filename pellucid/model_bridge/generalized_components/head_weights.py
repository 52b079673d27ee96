"""An attention's weights by head: writable views of the projections' own parameters, whichever way they are kept.

A projection may be one of three or a part of a fused one, ``[out, in]`` or ``[in, out]`` (``Conv1D``); the projections'
components know that. Here their outputs are seen as heads.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor

from pellucid.model_bridge.generalized_components.attention import AttentionBridge
from pellucid.model_bridge.generalized_components.linear import FusedLinearBridge, LinearBridge
from pellucid.model_bridge.generalized_components.weight_writes import WeightTargets

Part = Literal["q", "k", "v"]


class HeadWeights(AttentionBridge):
    """The weights of an attention with children ``q``, ``k``, ``v`` or ``qkv``, and ``o``; a subclass runs it.

    Its configuration has ``n_heads`` and ``n_key_value_heads``.
    """

    config: Any

    def _projection(self, part: Part | Literal["o"]) -> LinearBridge:
        return cast(LinearBridge, self.submodules[part])

    def _heads(self, part: Part) -> int:
        return int(self.config.n_heads if part == "q" else self.config.n_key_value_heads)

    def _weight(self, part: Part) -> Tensor:
        """``[heads, d_model, d_head]``."""
        if "qkv" in self.submodules:
            return cast(FusedLinearBridge, self.submodules["qkv"]).weights_of_parts()[part].transpose(0, 1)
        by_head: Tensor = self._projection(part).W.unflatten(-1, (self._heads(part), -1))
        return by_head.transpose(0, 1)

    def _bias(self, part: Part) -> Tensor:
        """``[heads, d_head]``."""
        if "qkv" in self.submodules:
            return cast(FusedLinearBridge, self.submodules["qkv"]).biases_of_parts()[part]
        by_head: Tensor = self._projection(part).b.unflatten(0, (self._heads(part), -1))
        return by_head

    @property
    def W_Q(self) -> Tensor:
        """``[n_heads, d_model, d_head]``, a writable view of the model's own parameter."""
        return self._weight("q")

    @property
    def W_K(self) -> Tensor:
        """``[n_key_value_heads, d_model, d_head]``, a writable view of the model's own parameter."""
        return self._weight("k")

    @property
    def W_V(self) -> Tensor:
        """``[n_key_value_heads, d_model, d_head]``, a writable view of the model's own parameter."""
        return self._weight("v")

    @property
    def W_O(self) -> Tensor:
        """``[n_heads, d_head, d_model]``, a writable view of the model's own parameter."""
        by_head: Tensor = self._projection("o").W.unflatten(0, (self._heads("q"), -1))
        return by_head

    @property
    def b_Q(self) -> Tensor:
        """``[n_heads, d_head]``, a writable view; zeros of their own where the projection has no bias."""
        return self._bias("q")

    @property
    def b_K(self) -> Tensor:
        """``[n_key_value_heads, d_head]``, a writable view; zeros of their own where the projection has no bias."""
        return self._bias("k")

    @property
    def b_V(self) -> Tensor:
        """``[n_key_value_heads, d_head]``, a writable view; zeros of their own where the projection has no bias."""
        return self._bias("v")

    @property
    def b_O(self) -> Tensor:
        """``[d_model]``; zeros of their own where the projection has no bias."""
        return self._projection("o").b

    def weight_targets(self) -> dict[str, WeightTargets]:
        """``q.weight`` ``[n_heads * d_head, d_model]``, ``k...``, ``v...``, ``o...``, fused or not; what norms there are."""
        return {key.removeprefix("qkv."): targets for key, targets in super().weight_targets().items()}
