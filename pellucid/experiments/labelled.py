"""A sweep whose cells have names: ready to be planned and run, its scores returned as a labelled array.

What the scores are turned into is the same for all analyses. With ``v`` the metric of an edited run, and two reference
values of each row:

==================  ====================================  ==========================================================
value               formula                               0 and 1 are
==================  ====================================  ==========================================================
``"normalized"``    ``(v - zero) / (one - zero)``         the two runs (Zhang and Nanda 2024, arXiv 2309.16042)
``"change"``        ``v - zero``                          0 is the unedited run, in the metric's unit
``"metric"``        ``v``                                 in the metric's unit
==================  ====================================  ==========================================================

Over several rows the mean is taken above and below the fraction, not of the fractions: a row in which the two runs hardly
differ would otherwise outweigh all others. A result keeps in ``attrs`` what it was made from, in strings, numbers and
lists of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal, TypeAlias

import torch
import xarray as xr
from jaxtyping import Float, Shaped
from torch import Tensor

import pellucid
from pellucid.arguments import check_kind, check_mapping
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.experiments.options import OnInterrupt, Rows
from pellucid.names import Flag
from pellucid.storage.json_text import finite, with_nan
from pellucid.sweep import (
    EditSet,
    KLDivergence,
    LogitDifference,
    LogProbability,
    Metric,
    MetricLike,
    NextTokenLoss,
    Normalized,
    Probability,
    ProbabilityDifference,
    Sweep,
    SweepPlan,
)
from pellucid.tables import BriefFields

Kind: TypeAlias = Literal["normalized", "change", "metric"]
Attribute: TypeAlias = "str | int | float | list[str] | list[int] | list[float]"

NO_UNIT = "1"


@dataclass(frozen=True, eq=False, repr=False)
class Grid(BriefFields):
    """What the cells of a sweep are.

    Attributes:
        dims: axis names, first to last.
        coords: by name, the axis it lies along and its values.
        shape: places of each axis.
        edits: the edits of each cell, the last axis fastest.
        columns: for each cell the columns ``[row]`` of padded rows it asks about, ``None`` for no one column.
    """

    dims: tuple[str, ...]
    coords: Mapping[str, tuple[str, list[Any]]]
    shape: tuple[int, ...]
    edits: Sequence[EditSet]
    columns: Sequence[tuple[int, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Reference(BriefFields):
    """Two values of each metric, ``[row]`` or a single one: what becomes 0, and what becomes 1."""

    kind: Kind
    zero: Mapping[str, Shaped[Tensor, "..."]] = field(default_factory=dict)
    one: Mapping[str, Shaped[Tensor, "..."]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class LabelledSweep(BriefFields):
    """A sweep ready to be run, see :meth:`plan` and :meth:`run`.

    Attributes:
        sweep: the engine, bound to the base run.
        grid: its cells.
        reference: what the scores are turned into.
        about: what the result's ``attrs`` say.
        rows: the mean over rows, or an axis ``row``.
        several: an axis ``metric``: a mapping of metrics was given.
        flags: opt-in hook points that are switched on while it runs.
    """

    sweep: Sweep
    grid: Grid
    reference: Reference
    about: Mapping[str, Attribute]
    rows: Rows = "mean"
    several: bool = False
    flags: tuple[Flag, ...] = ()

    def plan(self) -> SweepPlan:
        """What :meth:`run` is going to do: edits, operations, memory. Only the base run is computed."""
        with self.sweep.bridge.points_on(self.flags):
            return self.sweep.plan(self.grid.edits)

    def run(self, *, progress: bool | None = None, on_interrupt: OnInterrupt = "raise") -> xr.DataArray:
        """The labelled result.

        Args:
            progress: show a bar on standard error; by default on a terminal.
            on_interrupt: at a KeyboardInterrupt raise it, or return what is done, NaN elsewhere; ``attrs["done"]`` counts.

        Raises:
            InputError: a function of logits that gives neither one number nor one a row.
        """
        with self.sweep.bridge.points_on(self.flags):
            if not all(isinstance(metric, Metric) for metric in self.sweep.metrics.values()):
                check_scores(self.sweep.base_scores(self.grid.edits), self.sweep.tokens.shape[0], self.rows)
            found = self.sweep.run(self.grid.edits, progress=progress, on_interrupt=on_interrupt)
        base = in_float32(found.base)
        zero, one = dict(self.reference.zero), self.reference.one
        if self.reference.kind == "change" and not zero:
            zero = base
        arrays = [
            self._array(values, zero.get(name), one.get(name)) for name, values in in_float32(found.values).items()
        ]
        done = int(found.done.sum())
        about = dict(self.about) | {"cells": len(self.grid.edits), "done": done}
        about["base"] = [float(score.double().mean()) for score in base.values()]
        return self._joined(arrays).assign_attrs(about)

    def _array(self, values: Tensor, zero: Tensor | None, one: Tensor | None) -> xr.DataArray:
        """``[*dims]``, or ``[*dims, row]``."""
        n_rows = self.sweep.tokens.shape[0]
        by_row = values.reshape(values.shape[0], -1)
        real = self._real(by_row.shape[1])
        above = by_row if zero is None else by_row - zero.to(by_row)
        below = torch.ones_like(by_row) if one is None or zero is None else (one - zero).to(by_row).expand_as(by_row)
        if self.rows == "each":
            scores = (above / below).masked_fill(~real, torch.nan)
            return self._labelled(scores.view(*self.grid.shape, n_rows), ("row",))
        count = real.sum(-1)
        # An edit is not scored on rows where its column is padding, and neither are the values it is compared with.
        scores = (above * real).sum(-1) / count / ((below * real).sum(-1) / count)
        return self._labelled(scores.view(self.grid.shape), ())

    def _real(self, n_scores: int) -> Tensor:
        """``[cell, score]``: whether the cell's column is a token of the row. A score for all rows needs one of them."""
        mask = self.sweep.attention_mask
        real = torch.ones(len(self.grid.edits), self.sweep.tokens.shape[0], dtype=torch.bool)
        if mask is not None:
            for cell, columns in enumerate(self.grid.columns):
                for column in columns:
                    real[cell] &= mask[:, column].bool().cpu()
        return real if n_scores == real.shape[1] else real.any(-1, keepdim=True).expand(-1, n_scores)

    def _labelled(self, values: Tensor, more: tuple[str, ...]) -> xr.DataArray:
        return xr.DataArray(values.cpu().numpy(), dims=(*self.grid.dims, *more), coords=dict(self.grid.coords))

    def _joined(self, arrays: Sequence[xr.DataArray]) -> xr.DataArray:
        if not self.several:
            return arrays[0].rename(str(self.about["metric"]))
        joined = xr.concat(arrays, dim="metric", coords="minimal", compat="override")
        return joined.assign_coords(metric=list(self.sweep.metrics)).rename("metrics")


