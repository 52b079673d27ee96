"""Where the text to run comes from: the command line, a file, or standard input; always UTF-8."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pellucid.errors import InputError


def read_prompt(text: str | None, prompt_file: Path | None) -> str:
    """The text to run. Of a file's or a pipe's text one line break at the end is left out: editors put it there.

    Raises:
        InputError: no text, several, or bytes that are not UTF-8.
    """
    if (text is None) == (prompt_file is None):
        raise InputError("Give the text to run once: as TEXT, as --prompt-file FILE, or - for standard input.")
    if prompt_file is not None:
        return _decode(prompt_file.read_bytes(), str(prompt_file))
    if text == "-":
        return _decode(sys.stdin.buffer.read(), "standard input")
    assert text is not None
    if not text:
        raise InputError("TEXT is empty: there is nothing to run.")
    return as_typed(text, "TEXT is not UTF-8: put it into a UTF-8 file and give --prompt-file.")


def read_lines(files: Sequence[Path], option: str) -> list[str]:
    """The lines of UTF-8 files that are not blank, in order.

    Raises:
        InputError: a file that is not there, or is not UTF-8.
    """
    lines: list[str] = []
    for file in files:
        if not file.expanduser().is_file():
            raise InputError(f"{option}: there is no file {file}.")
        try:
            text = file.expanduser().read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{option}: {file} is not UTF-8 at byte {error.start}: convert it first.") from None
        lines += [line for line in text.splitlines() if line.strip()]
    return lines


def as_typed(text: str, mistake: str) -> str:
    """An argument as UTF-8, also where the locale is not (the bytes it cannot read are hidden in lone surrogates).

    Raises:
        InputError: ``mistake``, if it is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeError:
            raise InputError(mistake) from None
    return text


def _decode(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 at byte {error.start}: convert it first.") from None
    text = text[: -len("\r\n")] if text.endswith("\r\n") else text.removesuffix("\n")
    if not text:
        raise InputError(f"{source} is empty: there is nothing to run.")
    return text
