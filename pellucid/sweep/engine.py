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
from typing import Any, Literal, TypeAlias

import psutil
import torch
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_list, check_memory_limit
from pellucid.errors import InputError
from pellucid.model_bridge.cache_plan import EMBEDDING
from pellucid.model_bridge.corpus.job_identity import marks
from pellucid.model_bridge.generalized_components.weights import why_not_by_row
from pellucid.model_bridge.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.padding import before_first_real
from pellucid.progress import progress_bar
from pellucid.sweep.base_run import BaseRun, base_bytes, needed_names, run_base
from pellucid.sweep.edits import Edit, Write, Zero, resolve
from pellucid.sweep.lazy_logits import Asked
from pellucid.sweep.metrics import Metric
from pellucid.sweep.packing import PackedModel, State
from pellucid.sweep.plan import Batch, Costs, Limits, SweepPlan, divide, make_batches, resident, widest_rows
from pellucid.sweep.runs import Run, make_run, needs_whole, stage_of
from pellucid.sweep.scoring import MetricLike, Scorer, Unembedding, by_reads, check_metrics, make_scorer
from pellucid.tables import Table

EditSet: TypeAlias = Edit | Sequence[Edit]
"""One edit, or several that are made together in one run."""

ROWS_AT_ONCE = 512
"""Packed rows that go through a block together: enough for quick matrix products, few enough for a processor's cache."""


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


