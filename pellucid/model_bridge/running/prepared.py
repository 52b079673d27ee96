"""A checked input, as the runner hands it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pellucid.model_bridge.running.run_positions import RunPositions


@dataclass(slots=True)
class Prepared:
    """A checked input: what goes to Hugging Face's model, and which blocks it passes through."""

    tokens: Tensor | None
    residual: Tensor | None
    attention_mask: Tensor | None
    past_key_values: Any | None
    start: int | None
    stop: int | None
    positions: RunPositions | None = None
    """Once ``RunnableModel.positions_of`` has found them."""
    behind_wrapper: bool = False
    """The Hugging Face model is called, not the wrapper around it."""
    ends_at_norm: bool = False
    """Its backbone alone is called: the run ends with the final norm and makes no logits."""

    @property
    def given(self) -> Tensor:
        """The tokens, or the embeddings or residual."""
        given = self.tokens if self.tokens is not None else self.residual
        assert given is not None
        return given

    def past_length(self) -> int:
        """Positions already in the key/value cache."""
        return 0 if self.past_key_values is None else int(self.past_key_values.get_seq_length())
