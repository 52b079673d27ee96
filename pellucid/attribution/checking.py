"""An attribution's experiment: cells really patched by a sweep over the same pairs.

1. The cells of the largest effects are patched, each alone, and as many of the others at random. On these the estimate and
   the experiment are compared.
2. Cells that are left over are taken for unlikely. Random halves of them are patched together (the diagnostic of AtP*,
   arXiv 2403.00745). If effects add, the effects of random halves have the variance ``sum e^2 / 4``, so that twice their
   deviation bounds the effect ``|e|`` of any one of them; the bound told is that of the deviation's upper confidence limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from pellucid.attribution.cells import SiteCells
from pellucid.attribution.resampling import Numbers, pearson, spearman
from pellucid.sweep import FromRun, Value
from pellucid.sweep.edits import Edit, Write
from pellucid.tables import BriefFields

SUBSETS = 16
"""Random halves of the unlikely cells."""

CHI_SQUARE = 7.261
"""The 5 % quantile of chi-square with ``SUBSETS - 1`` degrees of freedom."""

LOW_AGREEMENT = 0.7
"""A Pearson correlation below is called low."""


@dataclass(frozen=True, eq=False, repr=False)
class Mixed(BriefFields, Value):
    """Another run's numbers where a mask says so, and what is there elsewhere.

    Attributes:
        run: the other run's activations by hook, ``[row, *axes]``.
        masks: by hook ``[1, *axes]`` bool.
    """

    run: Mapping[str, Shaped[Tensor, "row ..."]]
    masks: Mapping[str, Bool[Tensor, "1 ..."]]
    relative = True

    def new(self, current: Shaped[Tensor, "*axes"], write: Write) -> Shaped[Tensor, "*axes"]:
        """The mixture."""
        columns, name = torch.tensor(write.columns), write.spec.name
        taken = write.region_of(self.run[name][write.row], columns)
        mask = write.region_of(self.masks[name][0], columns).to(current.device)
        return torch.where(mask, taken.to(current), current)


@dataclass(frozen=True, eq=False, repr=False)
class Chosen(BriefFields):
    """The cells of one site that are patched.

    Attributes:
        site: all its cells.
        best: numbers of those of the largest effects, by any method.
        sample: numbers of the others that were drawn.
        halves: ``[subset, cell]`` bool, the unlikely cells of each half; no subsets where none are unlikely.
    """

    site: SiteCells
    best: Sequence[int]
    sample: Sequence[int]
    halves: Bool[Tensor, "subset cell"]

    @property
    def cells(self) -> list[int]:
        """Those patched alone, in the order of :meth:`edits`."""
        return [*self.best, *self.sample]

    @property
    def n_edits(self) -> int:
        """Edits of :meth:`edits`."""
        return len(self.cells) + len(self.halves)

    def edits(self, run: Mapping[str, Shaped[Tensor, "row ..."]], sizes: Mapping[str, int]) -> list[list[Edit]]:
        """An edit set for each cell, then one for each half.

        Args:
            run: activations that are patched from.
            sizes: how long each axis is.
        """
        cells = self.site.cells
        value = FromRun(run)
        alone = [cells.edits(cells.at(cell), lambda spec: value) for cell in self.cells]
        together = []
        for half in self.halves:
            mixed = Mixed(run, self.site.spread(half.view(cells.shape), sizes))
            together.append([Edit(name, mixed) for name in self.site.hooks])
        return [*alone, *together]


def choose(site: SiteCells, effects: Sequence[Numbers], count: int, seed: int) -> Chosen:
    """The cells of a site that are patched.

    Args:
        site: its cells.
        effects: of each method ``[cell]``.
        count: how many of the largest of each method, and how many of the others.
        seed: of what is drawn.
    """
    n_cells = math.prod(site.cells.shape)
    tops = [np.argsort(-np.abs(effect), kind="stable")[:count].tolist() for effect in effects]
    best = list(dict.fromkeys(cell for top in tops for cell in top))
    generator = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(n_cells), best)
    sample = sorted(generator.permutation(others)[:count].tolist())
    left = torch.from_numpy(np.setdiff1d(others, sample))
    halves = torch.zeros((SUBSETS if len(left) > 1 else 0, n_cells), dtype=torch.bool)
    for half in halves:
        half[left[torch.from_numpy(generator.random(len(left)) < 0.5)]] = True
    return Chosen(site, best, sample, halves)


@dataclass(frozen=True, eq=False, repr=False)
class Verdict(BriefFields):
    """What the experiment says of the estimates.

    Attributes:
        patched: ``[cell]``, the measured effect, NaN where there is none.
        pearson: of each method, with the measured effects.
        spearman: of each method.
        largest_in_sample: the largest magnitude measured among the cells drawn at random, NaN if none was.
        bound: on the magnitude of any cell that was not patched alone, NaN where none is left.
    """

    patched: Numbers
    pearson: list[float]
    spearman: list[float]
    largest_in_sample: float
    bound: float


def judge(chosen: Chosen, effects: Sequence[Numbers], measured: Numbers) -> Verdict:
    """Compare.

    Args:
        chosen: what was patched.
        effects: of each method ``[cell]``.
        measured: ``[edit]``, as :meth:`Chosen.edits` has them, in the unit of the effects.
    """
    cells = np.array(chosen.cells, dtype=np.int64)
    patched = np.full(math.prod(chosen.site.cells.shape), np.nan)
    patched[cells] = measured[: len(cells)]
    sample, halves = patched[list(chosen.sample)], measured[len(cells) :]
    return Verdict(
        patched,
        [pearson(effect[cells], patched[cells]) for effect in effects],
        [spearman(effect[cells], patched[cells]) for effect in effects],
        float(np.abs(sample).max()) if len(sample) else float("nan"),
        false_negative_bound(halves) if len(halves) else float("nan"),
    )


def false_negative_bound(halves: Numbers) -> float:
    """Twice the upper confidence limit (95 %) of the deviation of what random halves do, see the head of this file."""
    return 2 * float(np.std(halves, ddof=1)) * math.sqrt((len(halves) - 1) / CHI_SQUARE)
