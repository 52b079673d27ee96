"""A norm, with its inside: the scale it divides by and what is left before gain and bias.

Hugging Face gives neither, so they are computed beside it, in float32 at least (float16 would overflow in the square), and
take its place only in the rows where a hook changed them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.errors import WeightError
from pellucid.hook_values import bits_differ
from pellucid.model_bridge.generalized_components.base import (
    GeneralizedComponent,
    Site,
    StopForward,
    readable_parameter,
    splice,
    with_gradient_of,
)
from pellucid.run_context import current_span, hooks_suppressed

Role = Literal["embedding", "block", "final"]

InputIs = Literal["own", "stream", "copy"]
"""What a norm is given: a tensor that nothing else reads; the residual stream, to which Hugging Face's block adds
afterwards, so that an edit of it is written into the stream; or the stream as one branch of a parallel block reads it, so
that an edit is that branch's alone."""


class NormalizationBridge(GeneralizedComponent):
    """Stands for an ``nn.LayerNorm`` over ``d_model``.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        conversion_rule: shape rule for ``hook_in`` and ``hook_out``.
        role: where in the model it stands. The embedding's norm is passed by when a run starts at a later layer, the
            final one ends a run that stops before it.
        input_is: see :data:`InputIs`.
    """

    centres: ClassVar[bool] = True
    """Whether it subtracts the mean, so that its input's does not count."""

    hook_branch_in = Site("a copy of the residual that feeds this norm only (``hook_mlp_in``)")
    hook_scale = Site("sqrt(variance + eps), ``[batch, pos, 1]``")
    hook_normalized = Site("(x - mean) / scale, before gain and bias")

    def __init__(
        self,
        name: str | None,
        config: Any | None = None,
        conversion_rule: BaseTensorConversion | None = None,
        role: Role = "block",
        input_is: InputIs = "own",
    ) -> None:
        super().__init__(name, config, conversion_rule=conversion_rule)
        self.role, self.input_is = role, input_is

    @property
    def unit_weight(self) -> float:
        """The weight with which it only normalises."""
        return 1.0

    @property
    def w(self) -> Tensor:
        """``[d_model]``: TransformerLens' name of the weight (of Gemma's, what 1 is added to; see :meth:`gain`)."""
        return readable_parameter(self.module, "weight", self.path)

    @property
    def b(self) -> Tensor:
        """``[d_model]``: TransformerLens' name of the bias.

        Raises:
            AttributeError: the norm has none.
        """
        if getattr(self.module, "bias", None) is None:
            raise AttributeError(f"{self.path} has no bias, b: it is a norm without one.")
        return readable_parameter(self.module, "bias", self.path)

    def gain(self) -> Tensor:
        """``[d_model]``: what the normalised input is multiplied with; the weight itself, or computed from it."""
        weight: Tensor = self.module.weight.detach()
        return weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[batch, pos, d_model]`` to the same shape, gain and bias applied."""
        span = current_span()
        if self.role == "embedding" and span.start is not None:
            return hidden_states  # already a residual
        if self.role == "final" and self.config is not None:
            if span.start == self.config.n_layers and span.residual is not None:
                hidden_states = span.residual.to(hidden_states.device)
            if span.stop == self.config.n_layers:
                raise StopForward(hidden_states)
        original = self.original()
        if self.input_is == "stream":
            self.fire_into("hook_in", hidden_states)
            x = hidden_states
        else:
            x = self.fire("hook_in", hidden_states, copy_before_edit=self.input_is == "copy")
        x = self.fire("hook_branch_in", x, copy_before_edit=True)
        output: Tensor = original(x)
        if self.is_live("hook_scale", "hook_normalized"):
            output = self._with_inside(x, output)
        return self.fire("hook_out", output)

    def again(self, hidden_states: Tensor) -> Tensor:
        """The norm of another tensor ``[..., d_model]``, nothing firing."""
        return hooks_suppressed(self.module, hidden_states)  # type: ignore[no-any-return]

    def _with_inside(self, x: Tensor, native: Tensor) -> Tensor:
        """Fire the scale and the normalised input; ``native`` is the module's own output for ``x``."""
        eps = self._layer_norm().eps
        wide = x.detach() if x.requires_grad else x
        if wide.dtype is not torch.float64:
            wide = wide.float()
        normalized, mean, inverse = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
        scale = inverse.reciprocal_()
        if self.only_reads("hook_scale", "hook_normalized"):
            self.fire("hook_scale", scale)
            self.fire("hook_normalized", normalized)
            return native
        if x.requires_grad and torch.is_grad_enabled():
            # The kernel's mean and scale have no gradient: its numbers go on with that of the formula.
            wide = x if x.dtype == torch.float64 else x.float()
            variance, centre = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
            scale, mean = with_gradient_of(scale, (variance + eps).sqrt()), with_gradient_of(mean, centre)
        return self._with_edits(native, wide - mean, scale, normalized, x.dtype)

    def _with_edits(
        self, native: Tensor, divided: Tensor, scale: Tensor, normalized: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Fire scale and normalised input, ``divided / scale``; what an edit of them makes of ``native``."""
        edited_scale = self.fire("hook_scale", scale, copy_before_edit=True)
        rescaled = bits_differ(scale, edited_scale)
        normalized = splice(normalized, divided / edited_scale, rescaled)
        edited = self.fire("hook_normalized", normalized, copy_before_edit=True)
        changed = rescaled | bits_differ(normalized, edited).any(-1, keepdim=True)
        return splice(native, self._affine(edited, dtype), changed)

    def _layer_norm(self) -> nn.LayerNorm:
        module = self.module
        if not isinstance(module, nn.LayerNorm):
            raise WeightError(
                f"The inside of {self.path} can be hooked on an nn.LayerNorm; found {type(module).__name__} (an adapter?)."
            )
        return module

    def _affine(self, normalized: Tensor, dtype: torch.dtype) -> Tensor:
        """What the norm makes of its normalised input; ``dtype`` is its input's."""
        module = self._layer_norm()
        with align_module_device(module):  # an offloaded norm's weights are in memory only inside this block
            scaled = normalized * module.weight
            return scaled if module.bias is None else scaled + module.bias
