"""Attribution patching: what patching each place would do, estimated for all places at once, and checked on some.

One convention: the effect of a place is ``(source - base) . gradient``, the gradient taken at the *base* run, the one that
is edited. Denoising, the default, edits the corrupted run with clean values. So an effect is the estimate of the change that
:func:`~pellucid.experiments.activation_patching.activation_patching` of the same site and axes measures; with
``normalize=True`` both are in units of the clean run's metric less the corrupted run's, and (denoising) they are the same
number: comparing them is a subtraction.

Methods: AtP (Nanda 2023; Syed et al., arXiv 2310.10348), AtP* (Kramar et al., arXiv 2403.00745), RelP (Rezaei Jafari et al.,
arXiv 2508.21258), integrated gradients (Sundararajan et al., arXiv 1703.01365) from base to source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_kind, check_list
from pellucid.attribution.cells import SiteCells, find_site_cells
from pellucid.attribution.checking import SUBSETS
from pellucid.attribution.choices import METHODS
from pellucid.attribution.estimates import Estimator
from pellucid.attribution.pair_pass import PairPass, refuse_too_much
from pellucid.attribution.results import SiteResult, flat
from pellucid.attribution.streaming import PairStream, Resuming, metric_identity
from pellucid.axes import ROWS_AT_ONCE, Index
from pellucid.corpora.pairs import PromptPairs
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.experiments.labelled import Attribute, about_metrics, between
from pellucid.experiments.options import AttributionChoices, By, Direction, Method, Rows, SweepOptions, documented
from pellucid.experiments.pairs import PairBatch, PairMetric, check_pairs, pair_batches
from pellucid.experiments.places import Prompts, about_run
from pellucid.model_bridge.corpus.job_identity import Watched
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json
from pellucid.sweep.metrics import Metric
from pellucid.sweep.scoring import check_metrics
from pellucid.tables import BriefFields

MOST_TEXTS = 20
"""Pairs whose texts a result has in its ``attrs``."""


@dataclass(frozen=True, eq=False, repr=False)
class AttributionPlan(BriefFields):
    """How much work an attribution is.

    Attributes:
        pairs: how many.
        batches: runs of several together.
        forwards: runs of the model, without the experiment's.
        backwards: backward passes.
        cells: places of each site.
        patched: edits of the experiment for each pair, at most.
        nbytes: bytes of the effects of all pairs.
    """

    pairs: int
    batches: int
    forwards: int
    backwards: int
    cells: Mapping[str, int]
    patched: int
    nbytes: int


@dataclass(frozen=True, eq=False, repr=False)
class _Prepared:
    """What is known before the model runs."""

    batches: list[PairBatch]
    estimator: Estimator


@documented()
@dataclass(frozen=True, eq=False, repr=False)
class AttributionPatching(BriefFields, AttributionChoices):
    """Estimate what patching every place of a site does, for all places at once, and patch some.

    Attributes:
        bridge: the model, in eval mode; its weights may be frozen.
        pairs: the prompts.
        metric: a class of metrics, which is given each batch's answers and foils; a metric; or a function of logits
            ``[row, pos, d_vocab]`` that gives a number a row. By default the logit difference of answer and foil.
        options: those that experiments share, as far as they are of prompts that are not padded.

    Raises:
        InputError: a number or a word that an option does not know.
    """

    bridge: TransformerBridge
    pairs: PromptPairs
    metric: PairMetric | None = None
    options: SweepOptions = field(default_factory=SweepOptions, kw_only=True)

    def __post_init__(self) -> None:
        check_pairs(self.pairs, self.metric)
        check_kind("options", self.options, SweepOptions, "SweepOptions(...)")
        for method in self.methods:
            check_choice("method", method, METHODS)
        if len(set(self.methods)) != len(self.methods):
            raise InputError(f"method={list(self.methods)} names one of them twice.")
        if not isinstance(self.site, str) and len(set(self.sites)) != len(self.sites):
            raise InputError(f"site={list(self.sites)} names one of them twice.")
        check_choice("direction", self.direction, ("denoising", "noising"))
        check_choice("rows", self.options.rows, ("mean", "each"))
        unknown = [name for name in self.by if name not in self.sites] if isinstance(self.by, Mapping) else []
        if unknown:
            raise InputError(f"by names the site {unknown[0]!r}, which is none of site={list(self.sites)}.")
        for name, least in (
            ("n_points", 1),
            ("check", 0),
            ("top_n", 1),
            ("resamples", 2),
            ("seed", 0),
            ("batch_size", 1),
        ):
            check_count(name, vars(self)[name], least)
        for name in ("attention_mask", "padding_side", "logit_positions"):
            if vars(self.options)[name] is not None:
                raise InputError(
                    f"{name} would have no effect: pairs of prompts are run by length, and nothing is padded."
                )

    @property
    def methods(self) -> tuple[Method, ...]:
        """As they were asked for."""
        asked = [self.method] if isinstance(self.method, str) else check_list("method", self.method, "methods")
        return tuple(asked)

    @property
    def sites(self) -> tuple[str, ...]:
        """As they were asked for."""
        return tuple([self.site] if isinstance(self.site, str) else check_list("site", self.site, "sites"))

    def plan(self) -> AttributionPlan:
        """What :meth:`run` is going to do. Nothing is computed."""
        prepared = self._prepare()
        estimator, n_batches = prepared.estimator, len(prepared.batches)
        cells = {site.name: math.prod(site.cells.shape) for site in estimator.sites}
        return AttributionPlan(
            pairs=len(self.pairs),
            batches=n_batches,
            forwards=n_batches * estimator.n_forwards,
            backwards=n_batches * estimator.n_backwards,
            cells=cells,
            patched=sum(
                min(count, (1 + len(self.methods)) * self.check) + (SUBSETS if self.check else 0)
                for count in cells.values()
            ),
            nbytes=estimator.effect_bytes(len(self.pairs)),
        )

    def run(
        self, *, progress: bool | None = None, checkpoint: str | Path | None = None, every: float = 60.0
    ) -> xr.Dataset | dict[str, xr.Dataset]:
        """The effects, how sure they are, and what patching says.

        Args:
            progress: show a bar on standard error; by default on a terminal.
            checkpoint: a folder for the state: the same call goes on from it after an interrupt, with equal bits.
            every: seconds between states.

        Returns:
            For one site a data set, for several one of each by name. ``effect`` ``[*by]``, the mean over pairs;
            ``standard_error`` ``[*by]``, by resampling pairs, NaN for one pair; ``patched`` ``[*by]``, the measured change,
            NaN where no patching was done; with ``rows="each"`` ``effect_of_pair`` ``[*by, pair]``; with ``"ig"``
            ``completeness_delta`` ``[layer]``, the largest over pairs, with a warning where it is over a twentieth of what
            the runs differ by. With several methods the effects have a first axis ``estimator``. ``attrs["summary"]`` says
            in words how far it agrees with the experiment.

        Raises:
            InputError: prompts of different lengths, axes without ``layer``, a metric that gives one number for several
                rows, runs between which the metric does not differ, a model in training mode, too little memory.
            GradientError: a metric or a model without gradient; a divergence expanded at its own reference.
            UnsupportedModelError: RelP at queries or keys, or of a family without rules.
            OtherJobError: the folder holds a state of another job.
            HookNameError: no such site.
        """
        resuming = Resuming(checkpoint, every)
        prepared = self._prepare()
        refuse_too_much(prepared.estimator, len(self.pairs), self.options.memory_limit)
        settings = {} if checkpoint is None else self._settings()
        watched = Watched(self.bridge, "the attribution")
        stream = PairStream(self.bridge, "attribution", settings, resuming, progress)
        denoises = self.direction == "denoising"
        done = PairPass(prepared.estimator, prepared.batches, denoises, self.options, stream)
        with stream.running(len(self.pairs) * (2 if self.check else 1)):
            done.estimate()
            spans, ends = self._spans(done)
            results = [self._result(done, site, spans) for site in prepared.estimator.sites]
            chosen = {each.site.name: each.choose(self.check, self.seed) for each in results} if self.check else {}
            if chosen:
                done.check(chosen)
        watched.refuse_change()
        found = {}
        for each in results:
            name = each.site.name
            verdict = None
            if chosen:
                verdict = each.verdict(chosen[name], flat(done.state.tensors[f"patched {name}"]))
            stability = each.stability(self.resamples, self.top_n, self.seed)
            about = self._about(prepared, each.site, ends)
            of_each = self.options.rows == "each"
            found[name] = each.data_set(about, stability, chosen.get(name), verdict, of_each)
        return found[self.site] if isinstance(self.site, str) else found

    def _prepare(self) -> _Prepared:
        """Everything that can be refused before the model runs.

        Raises:
            InputError: and others, see :meth:`run`.
        """
        bridge, options = self.bridge, self.options
        bridge.runner.refuse_training()
        batches = pair_batches(bridge, self.pairs, self.metric, self.batch_size, prepend_bos=options.prepend_bos)
        for batch in batches:
            check_metrics({"metric": batch.metric}, batch.clean.tokens, None, bridge.cfg.d_vocab, None)
        lengths = sorted({batch.clean.length for batch in batches})
        base = _all_rows([batch.corrupted if self.direction == "denoising" else batch.clean for batch in batches])
        by = self.by if isinstance(self.by, Mapping) else dict.fromkeys(self.sites, self.by)
        sites = [find_site_cells(bridge, base, site, by.get(site), options) for site in self.sites]
        if len(lengths) > 1:
            placed = [word for site in sites for word in site.cells.by if word in ("pos", "key_pos")]
            if placed or options.positions is not None:
                raise InputError(
                    f"The pairs have {', '.join(map(str, lengths))} tokens, and a position must mean the same in all of "
                    "them: leave pos out of by and positions out, or take pairs of one length."
                )
        return _Prepared(batches, Estimator(bridge, sites, self.methods, self.n_points))

    def _spans(self, done: PairPass) -> tuple[Tensor | None, dict[str, float]]:
        """``[pair]`` that effects are measured in, and the mean metric of either run."""
        base, source = done.state.tensors["base"].double(), done.state.tensors["source"].double()
        clean, corrupted = (source, base) if done.denoises else (base, source)
        if self.normalize:
            between({"metric": corrupted}, {"metric": clean}, self.options.rows, ("corrupted", "clean"))
        ends = {"clean_metric": float(clean.mean()), "corrupted_metric": float(corrupted.mean())}
        return (clean - corrupted if self.normalize else None), ends

    def _result(self, done: PairPass, site: SiteCells, spans: Tensor | None) -> SiteResult:
        tensors, several = done.state.tensors, not isinstance(self.method, str)
        found = [tensors[f"effect {site.name} {method}"] for method in self.methods]
        # Means are taken in float64; of a single pair none is, and a copy of all cells costs a part of a run.
        effects = [flat(each) if len(self.pairs) > 1 else widened(each).reshape(1, -1).numpy() for each in found]
        delta = tensors.get(f"delta {site.name}")
        of_pairs = None if spans is None else spans.numpy()
        return SiteResult(site, self.methods, several, effects, of_pairs, None if delta is None else flat(delta))

    def _about(self, prepared: _Prepared, site: SiteCells, ends: Mapping[str, float]) -> dict[str, Attribute]:
        base = "corrupted" if self.direction == "denoising" else "clean"
        source = "clean" if base == "corrupted" else "corrupted"
        texts: dict[str, Attribute] = {}
        if len(self.pairs) <= MOST_TEXTS:
            for name in ("clean", "corrupted"):
                of = {
                    row: text
                    for batch in prepared.batches
                    for row, text in zip(batch.rows, _texts(batch, name), strict=True)
                }
                texts[name] = [of[row] for row in sorted(of)]
        lengths = {batch.clean.length for batch in prepared.batches}
        differing = sorted({column for batch in prepared.batches for column in batch.clean.differing(batch.corrupted)})
        metric = about_metrics(prepared.batches[0].metric, "normalized" if self.normalize else "change")
        return about_run(
            self.bridge,
            "attribution patching",
            method=self.method if isinstance(self.method, str) else [*map(str, self.methods)],
            site=site.name,
            hooks=site.hooks,
            direction=self.direction,
            base_run=base,
            **({"differs": differing} if len(lengths) == 1 else {}),
            effect=f"({source} - {base}) . gradient",
            expanded_at=base if "ig" not in self.methods else f"{base}; ig: on the way from {base} to {source}",
            pairs=len(self.pairs),
            pairs_name=self.pairs.name,
            pairs_sha256=self.pairs.content_hash,
            **texts,
            **metric,
            **ends,
            **({"n_points": self.n_points} if "ig" in self.methods else {}),
            top_n=self.top_n,
            resamples=self.resamples,
            seed=self.seed,
        )

    def _settings(self) -> dict[str, Json]:
        """All that the state's numbers depend on beside the model."""
        options = self.options
        plain = {
            name: repr(vars(self)[name]) for name in ("site", "by", "method", "direction", "n_points", "check", "seed")
        }
        chosen = {
            name: repr(vars(options)[name]) for name in ("layers", "positions", "heads", "neurons", "prepend_bos")
        }
        return {
            **plain,
            **chosen,
            "normalize": self.normalize,
            "batch_size": self.batch_size,
            "pairs_sha256": self.pairs.content_hash,
            "metric": metric_identity(self.metric),
        }


