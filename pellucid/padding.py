"""Which positions of a padded batch are real, once: every other module asks here.

A mask is ``[batch, pos]``, 1 at real positions and 0 at padding, on any side and in any dtype; ``None`` says that nothing
is padding. A position is *real* if the model attends to it. With a key/value cache a mask covers the cached positions too,
so it is longer than the run: :func:`last_columns` is its part for the run.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_TOKEN = -100
"""In the place of an id at a position that holds no token; Hugging Face marks with it the labels that do not count."""


def real_positions(mask: Tensor | None, batch: int, length: int, device: torch.device | str | None = None) -> Tensor:
    """``[batch, length]`` bool: which positions are real; all of them without a mask."""
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    return mask.to(device=device, dtype=torch.bool)


def has_padding(mask: Tensor | None) -> bool:
    """Whether any position is padding."""
    return mask is not None and not bool(mask.all())


def last_columns(mask: Tensor | None, length: int) -> Tensor | None:
    """``[batch, length]``: the mask of a run's own positions, without those that were in its key/value cache."""
    return None if mask is None else mask[:, mask.shape[1] - length :]


def places(mask: Tensor) -> Tensor:
    """``[batch, pos]`` int64: how many real positions of its row come before each one; -1 at padding."""
    real = mask.bool()
    return (real.long().cumsum(-1) - 1).masked_fill(~real, -1)


def position_ids(mask: Tensor) -> Tensor:
    """``[batch, pos]`` int64: the ids that Hugging Face's ``generate`` makes of a mask: :func:`places`, 0 at padding."""
    return places(mask).clamp(min=0)


def counts(mask: Tensor) -> Tensor:
    """``[batch]`` int64: real positions of each row."""
    return mask.bool().sum(-1)


def last_real(mask: Tensor) -> Tensor:
    """``[batch]`` int64: the column of each row's last real position; the last column of a row that has none."""
    return mask.shape[-1] - 1 - mask.bool().flip(-1).int().argmax(-1)


def before_first_real(mask: Tensor) -> Tensor:
    """``[batch, pos]`` bool: padding that has no real position before it, and so attends to nothing but padding."""
    return mask.bool().int().cumsum(-1) == 0


def after_last_real(mask: Tensor) -> Tensor:
    """``[batch, pos]`` bool: padding that has no real position after it."""
    return before_first_real(mask.flip(-1)).flip(-1)


def predicted(mask: Tensor) -> Tensor:
    """``[batch, pos - 1]`` bool: which positions have a next one to predict, both of them real."""
    real = mask.bool()
    return real[:, :-1] & real[:, 1:]


def targets(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """``[batch, pos - 1]`` bool: where a real position is followed by a real one that holds a token to predict.

    Args:
        tokens: ``[batch, pos]`` ids, :data:`NO_TOKEN` where there is none.
        mask: ``[batch, pos]``, or ``None``.
    """
    batch, length = tokens.shape
    return predicted(real_positions(mask, batch, length, tokens.device)) & (tokens[:, 1:] != NO_TOKEN)
