"""What goes into and comes out of a run: key/value caches; logits, whatever module is around the model; rows alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.arguments import check_kind
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.hook_points import HookFunction


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
    """What Hugging Face gives for what the head gives ``[..., d_vocab]``, by its own operations: scaled, then capped."""
    if cfg.output_logits_scale != 1:
        logits = logits * cfg.output_logits_scale
    if cfg.output_logits_divisor != 1:
        logits = logits / cfg.output_logits_divisor  # not times its inverse, which rounds otherwise
    if cfg.output_logits_soft_cap:
        logits = torch.tanh(logits / cfg.output_logits_soft_cap) * cfg.output_logits_soft_cap
    return logits


def refuse_rows(given: Tensor) -> None:
    """Refuse a batch of several rows where its axis is to be removed."""
    if given.shape[0] != 1:
        raise InputError(f"remove_batch_dim needs a batch of one row; found {given.shape[0]}.")


def of_one_row(function: HookFunction) -> HookFunction:
    """The function of a hook, shown a tensor of one row without its batch axis; what it returns is given the axis again.

    It is shown a view, so that an edit in place is one of the tensor.
    """

    @functools.wraps(function)
    def shown(tensor: Tensor, hook: Any) -> Any:
        if tensor.dim() == 0 or tensor.shape[0] != 1:  # shown in another shape (``enable_reshape``)
            return function(tensor, hook=hook)
        result = function(tensor[0], hook=hook)
        if isinstance(result, tuple) and len(result) == 1:
            result = result[0]
        return result[None] if isinstance(result, Tensor) else result

    return shown


def one_cache(
    past_key_values: Any | None, past_kv_cache: Any | None, use_cache: bool | None, return_type: str | None
) -> Any | None:
    """The key/value cache of a run, given under either name.

    A run has one if it is given one or is to return one: ``use_cache`` can say so, and decides nothing.

    Raises:
        InputError: under both; ``use_cache`` that says otherwise than the run does.
    """
    if past_key_values is not None and past_kv_cache is not None:
        raise InputError("past_kv_cache is another name of past_key_values: give one of them.")
    given = past_kv_cache if past_key_values is None else past_key_values
    if use_cache is None:
        return given
    check_kind("use_cache", use_cache, bool, "True, False or None")
    returns = return_type == "logits_and_cache"
    if use_cache and given is None and not returns:
        raise InputError(
            f"use_cache=True would have no effect: return_type={return_type!r} gives no key/value cache. Ask for "
            "return_type='logits_and_cache', or give a cache to extend, past_key_values=DynamicCache()."
        )
    if not use_cache and (returns or given is not None):
        asked = f"return_type={return_type!r}" if returns else "a run with past_key_values"
        raise InputError(
            f"use_cache=False is what a run without a key/value cache does, and {asked} has one. Leave one of them out."
        )
    return given


def new_cache(model: nn.Module) -> Any:
    """An empty key/value cache, of Hugging Face's class."""
    from transformers import DynamicCache

    config: Any = getattr(model, "config", None)
    return DynamicCache(config=config)
