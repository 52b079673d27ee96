"""A norm by root mean square: no mean is subtracted, and there is no bias. Llama's, and Gemma's, whose gain is 1 +
weight; Cohere's subtracts the mean all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.model_bridge.generalized_components.hf_code import in_float64
from pellucid.model_bridge.generalized_components.normalization import InputIs, NormalizationBridge, Role
from pellucid.run_context import hooks_suppressed


class RMSNormalizationBridge(NormalizationBridge):
    """Stands for an RMS norm over ``d_model``.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        conversion_rule: shape rule for ``hook_in`` and ``hook_out``.
        role: see :class:`NormalizationBridge`.
        input_is: see :data:`~pellucid.model_bridge.generalized_components.normalization.InputIs`.
        adds_one: whether the gain is 1 + weight (Gemma).
        rounds_first: whether the normalised input is rounded to the model's dtype before the gain (Llama) or after it.
    """

    widens = True
    centres: ClassVar[bool] = False

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        conversion_rule: BaseTensorConversion | None = None,
        role: Role = "block",
        input_is: InputIs = "own",
        adds_one: bool = False,
        rounds_first: bool = True,
    ) -> None:
        super().__init__(name, config, conversion_rule, role, input_is)
        self.adds_one, self.rounds_first = adds_one, rounds_first

    @property
    def unit_weight(self) -> float:
        """See :attr:`NormalizationBridge.unit_weight`."""
        return 0.0 if self.adds_one else 1.0

    def gain(self) -> Tensor:
        """See :meth:`NormalizationBridge.gain`; 1 + weight is in float64, which rounds nothing away."""
        weight: Tensor = self.module.weight.detach()
        return 1.0 + weight.double() if self.adds_one else weight

    def original(self) -> Callable[..., Any]:
        """See :meth:`GeneralizedComponent.original`; Hugging Face's code in float64 throughout for a float64 model."""
        return in_float64(super().original(), self.module)

    def again(self, hidden_states: Tensor) -> Tensor:
        """See :meth:`NormalizationBridge.again`."""
        if hidden_states.dtype is not torch.float64:
            return super().again(hidden_states)
        return hooks_suppressed(self.original(), hidden_states)  # type: ignore[no-any-return]

    def _with_inside(self, x: Tensor, native: Tensor) -> Tensor:
        """See :meth:`NormalizationBridge._with_inside`."""
        module = self.module
        eps = vars(module).get("variance_epsilon", vars(module).get("eps"))
        reads = self.only_reads("hook_scale", "hook_normalized")
        wide = x.detach() if reads else x
        wide = self._centred(wide if wide.dtype is torch.float64 else wide.float())
        variance = wide.pow(2).mean(-1, keepdim=True) + eps
        scale, normalized = variance.sqrt(), wide * torch.rsqrt(variance)
        if reads:
            self.fire("hook_scale", scale)
            self.fire("hook_normalized", normalized)
            return native
        return self._with_edits(native, wide, scale, normalized, x.dtype)

    def _centred(self, wide: Tensor) -> Tensor:
        """What is divided by the scale."""
        return wide

    def _affine(self, normalized: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`NormalizationBridge._affine`; gains differ in where they round."""
        module = self.module
        with align_module_device(module):  # see NormalizationBridge
            gain: Tensor = module.weight
            if self.adds_one:
                gain = 1.0 + (gain if dtype is torch.float64 else gain.float())
            return gain * normalized.to(dtype) if self.rounds_first else (normalized * gain).to(dtype)


class CentredNormalizationBridge(RMSNormalizationBridge):
    """Stands for a norm that subtracts the mean and has no bias (Cohere's class)."""

    centres: ClassVar[bool] = True

    def _centred(self, wide: Tensor) -> Tensor:
        """See :meth:`RMSNormalizationBridge._centred`."""
        return wide - wide.mean(-1, keepdim=True)
