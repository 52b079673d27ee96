"""What a corpus gives: batches of rows, counts of a label, and tokens with the text around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pellucid.corpora.packing import Row
from pellucid.corpora.sources import as_tensor
from pellucid.padding import has_padding
from pellucid.tables import BriefFields


@dataclass(frozen=True, repr=False)
class CorpusBatch(BriefFields):
    """Rows of one label.

    Attributes:
        label: whose rows these are; a batch never mixes labels.
        tokens: ``[batch, pos]`` int64 ids.
        attention_mask: ``[batch, pos]`` bool, ``False`` at padding. Separators are real tokens.
        documents: ``[batch, pos]`` int64, number of the document within its label; a separator belongs to the document
            before it; -1 at padding.
        positions: ``[batch, pos]`` int64, position within the document (a separator's is the document's length); -1 at
            padding.
        first_row: number of the first row within its label.
    """

    label: str
    tokens: Tensor
    attention_mask: Tensor
    documents: Tensor
    positions: Tensor
    first_row: int

    @property
    def n_tokens(self) -> int:
        """Real tokens, separators among them."""
        return int(self.attention_mask.sum())

    @property
    def is_padded(self) -> bool:
        """Whether any position is padding."""
        return has_padding(self.attention_mask)


@dataclass(frozen=True)
class LabelCount:
    """What a label has.

    Attributes:
        rows: rows of the corpus.
        tokens: tokens in them, separators among them.
        documents: documents of the source.
        empty_documents: those of them without a token; they give nothing, not even a separator.
        dropped_tokens: tokens of the last, unfinished row where it is dropped.
        sha256: of the documents, in order.
    """

    rows: int
    tokens: int
    documents: int
    empty_documents: int
    dropped_tokens: int
    sha256: str


@dataclass(frozen=True)
class TokenContext:
    """A token with the text around it."""

    before: str
    token: str
    after: str


def batch_of(
    label: str, held: Sequence[Row], first: int, side: Literal["left", "right"], length: int | None, pad_id: int
) -> CorpusBatch:
    """Rows of one label, padded at ``side`` to ``length`` or to the longest of them; the first is row ``first``."""
    shape = (len(held), length or max(len(row.ids) for row in held))
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    documents, positions = torch.full(shape, -1), torch.full(shape, -1)
    for index, row in enumerate(held):
        size = len(row.ids)
        where = slice(0, size) if side == "right" else slice(shape[1] - size, shape[1])
        tokens[index, where] = as_tensor(row.ids)
        documents[index, where] = as_tensor(row.documents)
        positions[index, where] = as_tensor(row.positions)
        mask[index, where] = True
    return CorpusBatch(label, tokens, mask, documents, positions, first)