def _all_rows(prompts: Sequence[Prompts]) -> Prompts:
    """Prompts of all batches as one, those of the first one's length."""
    same = [each for each in prompts if each.length == prompts[0].length]
    labels = tuple(row for each in same for row in each.labels)
    return Prompts(torch.cat([each.tokens for each in same]), None, labels, same[0].virtual)


def _texts(batch: PairBatch, name: str) -> list[str]:
    return (batch.clean if name == "clean" else batch.corrupted).text()


def as_pairs(clean: TextOrTokens | PromptPairs, corrupted: TextOrTokens | None) -> PromptPairs:
    """Prompts as activation patching takes them, as a table of pairs.

    Raises:
        InputError: no counterpart, or one too many.
    """
    if isinstance(clean, PromptPairs):
        if corrupted is not None:
            raise InputError("PromptPairs have their corrupted prompts: leave corrupted out.")
        return clean
    if corrupted is None:
        raise InputError("corrupted is missing: each clean prompt needs its counterpart.")
    return PromptPairs(_rows("clean", clean), _rows("corrupted", corrupted), name="prompts")


def _rows(name: str, given: TextOrTokens) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if isinstance(given, Tensor | np.ndarray):
        rows = given.tolist()
        return rows if given.ndim > 1 else [rows]
    listed = check_list(name, given, "texts, or rows of token ids")
    if all(type(token) is int for token in listed):
        return [listed]
    return [row.tolist() if isinstance(row, Tensor) else row for row in listed]


