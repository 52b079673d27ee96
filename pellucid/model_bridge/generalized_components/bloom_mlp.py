"""BLOOM's MLP, step by step as Hugging Face runs it, with hook points between the steps.

Peculiar to BLOOM: the module adds the residual itself, so its output is not its contribution; the contribution is the
output of ``dense_4h_to_h`` (``hook_mlp_out``). With ``slow_but_exact`` and ``pretraining_tp > 1`` Hugging Face sums
products with slices of that weight and drops its bias, and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.errors import InputError
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, readable_parameter
from pellucid.model_bridge.generalized_components.linear import LinearBridge
from pellucid.model_bridge.generalized_components.mlp import MLPBridge


def sum_of_slices(x: Tensor, linear: nn.Linear, count: int, dtype: torch.dtype | None = None) -> Tensor:
    """``x @ weight.T`` summed over ``count`` slices of the input features, without the bias, in Hugging Face's order.

    Args:
        x: ``[batch, pos, feature]``.
        linear: the layer.
        count: how many slices.
        dtype: of the sum, by default that of ``x``. Under autocast the products are in half precision and the sum of an MLP
            is in its residual's dtype.
    """
    # One accumulator, started at zero: the order in which the slices are added fixes the bits.
    with align_module_device(linear):
        output = torch.zeros(*x.shape[:-1], linear.weight.shape[0], dtype=dtype or x.dtype, device=x.device)
        width = x.shape[-1] / count
        for index in range(count):
            part = slice(int(index * width), int((index + 1) * width))
            output = output + F.linear(x[:, :, part], linear.weight[:, part])
        return output


class BloomMLPBridge(MLPBridge):
    """Stands for a Hugging Face ``BloomMLP``.

    Args:
        name: the module's name inside its parent, ``"mlp"``.
        config: the bridge's configuration.
        submodules: ``{"in": LinearBridge("dense_h_to_4h"), "out": LinearBridge("dense_4h_to_h")}``, the default.
        conversion_rule: shape rule for ``hook_in`` and ``hook_out``.
    """

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        submodules: Mapping[str, GeneralizedComponent] | None = None,
        conversion_rule: BaseTensorConversion | None = None,
    ) -> None:
        if submodules is None:
            submodules = {"in": LinearBridge("dense_h_to_4h"), "out": LinearBridge("dense_4h_to_h")}
        super().__init__(name, config, submodules, conversion_rule)
        self._child("in").link("hook_in", self, "hook_in")
        self._child("in").link("hook_out", self, "hook_pre")
        self._child("out").link("hook_in", self, "hook_post")
        self._child("out").link("hook_out", self, "hook_mlp_out")

    def set_original_component(self, original_component: nn.Module) -> None:
        """Stand for a ``BloomMLP``, children included."""
        super().set_original_component(original_component)
        for component in self.submodules.values():
            component.set_original_component(original_component.get_submodule(str(component.name)))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(hidden_states, residual)``, by position or name, to the residual with the MLP's contribution added."""
        return self._run(*args, **kwargs)

    def _run(self, hidden_states: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if hidden_states is None or residual is None:
            missing = "hidden_states" if hidden_states is None else "residual"
            raise InputError(f"BLOOM's MLP takes hidden_states and residual; {missing} was not given.")
        mlp = self.module
        hidden_states = self.fire("hook_in", hidden_states)
        pre = self.fire("hook_pre", mlp.dense_h_to_4h(hidden_states))
        post = self.fire("hook_post", mlp.gelu_impl(pre))
        if mlp.pretraining_tp > 1 and mlp.slow_but_exact:
            contribution = sum_of_slices(post, mlp.dense_4h_to_h, mlp.pretraining_tp, residual.dtype)
        else:
            contribution = mlp.dense_4h_to_h(post)
        contribution = self.fire("hook_mlp_out", contribution)
        output = residual + F.dropout(contribution, p=mlp.hidden_dropout, training=mlp.training)
        return self.fire("hook_out", output)

    @property
    def W_in(self) -> Tensor:
        """``[d_model, d_mlp]``, a view of ``dense_h_to_4h.weight``."""
        return readable_parameter(self.module.dense_h_to_4h, "weight", f"{self.path}.dense_h_to_4h").T

    @property
    def b_in(self) -> Tensor:
        """``[d_mlp]``."""
        return readable_parameter(self.module.dense_h_to_4h, "bias", f"{self.path}.dense_h_to_4h")

    @property
    def W_out(self) -> Tensor:
        """``[d_mlp, d_model]``, a view of ``dense_4h_to_h.weight``."""
        return readable_parameter(self.module.dense_4h_to_h, "weight", f"{self.path}.dense_4h_to_h").T

    @property
    def b_out(self) -> Tensor:
        """``[d_model]``."""
        return readable_parameter(self.module.dense_4h_to_h, "bias", f"{self.path}.dense_4h_to_h")
