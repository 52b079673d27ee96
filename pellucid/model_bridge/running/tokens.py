"""Strings, tokens, padding, beginning-of-sequence: the rule, once.

A string tokenises exactly as ``tokenizer(text)`` does: some tokenizers (Llama's, Gemma's) put a beginning-of-sequence token
first, others (BLOOM's, GPT-2's) do not. ``prepend_bos`` overrules it: with ``True`` one such token
stands before the text, with ``False`` none, whoever would put it. Nothing is cut off, and the user's tokenizer is not
replaced; padding comes on the tokenizer's own side unless another is asked for, and a batch of strings always brings its
mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pellucid.arguments import check_list
from pellucid.errors import InputError, warn

TextOrTokens: TypeAlias = str | Sequence[str] | Tensor
PaddingSide = Literal["left", "right"]


_AS_GIVEN: ContextVar[bool] = ContextVar("pellucid_ids_as_given", default=False)


@contextmanager
def ids_as_given() -> Iterator[None]:
    """Ids that are run meanwhile come from where masks are known (a corpus), or pad nothing: see ``warn_of_padding``."""
    token = _AS_GIVEN.set(True)
    try:
        yield
    finally:
        _AS_GIVEN.reset(token)


class TokenRules:
    """Everything between text and token ids.

    Args:
        tokenizer: Hugging Face's, or ``None`` if only ids are run.
        d_vocab: ids are below this.
        prepend_bos: the default of ``prepend_bos`` in every method; ``None`` leaves it to the tokenizer.
    """

    def __init__(self, tokenizer: Any | None, d_vocab: int, prepend_bos: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self.d_vocab = d_vocab
        self.prepend_bos = prepend_bos

    def need(self) -> Any:
        """The tokenizer.

        Raises:
            InputError: there is none.
        """
        if self.tokenizer is None:
            raise InputError("Strings need a tokenizer and this bridge has none: pass tokenizer=, or give token ids.")
        return self.tokenizer

    def encode(
        self,
        text: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids ``[batch, pos]`` and, if anything was padded, their mask ``[batch, pos]`` (else ``None``).

        Of each text the first ``longest`` tokens, or all of them.

        Raises:
            InputError: no tokenizer, no text, text without tokens, an unknown padding side, no padding token.
        """
        tokenizer = self.need()
        texts = [text] if isinstance(text, str) else check_list("input", text, "strings")
        for index, entry in enumerate(texts):
            if not isinstance(entry, str):
                raise InputError(f"A batch of strings has strings only; entry {index} is {type(entry).__name__}.")
        rows: list[list[int]] = [tokenizer(entry)["input_ids"] for entry in texts]
        wanted = self.prepend_bos if prepend_bos is None else prepend_bos
        if wanted and tokenizer.bos_token_id is None:
            raise InputError("prepend_bos=True, but the tokenizer has no beginning-of-sequence token.")
        if wanted is not None and bool(wanted) != puts_bos(tokenizer):
            rows = [[tokenizer.bos_token_id, *row] if wanted else row[1:] for row in rows]
        empty = [index for index, row in enumerate(rows) if not row]
        if empty:
            raise InputError(
                f"Text {empty[0]} ({texts[empty[0]]!r}) has no tokens: there is nothing to run. prepend_bos=True begins "
                "with the beginning-of-sequence token."
            )
        return self._pad([row[:longest] for row in rows], padding_side)

    def _pad(self, rows: list[list[int]], padding_side: PaddingSide | None) -> tuple[Tensor, Tensor | None]:
        length = max(map(len, rows))
        side = padding_side if padding_side is not None else self.need().padding_side
        if side not in ("left", "right"):
            raise InputError(f"padding_side is 'left' or 'right'; found {side!r}.")
        if all(len(row) == length for row in rows):
            return torch.tensor(rows, dtype=torch.long), None
        pad = self.need().pad_token_id
        if pad is None:
            raise InputError(
                "The strings have different numbers of tokens and the tokenizer has no padding token: set "
                "tokenizer.pad_token, or give token ids with an attention_mask."
            )
        tokens = torch.full((len(rows), length), pad, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for index, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            tokens[index, where] = torch.tensor(row)
            mask[index, where] = 1
        return tokens, mask

    def check(self, tokens: Tensor) -> Tensor:
        """Ids as ``[batch, pos]`` int64; whether they are in the vocabulary is :meth:`check_range`'s to say.

        Raises:
            InputError: not integers, another number of axes, or empty.
        """
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise InputError(
                f"Token ids are integers; found {tokens.dtype}. Embeddings go in with inputs_embeds=, a residual stream "
                "with start_at_layer=."
            )
        if tokens.dim() == 1:
            tokens = tokens[None]
        if tokens.dim() != 2:
            raise InputError(f"Token ids are [pos] or [batch, pos]; found shape {tuple(tokens.shape)}.")
        if tokens.numel() == 0:
            raise InputError(f"There are no tokens: the batch has shape {tuple(tokens.shape)}.")
        return tokens.long()

    def warn_of_padding(self, tokens: Tensor, pad_ids: Iterable[int | None], everywhere: bool = False) -> None:
        """Warn of ids that look padded where no mask says what they are.

        Args:
            tokens: ``[batch, pos]``, given without a mask.
            pad_ids: ids that padding may have; ``None`` is left out.
            everywhere: ask about each id of any number of rows, and not about the ends of several rows only.
        """
        if torch.compiler.is_compiling() or not (everywhere or tokens.shape[0] > 1) or _AS_GIVEN.get():
            return
        asked = tokens if everywhere else tokens[:, :: max(1, tokens.shape[1] - 1)]
        for pad in dict.fromkeys(pad for pad in pad_ids if pad is not None):
            padded = (asked == pad).any(-1)
            if bool(padded.any()):
                row = int(padded.int().argmax())
                where = "has" if everywhere else "begins" if int(tokens[row, 0]) == pad else "ends"
                warn(
                    f"Row {row} of the token ids {where}{'' if everywhere else ' with'} the padding token (id {pad}) and no "
                    "attention_mask says what it is: a run takes it for a token like any other, and Hugging Face's generate "
                    "guesses. If it is padding, `tokens, mask = bridge.to_tokens(texts, return_mask=True)` makes the mask; "
                    "pass attention_mask=mask, or give the texts themselves. If it is a token, pass "
                    "attention_mask=torch.ones_like(tokens)."
                )
                return

    def check_range(self, tokens: Tensor) -> None:
        """Refuse ids outside the vocabulary.

        Raises:
            InputError: naming one.
        """
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= self.d_vocab:
            wrong = low if low < 0 else high
            raise InputError(f"Token id {wrong} is outside the vocabulary: ids go from 0 to {self.d_vocab - 1}.")

    def decode(self, tokens: Any) -> str | list[str]:
        """Text of ``[pos]`` ids, or a list of texts of ``[batch, pos]`` ids; special tokens are kept.

        Raises:
            InputError: no tokenizer; no ids, or ids outside the vocabulary.
        """
        tokenizer = self.need()
        ids = as_ids(tokens)
        if ids.numel():
            self.check_range(ids)
        if ids.dim() == 2:
            return [str(tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in ids.tolist()]
        if ids.dim() > 2:
            raise InputError(f"Token ids are [pos] or [batch, pos]; found shape {tuple(ids.shape)}.")
        return str(tokenizer.decode(ids.reshape(-1).tolist(), clean_up_tokenization_spaces=False))

    def pieces(self, row: list[int]) -> list[str]:
        """Each token's text where it stands: together the decoded text, but for characters that several tokens share.

        A tokenizer of SentencePiece's kind drops the space before the first token that it decodes, so a token decoded alone
        has lost the space before its word.
        """
        alone = [str(self.decode([token])) for token in row]
        if "".join(alone) == self.decode(row):
            return alone
        made = alone[:1]
        for place in range(1, len(row)):
            spaced = " " + alone[place]
            together = self.decode(row[place - 1 : place + 1])
            made.append(spaced if together == alone[place - 1] + spaced else alone[place])
        return made

    def single_token(self, text: str) -> int:
        """The id of a string that is one token; what the tokenizer puts around a text is not counted.

        Raises:
            InputError: it is none or several.
        """
        if not isinstance(text, str):
            raise InputError(f"A single token is asked for by its text, a string; found {text!r}.")
        ids = own_ids(self.need(), text)
        if len(ids) != 1:
            pieces = [self.decode([token]) for token in ids]
            raise InputError(f"Input string: {text!r} is not a single token! It is {len(ids)}: {pieces}.")
        return int(ids[0])


def own_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, without what the tokenizer puts before and after one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def puts_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its beginning-of-sequence token before a text, as it is set now."""
    if tokenizer.bos_token_id is None:
        return False
    own = own_ids(tokenizer, "a")
    return bool(tokenizer("a")["input_ids"][: 1 + len(own)] == [tokenizer.bos_token_id, *own])


def as_ids(tokens: Any) -> Tensor:
    """Token ids as an integer tensor, whatever their shape.

    Raises:
        InputError: they are none.
    """
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is not None and not ids.numel():
        return ids.long()
    if ids is None or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        found = type(tokens).__name__ if ids is None else str(ids.dtype)
        raise InputError(f"Token ids are integers; found {found}.")
    return ids


def check_mask(mask: Any, batch: int, length: int, past: int, device: torch.device) -> Tensor:
    """A padding mask ``[batch, past + pos]`` as int64 0 and 1.

    Raises:
        InputError: not a mask of zeros and ones, or another shape; with a cache, one that leaves the past out.
    """
    if not isinstance(mask, Tensor):
        raise InputError(f"attention_mask must be a tensor [batch, pos]; found {type(mask).__name__}.")
    if tuple(mask.shape) != (batch, past + length):
        about = f" ({past} cached positions and {length} new ones)" if past else ""
        raise InputError(
            f"attention_mask must have shape {(batch, past + length)}{about}; found {tuple(mask.shape)}. 1 marks a real "
            "token, 0 padding."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask holds 1 at real tokens and 0 at padding; found other values.")
    return mask.to(device=device, dtype=torch.long)


def check_past(past: Any | None) -> None:
    """Refuse what is not one of Hugging Face's caches.

    Raises:
        InputError: such as the tuples of earlier releases, with the call that makes a cache of them.
    """
    if past is not None and not hasattr(past, "get_seq_length"):
        raise InputError(
            "past_key_values must be a Hugging Face cache, such as transformers.DynamicCache(); found a "
            f"{type(past).__name__}. Of tuples (key, value), one a layer, DynamicCache(those) makes one."
        )