# -- metrics -----------------------------------------------------------------------------------------------------------

_WORDS: Mapping[type, tuple[str, str]] = {
    LogitDifference: ("logit difference", "logits"),
    LogProbability: ("log-probability", "nats"),
    Probability: ("probability", NO_UNIT),
    ProbabilityDifference: ("probability difference", NO_UNIT),
    KLDivergence: ("KL divergence", "nats"),
    NextTokenLoss: ("loss", "nats"),
}


def words_of(metric: MetricLike) -> tuple[str, str]:
    """A metric's name and unit; the unit of a function is not known and is ``""``."""
    if isinstance(metric, Normalized):
        return f"normalized {words_of(metric.metric)[0]}", NO_UNIT
    if isinstance(metric, Metric):
        return _WORDS.get(type(metric), (type(metric).__name__, ""))
    return (metric.__name__ if isinstance(metric, FunctionType) else type(metric).__name__), ""


def about_metrics(metric: MetricLike | Mapping[str, MetricLike], kind: Kind) -> dict[str, Attribute]:
    """``metric`` and ``units`` of a result; several of each for several metrics."""
    many = dict(metric) if isinstance(metric, Mapping) else {words_of(metric)[0]: metric}
    units = [NO_UNIT if kind == "normalized" else words_of(each)[1] for each in many.values()]
    named: dict[str, Attribute] = {"metric": list(many), "units": units}
    if not isinstance(metric, Mapping):
        named = {"metric": next(iter(many)), "units": units[0]}
    return named | {"value": kind}


