"""Running many runs layer by layer, packed: the columns of all of them, one after the other, through each block at once.

Between layers the runs are kept in :class:`State`, groups of runs that stand at the same columns. In each layer

1. runs that enter here join, at the columns that they change, and runs that entered before are widened to every column
   they can reach, with the base run's residual in the others;
2. the groups are laid one after the other, ``[1, row, d_model]``, in chunks of a size that is quick to compute;
3. Hugging Face's own block runs on each chunk, its attention being the bridge's (:class:`PackedRuns` tells it which rows
   belong together), and the edits are made by hooks at their own hook points;
4. in the last layer only the columns that are read come out of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.model_bridge.generalized_components.alibi_utils import add_mask_to_alibi
from pellucid.model_bridge.generalized_components.packed_rows import PackedRuns, RunGroup
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec
from pellucid.sweep.base_run import BaseRun
from pellucid.sweep.edits import Write
from pellucid.sweep.runs import BEFORE_ATTENTION, BY_GROUP, EMBEDDING, Run, place_of

SCORES_AT_ONCE = 2**21
"""Attention scores that one group may have: a size that stays in a processor's cache."""

Columns = tuple[int, ...]


@dataclass(eq=False)
class State:
    """Runs that stand at the same columns, and their residual there.

    Attributes:
        runs: the runs.
        columns: where they stand.
        residual: ``[run, col, d_model]``.
    """

    runs: list[Run]
    columns: Columns
    residual: Tensor

    def base_rows(self) -> Tensor:
        """``[run]``."""
        return torch.tensor([run.row for run in self.runs], device=self.residual.device)


@dataclass(eq=False)
class Gathered:
    """Runs that go through a layer at the same columns, and where each comes from.

    Attributes:
        columns: the columns.
        runs: the runs.
        sources: for each run the state that it was in and its number there, ``None`` if it enters here.
    """

    columns: Columns
    runs: list[Run]
    sources: list[tuple[State | None, int]]

    @property
    def rows(self) -> int:
        """Packed rows."""
        return len(self.runs) * len(self.columns)

    def fill(self, buffer: Tensor, base: Tensor) -> None:
        """Write the residual that enters the layer.

        Args:
            buffer: ``[row, d_model]``.
            base: the base run's ``[base row, pos, d_model]``, for columns that a run has not changed.
        """
        residual = buffer.unflatten(0, (len(self.runs), -1))
        columns = torch.tensor(self.columns)
        start = 0
        # Stretches of runs that come out of one state, in its order.
        while start < len(self.runs):
            source, number = self.sources[start]
            end = start + 1
            while end < len(self.runs) and self.sources[end] == (source, number + end - start):
                end += 1
            if source is None:
                end = start + 1
                while end < len(self.runs) and self.sources[end][0] is None:
                    end += 1
            part = residual[start:end]
            if source is None or source.columns != self.columns:
                rows = sorted({run.row for run in self.runs[start:end]})
                if len(rows) == 1:
                    part.copy_(base[rows[0], columns])  # broadcast, with no copy of it a run
                else:
                    part.copy_(base[torch.tensor([[run.row] for run in self.runs[start:end]]), columns])
            if source is not None:
                of_them = source.residual[number : number + end - start]
                if source.columns == self.columns:
                    part.copy_(of_them)
                else:
                    part[:, torch.tensor([self.columns.index(column) for column in source.columns])] = of_them
            start = end


@dataclass(eq=False)
class Place:
    """Where one write goes in a packed tensor: the index on its first axis (or the run, by group) and those on ``pos``."""

    write: Write
    run: int | None
    places: Tensor


