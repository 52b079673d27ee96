"""What a sweep found, and what made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.sweep.plan import SweepPlan
from pellucid.tables import Table


@dataclass(frozen=True, repr=False)
class SweepResult:
    """What a sweep found.

    Attributes:
        values: by metric, ``[edit, *score]``: ``[edit, row]`` for one of our metrics; NaN for edits not done.
        base: by metric, the base run's own score.
        done: ``[edit]``, which edits were done; all, unless the sweep was interrupted.
        plan: how it was done.
    """

    values: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    done: Tensor
    plan: SweepPlan

    def _table(self) -> Table:
        """Of each metric the base run's score, and the least and the largest of an edit."""
        rows = [
            (name, f"{float(self.base[name].double().mean()):.4g}", _extreme(values, False), _extreme(values, True))
            for name, values in self.values.items()
        ]
        done = int(self.done.sum())
        heading = f"SweepResult: {done} of {len(self.done)} edits done; mean over rows"
        return Table(heading, ("metric", "base run", "least", "largest"), rows)

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()


def _extreme(values: Tensor, largest: bool) -> str:
    """``0.25 at edit 3``."""
    means = values.detach().double().cpu().reshape(len(values), -1).mean(-1) if values.numel() else values.new_empty(0)
    known = means.isfinite()
    if not known.any():
        return "no edit has one"
    edit = int(means.where(known, -torch.inf).argmax() if largest else means.where(known, torch.inf).argmin())
    return f"{float(means[edit]):.4g} at edit {edit}"
