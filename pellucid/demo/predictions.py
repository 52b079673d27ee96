"""The tokens a model expects next, shown as a person should see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.token_text import Tokenizer, token_labels


@dataclass(frozen=True)
class Prediction:
    """A token that may come next, and how probable the model holds it."""

    id: int
    token: str
    probability: float


def next_tokens(tokenizer: Tokenizer, logits: Tensor, count: int) -> list[Prediction]:
    """The most probable tokens by the logits of one position, ``[d_vocab]``, best first."""
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    best = probabilities.topk(min(count, probabilities.numel()))
    ids: list[int] = best.indices.tolist()
    return [
        Prediction(token, label, probability)
        for token, label, probability in zip(ids, token_labels(tokenizer, ids), best.values.tolist(), strict=True)
    ]
