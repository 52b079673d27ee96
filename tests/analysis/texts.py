"""Text for tests: token ids by label, as a corpus gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    label: str
    tokens: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class TokenText:
    """Rows ``[row, pos]`` by label, all of them real but where a mask says otherwise."""

    rows: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] | None = None

    def batches(self, batch_size: int) -> Iterator[TokenBatch]:
        for label, tokens in self.rows.items():
            mask = torch.ones_like(tokens, dtype=torch.bool) if self.masks is None else self.masks[label]
            for start in range(0, len(tokens), batch_size):
                stop = start + batch_size
                yield TokenBatch(label, tokens[start:stop], mask[start:stop])
