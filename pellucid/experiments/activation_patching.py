"""Activation patching: put one run's activation into another run, place by place, and see what the metric does.

*Denoising* edits the corrupted run with the clean run's values: what is enough to bring the answer back. *Noising* edits
the clean run with the corrupted run's: what is needed for it (Heimersheim and Nanda 2024, arXiv 2404.15255). Metrics:
Zhang and Nanda (2024, arXiv 2309.16042), who advise logit difference and corrupting by exchanging tokens. Normalised values
are 0 at the corrupted run's metric and 1 at the clean run's, in both directions.

Each prompt is run once. The run that is edited is the sweep's base run; of the other one the site's activations are kept,
and what its metric is computed from. Another metric on the same two runs (:meth:`ActivationPatching.with_metric`) needs no
run of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import xarray as xr
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.arguments import check_choice
from pellucid.axes import ROWS_AT_ONCE, Index
from pellucid.errors import InputError
from pellucid.experiments.experiment import Experiment, Metrics, left_of
from pellucid.experiments.labelled import (
    LabelledSweep,
    Reference,
    about_metrics,
    between,
    check_scores,
    in_float32,
)
from pellucid.experiments.options import (
    Direction,
    NeuronGroups,
    OnInterrupt,
    PatchingChoices,
    Rows,
    SweepOptions,
    documented,
)
from pellucid.experiments.places import (
    Prompts,
    about_run,
    check_by,
    default_by,
    find_site,
    make_grid,
    read_prompts,
    refuse_different_lengths,
)
from pellucid.model_bridge.corpus.job_identity import marks
from pellucid.model_bridge.running.tokens import PaddingSide, TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.padding import last_real
from pellucid.sweep import FromRun, Sweep
from pellucid.sweep.base_run import BaseRun, KeptRun
from pellucid.sweep.scoring import UneditedLogits, Unembedding


class _Pair:
    """The two runs, each made once, and the cells at which the one is patched into the other."""

    def __init__(self, asked: ActivationPatching) -> None:
        bridge, options = asked.bridge, asked.options
        self.bridge, self.marks = bridge, marks(bridge)
        self.site = find_site(bridge, asked.site, options.layers)
        by = check_by(self.site, default_by(self.site, ("head", "pos")) if asked.by is None else asked.by)
        given = {"clean": asked.clean, "corrupted": asked.corrupted}
        self.prompts = {name: read_prompts(bridge, input, options) for name, input in given.items()}
        refuse_different_lengths(self.prompts["clean"], self.prompts["corrupted"], ("clean", "corrupted"))
        denoises = asked.direction == "denoising"
        self.base_name, self.source_name = ("corrupted", "clean") if denoises else ("clean", "corrupted")
        base, source = self.prompts[self.base_name], self.prompts[self.source_name]
        self.base, self.source = base.unedited(bridge), source.unedited(bridge)
        self._activations: dict[str, Tensor] = {}
        self._source_run: KeptRun | None = None
        self.grid = make_grid(bridge, base, self.site, by, lambda spec: FromRun(self._activations), options)

    def source_run(self) -> KeptRun:
        """The run that is patched from."""
        if self._source_run is None:
            with self.bridge.points_on(self.site.flags):
                self._source_run = self.source.observe([spec.name for spec in self.site.specs.values()])
            self._activations |= self._source_run.activations
        return self._source_run

    def base_run(self) -> BaseRun:
        """The run that is edited."""
        self.source_run()
        with torch.no_grad(), self.bridge.points_on(self.site.flags):
            return self.base.base(self.base.resolve(self.grid.edits))


@documented(PatchingChoices)
@dataclass(frozen=True, eq=False, repr=False)
class ActivationPatching(Experiment, PatchingChoices):
    """Patch every place of a site, one after the other, from one run into another.

    Attributes:
        bridge: the model, in eval mode.
        clean: prompt or prompts on which the model does what is studied: text, texts, or ids ``[row, pos]``.
        corrupted: their counterparts, of as many tokens row by row.
        metric: what is measured; ``None`` for an experiment that is given one by :meth:`with_metric`.
        options: those that experiments share.

    Raises:
        InputError: a word that an option does not know.
    """

    clean: TextOrTokens
    corrupted: TextOrTokens
    metric: Metrics | None
    _pairs: list[_Pair] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("direction", self.direction, ("denoising", "noising"))

    def _pair(self) -> _Pair:
        if not self._pairs or self._pairs[0].marks != marks(self.bridge):
            self._pairs[:] = [_Pair(self)]
        return self._pairs[0]

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the result of one metric, as they were asked for or by default."""
        return self._pair().grid.dims

    @property
    def prompts(self) -> dict[str, Prompts]:
        """The ``"clean"`` and the ``"corrupted"`` prompts as they were read."""
        return self._pair().prompts

    def with_metric(self, metric: Metrics) -> ActivationPatching:
        """The same experiment with another metric: it has the runs that this one has made."""
        made = replace(self, metric=metric)
        made._pairs[:] = self._pairs
        return made

    def last_logits(self) -> dict[str, Float[Tensor, "row d_vocab"]]:
        """``[row, d_vocab]`` after each row's last real token, of the ``"clean"`` and the ``"corrupted"`` run."""
        pair = self._pair()
        runs: dict[str, KeptRun | BaseRun] = {pair.source_name: pair.source_run(), pair.base_name: pair.base_run()}
        columns = last_real(pair.prompts["clean"].real)[:, None]
        with torch.no_grad():
            return {
                name: UneditedLogits(Unembedding(self.bridge), run.final, run.logits).at(columns)[:, 0]
                for name, run in runs.items()
            }

    def _prepare(self, progress: bool | None) -> LabelledSweep:
        if self.metric is None:
            raise InputError("No metric was given: experiment.with_metric(metric) has one.")
        pair, options, rows = self._pair(), self.options, self.options.rows
        make_sweep = partial(Sweep, self.bridge, metric=self.metric, logit_positions=options.logit_positions)
        make_sweep(pair.base)  # refuses what it cannot do, before anything is run
        source = pair.source_run()
        limit = left_of(options.memory_limit, source.nbytes)
        sweep = make_sweep(pair.base, memory_limit=limit, rows_at_once=options.rows_at_once)
        reference = Reference("metric")
        scores: dict[str, list[float]] = {}
        if self.normalize:
            ends = {
                pair.source_name: make_sweep(pair.source).scores(source),
                pair.base_name: sweep.scores(pair.base_run()),
            }
            ends = {name: in_float32(end) for name, end in ends.items()}
            for end in ends.values():
                check_scores(end, pair.prompts["clean"].n_rows, rows)
            reference = between(ends["corrupted"], ends["clean"], rows, ("corrupted", "clean"))
            scores = {f"{name}_metric": [float(s.double().mean()) for s in end.values()] for name, end in ends.items()}
        about = about_run(
            self.bridge,
            "activation patching",
            site=pair.site.name,
            hooks=[spec.name for spec in pair.site.specs.values()],
            direction=self.direction,
            base_run=pair.base_name,
            differs=pair.prompts["clean"].differing(pair.prompts["corrupted"]),
            **{name: prompts.text() for name, prompts in pair.prompts.items()},
            **about_metrics(self.metric, reference.kind),
            **scores,
        )
        several = isinstance(self.metric, Mapping)
        return LabelledSweep(sweep, pair.grid, reference, about, rows, several, pair.site.flags)