@documented(AttributionChoices, SweepOptions)
def attribution_patching(
    bridge: TransformerBridge,
    clean: TextOrTokens | PromptPairs,
    corrupted: TextOrTokens | None = None,
    metric: PairMetric | None = None,
    site: str | Sequence[str] = "z",
    by: By | Mapping[str, By | None] | None = None,
    *,
    method: Method | Sequence[Method] = "relp",
    direction: Direction = "denoising",
    normalize: bool = True,
    n_points: int = 20,
    check: int = 20,
    top_n: int = 20,
    resamples: int = 100,
    seed: int = 0,
    batch_size: int = 16,
    rows: Rows = "mean",
    layers: Index = None,
    positions: Index = None,
    heads: Index = None,
    neurons: int | None = None,
    prepend_bos: bool | None = None,
    memory_limit: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    every: float = 60.0,
) -> xr.Dataset | dict[str, xr.Dataset]:
    """Run :class:`AttributionPatching`: estimate what patching every place of a site does, and patch some.

    Arguments are ``clean`` and ``corrupted``, prompts as :func:`activation_patching` takes them or
    :class:`~pellucid.corpora.pairs.PromptPairs` alone, and the fields of the experiment and of :class:`SweepOptions`;
    ``progress``, ``checkpoint`` and ``every`` those of its ``run``. A metric that knows the answer of each row runs with all
    of them in one batch.

    Returns:
        See :meth:`AttributionPatching.run`.

    Raises:
        InputError: and others, see :meth:`AttributionPatching.run`.
    """
    pairs = as_pairs(clean, corrupted)
    if isinstance(metric, Metric) and not isinstance(clean, PromptPairs):
        check_count("batch_size", batch_size)
        batch_size = max(batch_size, len(pairs))
    return AttributionPatching(
        bridge,
        pairs,
        metric,
        site=site,
        by=by,
        method=method,
        direction=direction,
        normalize=normalize,
        n_points=n_points,
        check=check,
        top_n=top_n,
        resamples=resamples,
        seed=seed,
        batch_size=batch_size,
        options=SweepOptions(
            rows=rows,
            layers=layers,
            positions=positions,
            heads=heads,
            neurons=neurons,
            prepend_bos=prepend_bos,
            memory_limit=memory_limit,
            rows_at_once=rows_at_once,
        ),
    ).run(progress=progress, checkpoint=checkpoint, every=every)
