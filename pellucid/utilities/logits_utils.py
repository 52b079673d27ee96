"""Logits as a table and as samples, under TransformerLens' names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pellucid.arguments import check_count, check_kind, check_number
from pellucid.errors import InputError
from pellucid.utilities.checks import check_floating, check_ids


def logits_to_df(logits: Tensor, tokenizer: Any | None = None, top_k: int | None = None) -> Any:
    """A pandas table of one position's tokens, the most probable first.

    Args:
        logits: ``[d_vocab]``.
        tokenizer: for the column ``token_string``.
        top_k: only so many rows.

    Returns:
        Columns ``token_index``, ``token_string`` (with a tokenizer), ``logit``, ``log_prob``, ``probability``.

    Raises:
        InputError: more axes than one.
    """
    import pandas as pd

    if check_kind("logits", logits, Tensor, "a tensor [d_vocab]").dim() != 1:
        raise InputError(f"logits_to_df takes the logits of one position, [d_vocab]; found {tuple(logits.shape)}.")
    log_probs = logits.detach().float().log_softmax(-1)
    order = log_probs.argsort(descending=True)[: None if top_k is None else check_count("top_k", top_k)]
    columns: dict[str, list[Any]] = {"token_index": order.tolist()}
    if tokenizer is not None:
        columns["token_string"] = [tokenizer.decode([token]) for token in columns["token_index"]]
    columns["logit"] = logits.detach()[order].tolist()
    columns["log_prob"] = log_probs[order].tolist()
    columns["probability"] = log_probs[order].exp().tolist()
    return pd.DataFrame(columns)


def sample_logits(
    final_logits: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    tokens: Tensor | None = None,
) -> Tensor:
    """One token for each row, drawn from its logits.

    Args:
        final_logits: ``[batch, d_vocab]``; they are not written to.
        top_k: draw among the most probable.
        top_p: draw among those that make up this share of the probability; without ``top_k`` only.
        temperature: divides the logits; 0 takes the most probable token.
        freq_penalty: subtracted for each occurrence in ``tokens``; as in TransformerLens not at temperature 0.
        repetition_penalty: divides a positive logit, and multiplies a negative one, of a token that occurs in ``tokens``.
        tokens: ``[batch, pos]`` ids so far.

    Returns:
        ``[batch]`` ids.

    Raises:
        InputError: an argument out of range, a penalty without ``tokens``, logits that are no distribution.
    """
    d_vocab = _check_logits(final_logits)
    if check_number("freq_penalty", freq_penalty) < 0:
        raise InputError(f"freq_penalty must be non-negative; found {freq_penalty}.")
    if check_number("temperature", temperature) < 0:
        raise InputError(f"temperature must be non-negative; found {temperature}.")
    check_number("repetition_penalty", repetition_penalty, above=0)
    if top_k is not None and top_p is not None:
        raise InputError("top_p would have no effect beside top_k: give one of them.")
    if repetition_penalty != 1.0 and tokens is None:
        raise InputError("repetition_penalty is of tokens that occur: give tokens=, ids [batch, pos].")
    if freq_penalty and tokens is None:
        raise InputError("freq_penalty counts occurrences: give tokens=, ids [batch, pos].")
    if tokens is not None:
        check_ids("tokens", tokens, "ids [batch, pos]", (2,), d_vocab)
        if (repetition_penalty != 1.0 or freq_penalty) and tokens.shape[:1] != final_logits.shape[:-1]:
            raise InputError(
                f"tokens is ids [batch, pos] of the rows of final_logits [batch, d_vocab]; found {list(tokens.shape)} and "
                f"{list(final_logits.shape)}."
            )
        tokens = tokens.to(final_logits.device, torch.int64)
    most = None if top_k is None else min(check_count("top_k", top_k), d_vocab)
    if top_p is not None:
        check_number("top_p", top_p, above=0, at_most=1)
    logits = final_logits
    if repetition_penalty != 1.0 and tokens is not None:
        logits = _apply_repetition_penalty(logits, tokens, repetition_penalty)
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    if freq_penalty and tokens is not None:
        ones = torch.ones_like(tokens, dtype=logits.dtype)
        logits = logits - freq_penalty * torch.zeros_like(logits).scatter_add_(1, tokens, ones)
    if not bool(logits.amax(-1).isfinite().all()):
        raise InputError(f"temperature={temperature} makes logits too large for {logits.dtype}: 0 takes the largest.")
    if most is not None:
        kept = logits.topk(most).values
        logits = logits.masked_fill(logits < kept[..., -1:], -torch.inf)
    elif top_p is not None:
        ordered, places = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the first that reaches top_p is kept
        logits = logits.masked_fill((before > top_p).scatter(-1, places, before > top_p), -torch.inf)
    drawn: Tensor = torch.distributions.Categorical(logits=logits.float()).sample()
    return drawn


def _check_logits(final_logits: Tensor) -> int:
    """How many logits a row has.

    Raises:
        InputError: none, or a row that is no distribution.
    """
    if check_floating("final_logits", final_logits).dim() == 0 or final_logits.numel() == 0:
        raise InputError(f"final_logits is logits [batch, d_vocab]; found shape {list(final_logits.shape)}.")
    if not bool(final_logits.amax(-1).isfinite().all()):
        raise InputError("final_logits has a row with NaN or infinity, or with nothing but -infinity: no distribution.")
    return final_logits.shape[-1]


def _apply_repetition_penalty(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """``[batch, d_vocab]`` logits with those of occurring tokens divided, or multiplied where they are negative."""
    scores = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(scores > 0, scores / penalty, scores * penalty))
