"""The sweep: many edits of one base run, and the metric of each, with only the work that an edit can change.

1. The base run is computed once; residuals, keys and values of it are kept.
2. Each edit is compared with it: one that changes no bit, or nothing that can reach what the metric reads, scores what
   the base run scores.
3. The others are gathered to batches that fit the memory limit and run packed, layer by layer
   (:mod:`pellucid.sweep.packing`).
4. Final norm and unembedding run on the positions and tokens that the metric reads (:mod:`pellucid.sweep.scoring`).

Where that cannot be honoured (functions of the user's own are on the model; a metric reads padding, or other logits for
one edit than for another), an edit is one whole forward of the bridge with hooks: slower, never another number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_memory_limit
from pellucid.axes import ROWS_AT_ONCE
from pellucid.errors import InputError
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.padding import before_first_real
from pellucid.progress import progress_bar
from pellucid.sweep.base_run import BaseRun, KeptRun, base_bytes
from pellucid.sweep.edited_rows import EditedRow, fires_by_group, make_edited_row, needs_whole
from pellucid.sweep.edits import Write
from pellucid.sweep.metrics import Metric
from pellucid.sweep.packed_attention import RowGroup
from pellucid.sweep.packing import PackedModel
from pellucid.sweep.plan import Batch, Costs, Limits, SweepPlan, divide, make_batches, peak_bytes, widest_rows
from pellucid.sweep.result import SweepResult
from pellucid.sweep.scoring import (
    MetricLike,
    Scorer,
    UneditedLogits,
    Unembedding,
    by_reads,
    check_metrics,
    make_scorer,
)
from pellucid.sweep.unedited import EditSet, Unedited


@dataclass(eq=False)
class _Prepared:
    """Edits resolved against the base run."""

    edited: list[list[EditedRow]]
    writes: list[list[Write]]
    whole: list[int]
    packed: list[int]
    base: BaseRun
    scorers: dict[str, Scorer]
    base_scores: dict[str, Tensor]
    read: list[frozenset[int]]
    limits: Limits
    plan: SweepPlan
    unembed: Unembedding


class Sweep:
    """Many edits of one base run.

    Args:
        bridge: the model, in eval mode.
        input: the base run's prompt or prompts: a string, strings, or token ids ``[row, pos]``; or an :class:`Unedited`
            run that other sweeps share, which has its own mask and cache.
        metric: a :class:`~pellucid.sweep.metrics.Metric`, a function of logits ``[row, pos, d_vocab]``, or several by
            name. A function is watched on the base run, and only the logits that it reads are computed for each edit.
        attention_mask: ``[row, pos]``, 1 at real tokens; inferred for strings.
        base_cache: activations of this very run, to take in place of running it (see :meth:`needed_names`).
        logit_positions: the positions that a function may read; by default it is found out.
        memory_limit: bytes that the sweep may take beside the model; by default half of what is available.
        reserved: bytes of that limit that are taken elsewhere: by the values of the edits, say.
        rows_at_once: packed rows that go through a block together.
        prepend_bos: see :meth:`TransformerBridge.to_tokens`; for strings.
        padding_side: of shorter strings.

    Attributes:
        tokens: ``[row, pos]``, the token ids of the base run's positions; ``NO_TOKEN`` at virtual ones.
        attention_mask: ``[row, pos]`` of the base run's positions, ``None`` if nothing is padding.

    Raises:
        InputError: the model is in training mode; see also ``TransformerBridge.forward``.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        input: TextOrTokens | Unedited,
        metric: MetricLike | Mapping[str, MetricLike],
        *,
        attention_mask: Tensor | None = None,
        base_cache: Mapping[str, Tensor] | None = None,
        logit_positions: Sequence[int] | None = None,
        memory_limit: int | None = None,
        reserved: int = 0,
        rows_at_once: int = ROWS_AT_ONCE,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> None:
        check_count("rows_at_once", rows_at_once)
        check_count("reserved", reserved, at_least=0)
        check_memory_limit(memory_limit)
        if base_cache is not None and not isinstance(base_cache, Mapping):
            raise InputError(f"base_cache is a cache, or a dictionary by hook name; found {type(base_cache).__name__}.")
        bridge.runner.refuse_training()
        if not isinstance(input, Unedited):
            prepared = bridge.check_input(
                input, prepend_bos=prepend_bos, padding_side=padding_side, attention_mask=attention_mask
            )
            input = Unedited(bridge, prepared, base_cache)
        self.bridge, self._unedited = bridge, input
        self.tokens, self.attention_mask = input.tokens, input.attention_mask
        self.metrics: dict[str, MetricLike] = dict(metric) if isinstance(metric, Mapping) else {"metric": metric}
        if not self.metrics:
            raise InputError("No metric was given: metric is an empty mapping.")
        check_metrics(self.metrics, self.tokens, self.attention_mask, bridge.cfg.d_vocab, logit_positions)
        self._logit_positions, self._rows_at_once = logit_positions, rows_at_once
        self._memory_limit, self._reserved = memory_limit, reserved

    def __repr__(self) -> str:
        rows, columns = self.tokens.shape
        return f"Sweep({rows} rows of {columns} tokens; metrics {', '.join(self.metrics)})"

    # -- the base run --------------------------------------------------------------------------------------------------

    def needed_names(self, edits: Iterable[EditSet]) -> list[str]:
        """The hooks that a ``base_cache`` must hold for these edits."""
        return self._unedited.needed_names(edits)

    def base_activations(self, hooks: Iterable[str]) -> Mapping[str, Tensor]:
        """The base run's activations at these hooks, for edits that are worked out from them.

        A sweep of edits of the same hooks that follows does not run the base again.

        Args:
            hooks: names of hook points.

        Returns:
            By canonical name, ``[row, ...]``; not to be written to.
        """
        return self._unedited.activations(hooks)

    def base_scores(self, edits: Iterable[EditSet]) -> dict[str, Tensor]:
        """Each metric of the base run. A sweep of these edits that follows does not run the base again."""
        with torch.no_grad():
            return self.scores(self._unedited.base(self._unedited.resolve(edits)))

    def scores(self, run: BaseRun | KeptRun) -> dict[str, Tensor]:
        """Each metric of a run of this sweep's input that nothing was edited in."""
        with torch.no_grad():
            unedited = UneditedLogits(Unembedding(self.bridge), run.final, run.logits)
            return {name: unedited.score(scorer) for name, scorer in self._scorers(unedited).items()}

    def _scorers(self, unedited: UneditedLogits) -> dict[str, Scorer]:
        return {
            name: make_scorer(
                name, metric, self.tokens, self.attention_mask, self.bridge, unedited, self._logit_positions
            )
            for name, metric in self.metrics.items()
        }

    def forget(self) -> None:
        """Let go of the base run and its memory; the next call makes it anew."""
        self._unedited.forget()

    # -- planning ------------------------------------------------------------------------------------------------------

    def plan(self, edits: Iterable[EditSet]) -> SweepPlan:
        """What :meth:`run` would do with these edits; only the base run is computed."""
        with torch.no_grad():
            return self._prepare(edits).plan

    def _prepare(self, edits: Iterable[EditSet]) -> _Prepared:
        bridge, n_layers = self.bridge, self.bridge.cfg.n_layers
        writes = self._unedited.resolve(edits)
        base, blocked = self._unedited.base(writes), self._unedited.why_whole()
        on_logits = any("d_vocab" in write.spec.axes for chosen in writes for write in chosen)
        unedited = UneditedLogits(Unembedding(bridge), base.final, base.logits)
        unembed = Unembedding(bridge, whole=True) if on_logits else unedited.unembed
        scorers = self._scorers(unedited)
        why = blocked or self._why_padding_whole(scorers)
        read, padding_varies = self._read(scorers), self._unedited.padding_varies()
        edited: list[list[EditedRow]] = []
        whole, packed = [], []
        for edit, chosen in enumerate(writes):
            by_row: dict[int, list[Write]] = {}
            for write in chosen:
                by_row.setdefault(write.row, []).append(write)
            made = [
                each
                for row, of_row in by_row.items()
                if (each := make_edited_row(edit, of_row, base.sites, n_layers, base.length, read[row])) is not None
            ]
            edited.append(made)
            if why or needs_whole(chosen) or (padding_varies and any(fires_by_group(write.spec) for write in chosen)):
                if _changes(chosen, base):
                    whole.append(edit)
            elif made:
                packed.append(edit)
        if not why and whole:
            several = any(needs_whole(writes[edit]) for edit in whole)
            why = (
                "a function that looks at several positions" if several else "scores of a fused kernel, beside padding"
            )
        costs = Costs(bridge.cfg, bridge.dtype.itemsize, base.length, base.n_rows)
        read_cells = max(
            scorer.reads.columns.numel() * len(scorer.reads.tokens or range(bridge.cfg.d_vocab))
            for scorer in scorers.values()
        )
        if on_logits:
            read_cells = max(scorer.reads.columns.numel() for scorer in scorers.values()) * bridge.cfg.d_vocab
        limit = self._limit()
        kept = base_bytes(bridge, base.n_rows, base.length, self._unedited.first_layer)
        kept += sum(site.nbytes for site in base.sites.values()) + (0 if base.logits is None else base.logits.nbytes)
        widest = max((sum(widest_rows(each, costs) for each in edited[edit]) for edit in packed), default=0)
        limits = divide(costs, limit, kept, widest, read_cells, self._rows_at_once, self._reserved)
        batches = make_batches(edited, packed, costs, limits, read_cells)
        plan = SweepPlan(
            n_edits=len(writes),
            n_unchanged=len(writes) - len(whole) - len(packed),
            n_whole=len(whole),
            why_whole=why if whole else "",
            batches=batches,
            rows_at_once=limits.rows_at_once,
            flops=sum(batch.flops for batch in batches) + len(whole) * costs.whole_flops(),
            flops_whole=len(writes) * costs.whole_flops(),
            base_bytes=kept,
            peak_bytes=peak_bytes(kept, batches, costs, limits, read_cells, bool(whole)),
            memory_limit=limit,
        )
        base_scores = {name: unedited.score(scorer) for name, scorer in scorers.items()}
        return _Prepared(edited, writes, whole, packed, base, scorers, base_scores, read, limits, plan, unembed)

    def _limit(self) -> int:
        if self._memory_limit is not None:
            return self._memory_limit
        if self.bridge.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.bridge.device)[0]) // 2
        return int(psutil.virtual_memory().available) // 2

    def _why_padding_whole(self, scorers: Mapping[str, Scorer]) -> str:
        """A row of padding before the first token attends to everything, later columns too: not what packing assumes."""
        mask = self.attention_mask
        if mask is None:
            return ""
        before = before_first_real(mask).cpu()
        for scorer in scorers.values():
            if not isinstance(scorer.metric, Metric) and bool(before.gather(1, scorer.reads.columns).any()):
                return f"the metric {scorer.name!r} reads padding"
        return ""

    def _read(self, scorers: Mapping[str, Scorer]) -> list[frozenset[int]]:
        """Columns that any metric reads, by row."""
        rows = range(self.tokens.shape[0])
        return [
            frozenset(column for scorer in scorers.values() for column in scorer.reads.columns[row].tolist())
            for row in rows
        ]

    # -- running -------------------------------------------------------------------------------------------------------

    def run(
        self,
        edits: Iterable[EditSet],
        *,
        progress: bool | None = None,
        on_interrupt: Literal["raise", "return"] = "raise",
    ) -> SweepResult:
        """The metric of every edit.

        Args:
            edits: each an :class:`Edit`, or several that are made together.
            progress: show a bar; by default on a terminal.
            on_interrupt: at a KeyboardInterrupt ``"raise"`` it, or ``"return"`` what finished batches have found.

        Returns:
            The scores, in the order of ``edits``. The same call gives the same bits; another memory limit or other
            edits beside them may round differently, as other shapes of matrix products do.
        """
        check_choice("on_interrupt", on_interrupt, ("raise", "return"))
        with torch.no_grad():
            prepared = self._prepare(edits)
            return self._run(prepared, progress, on_interrupt)

    def _run(self, prepared: _Prepared, progress: bool | None, on_interrupt: str) -> SweepResult:
        plan = prepared.plan
        unchanged = torch.ones(plan.n_edits, dtype=torch.bool)
        unchanged[[*prepared.whole, *prepared.packed]] = False
        values = {name: base.expand(plan.n_edits, *base.shape).clone() for name, base in prepared.base_scores.items()}
        done = unchanged.clone()
        with progress_bar(total=plan.n_edits, desc="sweep", unit="edit", show=progress) as bar:
            bar.update(int(unchanged.sum()))
            try:
                rows = max((batch.rows for batch in plan.batches), default=0)
                model = PackedModel(self.bridge, prepared.base, prepared.read, prepared.limits.rows_at_once, rows)
                for batch in plan.batches:
                    again = self._run_batch(prepared, model, batch, values)
                    for edit in sorted(again):
                        self._run_whole(prepared, edit, values)
                    done[list(batch.edits)] = True
                    bar.update(len(batch.edits))
                for edit in prepared.whole:
                    self._run_whole(prepared, edit, values)
                    done[edit] = True
                    bar.update(1)
            except KeyboardInterrupt:
                if on_interrupt == "raise":
                    raise
                for value in values.values():
                    value[~done] = torch.nan
        return SweepResult(values, prepared.base_scores, done, plan)

    def _run_batch(self, prepared: _Prepared, model: PackedModel, batch: Batch, values: dict[str, Tensor]) -> set[int]:
        """Run one batch; returns the edits that have to be run whole."""
        base, groups = prepared.base, model.run(batch.edited)
        again: set[int] = set()
        place = {edit: i for i, edit in enumerate(batch.edits)}
        for scorers in by_reads(prepared.scorers):
            reads = scorers[0].reads
            for start in range(0, len(batch.edits), prepared.limits.logit_edits):
                chosen = batch.edits[start : start + prepared.limits.logit_edits]
                residual = self._final_residual(base, groups, reads.columns, place, start, len(chosen))
                logits = self._final_logits(prepared, chosen, residual, reads.columns, reads.tokens)
                for scorer in scorers:
                    for edit, score in zip(chosen, scorer.score(logits), strict=True):
                        if score is None:
                            again.add(edit)
                        elif isinstance(scorer.metric, Metric):
                            # Rows that the edit leaves alone keep the base run's bits.
                            rows = [each.row for each in prepared.edited[edit]]
                            values[scorer.name][edit, rows] = score[rows]
                        else:
                            _put(values, scorer.name, edit, score)
        return again

    def _final_residual(
        self,
        base: BaseRun,
        groups: Sequence[RowGroup],
        columns: Tensor,
        place: Mapping[int, int],
        start: int,
        count: int,
    ) -> Tensor:
        """``[edit, row, read, d_model]``: what leaves the last layer at the columns read."""
        rows = torch.arange(base.n_rows)[:, None]
        unedited = base.residual[self.bridge.cfg.n_layers][rows, columns]
        residual = unedited.expand(count, *unedited.shape).clone()
        read = columns.tolist()
        for group in groups:
            for i, each in enumerate(group.edited):
                edit = place[each.edit] - start
                if not 0 <= edit < count:
                    continue
                for j, column in enumerate(read[each.row]):
                    if column in group.columns:
                        residual[edit, each.row, j] = group.residual[i, group.columns.index(column)]
        return residual

    def _final_logits(
        self,
        prepared: _Prepared,
        edits: Sequence[int],
        residual: Tensor,
        columns: Tensor,
        tokens: tuple[int, ...] | None,
    ) -> Tensor:
        """``[edit, row, read, token]``, edits of the final norm and of the logits made on the way."""
        n_layers = self.bridge.cfg.n_layers
        n_rows, n_read = columns.shape
        read = columns.tolist()
        placed: dict[str, list[tuple[Write, Tensor]]] = {}
        for e, edit in enumerate(edits):
            for each in prepared.edited[edit]:
                for write in each.writes.get(n_layers, ()):
                    there = read[each.row]
                    kept = tuple(k for k in write.kept if write.declared[k] in there)
                    if kept:
                        first = (e * n_rows + each.row) * n_read
                        at = torch.tensor([first + there.index(write.declared[k]) for k in kept])
                        placed.setdefault(write.spec.name, []).append((write.kept_to(kept), at))
        if not placed:
            return prepared.unembed(residual, tokens)
        hooks = [(name, partial(_make_all, tuple(found))) for name, found in placed.items()]
        with self.bridge.hooks(fwd_hooks=hooks):
            return prepared.unembed(residual, tokens)

    def _run_whole(self, prepared: _Prepared, edit: int, values: dict[str, Tensor]) -> None:
        """One edit as one forward of the bridge, hooks and all."""
        by_name: dict[str, list[Write]] = {}
        for write in prepared.writes[edit]:
            by_name.setdefault(write.spec.name, []).append(write)
        hooks = [(name, partial(_make_whole, tuple(writes))) for name, writes in by_name.items()]
        logits = self.bridge.run_with_hooks(**self._unedited.input, fwd_hooks=hooks)
        for name, scorer in prepared.scorers.items():
            _put(values, name, edit, scorer.score_whole(logits))


def _put(values: dict[str, Tensor], name: str, edit: int, score: Tensor) -> None:
    if score.shape != values[name].shape[1:]:
        raise InputError(
            f"The metric {name!r} gave shape {tuple(score.shape)} for an edit and {tuple(values[name].shape[1:])} for the "
            "base run; it must be the same for all."
        )
    values[name][edit] = score.to(values[name])


def _make_all(found: Sequence[tuple[Write, Tensor]], tensor: Tensor, hook: Any) -> None:
    for write, places in found:
        write.make(tensor[0], places)


def _make_whole(writes: Sequence[Write], tensor: Tensor, hook: Any) -> None:
    for write in writes:
        write.make(tensor[write.row], torch.tensor(write.columns))


def _changes(writes: Sequence[Write], base: BaseRun) -> bool:
    return any(write.where_it_changes(base.sites[write.spec.name]).kept for write in writes)
