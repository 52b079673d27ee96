"""What a patching sweep found, when it is more than one tensor: several metrics, one value an example, a baseline."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.arguments import check_choice, check_kind, check_texts, check_wholes
from pellucid.errors import InputError, ResultKeyError
from pellucid.names import nearest
from pellucid.patching.statistics import bootstrap_interval, generator_for, sign_flip_pvalue, standard_error
from pellucid.tables import Table


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> pd.DataFrame:
    """Every combination of indices, the last column running fastest.

    Args:
        column_max_ranges: how many values each column takes: 0 to one less.
        column_names: their names.

    Returns:
        One row for each combination.
    """
    sizes, names = check_wholes("column_max_ranges", column_max_ranges), check_texts("column_names", column_names)
    if len(sizes) != len(names):
        raise InputError(f"column_names and column_max_ranges are of one length; found {len(names)} and {len(sizes)}.")
    rows = itertools.product(*(range(size) for size in sizes))
    return pd.DataFrame(list(rows), columns=names)


@dataclass(eq=False, repr=False)
class PatchingResult:
    """Metrics of a patching sweep, with statistics over examples.

    Attributes:
        values: ``[metric?, *axes, batch?]``, or ``[metric?, row of index_df, batch?]`` where an ``index_df`` was given.
        axis_names: names of the axes that were swept; empty where an ``index_df`` was given.
        index_df: one row for each cell, in the order of ``values``.
        metric_names: ``["metric"]`` for a single one.
        reduced: whether examples were averaged (or never separate), so that there is no batch axis.
        baseline: the corrupted run's own metric, ``[metric?, batch?]``, if it was asked for.
        has_metric_axis: whether there is a metric axis: several metrics were given by name.
        patch_type_names: what the entries of a ``patch_type`` axis are, for the ``_every`` functions.
    """

    values: Float[Tensor, "..."]
    axis_names: list[str]
    index_df: pd.DataFrame
    metric_names: list[str]
    reduced: bool
    baseline: Float[Tensor, "..."] | None = None
    has_metric_axis: bool = False
    patch_type_names: list[str] | None = None

    def __getitem__(self, metric_name: str) -> PatchingResult:
        """The result of one metric, without a metric axis.

        Raises:
            ResultKeyError: no metric is called that.
        """
        if metric_name not in self.metric_names:
            raise ResultKeyError(
                f"No metric is called {metric_name!r}. Nearest: {', '.join(nearest(str(metric_name), self.metric_names))}."
            )
        if not self.has_metric_axis:
            return self
        place = self.metric_names.index(metric_name)
        return PatchingResult(
            values=self.values[place],
            axis_names=list(self.axis_names),
            index_df=self.index_df,
            metric_names=[metric_name],
            reduced=self.reduced,
            baseline=None if self.baseline is None else self.baseline[place],
            patch_type_names=self.patch_type_names,
        )

    def _table(self) -> Table:
        """Of each metric the least and the largest mean over examples, and where."""
        means = self.mean().detach().double().cpu().reshape(len(self.metric_names), -1)
        baselines = [""] * len(means)
        if self.baseline is not None:
            per_metric = self.baseline.detach().double().cpu().reshape(len(means), -1)
            baselines = [f"{float(values.mean()):.4g}" for values in per_metric]
        rows = [
            (name, baseline, self._extreme(values, False), self._extreme(values, True))
            for name, baseline, values in zip(self.metric_names, baselines, means, strict=True)
        ]
        axes = " × ".join(self.axis_names or ["row of index_df"])
        examples = "mean over examples" if self.reduced else f"{self.values.shape[-1]} examples"
        heading = f"PatchingResult: {axes}, {len(self.index_df)} cells, {examples}"
        return Table(heading, ("metric", "baseline", "least", "largest"), rows)

    def _extreme(self, values: Tensor, largest: bool) -> str:
        known = values.isfinite()
        if not known.any():
            return "none is finite"
        cell = int(values.where(known, -torch.inf).argmax() if largest else values.where(known, torch.inf).argmin())
        place = ", ".join(f"{name} {value}" for name, value in self.index_df.iloc[cell].items())
        return f"{float(values[cell]):.4g} at {place}"

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    def _needs_examples(self, what: str) -> None:
        if self.reduced:
            raise InputError(f"{what} needs a value for each example; this result has their mean. Use reduce='none'.")

    def _baseline_beside_values(self) -> Tensor:
        """The baseline with an axis of one for each axis of ``values`` that it lacks."""
        if self.baseline is None:
            raise InputError("This needs the corrupted run's own metric, which was not kept. Use baseline=True.")
        lead = 1 if self.has_metric_axis else 0
        ones = [1] * (self.values.dim() - self.baseline.dim())
        return self.baseline.reshape(*self.baseline.shape[:lead], *ones, *self.baseline.shape[lead:])

    def mean(self) -> Float[Tensor, "..."]:
        """The mean over examples, ``[metric?, *axes]``."""
        return self.values if self.reduced else self.values.mean(dim=-1)

    def stderr(self) -> Float[Tensor, "..."]:
        """The standard error of that mean, ``[metric?, *axes]``.

        Raises:
            InputError: examples were averaged, or there is only one.
        """
        self._needs_examples("stderr")
        return standard_error(self.values)

    def effect(self) -> Float[Tensor, "..."]:
        """What each patch changes: ``values`` less the corrupted run's metric.

        Raises:
            InputError: there is no baseline.
        """
        return self.values - self._baseline_beside_values()

    def normalized(self, clean_baseline: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``(values - corrupted) / (clean - corrupted)``: 0 where a patch did nothing, 1 where it gave the clean metric.

        Where clean and corrupted score the same there is nothing to recover, and the answer is infinite or NaN.

        Args:
            clean_baseline: the metric of the clean run, of the shape of ``baseline``.

        Raises:
            InputError: there is no baseline, or ``clean_baseline`` has another shape.
        """
        corrupted = self._baseline_beside_values()
        assert self.baseline is not None
        check_kind("clean_baseline", clean_baseline, (Tensor, float, int), "the metric of the clean run, a tensor")
        clean = torch.as_tensor(clean_baseline, dtype=self.values.dtype, device=self.values.device)
        if clean.shape != self.baseline.shape:
            raise InputError(
                f"clean_baseline must have the shape of baseline, {tuple(self.baseline.shape)}; found {tuple(clean.shape)}."
            )
        return (self.values - corrupted) / (clean.reshape(corrupted.shape) - corrupted)

    def bootstrap_ci(
        self,
        *,
        confidence: float = 0.95,
        n_resamples: int = 1000,
        seed: int = 0,
        statistic: str = "mean",
        of_effect: bool = False,
    ) -> tuple[Float[Tensor, "*axes"], Float[Tensor, "*axes"]]:
        """A percentile bootstrap interval over examples.

        Few examples give a narrow and skewed one; equal examples a point.

        Args:
            confidence: share of resamples inside.
            n_resamples: how many.
            seed: of the resamples.
            statistic: ``"mean"`` or ``"median"``.
            of_effect: of :meth:`effect` in place of ``values``.

        Returns:
            Lower and upper ends, each ``[metric?, *axes]``.

        Raises:
            InputError: examples were averaged; no baseline with ``of_effect``; an argument out of range.
        """
        self._needs_examples("bootstrap_ci")
        data = self.effect() if of_effect else self.values
        check_choice("statistic", statistic, ("mean", "median"))
        return bootstrap_interval(data, statistic, confidence, n_resamples, generator_for(seed, "bootstrap", statistic))

    def permutation_pvalue(
        self, *, n_permutations: int = 1000, seed: int = 0, alternative: str = "two-sided"
    ) -> Float[Tensor, "..."]:
        """P-value of a mean effect of zero: the signs of the examples' effects are flipped.

        Exact for 12 examples or fewer. One p-value a cell: a sweep of many cells needs a correction for it.

        Args:
            n_permutations: patterns drawn where there are too many for all.
            seed: of those.
            alternative: ``"two-sided"``, ``"greater"`` or ``"less"``.

        Returns:
            ``[metric?, *axes]``.

        Raises:
            InputError: examples were averaged; no baseline; an argument out of range.
        """
        self._needs_examples("permutation_pvalue")
        return sign_flip_pvalue(self.effect(), alternative, n_permutations, generator_for(seed, "permutation"))

    def to_dataframe(self) -> pd.DataFrame:
        """Long form: a row for each metric, cell and example, with columns ``metric``, the index, ``example``, ``value``."""
        cells, examples = len(self.index_df), 1 if self.reduced else self.values.shape[-1]
        flat = self.values.detach().cpu().reshape(len(self.metric_names), cells * examples)
        index = self.index_df.iloc[[cell for cell in range(cells) for _ in range(examples)]]
        if self.patch_type_names is not None:
            names = [self.patch_type_names[int(number)] for number in index["patch_type"]]
            index = index.assign(patch_type_name=names)
        if not self.reduced:
            index = index.assign(example=list(range(examples)) * cells)
        parts = []
        for name, values in zip(self.metric_names, flat, strict=True):
            part = index.assign(value=values.tolist())
            part.insert(0, "metric", name)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)
