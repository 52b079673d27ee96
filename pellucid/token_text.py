"""How a token is shown to a person: as the text it stands for, exactly, and never as something it is not.

Tokens are bytes. A byte-level tokenizer (BLOOM's, GPT-2's, Llama 3's) writes each byte as one printable character, so its
own names of tokens are unreadable outside ASCII (``æ³ķ`` for ``法``), and decoding one token alone loses any character that
several tokens share (``U+FFFD``). One of SentencePiece's kind (Llama 2's, Gemma's, Mistral's) names them by their text, with
``▁`` for a space and ``<0xE5>`` for a byte. A label goes back to the bytes and says what they are:

====================  ================================================================================================
``·`` ``⏎`` ``⇥``     space, line feed, tab
``⟨E5⟩⟨9B⟩``          bytes that are only part of a character
``⟨U+200D⟩``          a whole character that cannot be seen, or one that labels use for something else
``⟦<s>⟧``             a special token; the same letters in a text have no such brackets
``⟦250700⟧``          an id that the tokenizer has no token for (some vocabularies are padded)
``⟦…⟧``               no token: a position at which several prompts have different ones
``◌́``                 a combining mark with no letter before it in its token, on a dotted circle
====================  ================================================================================================

Labels are plain text: whoever puts one into markup (HTML, rich) escapes it there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Protocol

from pellucid.errors import InputError


class AddedToken(Protocol):
    """A token beside the byte-level vocabulary."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """What we need of a Hugging Face tokenizer."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """Tokens that are text, not bytes, by id."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The tokenizer's own name of a token."""
        ...

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """The id of a token by that name; another's where there is none."""
        ...


def _byte_table() -> dict[str, int]:
    """GPT-2's byte-level alphabet, backwards: printable Latin-1 is itself, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


_BYTES: Mapping[str, int] = _byte_table()
_SPACE = "▁"
"""A space in the names of SentencePiece's tokens; no name of a byte-level tokenizer has that character."""
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SIGNS: Mapping[str, str] = {" ": "·", "\n": "⏎", "\t": "⇥"}
_DOTTED_CIRCLE = "◌"
_RESERVED = frozenset((*_SIGNS.values(), *"⟨⟩⟦⟧", _DOTTED_CIRCLE, "\ufffd"))
"""Characters that mean something in a label, so that a text's own are written as code points."""

SEVERAL = "⟦…⟧"
"""The label of a position where several prompts have different tokens."""


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    """One token as a person should see it, see :mod:`pellucid.token_text`.

    Raises:
        InputError: a negative id.
    """
    return token_labels(tokenizer, [token_id])[0]


def token_labels(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Each token as a person should see it, see :mod:`pellucid.token_text`.

    Raises:
        InputError: a negative id.
    """
    names = _Names(tokenizer)
    return [names.label(int(token_id)) for token_id in ids]


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """The bytes of text that a token stands for; ``None`` for a special token or an id without a token.

    Raises:
        InputError: a negative id.
    """
    return _Names(tokenizer).bytes_of(token_id)


def tokens_to_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text that tokens stand for, special ones left out; bytes that make no character are written ``⟨E5⟩``.

    Raises:
        InputError: a negative id.
    """
    names = _Names(tokenizer)
    joined = b"".join(names.bytes_of(int(token_id)) or b"" for token_id in ids)
    return "".join(_loose_byte(char) or char for char in _characters(joined))


class _Names:
    """What a tokenizer's names of tokens mean, asked once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        space = tokenizer.convert_tokens_to_ids(_SPACE)
        self._marks_spaces = space is not None and tokenizer.convert_ids_to_tokens(space) == _SPACE

    def label(self, token_id: int) -> str:
        data = self.bytes_of(token_id)
        if data is not None:
            return _show(data)
        return f"⟦{self._added[token_id].content if token_id in self._added else token_id}⟧"

    def bytes_of(self, token_id: int) -> bytes | None:
        if token_id < 0:
            raise InputError(f"Token ids are 0 or more; found {token_id}.")
        if token_id in self._added:
            token = self._added[token_id]
            return None if token.special else self._text(token.content)
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if name is None:
            return None
        one_byte = _ONE_BYTE.fullmatch(name) if self._marks_spaces else None
        if one_byte is not None:
            return bytes.fromhex(one_byte[1])
        if not self._marks_spaces and all(char in _BYTES for char in name):
            return bytes(_BYTES[char] for char in name)
        return self._text(name)  # a tokenizer that is not byte-level names its tokens by their text

    def _text(self, name: str) -> bytes:
        return (name.replace(_SPACE, " ") if self._marks_spaces else name).encode()


def _characters(data: bytes) -> str:
    """UTF-8 text; a byte that is part of no character comes out as a lone surrogate, U+DC80 and up."""
    return data.decode("utf-8", errors="surrogateescape")


def _loose_byte(char: str) -> str | None:
    return f"⟨{ord(char) - 0xDC00:02X}⟩" if 0xDC80 <= ord(char) <= 0xDCFF else None


def _show(data: bytes) -> str:
    shown: list[str] = []
    has_base = False
    for char in _characters(data):
        sign = _loose_byte(char) or _SIGNS.get(char)
        if sign is None and (char in _RESERVED or not char.isprintable()):
            sign = f"⟨U+{ord(char):04X}⟩"
        if sign is None and not has_base and unicodedata.category(char).startswith("M"):
            sign = _DOTTED_CIRCLE + char
            has_base = True
        else:
            has_base = sign is None
        shown.append(char if sign is None else sign)
    return "".join(shown)
