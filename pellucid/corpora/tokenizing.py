"""What a corpus asks of a tokenizer: whether it is one, what identifies it, its padding and its separator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pellucid.corpora.packing import Packing
from pellucid.errors import InputError

Separator: TypeAlias = int | Literal["eos", "none"] | None
"""What stands between documents: a token id, the end-of-sequence token, or nothing."""


def tokenizer_fingerprint(tokenizer: Any | None) -> str | None:
    """SHA-256 of what a tokenizer does with text; ``None`` without one.

    Padding and truncation, which a call may leave set, are not part of it: a corpus is made without them.
    """
    if tokenizer is None:
        return None
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        parts["padding"] = parts["truncation"] = None
    else:
        parts = {"class": type(tokenizer).__name__, "vocabulary": sorted(tokenizer.get_vocab().items())}
    return digest({"tokenizer": parts, "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False))})


def digest(data: Mapping[str, Any]) -> str:
    """SHA-256 of JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def need_tokenizer(tokenizer: Any | None) -> Any:
    """The tokenizer.

    Raises:
        InputError: there is none.
    """
    if tokenizer is None:
        raise InputError("Text needs a tokenizer: pass the model's (bridge.tokenizer), or give token ids.")
    return tokenizer


def pad_id_of(tokenizer: Any | None) -> int:
    """The id that fills shorter rows: the tokenizer's padding token, or 0."""
    return 0 if tokenizer is None or tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def separator_id_of(separator: Separator, packing: Packing, tokenizer: Any | None) -> int | None:
    """The id that stands between documents, ``None`` for none.

    Raises:
        InputError: no separator, or the tokenizer has none.
    """
    if separator is None:
        separator = "eos" if packing == "packed" else "none"
    if separator == "none":
        return None
    if separator == "eos":
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise InputError(
                'separator="eos" needs a tokenizer with an end-of-sequence token: give a token id, or separator="none".'
            )
        return int(tokenizer.eos_token_id)
    if isinstance(separator, str | bool) or not isinstance(separator, int) or separator < 0:
        raise InputError(f"separator is 'eos', 'none' or a token id; found {separator!r}.")
    return separator


def check_tokenizer(tokenizer: Any | None) -> None:
    """Refuse what is no tokenizer.

    Raises:
        InputError: it is none of Hugging Face's kind.
    """
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "pad_token_id")):
        raise InputError(f"tokenizer is Hugging Face's, such as bridge.tokenizer; found {type(tokenizer).__name__}.")
