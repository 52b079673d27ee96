"""The token embedding. Its ``hook_in`` holds the token ids, so a hook there can replace tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pellucid.errors import HookValueError
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, readable_parameter


class EmbeddingBridge(GeneralizedComponent):
    """Stands for ``word_embeddings``. In BLOOM a layer norm follows, so its output is not yet the residual stream."""

    weight_names: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def W_E(self) -> Tensor:
        """``[d_vocab, d_model]``, the model's own parameter, before the embedding norm."""
        return readable_parameter(self.module, "weight", self.path)

    def forward(self, input: Tensor, **kwargs: Any) -> Tensor:
        """Token ids ``[batch, pos]`` to ``[batch, pos, d_model]``."""
        original = self.original()
        tokens = self.fire("hook_in", input, copy_before_edit=True)  # the ids belong to the caller
        if tokens is not input:
            self._refuse_outside(tokens)
        output: Tensor = original(tokens, **kwargs)
        return self.fire("hook_out", output)

    def _refuse_outside(self, tokens: Tensor) -> None:
        """A hook has replaced tokens: refuse ids that are none, which a GPU would not survive."""
        low, high = (int(value) for value in tokens.aminmax())
        count = self.module.weight.shape[0]  # an adapter has no num_embeddings
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise HookValueError(f"A hook on {self.path} gave token id {wrong}; ids go from 0 to {count - 1}.")
