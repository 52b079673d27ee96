"""Loss and accuracy of next tokens, under TransformerLens' names; the loss is :func:`pellucid.losses.next_token_loss`."""

from __future__ import annotations

from torch import Tensor

from pellucid.errors import InputError
from pellucid.losses import next_token_loss


def lm_cross_entropy_loss(
    logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
) -> Tensor:
    """Cross-entropy of each token given those before it, in nats.

    Args:
        logits: ``[batch, pos, d_vocab]``.
        tokens: ``[batch, pos]`` ids.
        attention_mask: ``[batch, pos]``; a position counts when it and its target are both real.
        per_token: ``[batch, pos - 1]``, zeros where nothing counts, and not the mean.

    Raises:
        InputError: a mask of another shape than the tokens; no position counts.
    """
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise InputError(
            f"attention_mask must have the same shape as tokens, {tuple(tokens.shape)}; found "
            f"{tuple(attention_mask.shape)}."
        )
    return next_token_loss(logits, tokens, attention_mask, per_token)


def lm_accuracy(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """Share of tokens that are the most probable ones at the position before; or ``[batch, pos - 1]`` bool."""
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:].to(logits.device)
    return right if per_token else right.float().mean()
