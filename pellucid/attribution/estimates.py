"""Estimates of what patching each cell would do, for one batch of pairs.

1. The source run is made once, without a graph; the base run once, in autograd's graph, with RelP's rules and GradDrop's
   gates where a method needs them.
2. A backward pass a method (of AtP*, one more a layer) gives the gradients of all sites.
3. The effect of a cell is the sum of ``(source - base) * gradient`` over what the cell reaches.

Integrated gradients take the gradient at points on the straight way of one layer's activation from base to source, the rest
of the run following from it; what their cells sum to is then what patching the whole layer does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.attribution.cells import SiteCells
from pellucid.attribution.qk_fix import PatternChange, is_fixed, pattern_change, pattern_hooks, refuse_shared_norm
from pellucid.dtypes import widened
from pellucid.errors import UnsupportedModelError
from pellucid.experiments.options import Method
from pellucid.gradients import GradientRun, refuse_zero_gradient, run_with_gradients
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import Flag
from pellucid.sweep import MetricLike, Sweep
from pellucid.sweep.base_run import KeptRun
from pellucid.sweep.unedited import Unedited
from pellucid.tables import BriefFields

INTO_THE_PATTERN = (
    *("hook_q", "hook_k", "hook_q_normed", "hook_k_normed", "hook_rot_q", "hook_rot_k", "hook_attn_scores"),
    *("hook_q_in", "hook_k_in", "hook_q_input", "hook_k_input"),
)
"""Points that reach the metric through the pattern alone, which RelP takes for a constant."""


@dataclass(frozen=True, eq=False, repr=False)
class Estimates(BriefFields):
    """What one batch gives.

    Attributes:
        effects: by site and method, ``[row, *by]``, in the metric's unit.
        base: ``[row]``, the metric of the base run.
        source: ``[row]``, of the source run.
        deltas: by site, ``[row, layer]``: what integrated gradients sum to, less what patching the whole layer does.
    """

    effects: Mapping[tuple[str, Method], Float[Tensor, "row ..."]]
    base: Float[Tensor, " row"]
    source: Float[Tensor, " row"]
    deltas: Mapping[str, Float[Tensor, "row layer"]]


@dataclass(frozen=True, eq=False, repr=False)
class Estimator(BriefFields):
    """How a batch is estimated.

    Attributes:
        bridge: the model.
        sites: cells of each site.
        methods: in the order of the result.
        n_points: of integrated gradients.

    Raises:
        UnsupportedModelError: a site and a method that do not go together.
    """

    bridge: TransformerBridge
    sites: Sequence[SiteCells]
    methods: Sequence[Method]
    n_points: int

    def __post_init__(self) -> None:
        for site in self.sites:
            spec = site.cells.site.first
            if "relp" in self.methods and spec.site in INTO_THE_PATTERN:
                raise UnsupportedModelError(
                    f"RelP takes the attention pattern for a constant, so that nothing flows back to {site.name}: take the "
                    "method 'atp*', or the site v, z or pattern."
                )
            if "atp*" in self.methods and is_fixed(site):
                refuse_shared_norm(self.bridge, site)

    @property
    def flags(self) -> tuple[Flag, ...]:
        """Opt-in points that have to be on."""
        return tuple(dict.fromkeys(flag for site in self.sites for flag in site.cells.site.flags))

    @property
    def fixed(self) -> list[SiteCells]:
        """Sites for which AtP* computes the pattern's change."""
        return [site for site in self.sites if is_fixed(site)] if "atp*" in self.methods else []

    @property
    def hooks(self) -> list[str]:
        """The points of all sites."""
        return list(dict.fromkeys(name for site in self.sites for name in site.hooks))

    @property
    def n_forwards(self) -> int:
        """Runs of the model for a batch."""
        ways = sum(len(site.specs) for site in self.sites) if "ig" in self.methods else 0
        return 2 + len(self.fixed) + ways * (self.n_points + 1)

    @property
    def n_backwards(self) -> int:
        """Backward passes for a batch."""
        ways = sum(len(site.specs) for site in self.sites) if "ig" in self.methods else 0
        plain = bool({"atp", "atp*"} & set(self.methods))
        dropped = self.bridge.cfg.n_layers if "atp*" in self.methods else 0
        return int(plain) + int("relp" in self.methods) + dropped + ways * self.n_points

    def effect_bytes(self, n_pairs: int) -> int:
        """Bytes of the effects of so many pairs."""
        cells = sum(math.prod(site.cells.shape) for site in self.sites) * len(self.methods)
        return n_pairs * cells * max(4, self.bridge.dtype.itemsize)

    def source(self, source: Unedited) -> KeptRun:
        """The run that is patched from."""
        with self.bridge.points_on(self.flags):
            return source.observe(self.hooks)

    def estimate(self, base: Unedited, source: Unedited, metric: MetricLike, kept: KeptRun | None = None) -> Estimates:
        """The effects of a batch.

        Args:
            base: the run that is patched.
            source: the run that is patched from.
            metric: gives a number a row.
            kept: the source's run, where it was made already.

        Raises:
            GradientError: no gradient flows, or it is zero because the metric is a divergence from the base run itself.
            InputError: a metric that gives no number a row.
        """
        run_source = self.source(source) if kept is None else kept
        needed = [name for site in self.fixed for name in pattern_hooks(site)]
        ruled, drops = "relp" in self.methods, "atp*" in self.methods
        with self.bridge.points_on(self.flags):
            run = run_with_gradients(
                base,
                metric,
                [*self.hooks, *needed],
                rules=ruled,
                gates=drops,
            )
            refuse_zero_gradient(metric, run.scores.detach())
            values = {name: tensor.detach() for name, tensor in run.activations.items()}
            moved = {name: run_source.activations[name] - values[name] for name in self.hooks}
            effects: dict[tuple[str, Method], Tensor] = {}
            plain = run.gradients(last=not (ruled or drops)) if drops or "atp" in self.methods else {}
            for site in self.sites if "atp" in self.methods else ():
                effects[site.name, "atp"] = _linear(site, moved, plain)
            if ruled:
                plain = plain if drops else {}  # let go of before as many others are made
                by_rules = run.gradients(self.hooks, rules=True, last=not drops)
                for site in self.sites:
                    effects[site.name, "relp"] = _linear(site, moved, by_rules)
            if drops:
                changes = {
                    site.name: pattern_change(self.bridge, base, site, values, run_source.activations)
                    for site in self.fixed
                }
                for name, effect in self._star(run, moved, plain, changes).items():
                    effects[name, "atp*"] = effect
            scores = run.scores.detach()
            del run, plain
            deltas = dict[str, Tensor]()
            for site in self.sites if "ig" in self.methods else ():
                effects[site.name, "ig"], deltas[site.name] = self._integrated(
                    site, base, metric, values, moved, scores
                )
        of_source = Sweep(self.bridge, source, metric).scores(run_source)["metric"]
        return Estimates(effects, widened(scores), widened(of_source.reshape(-1)), deltas)

    # -- AtP* ----------------------------------------------------------------------------------------------------------

    def _star(
        self,
        run: GradientRun,
        moved: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
        changes: Mapping[str, PatternChange],
    ) -> dict[str, Tensor]:
        """By site: GradDrop's mean of magnitudes over the layers that are left out, with the sign that nothing left out has.

        A cell inside a layer has no effect without that layer, and the mean is over the others (L - 1, as in the paper); one
        on the stream has, and the mean is over all L.
        """

        def effects(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                site.name: site.summed(changes[site.name].products(gradients))
                if site.name in changes
                else _linear(site, moved, gradients)
                for site in self.sites
            }

        whole, n_layers = effects(plain), self.bridge.cfg.n_layers
        if n_layers == 1:
            return whole
        total = {name: torch.zeros_like(effect) for name, effect in whole.items()}
        for layer in range(n_layers):
            for name, effect in effects(run.gradients(list(plain), without_layer=layer)).items():
                total[name] += effect.abs()
        count = {site.name: n_layers if site.is_on_the_stream else n_layers - 1 for site in self.sites}
        return {name: whole[name].sign() * total[name] / count[name] for name in whole}

    # -- integrated gradients ------------------------------------------------------------------------------------------

    def _integrated(
        self,
        site: SiteCells,
        base: Unedited,
        metric: MetricLike,
        values: Mapping[str, Tensor],
        moved: Mapping[str, Tensor],
        scores: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``[row, *by]`` and the delta ``[row, layer]``."""
        products, deltas = dict[int | None, Tensor](), []
        for layer, spec in site.specs.items():
            start, way = values[spec.name], moved[spec.name]
            mean = torch.zeros_like(start)
            for place, weight in gauss_legendre(self.n_points):
                point = run_with_gradients(base, metric, [spec.name], instead={spec.name: start + place * way})
                mean += weight * point.gradients(last=True)[spec.name]
            products[layer] = widened(way) * mean
            end = run_with_gradients(base, metric, [spec.name], instead={spec.name: start + way}).scores.detach()
            whole = products[layer].flatten(1).sum(1)
            deltas.append(widened(whole - (end - scores).to(whole)))
        return site.summed(products), torch.stack(deltas, 1)


def gauss_legendre(n_points: int) -> list[tuple[float, float]]:
    """Points between 0 and 1 and their weights, which sum to 1: exact for polynomials of degree ``2 n_points - 1``."""
    places, weights = np.polynomial.legendre.leggauss(n_points)
    return [((place + 1) / 2, weight / 2) for place, weight in zip(places.tolist(), weights.tolist(), strict=True)]


def _linear(site: SiteCells, moved: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """``[row, *by]``: ``(source - base) * gradient``."""

    def product(layer: int | None) -> Tensor:
        name = site.specs[layer].name
        return widened(moved[name]) * gradients[name]

    return site.summed_from(product)
