"""What a caller gives: one wording for what is of the wrong kind, or out of range, said before anything is done.

A boolean is no number here, though Python lets it count as one; a NumPy number is. A string is no list of strings, though
its characters are strings. An empty string is no path: it would mean the current folder.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from pellucid.errors import InputError

T = TypeVar("T")

_SHOWN = 80
"""Characters of a wrong value that an error shows."""


def _found(value: Any) -> str:
    """A value as an error shows it; ``repr`` of what is large would hide the message."""
    words = f"{value!r}"
    return f"{words if len(words) <= _SHOWN else words[:_SHOWN] + ' ...'} ({type(value).__name__})"


def check_whole(argument: str, value: Any) -> int:
    """A whole number, as ``int``.

    Raises:
        InputError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{argument} is a whole number; found {_found(value)}.")
    return int(value)


def check_count(argument: str, value: Any, at_least: int = 1, at_most: int | None = None) -> int:
    """A whole number within bounds, as ``int``.

    Raises:
        InputError: not a whole number, or out of bounds.
    """
    count = check_whole(argument, value)
    if count < at_least:
        raise InputError(f"{argument} must be at least {at_least}; found {value}.")
    if at_most is not None and count > at_most:
        raise InputError(f"{argument} must be at most {at_most}; found {value}.")
    return count


def check_number(
    argument: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """A finite number within bounds, as ``float``.

    Raises:
        InputError: not a number, not finite, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{argument} is a number; found {_found(value)}.")
    number = float(value)
    if not math.isfinite(number):
        raise InputError(f"{argument} must be finite; found {value}.")
    if number < at_least:
        raise InputError(f"{argument} must be at least {at_least:g}; found {value}.")
    if number <= above:
        raise InputError(f"{argument} must be above {above:g}; found {value}.")
    if number > at_most:
        raise InputError(f"{argument} must be at most {at_most:g}; found {value}.")
    return number


def check_wholes(argument: str, values: Any, at_least: int = 0, *, empty: bool = False) -> list[int]:
    """A list of whole numbers, each at least ``at_least``, as ``int``; not empty unless ``empty``.

    Raises:
        InputError: something else; an entry that is none.
    """
    listed = check_list(argument, values, "whole numbers", empty=empty)
    return [check_count(f"an entry of {argument}", value, at_least) for value in listed]


def check_list(argument: str, values: Any, of: str, *, empty: bool = False) -> list[Any]:
    """A list, a tuple, an array or another iterable that is no string and no mapping; not empty unless ``empty``.

    Raises:
        InputError: something else.
    """
    is_scalar = getattr(values, "ndim", None) == 0  # a tensor or an array that says it can be gone through, and cannot
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable) or is_scalar:
        raise InputError(f"{argument} is a list of {of}; found {_found(values)}.")
    listed = list(values)
    if not listed and not empty:
        raise InputError(f"{argument} is a list of {of}; found an empty one.")
    return listed


def check_text(argument: str, value: Any) -> str:
    """A string with something in it.

    Raises:
        InputError: something else.
    """
    if not isinstance(value, str) or not value:
        raise InputError(f"{argument} is a string that is not empty; found {_found(value)}.")
    return value


def check_texts(argument: str, values: Any) -> list[str]:
    """A list of strings. Not empty; of one string give ``[string]``.

    Raises:
        InputError: something else.
    """
    if isinstance(values, str):
        raise InputError(f"{argument} is a list of strings; found the string {_found(values)}. Give [{values!r}].")
    return [check_text(f"an entry of {argument}", value) for value in check_list(argument, values, "strings")]


def check_path(argument: str, value: Any) -> Path:
    """A file's or a folder's path.

    Raises:
        InputError: something else; an empty string, which would mean the current folder.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InputError(f"{argument} is a path; found {_found(value)}.")
    return Path(value)


def check_kind(argument: str, value: Any, kind: type[T] | tuple[type, ...], what: str) -> T:
    """An instance of a class; ``what`` says it in words.

    Raises:
        InputError: something else.
    """
    if not isinstance(value, kind):
        raise InputError(f"{argument} is {what}; found {_found(value)}.")
    return value  # type: ignore[return-value]


def check_mapping(argument: str, value: Any, what: str) -> Mapping[Any, Any]:
    """A mapping, such as a dictionary; ``what`` says from what to what.

    Raises:
        InputError: something else.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{argument} maps {what}; found {_found(value)}.")
    return value


def check_function(argument: str, value: Any, what: str) -> Callable[..., Any]:
    """Something that can be called.

    Raises:
        InputError: something else.
    """
    if not callable(value):
        raise InputError(f"{argument} is {what}; found {_found(value)}.")
    return value  # type: ignore[no-any-return]


def check_memory_limit(value: Any) -> None:
    """Bytes, or ``None``.

    Raises:
        InputError: something else.
    """
    if value is not None:
        check_count("memory_limit", value)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a value that is not one of ``choices``.

    Raises:
        InputError: naming the valid ones.
    """
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        words = [choice for choice in choices if isinstance(choice, str)]
        near = difflib.get_close_matches(value, words, 1, 0.0) if isinstance(value, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"Invalid {name}: {value!r}. {name} must be one of {', '.join(map(repr, choices))}.{hint}")
