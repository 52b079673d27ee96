"""Wilson's interval of a proportion (Wilson 1927): the values that a binomial test would not refuse.

Its ends are the two ``p`` at which ``(k/n - p)^2 = z^2 p (1 - p) / n``. Unlike the interval of a normal distribution around
``k/n`` it stays within 0 and 1 and has a width where ``k`` is 0.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from pellucid.arguments import check_number
from pellucid.errors import InputError


def wilson_interval(
    k: npt.ArrayLike, n: npt.ArrayLike, confidence: float = 0.95
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Both ends of the interval of ``k / n``.

    Args:
        k: how often something was seen, of any shape.
        n: how often it was looked for, which broadcasts with ``k``.
        confidence: probability that the interval holds the true proportion.

    Returns:
        lower and upper ends, float64.

    Raises:
        InputError: a confidence that is not between 0 and 1; counts that are negative, or above ``n``; ``n`` below 1.
    """
    if not check_number("confidence", confidence, above=0) < 1:
        raise InputError(f"confidence must be below 1; found {confidence}.")
    seen, looked = _numbers("k", k), _numbers("n", n)
    if bool((looked < 1).any()):
        raise InputError(f"n must be at least 1; found {looked.min():g}.")
    if bool((seen < 0).any()) or bool((seen > looked).any()):
        raise InputError("k is a count, from 0 to n; found one outside.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, over = seen / looked, z * z / looked
    middle = (p + over / 2) / (1 + over)
    half = np.sqrt(p * (1 - p) * over + over * over / 4) / (1 + over)
    # Exact where nothing, or everything, was seen: rounding would leave the interval outside of 0 to 1.
    return np.where(seen == 0, 0.0, middle - half), np.where(seen == looked, 1.0, middle + half)


def _numbers(argument: str, values: Any) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{argument} are counts; found {type(values).__name__}.") from None
