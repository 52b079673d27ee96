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
    """

    def __init__(
        self, bridge: TransformerBridge, base: BaseRun, read: Sequence[frozenset[int]], rows_at_once: int
    ) -> None:
        self.bridge, self.base, self.read, self.rows_at_once = bridge, base, read, rows_at_once
        self._now: dict[str, list[list[Place]]] = {}
        self._packed: PackedRuns | None = None

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
            tokens = self.base.tokens[rows[:, None], torch.tensor(columns)].flatten()[None]
            self._locate([(runs, columns, None)], EMBEDDING)
            embedded = self.bridge.embed_ln.module(self.bridge.embed.module(tokens))
            states.append(State(runs, columns, embedded[0].unflatten(0, (len(runs), -1))))
        return states

    def _layer(self, layer: int, states: list[State], entering: list[Run]) -> list[State]:
        groups: dict[tuple[Columns, int], list[State]] = {}
        for state in states:
            for widened in self._widened(state, layer):
                groups.setdefault(self._key(widened, layer), []).append(widened)
        for columns, runs in _grouped(entering, lambda run: run.columns).items():
            for part in _by_row_kind(runs, self._kind if layer == self.bridge.cfg.n_layers - 1 else None):
                rows = torch.tensor([run.row for run in part])
                residual = self.base.residual[layer][rows[:, None], torch.tensor(columns)]
                state = State(part, columns, residual)
                groups.setdefault(self._key(state, layer), []).append(state)
        return [
            out
            for chunk in self._chunks([_joined(parts) for parts in groups.values()])
            for out in self._block(layer, chunk)
        ]

    def _kind(self, run: Run) -> int:
        """Rows in which the metric reads the same columns."""
        return self.read.index(self.read[run.row])

    def _key(self, state: State, layer: int) -> tuple[Columns, int]:
        last = layer == self.bridge.cfg.n_layers - 1
        return state.columns, self._kind(state.runs[0]) if last else 0

    def _widened(self, state: State, layer: int) -> Iterator[State]:
        """The same runs at every column that they can have changed."""
        kind = self._kind if layer == self.bridge.cfg.n_layers - 1 else None
        for first, runs in _grouped(state.runs, lambda run: run.first).items():
            for part in _by_row_kind(runs, kind):
                columns = tuple(range(first, self.base.length))
                if columns == state.columns and len(part) == len(state.runs):
                    yield state
                    continue
                numbers = {id(run): number for number, run in enumerate(state.runs)}
                chosen = state.residual[torch.tensor([numbers[id(run)] for run in part])]
                rows = torch.tensor([run.row for run in part])
                residual = self.base.residual[layer][rows, first:]
                if state.columns:
                    residual[:, torch.tensor(state.columns) - first] = chosen
                yield State(part, columns, residual)

    def _chunks(self, states: list[State]) -> Iterator[list[State]]:
        """States cut so that attention's scores stay small, and gathered to chunks of ``rows_at_once`` packed rows."""
        chunk: list[State] = []
        rows = 0
        for state in states:
            width = len(state.columns)
            scores = self.bridge.cfg.n_heads * width * self.base.length
            at_once = max(1, min(SCORES_AT_ONCE // scores, self.rows_at_once // width))
            for start in range(0, len(state.runs), at_once):
                part = State(
                    state.runs[start : start + at_once], state.columns, state.residual[start : start + at_once]
                )
                count = len(part.runs) * width
                if chunk and rows + count > self.rows_at_once:
                    yield chunk
                    chunk, rows = [], 0
                chunk.append(part)
                rows += count
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
        packed = PackedRuns(groups, base.keys[layer], base.values[layer], base.alibi, base.mask)
        self._packed = packed
        self._locate(outs, layer)
        rows = torch.cat([state.residual.flatten(0, 1) for state in chunk])[None]
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


def _by_row_kind(runs: list[Run], kind: Callable[[Run], int] | None) -> list[list[Run]]:
    return [runs] if kind is None else list(_grouped(runs, kind).values())


def _joined(states: list[State]) -> State:
    """One state of several at the same columns."""
    if len(states) == 1:
        return states[0]
    runs = [run for state in states for run in state.runs]
    return State(runs, states[0].columns, torch.cat([state.residual for state in states]))
