"""Statistics over examples, under TransformerLens' names; :mod:`pellucid.patching.statistics` has the rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_count, check_kind, check_list, check_number
from pellucid.errors import InputError
from pellucid.patching.statistics import AT_ONCE, EXACT_UP_TO, bootstrap_interval, generator_for, sign_flip_pvalue
from pellucid.patching.statistics import count_hits as _count_hits  # noqa: F401 (TransformerLens' name of it)
from pellucid.patching.statistics import standard_error as _standard_error
from pellucid.utilities.checks import check_axis, check_floating


def derive_generator(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator of its own for each seed and labels, the same in every process."""
    return generator_for(seed, *map(str, labels))


def _last(argument: str, x: Tensor, dim: int) -> Tensor:
    if check_floating(argument, x).ndim == 0:
        raise InputError(f"{argument} is a tensor of floating-point numbers with an axis of examples; found a scalar.")
    return x.movedim(check_axis("dim", dim, x), -1)


def _draws(generator: torch.Generator | None) -> torch.Generator:
    """The generator given, or that of seed 0; numbers are drawn on the CPU, the same for every device.

    Raises:
        InputError: no generator of the CPU.
    """
    if generator is None:
        return derive_generator(0)
    check_kind("generator", generator, torch.Generator, "a torch.Generator of the CPU")
    if generator.device.type != "cpu":
        raise InputError(f"generator is a torch.Generator of the CPU; found one of {generator.device}.")
    return generator


def standard_error(x: Tensor, *, dim: int = -1) -> Tensor:
    """Standard error of the mean along ``dim``, which is gone from the result.

    Raises:
        InputError: fewer than 2 examples.
    """
    moved = _last("x", x, dim)
    if moved.shape[-1] < 2:
        raise InputError(f"standard_error needs at least 2 samples along dim {dim}; found {moved.shape[-1]}.")
    return _standard_error(moved)


def bootstrap_ci(
    x: Tensor,
    *,
    dim: int = -1,
    statistic: str = "mean",
    confidence: float = 0.95,
    n_resamples: int = 1000,
    generator: torch.Generator | None = None,
    chunk_size: int = AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap of the mean or median along ``dim``: ``(low, high)``, without that axis.

    Raises:
        InputError: no examples, or an argument out of range.
    """
    drawn = _draws(generator)
    return bootstrap_interval(_last("x", x, dim), statistic, confidence, n_resamples, drawn, chunk_size)


def sign_flip_permutation_pvalue(
    effects: Tensor,
    *,
    dim: int = -1,
    n_permutations: int = 1000,
    generator: torch.Generator | None = None,
    alternative: str = "two-sided",
    exact_max_n: int = EXACT_UP_TO,
) -> Tensor:
    """P-value of a mean effect of zero along ``dim``, by flipping signs; exact up to ``exact_max_n`` examples.

    Raises:
        InputError: no examples, or an argument out of range.
    """
    check_count("exact_max_n", exact_max_n, 0)
    drawn = _draws(generator)
    return sign_flip_pvalue(_last("effects", effects, dim), alternative, n_permutations, drawn, exact_max_n)


@dataclass(frozen=True)
class SuccessRateInterval:
    """A success rate with its exact interval (Clopper and Pearson 1934), and the counts behind it."""

    point_estimate: float
    ci_low: float
    ci_high: float
    n_trials: int
    n_successes: int
    confidence: float


def success_rate_ci(successes: Sequence[bool], *, confidence: float = 0.95) -> SuccessRateInterval:
    """The share of successes, and the interval outside which a rate would give such a count too seldom.

    Raises:
        InputError: no trials, or one that is neither True nor False (1 or 0); a confidence that is not between 0 and 1.
    """
    listed = check_list("successes", successes, "truth values", empty=True)
    if not listed:
        raise InputError("successes must be a non-empty sequence: there are no trials.")
    check_number("confidence", confidence, above=0, at_most=1)
    count, trials = sum(map(_as_truth, listed)), len(listed)
    tail = (1 - confidence) / 2
    # P(X >= k) at the lower end, and P(X <= k) at the upper end, are the tail.
    low = 0.0 if count == 0 else _root(lambda p: 1 - _binomial_cdf(count - 1, trials, p) < tail)
    high = 1.0 if count == trials else _root(lambda p: _binomial_cdf(count, trials, p) > tail)
    return SuccessRateInterval(count / trials, low, high, trials, count, confidence)


def _as_truth(value: Any) -> bool:
    given = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(given, int | float | np.generic) and given in (0, 1):
        return bool(given)
    raise InputError(f"an entry of successes is True or False; found {given!r} ({type(given).__name__}).")


def _root(is_below: Callable[[float], bool]) -> float:
    """Where a condition on a rate between 0 and 1 stops holding, to the last bit."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """``P(X <= k)`` of ``n`` trials at rate ``p``; in logarithms, since binomial coefficients overflow."""
    if k < 0 or k >= n or p <= 0 or p >= 1:
        return float(k >= n or (k >= 0 and p <= 0))
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    top = max(logs)
    return min(1.0, math.exp(top) * math.fsum(math.exp(each - top) for each in logs))