@dataclass(eq=False)
class _Prepared:
    """Edits resolved against the base run."""

    runs: list[list[Run]]
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
        input: the base run's prompt or prompts: a string, strings, or token ids ``[row, pos]``.
        metric: a :class:`~pellucid.sweep.metrics.Metric`, a function of logits ``[row, pos, d_vocab]``, or several by
            name. A function is watched on the base run, and only the logits that it reads are computed for each edit.
        attention_mask: ``[row, pos]``, 1 at real tokens; inferred for strings.
        base_cache: activations of this very run, to take in place of running it (see :meth:`needed_names`).
        logit_positions: the positions that a function may read; by default it is found out.
        memory_limit: bytes that the sweep may take beside the model; by default half of what is available.
        reserved: bytes of that limit that are taken elsewhere: by the values of the edits, say.
        rows_at_once: packed rows that go through a block together.
        prepend_bos: put the beginning-of-sequence token before strings.
        padding_side: of shorter strings.

    Raises:
        InputError: the model is in training mode; see also ``TransformerBridge.forward``.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        input: TextOrTokens,
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
        _refuse_training(bridge)
        check_count("rows_at_once", rows_at_once)
        check_count("reserved", reserved, at_least=0)
        check_memory_limit(memory_limit)
        self.bridge = bridge
        self.metrics: dict[str, MetricLike] = dict(metric) if isinstance(metric, Mapping) else {"metric": metric}
        if not self.metrics:
            raise InputError("No metric was given: metric is an empty mapping.")
        self._prepared_input = bridge.check_input(
            input, prepend_bos=prepend_bos, padding_side=padding_side, attention_mask=attention_mask
        )
        self._positions = bridge.positions_of(self._prepared_input)
        check_metrics(self.metrics, self.tokens, self.attention_mask, bridge.cfg.d_vocab, logit_positions)
        if base_cache is not None and not isinstance(base_cache, Mapping):
            raise InputError(f"base_cache is a cache, or a dictionary by hook name; found {type(base_cache).__name__}.")
        self._base_cache = base_cache
        self._logit_positions = logit_positions
        self._memory_limit = memory_limit
        self._reserved = reserved
        self._rows_at_once = rows_at_once
        self._base: BaseRun | None = None
        self._base_marks: tuple[object, ...] = ()
        self._base_first = 0

    def __repr__(self) -> str:
        rows, columns = self.tokens.shape
        return f"Sweep({rows} rows of {columns} tokens; metrics {', '.join(self.metrics)})"

    @property
    def tokens(self) -> Tensor:
        """``[row, pos]``, the token ids of the base run's positions; ``NO_TOKEN`` at virtual ones."""
        tokens = self._positions.tokens
        assert tokens is not None
        return tokens

    @property
    def attention_mask(self) -> Tensor | None:
        """``[row, pos]`` of the base run's positions, ``None`` if nothing is padding."""
        return self._positions.attention_mask

    # -- what is asked for ---------------------------------------------------------------------------------------------

    def _sizes(self) -> dict[str, int]:
        cfg, (rows, length) = self.bridge.cfg, self.tokens.shape
        return {
            "batch": rows,
            "pos": length,
            "key_pos": length,
            "n_heads": cfg.n_heads,
            "d_head": cfg.d_head,
            "d_model": cfg.d_model,
            "d_mlp": cfg.d_mlp or 4 * cfg.d_model,
            "d_vocab": cfg.d_vocab,
            "1": 1,
        }

    def _resolve(self, edits: Iterable[EditSet]) -> list[list[Write]]:
        sizes = self._sizes()
        writes = []
        for edit_set in check_list("edits", edits, "Edits, or of lists of them", empty=True):
            if not isinstance(edit_set, Edit | Sequence):
                raise InputError(f"A sweep takes Edits, or lists of them; edits has {type(edit_set).__name__}.")
            members = [edit_set] if isinstance(edit_set, Edit) else list(edit_set)
            for member in members:
                if not isinstance(member, Edit):
                    raise InputError(f"A sweep takes Edits, or lists of them; edits has {type(member).__name__}.")
                self._refuse_tokens_of_wrapped(member)
            writes.append(
                [write for member in members for write in resolve(member, self.bridge.hook_spec(member.hook), sizes)]
            )
        return writes

    def _refuse_tokens_of_wrapped(self, edit: Edit) -> None:
        if self._positions.virtual and self.bridge.hook_spec(edit.hook).component == EMBEDDING:
            raise InputError(
                f"{edit.hook} has the tokens only, not the {self._positions.virtual} virtual positions that the model's "
                "wrapper puts before them, so its positions are not the run's. Edit embed.hook_out, or give other tokens."
            )

    def needed_names(self, edits: Iterable[EditSet]) -> list[str]:
        """The hooks that a ``base_cache`` must hold for these edits."""
        writes = self._resolve(edits)
        return needed_names(self.bridge.cfg.n_layers, self._first_layer(writes), _sites(writes))

    def _first_layer(self, writes: Sequence[Sequence[Write]]) -> int:
        n_layers = self.bridge.cfg.n_layers
        return min((stage_of(write.spec, n_layers) for chosen in writes for write in chosen), default=n_layers)

    # -- the base run --------------------------------------------------------------------------------------------------

    def _run_base(self, writes: Sequence[Sequence[Write]]) -> BaseRun:
        """The base run, made anew when edits need more of it than was kept, or the model is no longer the same."""
        _refuse_training(self.bridge)
        first, sites = self._first_layer(writes), _sites(writes)
        base, marks = self._base, self._marks()
        if base is None or marks != self._base_marks or first < self._base_first or not set(sites) <= set(base.sites):
            base = run_base(self.bridge, self._prepared_input, first, sites, self._base_cache)
            self._base, self._base_first, self._base_marks = base, first, marks
        return base

    def base_activations(self, hooks: Iterable[str]) -> Mapping[str, Tensor]:
        """The base run's activations at these hooks, for edits that are worked out from them.

        A sweep of edits of the same hooks that follows does not run the base again.

        Args:
            hooks: names of hook points.

        Returns:
            By canonical name, ``[row, ...]``; not to be written to.
        """
        with torch.no_grad():
            return self._run_base(self._resolve(Edit(name, Zero()) for name in hooks)).sites

    def _marks(self) -> tuple[object, ...]:
        """What the base run depends on and may change between two calls."""
        return marks(self.bridge)

    def forget(self) -> None:
        """Let go of the base run and its memory; the next call makes it anew."""
        self._base = None

    # -- planning ------------------------------------------------------------------------------------------------------

    def plan(self, edits: Iterable[EditSet]) -> SweepPlan:
        """What :meth:`run` would do with these edits; only the base run is computed."""
        with torch.no_grad():
            return self._prepare(edits).plan

    def _prepare(self, edits: Iterable[EditSet]) -> _Prepared:
        writes = self._resolve(edits)
        bridge, n_layers = self.bridge, self.bridge.cfg.n_layers
        base = self._run_base(writes)
        on_logits = any(write.spec.component == "unembed" for chosen in writes for write in chosen)
        plain_unembed = Unembedding(bridge)
        unembed = Unembedding(bridge, whole=True) if on_logits else plain_unembed
        blocked = self._why_everything_whole()
        if blocked:
            logits = bridge(**self._input())
            base_logits = partial(_cells_of_whole, logits)
        else:
            base_logits = partial(self._base_cells, base, plain_unembed)
        scorers = {
            name: make_scorer(
                name, metric, self.tokens, self.attention_mask, bridge, base_logits, self._logit_positions
            )
            for name, metric in self.metrics.items()
        }
        why = blocked or self._why_padding_whole(scorers)
        read = self._read(scorers)
        runs: list[list[Run]] = []
        whole, packed = [], []
        for edit, chosen in enumerate(writes):
            by_row: dict[int, list[Write]] = {}
            for write in chosen:
                by_row.setdefault(write.row, []).append(write)
            made = [
                run
                for row, of_row in by_row.items()
                if (run := make_run(edit, of_row, base.sites, n_layers, base.length, read[row])) is not None
            ]
            runs.append(made)
            if why or needs_whole(chosen):
                if _changes(chosen, base):
                    whole.append(edit)
            elif made:
                packed.append(edit)
        if not why and whole:
            why = "a function that looks at several positions"
        costs = Costs(bridge.cfg, bridge.dtype.itemsize, base.length, base.n_rows)
        read_cells = max(
            scorer.reads.columns.numel() * len(scorer.reads.tokens or range(bridge.cfg.d_vocab))
            for scorer in scorers.values()
        )
        if on_logits:
            read_cells = max(scorer.reads.columns.numel() for scorer in scorers.values()) * bridge.cfg.d_vocab
        limit = self._limit()
        kept = base_bytes(bridge, base.n_rows, base.length, self._base_first)
        kept += sum(site.nbytes for site in base.sites.values())
        widest = max((sum(widest_rows(run, costs) for run in runs[edit]) for edit in packed), default=0)
        limits = divide(costs, limit, kept, widest, read_cells, self._rows_at_once, self._reserved)
        batches = make_batches(runs, packed, costs, limits, read_cells)
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
            peak_bytes=_peak(kept, batches, costs, limits, read_cells, bool(whole)),
            memory_limit=limit,
        )
        base_scores = {
            name: scorer.score_whole(logits) if blocked else self._base_score(base, plain_unembed, scorer)
            for name, scorer in scorers.items()
        }
        return _Prepared(runs, writes, whole, packed, base, scorers, base_scores, read, limits, plan, unembed)

    def _limit(self) -> int:
        if self._memory_limit is not None:
            return self._memory_limit
        if self.bridge.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.bridge.device)[0]) // 2
        return int(psutil.virtual_memory().available) // 2

    def _input(self) -> dict[str, Any]:
        """The base run's input as a run of the bridge takes it."""
        return {"input": self._prepared_input.tokens, "attention_mask": self._prepared_input.attention_mask}

    def _why_everything_whole(self) -> str:
        """Why edits can only be made by whole forwards, if so."""
        if self._positions.past:
            return "the model's wrapper gives it a key/value cache"
        names = sorted({str(handle.name) for handle in self.bridge.live_hooks()})
        if names:
            return f"hooks are on {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        if self.bridge.has_torch_hooks():
            return "torch hooks are on the model"
        mixing = why_not_by_row(self.bridge.hf_model)
        return "" if mixing is None else f"{mixing}, which may compute a row from the others of its batch, too"

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

    # -- scores --------------------------------------------------------------------------------------------------------

    def _base_cells(self, base: BaseRun, unembed: Unembedding, asked: Asked) -> Tensor:
        """``[row, column, token]`` of the base run's logits."""
        columns = torch.tensor(sorted(asked.columns))
        tokens = None if asked.tokens is None else tuple(sorted(asked.tokens))
        return unembed(base.residual[self.bridge.cfg.n_layers][:, columns], tokens)

    def _base_score(self, base: BaseRun, unembed: Unembedding, scorer: Scorer) -> Tensor:
        rows = torch.arange(base.n_rows)[:, None]
        residual = base.residual[self.bridge.cfg.n_layers][rows, scorer.reads.columns]
        score = scorer.score(unembed(residual, scorer.reads.tokens)[None])[0]
        assert score is not None
        return score

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
        base, states = prepared.base, model.run(batch.runs)
        again: set[int] = set()
        place = {edit: i for i, edit in enumerate(batch.edits)}
        for scorers in by_reads(prepared.scorers):
            reads = scorers[0].reads
            for start in range(0, len(batch.edits), prepared.limits.logit_edits):
                chosen = batch.edits[start : start + prepared.limits.logit_edits]
                residual = self._final_residual(base, states, reads.columns, place, start, len(chosen))
                logits = self._final_logits(prepared, chosen, residual, reads.columns, reads.tokens)
                for scorer in scorers:
                    for edit, score in zip(chosen, scorer.score(logits), strict=True):
                        if score is None:
                            again.add(edit)
                        elif isinstance(scorer.metric, Metric):
                            # Rows that the edit leaves alone keep the base run's bits.
                            rows = [run.row for run in prepared.runs[edit]]
                            values[scorer.name][edit, rows] = score[rows]
                        else:
                            _put(values, scorer.name, edit, score)
        return again

    def _final_residual(
        self, base: BaseRun, states: Sequence[State], columns: Tensor, place: Mapping[int, int], start: int, count: int
    ) -> Tensor:
        """``[edit, row, read, d_model]``: what leaves the last layer at the columns read."""
        rows = torch.arange(base.n_rows)[:, None]
        unedited = base.residual[self.bridge.cfg.n_layers][rows, columns]
        residual = unedited.expand(count, *unedited.shape).clone()
        read = columns.tolist()
        for state in states:
            for i, run in enumerate(state.runs):
                edit = place[run.edit] - start
                if not 0 <= edit < count:
                    continue
                for j, column in enumerate(read[run.row]):
                    if column in state.columns:
                        residual[edit, run.row, j] = state.residual[i, state.columns.index(column)]
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
            for run in prepared.runs[edit]:
                for write in run.writes.get(n_layers, ()):
                    there = read[run.row]
                    kept = tuple(k for k in write.kept if write.declared[k] in there)
                    if kept:
                        first = (e * n_rows + run.row) * n_read
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
        logits = self.bridge.run_with_hooks(**self._input(), fwd_hooks=hooks)
        for name, scorer in prepared.scorers.items():
            _put(values, name, edit, scorer.score_whole(logits))


