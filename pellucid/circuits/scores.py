"""Scores of edges with their error: one number an edge and pair of prompts, their mean, and what resampling the pairs says.

Scores are means over pairs, so that pairs can be drawn anew without another run of the model: a resample is a weight a pair,
and all resamples together one product ``[resample, pair] @ [pair, edge]`` (Meloux et al. 2025, arXiv 2510.00845, ask for 100
of them). Where the numbers of all pairs would take too much memory, blocks of pairs are kept, and blocks are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pellucid.arguments import check_count
from pellucid.attribution.resampling import (
    AT_ONCE,
    RESAMPLES,
    draw_counts,
    interval,
    pairwise_jaccard,
    rowwise_jaccard,
)
from pellucid.circuits.wiring import Wiring
from pellucid.errors import InputError
from pellucid.tables import BriefFields


@dataclass(frozen=True, eq=False, repr=False)
class Overlap(BriefFields):
    """Jaccard's measure (shared edges by all edges of two sets) of many pairs of sets.

    Attributes:
        mean: over the pairs of sets.
        low: lower end of the interval that holds 95 % of them.
        high: its upper end.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, measures: Sequence[float] | np.ndarray) -> Overlap:
        """Of the measures of many pairs of sets."""
        low, high = interval(measures)
        return cls(float(np.mean(measures)), float(low), float(high))


@dataclass(frozen=True, eq=False, repr=False)
class Stability(BriefFields):
    """How much of the ``n`` strongest edges is due to the prompts that were drawn.

    Attributes:
        n: edges of each set.
        in_top: ``[edge]``, the share of resamples in which an edge is among the ``n`` strongest.
        resamples: overlap of any two resamples' sets.
        halves: overlap of the sets of two halves of the pairs, for as many random halvings as resamples.
        seed: of the drawing.
    """

    n: int
    in_top: np.ndarray
    resamples: Overlap
    halves: Overlap
    seed: int


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(BriefFields):
    """Scores of every edge of a model.

    Attributes:
        wiring: the edges.
        values: ``[block, edge]``, the mean score over a block of pairs, of one pair as a rule; no rows where nothing was
            measured.
        sizes: ``[block]``, pairs of each block.
        about: what made them: method, sign, metric, prompts, model.
    """

    wiring: Wiring
    values: np.ndarray
    sizes: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_pairs(self) -> int:
        """Pairs that were measured."""
        return int(self.sizes.sum())

    @cached_property
    def mean(self) -> np.ndarray:
        """``[edge]``, over all pairs; NaN where nothing was measured."""
        if not len(self.values):
            return np.full(len(self.wiring), np.nan)
        return np.asarray((self.sizes / self.sizes.sum()).astype(self.values.dtype) @ self.values)

    @cached_property
    def error(self) -> np.ndarray:
        """``[edge]``, the standard error of the mean over pairs; NaN with fewer than two."""
        if len(self.values) < 2:
            return np.full(len(self.wiring), np.nan)
        weights = self.sizes / self.sizes.mean()
        spread = np.zeros(len(self.wiring))
        for weight, row in zip(weights, self.values, strict=True):
            spread += weight**2 * (row - self.mean).astype(np.float64) ** 2
        count = len(self.values)
        return np.sqrt(spread / (count - 1) / count)

    def strongest(self, n: int, among: np.ndarray) -> np.ndarray:
        """The ``n`` edges of ``among`` ``[edge]`` with the largest size of mean score, those first."""
        order = np.argsort(-np.abs(self.mean[among]), kind="stable")[:n]
        return among[order]

    # -- drawing pairs anew --------------------------------------------------------------------------------------------

    def stability(self, n: int, resamples: int = RESAMPLES, seed: int = 0) -> Stability:
        """What drawing the pairs anew, with replacement, and halving them at random makes of the ``n`` strongest edges.

        Args:
            n: edges.
            resamples: how often.
            seed: of the drawing; equal seeds, equal results.

        Raises:
            InputError: fewer than two pairs (or blocks of pairs), which nothing can be drawn from.
        """
        check_count("n", n, 1, len(self.wiring))
        check_count("resamples", resamples, 2)
        check_count("seed", seed, 0)
        self._refuse_few("resampling")
        rng, count = np.random.default_rng(seed), len(self.values)
        drawn = draw_counts(count, resamples, rng)
        first = np.zeros((resamples, count))
        for row in first:
            row[rng.permutation(count)[: count // 2]] = 1
        tops, one, other = np.split(self._tops(np.concatenate([drawn, first, 1 - first]), n), 3)
        in_top = np.bincount(tops.ravel(), minlength=len(self.wiring)) / resamples
        halves = rowwise_jaccard(one, other)
        return Stability(n, in_top, Overlap.of(pairwise_jaccard(tops)), Overlap.of(halves), seed)

    def _refuse_few(self, what: str) -> None:
        if len(self.values) < 2:
            raise InputError(
                f"{what} draws pairs of prompts anew, and these scores are of {self.n_pairs}"
                f"{' in one block' if self.n_pairs > 1 else ''}: give at least two pairs."
            )

    def _tops(self, drawn: np.ndarray, n: int) -> np.ndarray:
        """``[draw, n]``: the strongest edges of each draw ``[draw, block]`` of how often a block is in it."""
        weights = (drawn * self.sizes / (drawn * self.sizes).sum(1, keepdims=True)).astype(self.values.dtype)
        edges = self._contenders(weights, n)
        values, together = self.values[:, edges], max(1, AT_ONCE // len(edges))
        found = [
            np.argpartition(np.abs(some @ values), -n, axis=1)[:, -n:]
            for some in np.split(weights, range(together, len(weights), together))
        ]
        return np.asarray(edges[np.concatenate(found)])

    def _contenders(self, weights: np.ndarray, n: int) -> np.ndarray:
        """The edges that can be among the ``n`` strongest of a draw ``[draw, block]`` of weights that sum to 1.

        The ``n``-th strongest of a few edges is no stronger than that of all, and no edge is stronger in a draw than in its
        strongest block, but for rounding: a weighted mean is off by half an epsilon of its largest term for each block, and
        for the weights, here and in the draw.
        """
        few = self.strongest(2 * n, np.arange(len(self.wiring)))
        floor = np.partition(np.abs(weights @ self.values[:, few]), -n, axis=1)[:, -n].min()
        rounding = (len(self.values) + 1) * float(np.finfo(self.values.dtype).eps)
        return np.flatnonzero(np.abs(self.values).max(0) * (1 + rounding) >= floor)
