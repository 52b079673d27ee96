"""Loss and accuracy of next tokens, under TransformerLens' names; the loss is :func:`pellucid.losses.next_token_loss`."""

from __future__ import annotations

from torch import Tensor

from pellucid.errors import InputError
from pellucid.losses import check_shapes, next_token_loss
from pellucid.padding import NO_TOKEN
from pellucid.utilities.checks import check_floating, check_ids


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
        InputError: shapes that differ; ids that have no logit; no position counts.
    """
    check_shapes(logits, tokens, attention_mask)
    check_floating("logits", logits)
    check_ids("tokens", tokens[tokens != NO_TOKEN], "ids [batch, pos]", d_vocab=logits.shape[-1])
    return next_token_loss(logits, tokens, attention_mask, per_token)


def lm_accuracy(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """Share of tokens that are the most probable ones at the position before; or ``[batch, pos - 1]`` bool.

    Raises:
        InputError: shapes that differ; ids that have no logit; no token has one before it.
    """
    check_shapes(logits, tokens, None)
    check_ids("tokens", tokens, "ids [batch, pos]", d_vocab=logits.shape[-1])
    if not per_token and tokens[:, 1:].numel() == 0:
        raise InputError(f"An accuracy needs a row of two tokens: tokens has the shape {list(tokens.shape)}.")
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:].to(logits.device)
    return right if per_token else right.float().mean()