def in_float32(scores: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, Float[Tensor, "..."]]:
    """Scores in float32 at least: a function of bfloat16 logits may give bfloat16, which numpy does not have.

    Differences and means of scores are then taken there, not in half precision.
    """
    return {name: widened(score) for name, score in scores.items()}


def check_scores(scores: Mapping[str, Shaped[Tensor, "..."]], n_rows: int, rows: Rows) -> None:
    """Refuse scores that are neither one number nor one a row; and one number where each row is asked for.

    Raises:
        InputError: naming the metric.
    """
    for name, score in scores.items():
        if score.dim() > 1 or (score.dim() == 1 and score.shape[0] != n_rows):
            raise InputError(
                f"The metric {name!r} gives shape {tuple(score.shape)} for {n_rows} rows; a labelled result takes one "
                "number, or one a row. Reduce it in the function, or run pellucid.sweep.Sweep with it."
            )
        if rows == "each" and score.dim() != 1:
            raise InputError(f'rows="each" needs a number for each row; the metric {name!r} gives one for all.')


def between(
    zero: Mapping[str, Shaped[Tensor, "..."]],
    one: Mapping[str, Shaped[Tensor, "..."]],
    rows: Rows,
    names: tuple[str, str],
) -> Reference:
    """The reference of normalised values.

    Args:
        zero: by metric, what becomes 0.
        one: by metric, what becomes 1.
        rows: whether each row has its own scale.
        names: what the two runs are called.

    Raises:
        InputError: the two are equal, or not finite: there is nothing between them.
    """
    for name, low in zero.items():
        span = (one[name] - low).double()
        span = span if rows == "each" else span.mean()
        if not bool(torch.isfinite(span).all()) or bool((span == 0).any()):
            raise InputError(
                f"The metric {name!r} is {_shown(low)} on the {names[0]} run and {_shown(one[name])} on the {names[1]} "
                "run: there is nothing between them to normalize by. Choose prompts or a metric on which the runs "
                "differ, or pass normalize=False."
            )
    return Reference("normalized", zero, one)


def _shown(score: Tensor) -> str:
    return ", ".join(f"{number:.6g}" for number in score.reshape(-1)[:4].tolist())


# -- opt-in hook points ------------------------------------------------------------------------------------------------


# -- saving ------------------------------------------------------------------------------------------------------------


def to_document(result: xr.DataArray) -> dict[str, Any]:
    """A result as JSON has it: names, axes, coordinates, numbers in nested lists (``None`` for NaN), ``attrs``.

    :func:`from_document` is its inverse, to the bit.
    """
    check_kind("result", result, xr.DataArray, "an array, as an analysis gives it")
    return {
        "pellucid": pellucid.__version__,
        "name": str(result.name),
        "dims": [str(dim) for dim in result.dims],
        "coords": {
            str(name): {"dims": [str(dim) for dim in coord.dims], "data": coord.values.tolist()}
            for name, coord in result.coords.items()
        },
        "dtype": str(result.dtype),
        "data": finite(result.values.tolist()),
        "attrs": {str(key): _plain(value) for key, value in result.attrs.items()},
    }


def from_document(document: Mapping[str, Any]) -> xr.DataArray:
    """What :func:`to_document` was given.

    Raises:
        InputError: it lacks something.
    """
    check_mapping("document", document, "names to what to_document gave")
    missing = [key for key in ("name", "dims", "coords", "dtype", "data", "attrs") if key not in document]
    if missing:
        raise InputError(f"document is no saved result: it has no {missing[0]!r}. to_document(result) makes one.")
    coords = {name: (tuple(coord["dims"]), coord["data"]) for name, coord in document["coords"].items()}
    made = xr.DataArray(
        with_nan(document["data"]), coords, tuple(document["dims"]), document["name"], dict(document["attrs"])
    )
    return made.astype(document["dtype"], keep_attrs=True)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
