"""A linear map of the model; its input and output are hook points."""

from __future__ import annotations

from torch import Tensor

from pellucid.model_bridge.generalized_components.base import GeneralizedComponent


class LinearBridge(GeneralizedComponent):
    """Stands for an ``nn.Linear`` (adapted or quantised ones included).

    Inside attention and MLP its points are linked to theirs: ``attn.o.hook_in`` is ``attn.hook_z``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return super().forward(input)  # type: ignore[no-any-return]
