"""Statistics over examples: standard error, bootstrap intervals, a sign-flip permutation test.

Random streams are derived from a seed and labels as TransformerLens derives them, so that the same seed gives the same
resamples there and here. Percentile bootstrap: Efron and Tibshirani (1993), chapter 13. Sign flips: Fisher (1935).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_number, check_whole
from pellucid.errors import InputError

EXACT_UP_TO = 12
"""Examples up to which all sign patterns are tried: 4,096 of them."""

AT_ONCE = 256
"""Resamples made at once: bounds memory."""

TIE = 100
"""Units in the last place within which two means are called equal: their sums were made in different orders."""


def generator_for(seed: int, *labels: str) -> torch.Generator:
    """A CPU generator of its own for each seed and labels: 63 bits of the SHA-256 of ``seed:label:...``."""
    check_whole("seed", seed)
    digest = hashlib.sha256(":".join([str(seed), *labels]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def standard_error(values: Float[Tensor, "*axes example"]) -> Float[Tensor, "*axes"]:
    """Standard deviation (of a sample) over the root of the number of examples, ``[..., example]`` to ``[...]``.

    Raises:
        InputError: there is one example, which says nothing about spread.
    """
    count = values.shape[-1]
    if count < 2:
        raise InputError(f"A standard error needs 2 examples or more; there are {count}.")
    return values.std(dim=-1) / math.sqrt(count)


def bootstrap_interval(
    values: Float[Tensor, "*axes example"],
    statistic: str,
    confidence: float,
    n_resamples: int,
    generator: torch.Generator,
    at_once: int = AT_ONCE,
) -> tuple[Float[Tensor, "*axes"], Float[Tensor, "*axes"]]:
    """Percentile bootstrap of the mean or median over examples, ``[..., example]`` to two ``[...]``.

    Raises:
        InputError: no examples, or an argument out of range.
    """
    check_choice("statistic", statistic, ("mean", "median"))
    if check_number("confidence", confidence, above=0, at_most=1) == 1:
        raise InputError("confidence must be below 1: an interval that is sure to hold has no end.")
    check_count("n_resamples", n_resamples)
    count = values.shape[-1]
    if count < 1:
        raise InputError("There are no examples to resample.")
    drawn = []
    for size in _chunks(n_resamples, check_count("chunk_size", at_once)):
        chosen = torch.randint(0, count, (size, count), generator=generator).to(values.device)
        samples = values[..., chosen]
        drawn.append(samples.mean(dim=-1) if statistic == "mean" else samples.median(dim=-1).values)
    statistics = torch.cat(drawn, dim=-1).to(torch.promote_types(values.dtype, torch.float32))
    tail = (1 - confidence) / 2
    low, high = (torch.quantile(statistics, share, dim=-1).to(values.dtype) for share in (tail, 1 - tail))
    return low, high


def sign_flip_pvalue(
    effects: Float[Tensor, "*axes example"],
    alternative: str,
    n_permutations: int,
    generator: torch.Generator,
    exact_up_to: int = EXACT_UP_TO,
) -> Float[Tensor, "*axes"]:
    """P-value of a mean effect of zero, by flipping signs of examples, ``[..., example]`` to ``[...]``.

    Up to ``exact_up_to`` examples it is exact: the share of all sign patterns whose mean is at least as far out.
    Beyond, ``n_permutations`` patterns are drawn and the observed one is counted among them.

    Raises:
        InputError: no examples, or an argument out of range.
    """
    check_choice("alternative", alternative, ("two-sided", "greater", "less"))
    check_count("n_permutations", n_permutations)
    count = effects.shape[-1]
    if count < 1:
        raise InputError("There are no examples to permute.")
    wide = effects.to(torch.promote_types(effects.dtype, torch.float32))
    observed = wide.mean(dim=-1, keepdim=True)

    def as_far_out(signs: Tensor) -> Tensor:
        return count_hits((wide.unsqueeze(-2) * signs.to(wide)).mean(dim=-1), observed, alternative)

    if count <= exact_up_to:
        return as_far_out(torch.tensor(list(itertools.product((1.0, -1.0), repeat=count)))) / float(2**count)
    total = torch.zeros_like(observed[..., 0])
    for size in _chunks(n_permutations, AT_ONCE):
        total += as_far_out(torch.randint(0, 2, (size, count), generator=generator) * 2 - 1)
    return (total + 1) / (n_permutations + 1)


def count_hits(
    means: Float[Tensor, "*axes pattern"], observed: Float[Tensor, "*axes 1"], alternative: str
) -> Float[Tensor, "*axes"]:
    """How many of the means ``[..., pattern]`` are at least as far out as the observed one ``[..., 1]``."""
    slack = observed.abs() * (TIE * torch.finfo(means.dtype).eps)
    if alternative == "two-sided":
        out = means.abs() >= observed.abs() - slack
    else:
        out = means >= observed - slack if alternative == "greater" else means <= observed + slack
    return out.sum(dim=-1).to(means.dtype)


def _chunks(total: int, at_once: int) -> Iterator[int]:
    for start in range(0, total, at_once):
        yield min(at_once, total - start)
