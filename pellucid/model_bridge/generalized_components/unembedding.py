"""The unembedding: the last norm's output to logits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, readable_parameter


class UnembeddingBridge(GeneralizedComponent):
    """Stands for ``lm_head``. BLOOM ties it to ``word_embeddings`` and gives it no bias."""

    weight_names: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def W_U(self) -> Tensor:
        """``[d_model, d_vocab]``, a view of the model's own parameter."""
        return readable_parameter(self.module, "weight", self.path).T

    @property
    def b_U(self) -> Tensor:
        """``[d_vocab]``: zeros, BLOOM's ``lm_head`` has no bias."""
        weight = readable_parameter(self.module, "weight", self.path)
        return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[batch, pos, d_model]`` to logits ``[batch, pos, d_vocab]``."""
        return super().forward(hidden_states)  # type: ignore[no-any-return]
