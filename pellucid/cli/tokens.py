"""From what a person types to one token id. A metric reads one token, and most words have a leading space."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pellucid.cli.prompt import as_typed
from pellucid.demo.predictions import next_tokens
from pellucid.errors import InputError, warn
from pellucid.model_bridge.running.tokens import own_ids
from pellucid.token_text import token_label, token_labels

BY_ID = "id:"
"""What stands before a token's id."""

SHOWN = 5
"""Candidates that a message names."""


def read_token(tokenizer: Any, typed: str, option: str, logits: Tensor) -> int:
    """The id of one token.

    Args:
        tokenizer: the model's.
        typed: the text of a token, or ``id:`` and its id.
        option: where it was typed.
        logits: ``[d_vocab]`` at the position that is read, for candidates.

    Raises:
        InputError: no token, several, or an id outside the vocabulary; names candidates.
    """
    if typed.startswith(BY_ID):
        return _by_id(tokenizer, typed, option, logits)
    text = as_typed(typed, f"{option} is not UTF-8: give the token's id, {option} id:123.")
    ids = own_ids(tokenizer, text)
    spaced = own_ids(tokenizer, f" {text}")
    if len(ids) == 1:
        if not text.startswith(" ") and len(spaced) == 1 and spaced != ids and logits[spaced[0]] > logits[ids[0]]:
            warn(
                f"{option} {text!r} is the token without a leading space; the model expects {f' {text}'!r} rather. "
                f"Inside a sentence a word begins with its space: {option} {f' {text}'!r}."
            )
        return ids[0]
    found = f"{option} {text!r} is {len(ids)} tokens" + (f", {_named(tokenizer, ids)}" if ids else "")
    bare = bool(text) and not text.startswith(" ")
    if bare and len(spaced) == 1:
        raise InputError(f"{found}; the metric reads one. With its leading space it is one: {option} {f' {text}'!r}.")
    first = (spaced if bare else ids)[:1]
    begins = f" Inside a sentence it begins with {_with_id(tokenizer, first[0])}." if first else ""
    raise InputError(f"{found}; the metric reads one.{begins} {expected(tokenizer, logits)}")


def expected(tokenizer: Any, logits: Tensor) -> str:
    """A sentence that names what the model expects next, best first."""
    best = next_tokens(tokenizer, logits, SHOWN)
    named = ", ".join(f"{token.token} {token.probability:.0%} (id:{token.id})" for token in best)
    return f"The model expects next: {named}."


def _by_id(tokenizer: Any, typed: str, option: str, logits: Tensor) -> int:
    number = typed.removeprefix(BY_ID)
    if not (number.isascii() and number.isdigit()):
        raise InputError(f"{option} {typed!r}: after id: comes a token's id, a whole number.")
    if int(number) >= logits.shape[0]:
        raise InputError(
            f"{option} {typed!r}: the vocabulary has ids 0 to {logits.shape[0] - 1}. {expected(tokenizer, logits)}"
        )
    return int(number)


def _named(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(token_labels(tokenizer, ids))


def _with_id(tokenizer: Any, token: int) -> str:
    return f"{token_label(tokenizer, token)} (id:{token})"
