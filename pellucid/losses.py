"""The next-token loss of a padded batch: each row's loss is its own."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pellucid.errors import InputError
from pellucid.padding import NO_TOKEN, targets


def check_shapes(
    logits: Shaped[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Shaped[Tensor, "batch pos"] | None,
) -> None:
    """Refuse logits, tokens and a mask that are not of the same positions.

    Raises:
        InputError: naming the shapes.
    """
    if not isinstance(logits, Tensor) or not isinstance(tokens, Tensor) or logits.dim() != 3 or tokens.dim() != 2:
        raise InputError("A loss is of logits [batch, pos, d_vocab] and tokens [batch, pos], tensors both.")
    if logits.shape[:2] != tokens.shape:
        raise InputError(f"The logits are of positions {tuple(logits.shape[:2])}, and tokens of {tuple(tokens.shape)}.")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"tokens is ids [batch, pos], whole numbers; found {tokens.dtype}.")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise InputError(f"attention_mask is a tensor [batch, pos]; found {type(attention_mask).__name__}.")
    if attention_mask is not None and tuple(attention_mask.shape) != tuple(tokens.shape):
        raise InputError(
            f"attention_mask must have the same shape as tokens, {tuple(tokens.shape)}; found "
            f"{tuple(attention_mask.shape)}."
        )


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Shaped[Tensor, "batch pos"] | None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos-1"]:
    """Cross-entropy of each token given those before it, in nats, in float32 at least.

    A position counts when it and its target are both real tokens: what a padding position predicts, the first real token
    after left padding included, is not counted.

    Args:
        logits: ``[batch, pos, d_vocab]``.
        tokens: ``[batch, pos]`` ids; :data:`~pellucid.padding.NO_TOKEN` at positions without one, which are no targets.
        attention_mask: ``[batch, pos]``, or ``None`` if nothing is padding.
        per_token: give ``[batch, pos - 1]`` with zeros where nothing is counted, not the mean over what is.

    Raises:
        InputError: no position counts.
    """
    tokens = tokens.to(logits.device)
    counts = targets(tokens, None if attention_mask is None else attention_mask.to(logits.device))
    if counts.numel() == 0 or not bool(counts.any()):
        raise InputError("A loss needs a row with two real tokens next to each other; this batch has none.")
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    # -log p = logsumexp - logit: nothing of [batch, pos, d_vocab] is kept for rows that do not count.
    ids = tokens[:, 1:].masked_fill(tokens[:, 1:] == NO_TOKEN, 0)
    losses = torch.logsumexp(wide, dim=-1) - wide.gather(-1, ids[..., None])[..., 0]
    losses = torch.where(counts, losses, torch.zeros((), dtype=losses.dtype, device=losses.device))
    return losses if per_token else losses.sum() / counts.sum()