def _refuse_training(bridge: TransformerBridge) -> None:
    if bridge.hf_model.training:
        raise InputError(
            "The model is in training mode, where dropout makes every run another. Call bridge.eval() first."
        )


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


def _sites(writes: Sequence[Sequence[Write]]) -> list[str]:
    return list(dict.fromkeys(write.spec.name for chosen in writes for write in chosen))


def _cells_of_whole(logits: Tensor, asked: Asked) -> Tensor:
    cells = logits[:, torch.tensor(sorted(asked.columns))]
    return cells if asked.tokens is None else cells[..., torch.tensor(sorted(asked.tokens))]


def _peak(kept: int, batches: Sequence[Batch], costs: Costs, limits: Limits, read_cells: int, whole: bool) -> int:
    """Bytes that the process grows by at the worst moment."""
    peaks = [resident(kept, costs.chunk_bytes(costs.n_rows * costs.length))]  # the base run itself
    if whole:
        peaks.append(resident(kept, costs.chunk_bytes(costs.n_rows * costs.length), costs.whole_logit_bytes()))
    states = max((costs.state_bytes(batch.rows) for batch in batches), default=0)
    for batch in batches:
        rows, mlp_rows = (max(1, min(limits.rows_at_once, rows)) for rows in (batch.rows, batch.mlp_rows))
        peaks.append(resident(kept, states + costs.chunk_bytes(rows, mlp_rows)))
        logits = costs.logit_bytes(read_cells) * min(limits.logit_edits, len(batch.edits))
        peaks.append(resident(kept, states, logits))
    return max(peaks)
