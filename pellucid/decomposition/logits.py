"""What parts of the residual stream say of a token's logit: products with its column of ``W_U``, through the frozen norm.

What no part says is a constant of the model: the final norm's bias times that column, and ``b_U``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.decomposition.residual import read_by
from pellucid.decomposition.stream import CachedRun, StreamModel, model_of
from pellucid.errors import InputError
from pellucid.slices import Slice, SliceInput

AT_ONCE = 16
"""Parts that are multiplied with directions at a time."""


def directions_of(model: StreamModel, tokens: Any, incorrect_tokens: Any | None) -> Float[Tensor, "... d_model"]:
    """``[..., d_model]``: the tokens' columns of ``W_U``, or their differences.

    Raises:
        InputError: no tokens; as many incorrect ones as not.
    """
    directions = model.tokens_to_residual_directions(tokens).detach()
    if incorrect_tokens is None:
        return directions
    others = model.tokens_to_residual_directions(incorrect_tokens).detach()
    if others.shape != directions.shape:
        raise InputError(
            f"tokens and incorrect_tokens have one shape; found {list(directions.shape[:-1])} and {list(others.shape[:-1])}."
        )
    return directions - others


def attributed(
    run: CachedRun,
    residual_stack: Float[Tensor, "row ... d_model"],
    tokens: Any,
    incorrect_tokens: Any | None,
    pos_slice: Slice | SliceInput,
    batch_slice: Slice | SliceInput,
    has_batch_dim: bool,
) -> Float[Tensor, "row ..."]:
    """See :meth:`DecompositionMethods.logit_attrs`."""
    batch = Slice.of(batch_slice)
    directions = directions_of(model_of(run), tokens, incorrect_tokens)
    stack, norm = read_by(run, residual_stack, None, False, pos_slice, batch, has_batch_dim)
    of_rows = has_batch_dim and batch.mode != "int" and stack.dim() == 4 and directions.dim() == 2
    if of_rows and directions.shape[0] == stack.shape[1]:
        directions = directions.unsqueeze(-2)  # a token a row, whatever the position
    try:
        torch.broadcast_shapes(stack.shape, directions.shape)
    except RuntimeError:
        raise InputError(
            f"tokens are one, [batch] or [batch, pos] of the stack {list(residual_stack.shape)}; found "
            f"{list(directions.shape[:-1])}."
        ) from None
    # The norm is taken to the few directions, not to the many parts, whose numbers are then read once and never copied.
    dtype = torch.promote_types(torch.promote_types(stack.dtype, directions.dtype), norm.scale.dtype)
    pulled = norm.pulled_back(directions.to(stack.device, dtype).unsqueeze(-1)).squeeze(-1)
    products = [(parts.to(dtype) * pulled).sum(-1) for parts in stack.split(AT_ONCE)]
    return torch.cat(products) / norm.scale.to(stack.device).squeeze(-1)


def constant_of(model: StreamModel, tokens: Any, incorrect_tokens: Any | None) -> Float[Tensor, "..."]:
    """See :meth:`DecompositionMethods.logit_bias`."""
    directions = directions_of(model, tokens, incorrect_tokens)
    norm = model.stream.norm("ln_final")
    constant = directions.new_zeros(directions.shape[:-1])
    if norm is not None and norm.bias is not None:
        constant = constant + directions @ norm.bias.to(directions)
    shifts = [_of_tokens(model, model.b_U, given) for given in (tokens, incorrect_tokens) if given is not None]
    shift = shifts[0] - shifts[1] if len(shifts) == 2 else shifts[0]
    return constant + shift.to(constant).view(constant.shape)


def _of_tokens(model: StreamModel, values: Tensor, tokens: Any) -> Tensor:
    ids = model.to_single_token(tokens) if isinstance(tokens, str) else tokens
    return values.detach()[torch.as_tensor(ids, device=values.device)]
