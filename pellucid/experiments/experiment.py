"""What all experiments have in common: a plan, and a run that gives a labelled result.

An experiment is made of its bridge, its prompts, a metric and options, none of which change afterwards. What has to be
known before its sweep (runs of the model, means) is computed once, when it is first needed, and again only when the model
is no longer the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import xarray as xr

from pellucid.arguments import check_choice
from pellucid.errors import InputError
from pellucid.experiments.labelled import LabelledSweep
from pellucid.experiments.options import OnInterrupt, SweepOptions
from pellucid.model_bridge.corpus.job_identity import marks
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.sweep import MetricLike, SweepPlan
from pellucid.tables import BriefFields

Metrics: TypeAlias = MetricLike | Mapping[str, MetricLike]
"""A metric of :mod:`pellucid.sweep`; a function of logits ``[row, pos, d_vocab]`` that gives a number, or one a row; or
several by name."""


@dataclass
class _Kept:
    """What an experiment has computed, and the marks of the model that it holds for."""

    marks: object = None
    labelled: LabelledSweep | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Experiment(BriefFields, ABC):
    """Base of the experiments: :meth:`plan` says how much work it is, :meth:`run` does it."""

    bridge: TransformerBridge
    options: SweepOptions = field(default_factory=SweepOptions, kw_only=True)
    _kept: _Kept = field(default_factory=_Kept, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("rows", self.options.rows, ("mean", "each"))

    @abstractmethod
    def _prepare(self, progress: bool | None) -> LabelledSweep:
        """Compute what comes before the sweep."""

    def labelled(self, progress: bool | None = None) -> LabelledSweep:
        """The sweep behind it, with its cells, ready to be run.

        Args:
            progress: show a bar while it is made; by default on a terminal.

        Raises:
            InputError: what was asked for cannot be done, with what to do.
        """
        kept, now = self._kept, marks(self.bridge)
        if kept.labelled is None or kept.marks != now:
            kept.labelled, kept.marks = None, None  # let go of before the next one is made
            kept.labelled, kept.marks = self._prepare(progress), now
        return kept.labelled

    def plan(self) -> SweepPlan:
        """What :meth:`run` is going to do: edits, operations, memory. Only unedited runs are computed."""
        return self.labelled().plan()

    def run(self, *, progress: bool | None = None, on_interrupt: OnInterrupt = "raise") -> xr.DataArray:
        """The result, an axis for each of its words, with coordinates and what it was made from in ``attrs``.

        Args:
            progress: show a bar on standard error; by default on a terminal.
            on_interrupt: at a KeyboardInterrupt raise it, or return what is done, with NaN elsewhere.

        Raises:
            InputError: what was asked for cannot be done, with what to do.
        """
        check_choice("on_interrupt", on_interrupt, ("raise", "return"))
        return self.labelled(progress).run(progress=progress, on_interrupt=on_interrupt)


def left_of(memory_limit: int | None, taken: int) -> int | None:
    """What a memory limit leaves a sweep beside activations that are kept already.

    Raises:
        InputError: nothing.
    """
    if memory_limit is None:
        return None
    if memory_limit <= taken:
        raise InputError(
            f"memory_limit={memory_limit:,} bytes is too little: the activations to patch from take {taken:,}. Give more, "
            "or fewer layers at a time."
        )
    return memory_limit - taken
