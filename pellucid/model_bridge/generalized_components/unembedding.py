"""The unembedding: the last norm's output to logits."""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, readable_parameter
from pellucid.run_context import in_own_context, set_run, take_finished


class UnembeddingBridge(GeneralizedComponent):
    """Stands for ``lm_head``. BLOOM ties it to ``word_embeddings`` and gives it no bias; folding the final norm does."""

    @property
    def W_U(self) -> Tensor:
        """``[d_model, d_vocab]``, a view of the model's own parameter."""
        return readable_parameter(self.module, "weight", self.path).T

    @property
    def b_U(self) -> Tensor:
        """``[d_vocab]``: zeros as long as ``lm_head`` has no bias, as most families' has none."""
        if getattr(self.module, "bias", None) is not None:
            return readable_parameter(self.module, "bias", self.path)
        weight = readable_parameter(self.module, "weight", self.path)
        return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[batch, pos, d_model]`` to logits ``[batch, pos, d_vocab]``."""
        return in_own_context(self._run, hidden_states)

    def _run(self, hidden_states: Tensor) -> Tensor:
        set_run(take_finished())
        return super().forward(hidden_states)  # type: ignore[no-any-return]