@documented(PatchingChoices, SweepOptions)
def activation_patching(
    bridge: TransformerBridge,
    clean: TextOrTokens,
    corrupted: TextOrTokens,
    metric: Metrics,
    site: str = "resid_pre",
    by: str | Sequence[str] | None = None,
    *,
    direction: Direction = "denoising",
    normalize: bool = True,
    rows: Rows = "mean",
    layers: Index = None,
    positions: Index = None,
    heads: Index = None,
    neurons: int | NeuronGroups | None = None,
    attention_mask: Shaped[Tensor, "row pos"] | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    progress: bool | None = None,
    on_interrupt: OnInterrupt = "raise",
) -> xr.DataArray:
    """Run :class:`ActivationPatching`: patch every place of a site, one after the other, from one run into another.

    Arguments are the fields of the experiment and of :class:`SweepOptions`; ``progress`` and ``on_interrupt`` those of its
    ``run``.

    Returns:
        ``[*by]`` (with several metrics ``[metric, *by]``; with ``rows="each"`` a last axis ``row``), coordinates
        ``layer``, ``pos``, ``head``, ..., and ``token``, the edited run's token at each position. A position that is
        padding in some rows is the mean of the others, NaN if in all. ``attrs`` has what it was made from.

    Raises:
        InputError: prompts of different token counts, an axis the site does not have, an index out of range, runs between
            which the metric does not differ, a model in training mode.
        HookNameError: no such site.
    """
    return ActivationPatching(
        bridge,
        clean,
        corrupted,
        metric,
        site=site,
        by=by,
        direction=direction,
        normalize=normalize,
        options=SweepOptions(
            rows=rows,
            layers=layers,
            positions=positions,
            heads=heads,
            neurons=neurons,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            logit_positions=logit_positions,
            memory_limit=memory_limit,
            rows_at_once=rows_at_once,
        ),
    ).run(progress=progress, on_interrupt=on_interrupt)
