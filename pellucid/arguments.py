"""Numbers that a caller gives: one wording for what is not one, or out of range, said before anything is done.

A boolean is no number here, though Python lets it count as one; a NumPy number is.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from pellucid.errors import InputError


def check_whole(argument: str, value: Any) -> int:
    """A whole number, as ``int``.

    Raises:
        InputError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{argument} is a whole number; found {value!r} ({type(value).__name__}).")
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
        raise InputError(f"{argument} is a number; found {value!r} ({type(value).__name__}).")
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
