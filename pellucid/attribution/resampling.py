"""How sure the mean over pairs is: pairs drawn anew, with replacement, and what of the result stays (Méloux et al.,
arXiv 2510.00845, ask for 100 resamples and a Jaccard of 0.8). The draws, the interval and Jaccard's measure are spelled here
for all that draws pairs anew: attribution, edges of a circuit, its curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pellucid.tables import BriefFields

Numbers = NDArray[np.floating]

RESAMPLES = 100
"""How often pairs are drawn anew, where nobody says."""

CONFIDENCE = 0.95
"""Of intervals: the share of what was drawn that lies in them."""

AT_ONCE = 1 << 22
"""Cells of which resamples are computed together: 32 MiB of a hundred would be too many numbers for a large result."""


@dataclass(frozen=True, eq=False, repr=False)
class Stability(BriefFields):
    """How sure a mean over pairs is.

    Attributes:
        standard_error: ``[cell]``, the deviation of the mean over resamples.
        n: how many of the largest effects are compared.
        jaccard: of those ``n``, the mean over all pairs of resamples.
        spearman: rank correlation of the magnitudes between two halves of the pairs.
    """

    standard_error: Numbers
    n: int
    jaccard: float
    spearman: float


def mean_effects(effects: Numbers, spans: Numbers | None, counts: Numbers | None = None) -> Numbers:
    """``[draw, cell]`` of effects ``[pair, cell]``: their mean, over the mean of ``spans`` ``[pair]`` if there are some.

    Args:
        effects: of each pair.
        spans: what each pair's effects are measured in.
        counts: ``[draw, pair]``, how often each pair is drawn; by default once.
    """
    weights = np.ones((1, len(effects))) if counts is None else counts
    total: Numbers = weights @ effects
    below = weights.sum(1) if spans is None else weights @ spans
    total /= below[:, None]  # in place: a large result's copies take as long as a part of the run
    return total


def means_of(effects: Sequence[Numbers], spans: Numbers | None) -> Numbers:
    """``[method, cell]`` in float64: of each method :func:`mean_effects`, of each pair once.

    Args:
        effects: of each method ``[pair, cell]``; of a single pair in any precision.
        spans: what each pair's effects are measured in.
    """
    found = np.empty((len(effects), effects[0].shape[1]))
    for row, effect in zip(found, effects, strict=True):
        if len(effect) > 1:
            row[:] = mean_effects(effect, spans)[0]
        else:  # its mean is itself; 0 is added as a sum does it, which takes the sign from a zero
            np.add(effect[0], 0.0, out=row, dtype=np.float64)
            if spans is not None:
                row /= spans[0]
    return found


def draw_counts(n_pairs: int, resamples: int, seed: int | np.random.Generator) -> Numbers:
    """``[draw, pair]``: how often each pair is in each draw of ``n_pairs`` with replacement."""
    generator = np.random.default_rng(seed)  # one that is given is taken as it stands
    return generator.multinomial(n_pairs, np.full(n_pairs, 1 / n_pairs), size=resamples).astype(np.float64)


def interval(drawn: Sequence[float] | Numbers, axis: int | None = None) -> Numbers:
    """``[2, ...]``: the ends between which :data:`CONFIDENCE` of what was drawn lies, along ``axis`` or of all."""
    return np.asarray(np.quantile(np.asarray(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=axis))


def stability_of(effects: Numbers, spans: Numbers | None, resamples: int, n: int, seed: int) -> Stability:
    """How sure the mean of ``[pair, cell]`` is; NaN of a single pair.

    Args:
        effects: of each pair.
        spans: what they are measured in, ``[pair]``.
        resamples: how often pairs are drawn.
        n: how many of the largest effects are compared.
        seed: of the draws.
    """
    n_pairs, n_cells = effects.shape
    if n_pairs < 2:
        unknown = np.broadcast_to(np.float64("nan"), n_cells)  # one number in memory, however many cells
        return Stability(unknown, n, float("nan"), float("nan"))
    counts = draw_counts(n_pairs, resamples, seed)
    error, n = np.empty(n_cells), min(n, n_cells)
    best, where = np.empty((resamples, 0)), np.empty((resamples, 0), dtype=np.int64)
    step = max(1, AT_ONCE // resamples)
    for start in range(0, n_cells, step):
        means = mean_effects(effects[:, start : start + step], spans, counts)
        error[start : start + step] = means.std(0, ddof=1)
        sizes = np.concatenate([best, np.abs(means)], axis=1)
        places = np.concatenate([where, np.broadcast_to(np.arange(start, start + means.shape[1]), means.shape)], axis=1)
        top = np.argsort(-sizes, axis=1, kind="stable")[:, :n]
        best, where = np.take_along_axis(sizes, top, 1), np.take_along_axis(places, top, 1)
    order = np.random.default_rng(seed).permutation(n_pairs)
    halves = [order[: n_pairs // 2], order[n_pairs // 2 :]]
    one, other = (np.abs(mean_effects(effects[half], None if spans is None else spans[half])[0]) for half in halves)
    return Stability(error, n, mean_jaccard(where), spearman(one, other))


def mean_jaccard(chosen: NDArray[np.int64]) -> float:
    """The mean of :func:`pairwise_jaccard`; NaN of a single row."""
    return float(pairwise_jaccard(chosen).mean()) if len(chosen) > 1 else float("nan")


def pairwise_jaccard(chosen: NDArray[np.int64]) -> Numbers:
    """Of any two rows of ``[draw, n]`` distinct members, numbers from 0, their Jaccard measure; ``[pair of rows]``."""
    table = _members(chosen)
    return jaccard((table @ table.T)[np.triu_indices(len(chosen), 1)], chosen.shape[1])


def rowwise_jaccard(one: NDArray[np.int64], other: NDArray[np.int64]) -> Numbers:
    """Of each row of ``[draw, n]`` distinct members, numbers from 0, and that of ``other``; ``[draw]``."""
    tables = np.split(_members(np.concatenate([one, other])), 2)
    return jaccard((tables[0] * tables[1]).sum(1), one.shape[1])


def jaccard(shared: Numbers, n: int) -> Numbers:
    """Shared members of sets of ``n`` over all members of both."""
    shared = shared.astype(np.float64)
    return np.asarray(shared / (2 * n - shared))


def _members(chosen: NDArray[np.int64]) -> Numbers:
    """``[draw, member]`` of ``[draw, n]``: 1 where it is chosen, 0 elsewhere, for each member that any row has."""
    seen = np.zeros(int(chosen.max()) + 1, dtype=bool)
    seen[chosen] = True
    members = np.flatnonzero(seen)
    column = np.zeros(len(seen), dtype=np.int64)
    column[members] = np.arange(len(members))
    table = np.zeros((len(chosen), len(members)), dtype=np.float32)
    np.put_along_axis(table, column[chosen], 1, axis=1)
    return table


def pearson(one: Numbers, other: Numbers) -> float:
    """Correlation of two lists; NaN where one of them does not vary."""
    if len(one) < 2 or not np.ptp(one) or not np.ptp(other):
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def spearman(one: Numbers, other: Numbers) -> float:
    """Correlation of ranks, equal numbers having their mean rank."""
    return pearson(*(pd.Series(each).rank().to_numpy() for each in (one, other)))
