"""What comes out of a run: logits, whatever module is around the model, and rows without their axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import InputError, UnsupportedModelError


def logits_of(output: Any, model: nn.Module, arguments: Mapping[str, Any], cfg: TransformerBridgeConfig) -> Tensor:
    """The logits that a module around the model gives: its output's ``logits``, the first entry of a tuple, or the output.

    Raises:
        UnsupportedModelError: they are nothing like ``[batch, pos, d_vocab]``.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    given = arguments.get("input_ids", arguments.get("inputs_embeds"))
    if isinstance(found, Tensor) and found.dim() == 3 and given is not None:
        batch, pos, width = found.shape
        if batch == given.shape[0] and pos >= given.shape[1] and width == cfg.d_vocab:
            return found
    what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__name__} is around the model, and its forward gives {what}; expected "
        f"logits [batch, pos, {cfg.d_vocab}], in an output with .logits, a tuple or alone. Bridge the model inside it."
    )


def scaled_and_capped(logits: Tensor, cfg: TransformerBridgeConfig) -> Tensor:
    """What Hugging Face gives for what the head gives ``[..., d_vocab]``, in its own order: scaled, then capped."""
    if cfg.output_logits_scale != 1:
        logits = logits * cfg.output_logits_scale
    if cfg.output_logits_soft_cap:
        logits = torch.tanh(logits / cfg.output_logits_soft_cap) * cfg.output_logits_soft_cap
    return logits


def refuse_rows(given: Tensor) -> None:
    """Refuse a batch of several rows where its axis is to be removed."""
    if given.shape[0] != 1:
        raise InputError(f"remove_batch_dim needs a batch of one row; found {given.shape[0]}.")


def without_batch_dim(output: Any) -> Any:
    """The first row of every tensor that has rows; a mean loss has none."""
    if isinstance(output, tuple):
        return tuple(map(without_batch_dim, output))
    return output[0] if isinstance(output, Tensor) and output.dim() > 0 else output