class PackedModel:
    """The model, run on packed rows.

    Args:
        bridge: the model.
        base: its unedited run.
        read: columns read in each row.
        rows_at_once: packed rows that go through a block together.
        rows: packed rows of the largest batch.
    """

    def __init__(
        self, bridge: TransformerBridge, base: BaseRun, read: Sequence[frozenset[int]], rows_at_once: int, rows: int
    ) -> None:
        self.bridge, self.base, self.read, self.rows_at_once = bridge, base, read, rows_at_once
        # Two buffers for all states of all batches: what goes into a layer and what comes out of it.
        whole = base.residual[bridge.cfg.n_layers]
        self._incoming, self._outgoing = whole.new_empty(2, rows, whole.shape[-1])
        self._now: dict[str, list[list[Place]]] = {}
        self._packed: PackedRuns | None = None
        self._fast_bias = None
        if bridge.attn_implementation == "sdpa":
            self._fast_bias = add_mask_to_alibi(base.alibi, base.mask, bridge.cfg.n_heads)

    # -- layer by layer ------------------------------------------------------------------------------------------------

    def run(self, runs: Sequence[Run]) -> list[State]:
        """The residual that leaves the last layer, at the columns that are read. Runs that enter after it are left out."""
        n_layers = self.bridge.cfg.n_layers
        states: list[State] = []
        specs = {write.spec.name: write.spec for run in runs for writes in run.writes.values() for write in writes}
        waiting = sorted((run for run in runs if run.stage < n_layers), key=lambda run: run.stage)
        hooks = [(name, self._maker(spec)) for name, spec in specs.items()]
        with self.bridge.hooks(fwd_hooks=hooks), self.bridge.mounted_attention():
            for stage in range(waiting[0].stage if waiting else n_layers, n_layers):
                entering = [run for run in waiting if run.stage == stage]
                states = self._embed(entering) if stage == EMBEDDING else self._layer(stage, states, entering)
        return states

    def _embed(self, entering: list[Run]) -> list[State]:
        """Runs that change tokens or their embedding: only those columns are embedded."""
        states = []
        for columns, runs in _grouped(entering, lambda run: run.columns).items():
            rows = torch.tensor([run.row for run in runs])
            at = rows[:, None], torch.tensor(columns)
            self._locate([(runs, columns, None)], EMBEDDING)
            if self.base.embeddings is None:
                embeds = self.bridge.embed.module(self.base.tokens[at].flatten()[None])
            else:
                embeds = self.base.embeddings[at].flatten(end_dim=1)[None].clone()  # edits are made in place
            embedded = self.bridge.embed_ln.module(embeds)
            states.append(State(runs, columns, embedded[0].unflatten(0, (len(runs), -1))))
        return states

    def _layer(self, layer: int, states: list[State], entering: list[Run]) -> list[State]:
        groups = self._grouped_states(layer, states, entering)
        incoming = self._incoming[: sum(group.rows for group in groups)]
        start = 0
        for group in groups:
            group.fill(incoming[start : start + group.rows], self.base.residual[layer])
            start += group.rows
        states, leaving = [], 0
        for chunk in self._chunks(groups, incoming):
            for out in self._block(layer, chunk):
                # Into a buffer of its own: the block's output would keep its whole chunk alive.
                rows = out.residual.shape[0] * out.residual.shape[1]
                kept = self._outgoing[leaving : leaving + rows].unflatten(0, out.residual.shape[:2])
                states.append(State(out.runs, out.columns, kept.copy_(out.residual)))
                leaving += rows
        return states

    def _grouped_states(self, layer: int, states: list[State], entering: list[Run]) -> list[Gathered]:
        """Runs by the columns at which they go through this layer."""
        last = layer == self.bridge.cfg.n_layers - 1
        groups: dict[tuple[Columns, int], Gathered] = {}

        def add(columns: Columns, run: Run, source: State | None, number: int) -> None:
            # In the last layer the columns that come out depend on what is read in the row.
            key = (columns, self.read.index(self.read[run.row]) if last else 0)
            group = groups.setdefault(key, Gathered(columns, [], []))
            group.runs.append(run)
            group.sources.append((source, number))

        for state in states:
            for number, run in enumerate(state.runs):
                add(tuple(range(run.first, self.base.length)), run, state, number)
        for run in entering:
            add(run.columns, run, None, 0)
        return list(groups.values())

    def _chunks(self, groups: list[Gathered], incoming: Tensor) -> Iterator[list[State]]:
        """States cut so that attention's scores stay small, and gathered to chunks of ``rows_at_once`` packed rows."""
        chunk: list[State] = []
        rows = start = 0
        for group in groups:
            width = len(group.columns)
            scores = self.bridge.cfg.n_heads * width * self.base.length
            at_once = max(1, min(SCORES_AT_ONCE // scores, self.rows_at_once // width))
            for first in range(0, len(group.runs), at_once):
                runs = group.runs[first : first + at_once]
                count = len(runs) * width
                if chunk and rows + count > self.rows_at_once:
                    yield chunk
                    chunk, rows = [], 0
                residual = incoming[start : start + count].unflatten(0, (len(runs), width))
                chunk.append(State(runs, group.columns, residual))
                rows += count
                start += count
        if chunk:
            yield chunk

    def _wanted(self, state: State, layer: int) -> Columns:
        """Columns whose output is wanted."""
        if layer < self.bridge.cfg.n_layers - 1:
            return state.columns
        read = self.read[state.runs[0].row]
        return tuple(column for column in state.columns if column in read)

    def _block(self, layer: int, chunk: list[State]) -> list[State]:
        groups, outs, start = [], [], 0
        for state in chunk:
            wanted = self._wanted(state, layer)
            narrowed = None if wanted == state.columns else torch.tensor([state.columns.index(c) for c in wanted])
            group = RunGroup(start, state.base_rows(), torch.tensor(state.columns), narrowed)
            groups.append(group)
            outs.append((state.runs, state.columns, wanted))
            start += group.rows
        base = self.base
        packed = PackedRuns(groups, base.keys[layer], base.values[layer], base.alibi, base.mask, self._fast_bias)
        self._packed = packed
        self._locate(outs, layer)
        # The states of a chunk lie one after the other in one buffer.
        first = chunk[0].residual
        rows = first.as_strided((1, start, first.shape[-1]), (0, first.shape[-1], 1), first.storage_offset())
        block: Any = self.bridge.blocks[layer].module
        output = block(rows, alibi=base.alibi, attention_mask=base.mask, layer_past=packed)[0][0]
        states, start = [], 0
        for group, (runs, _, wanted) in zip(groups, outs, strict=True):
            part = output[start : start + group.rows_out].unflatten(0, (len(runs), -1))
            states.append(State(runs, wanted, part))
            start += group.rows_out
        return states

    # -- edits ---------------------------------------------------------------------------------------------------------

    def _locate(self, groups: Sequence[tuple[list[Run], Columns, Columns | None]], stage: int) -> None:
        """Work out where in the coming packed tensors each write of this stage goes.

        Args:
            groups: runs, the columns at which they come in, those at which they leave attention.
            stage: the stage.
        """
        self._now = {}
        start_in = start_out = 0
        for number, (runs, columns, wanted) in enumerate(groups):
            leaving = columns if wanted is None else wanted
            for i, run in enumerate(runs):
                for write in run.writes.get(stage, ()):
                    place = place_of(write.spec)
                    early = place in BEFORE_ATTENTION or stage == EMBEDDING
                    there = columns if early else leaving
                    present = tuple(k for k in write.kept if write.declared[k] in there)
                    if not present:
                        continue
                    at = torch.tensor([there.index(write.declared[k]) for k in present])
                    by_group = self._now.setdefault(write.spec.name, [[] for _ in groups])
                    if place in BY_GROUP:
                        by_group[number].append(Place(write.kept_to(present), i, at))
                    else:
                        first = (start_in if early else start_out) + i * len(there)
                        by_group[number].append(Place(write.kept_to(present), None, at + first))
            start_in += len(runs) * len(columns)
            start_out += len(runs) * len(leaving)

    def _maker(self, spec: HookSpec) -> Callable[..., None]:
        """The hook function that makes the writes of one hook point."""
        once_a_group = place_of(spec) in BY_GROUP

        def make(tensor: Tensor, hook: Any) -> None:
            by_group = self._now.get(spec.name)
            if by_group is None:
                return
            if once_a_group:
                assert self._packed is not None
                for place in by_group[self._packed.current]:
                    assert place.run is not None
                    place.write.make(tensor[place.run], place.places)
                return
            for places in by_group:
                for place in places:
                    place.write.make(tensor[0], place.places)

        return make


def _grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups
