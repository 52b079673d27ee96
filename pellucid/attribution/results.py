"""From the numbers of a pass to labelled results that say what they are, how sure, and whether it is so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from pellucid.attribution.cells import SiteCells
from pellucid.attribution.checking import LOW_AGREEMENT, Chosen, Verdict, choose, judge
from pellucid.attribution.choices import TITLES
from pellucid.attribution.resampling import Numbers, Stability, mean_effects, means_of, stability_of
from pellucid.errors import warn
from pellucid.experiments.labelled import Attribute
from pellucid.experiments.options import Method
from pellucid.tables import BriefFields

INCOMPLETE = 0.05
"""Integrated gradients that miss more than this part of the gap between the runs are warned of."""


@dataclass(frozen=True, eq=False, repr=False)
class SiteResult(BriefFields):
    """The numbers of one site.

    Attributes:
        site: its cells.
        methods: in the order of the result; an axis ``estimator`` where ``several``.
        several: whether there is that axis.
        effects: of each method ``[pair, cell]``, in the metric's unit; in float64, a single pair's as they were computed.
        spans: ``[pair]``, the clean run's metric less the corrupted run's; ``None`` where nothing is normalised.
        delta: ``[pair, layer]`` of integrated gradients.
    """

    site: SiteCells
    methods: Sequence[Method]
    several: bool
    effects: Sequence[Numbers]
    spans: Numbers | None
    delta: Numbers | None

    @cached_property
    def means(self) -> Numbers:
        """``[method, cell]``."""
        return means_of(self.effects, self.spans)

    def choose(self, count: int, seed: int) -> Chosen:
        """The cells that are patched."""
        return choose(self.site, list(self.means), count, seed)

    def stability(self, resamples: int, n: int, seed: int) -> list[Stability]:
        """Of each method."""
        return [stability_of(effect, self.spans, resamples, n, seed) for effect in self.effects]

    def verdict(self, chosen: Chosen, measured: Numbers) -> Verdict:
        """Of ``measured`` ``[pair, edit]``, in the metric's unit."""
        return judge(chosen, list(self.means), mean_effects(measured, self.spans)[0])

    def data_set(
        self,
        about: Mapping[str, Attribute],
        stability: Sequence[Stability],
        chosen: Chosen | None,
        verdict: Verdict | None,
        of_each: bool,
    ) -> xr.Dataset:
        """The result; ``attrs["summary"]`` says it in words."""
        cells = self.site.cells
        dims = cells.by

        def array(values: Numbers, more: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Any]:
            shaped = values.reshape(len(values), *cells.shape, *values.shape[2:])
            if self.several:
                return ("estimator", *dims, *more), shaped
            return (*dims, *more), shaped[0]

        coords: dict[str, Any] = dict(cells.coords)
        if self.several:
            coords["estimator"] = list(self.methods)
        variables = {
            "effect": array(self.means),
            "standard_error": array(np.stack([each.standard_error for each in stability])),
        }
        if of_each:
            spans = np.ones(1) if self.spans is None else self.spans[:, None]
            variables["effect_of_pair"] = array(np.stack([(effect / spans).T for effect in self.effects]), ("pair",))
            coords["pair"] = list(range(len(self.effects[0])))
        if self.delta is not None:
            scale = 1.0 if self.spans is None else abs(float(self.spans.mean()))
            worst = np.abs(self.delta).max(0) / scale
            along = ("layer",) if "layer" in dims else ()
            variables["completeness_delta"] = (along, worst if along else worst[0])
            self._warn_of_missing(float(np.abs(self.delta).max()), about)
        attrs: dict[str, Attribute] = {"summary": "", **about}
        attrs |= self._told({"jaccard": [each.jaccard for each in stability]})
        attrs |= self._told({"spearman_of_halves": [each.spearman for each in stability]})
        if chosen is not None and verdict is not None:
            variables["patched"] = (dims, verdict.patched.reshape(cells.shape))
            attrs |= self._told({"pearson": verdict.pearson, "spearman": verdict.spearman})
            attrs |= {
                "checked_best": len(chosen.best),
                "checked_at_random": len(chosen.sample),
                "largest_in_sample": verdict.largest_in_sample,
                "false_negative_bound": verdict.bound,
            }
        attrs["summary"] = "\n".join(self._words(about, chosen, verdict, stability))
        found = xr.Dataset(variables, coords, attrs)
        # A variable alone, as pictures are drawn of it, has none of the data set's attrs.
        whose = {name: attrs[name] for name in ("base_run", "differs") if name in attrs}
        for name in {"effect", "patched"} & set(variables):
            found[name].attrs |= whose
        return found

    def _warn_of_missing(self, delta: float, about: Mapping[str, Attribute]) -> None:
        """Integrated gradients that do not add up to what patching a layer does."""
        gap = abs(float(about["clean_metric"]) - float(about["corrupted_metric"]))  # type: ignore[arg-type]
        if delta > INCOMPLETE * gap:
            warn(
                f"Integrated gradients of {self.site.name} with n_points={about['n_points']} miss what patching a whole "
                f"layer does by up to {delta:.3g}, where the clean and the corrupted run are {gap:.3g} apart (see "
                "completeness_delta): take more n_points, and read patched, not effect, until then. More points do not help "
                "where a mixture of experts chooses others on the way: the metric jumps there."
            )

    def _told(self, numbers: Mapping[str, list[float]]) -> dict[str, Attribute]:
        """One number for one method, a list for several."""
        return {name: list(values) if self.several else values[0] for name, values in numbers.items()}

    def _words(
        self,
        about: Mapping[str, Attribute],
        chosen: Chosen | None,
        verdict: Verdict | None,
        stability: Sequence[Stability],
    ) -> list[str]:
        titles = [TITLES[method] for method in self.methods]
        n_pairs = about["pairs"]
        lines = [f"{', '.join(titles)} of {self.site.name} by {', '.join(self.site.cells.by)}; pairs: {n_pairs}."]
        if chosen is None or verdict is None:
            lines.insert(0, "Not checked: no cell was patched (check=0).")
        else:
            n_cells = len(chosen.cells)
            low = [
                f"{title} {value:.2f}"
                for title, value in zip(titles, verdict.pearson, strict=True)
                if not value >= LOW_AGREEMENT
            ]
            if low:
                lines.insert(
                    0,
                    f"LOW AGREEMENT with patching (Pearson on {n_cells} cells: {', '.join(low)}): read patched, not effect.",
                )
            for title, one, rank in zip(titles, verdict.pearson, verdict.spearman, strict=True):
                lines.append(f"{title} against patching, {n_cells} cells: Pearson {one:.2f}, Spearman {rank:.2f}.")
            if chosen.sample:
                found = verdict.largest_in_sample
                lines.append(f"Of {len(chosen.sample)} others at random the largest measured effect is {found:.3g}.")
            if len(chosen.halves):
                lines.append(f"No cell that was not patched is likely beyond {verdict.bound:.3g}, if effects add.")
        for title, each in zip(titles, stability, strict=True):
            if np.isfinite(each.jaccard):
                lines.append(
                    f"{title} over resampled pairs: Jaccard of the top {each.n} of {len(each.standard_error)} "
                    f"{each.jaccard:.2f}, Spearman of two halves {each.spearman:.2f}."
                )
        return lines


def flat(tensor: Float[Tensor, "pair ..."]) -> Numbers:
    """``[pair, cell]`` of ``[pair, *by]``, in float64: means are taken there."""
    found: Numbers = tensor.double().reshape(len(tensor), -1).numpy()
    return found
