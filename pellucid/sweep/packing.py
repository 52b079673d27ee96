"""Running many edited rows layer by layer, packed: the columns of all of them side by side through each block.

Between layers they are kept in :class:`RowGroup`, those together that stand at the same columns. In each layer

1. rows that enter here join, at the columns that they change, and rows that entered before are widened to every column
   they can reach, with the base run's residual in the others;
2. the groups are laid one after the other, ``[1, packed row, d_model]``, in chunks of a size that is quick to compute;
3. Hugging Face's own block runs on each chunk, its attention mixing values group by group (:class:`PackedAttention`), and
   the edits are made by hooks at their own hook points;
4. in the last layer only the columns that are read go through the block; the others go as far as their keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from pellucid.model_bridge.generalized_components import PosEmbedBridge
from pellucid.model_bridge.generalized_components.alibi_utils import add_mask_to_alibi
from pellucid.model_bridge.generalized_components.mixing import mixing_by
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec
from pellucid.run_context import hooks_suppressed
from pellucid.sweep.base_run import BaseRun, refuse_unknown
from pellucid.sweep.edited_rows import EMBEDDING, EditedRow, fires_by_group
from pellucid.sweep.edits import Write
from pellucid.sweep.packed_attention import Columns, PackedAttention, Projected, RowGroup

SCORES_AT_ONCE = 2**21
"""Attention scores that one group may have: a size that stays in a processor's cache."""


@dataclass(eq=False)
class Gathered:
    """Edited rows that go through a layer at the same columns, and where each comes from.

    Attributes:
        columns: the columns.
        edited: the rows.
        sources: for each row the group that it was in and its number there, ``None`` if it enters here.
    """

    columns: Columns
    edited: list[EditedRow]
    sources: list[tuple[RowGroup | None, int]]

    @property
    def packed_rows(self) -> int:
        """Packed rows."""
        return len(self.edited) * len(self.columns)

    def fill(self, buffer: Tensor, base: Tensor) -> None:
        """Write the residual that enters the layer.

        Args:
            buffer: ``[packed row, d_model]``.
            base: the base run's ``[base row, pos, d_model]``, for columns that a row has not changed.
        """
        residual = buffer.unflatten(0, (len(self.edited), -1))
        columns = torch.tensor(self.columns)
        start = 0
        # Stretches of rows that come out of one group, in its order.
        while start < len(self.edited):
            source, number = self.sources[start]
            end = start + 1
            while end < len(self.edited) and self.sources[end] == (source, number + end - start):
                end += 1
            if source is None:
                end = start + 1
                while end < len(self.edited) and self.sources[end][0] is None:
                    end += 1
            part = residual[start:end]
            if source is None or source.columns != self.columns:
                rows = [each.row for each in self.edited[start:end]]
                if len(set(rows)) == 1:
                    part.copy_(base[rows[0], columns])  # broadcast, with no copy of it a row
                else:
                    part.copy_(base[torch.tensor(rows)[:, None], columns])
            if source is not None:
                of_them = source.residual[number : number + end - start]
                if source.columns == self.columns:
                    part.copy_(of_them)
                else:
                    part[:, torch.tensor([self.columns.index(column) for column in source.columns])] = of_them
            start = end


@dataclass(eq=False)
class Place:
    """Where one write goes in a packed tensor: its indices on ``pos``, and by group the row's number there."""

    write: Write
    number: int | None
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
        # Two buffers for all groups of all batches: what goes into a layer and what comes out of it.
        whole = base.residual[bridge.cfg.n_layers]
        self._incoming, self._outgoing = whole.new_empty(2, rows, whole.shape[-1])
        self._now: dict[str, list[list[Place]]] = {}
        self._attention: PackedAttention | None = None
        self._fast_bias = None
        if bridge.attn_implementation == "sdpa" and base.alibi is not None:
            # BLOOM's blocks are all given the same mask.
            self._fast_bias = add_mask_to_alibi(base.alibi, base.mask(min(base.handed)), bridge.cfg.n_heads)

    # -- layer by layer ------------------------------------------------------------------------------------------------

    def run(self, edited: Sequence[EditedRow]) -> list[RowGroup]:
        """The residual that leaves the last layer, at the columns that are read. Rows that enter after it are left out.

        Raises:
            UnsupportedModelError: the blocks are handed something that cannot be taken at packed rows.
        """
        refuse_unknown(self.bridge, self.base)
        n_layers = self.bridge.cfg.n_layers
        groups: list[RowGroup] = []
        specs = {write.spec.name: write.spec for each in edited for writes in each.writes.values() for write in writes}
        waiting = sorted((each for each in edited if each.stage < n_layers), key=lambda each: each.stage)
        hooks = [(name, self._maker(spec)) for name, spec in specs.items()]
        with self.bridge.hooks(fwd_hooks=hooks), self.bridge.mounted_attention():
            for stage in range(waiting[0].stage if waiting else n_layers, n_layers):
                entering = [each for each in waiting if each.stage == stage]
                groups = self._embed(entering) if stage == EMBEDDING else self._layer(stage, groups, entering)
        return groups

    def _embed(self, entering: list[EditedRow]) -> list[RowGroup]:
        """Rows that change tokens or their embedding: only those columns are embedded."""
        groups = []
        for columns, edited in _by_columns(entering).items():
            rows, there = torch.tensor([each.row for each in edited]), torch.tensor(columns)
            at = rows[:, None], there
            self._locate([(edited, columns)], EMBEDDING)
            outer = self.bridge.runner.tree.components
            if self.base.embeddings is None:
                embeds = outer["embed"].module(self.base.tokens[at].flatten()[None])
            else:
                embeds = self.base.embeddings[at].flatten(end_dim=1)[None].clone()  # edits are made in place
            if self.bridge.runner.tree.embed_factor != 1:
                embeds = embeds * self.bridge.runner.tree.embed_factor
            positions = self.base.positions
            if positions is not None:
                asked = positions[at if positions.shape[0] > 1 else (rows[:, None] * 0, there)]
                embeds = embeds + cast(PosEmbedBridge, outer["pos_embed"]).at(asked.flatten()[None])
            if "embed_ln" in outer:
                embeds = outer["embed_ln"].module(embeds)
            groups.append(RowGroup(edited, columns, embeds[0].unflatten(0, (len(edited), -1))))
        return groups

    def _layer(self, layer: int, groups: list[RowGroup], entering: list[EditedRow]) -> list[RowGroup]:
        gathered = self._gather(layer, groups, entering)
        incoming = self._incoming[: sum(each.packed_rows for each in gathered)]
        start = 0
        for each in gathered:
            each.fill(incoming[start : start + each.packed_rows], self.base.residual[layer])
            start += each.packed_rows
        groups, leaving = [], 0
        for chunk in self._chunks(gathered, incoming):
            for out in self._block(layer, chunk):
                # Into a buffer of its own: the block's output would keep its whole chunk alive.
                kept = self._outgoing[leaving : leaving + out.packed_rows].unflatten(0, out.residual.shape[:2])
                groups.append(RowGroup(out.edited, out.columns, kept.copy_(out.residual)))
                leaving += out.packed_rows
        return groups

    def _gather(self, layer: int, groups: list[RowGroup], entering: list[EditedRow]) -> list[Gathered]:
        """Rows by the columns at which they go through this layer."""
        last = layer == self.bridge.cfg.n_layers - 1
        found: dict[tuple[Columns, int], Gathered] = {}

        def add(columns: Columns, edited: EditedRow, source: RowGroup | None, number: int) -> None:
            # In the last layer the columns that come out depend on what is read in the row.
            key = (columns, self.read.index(self.read[edited.row]) if last else 0)
            into = found.setdefault(key, Gathered(columns, [], []))
            into.edited.append(edited)
            into.sources.append((source, number))

        for group in groups:
            for number, edited in enumerate(group.edited):
                add(tuple(range(edited.first, self.base.length)), edited, group, number)
        for edited in entering:
            add(edited.columns, edited, None, 0)
        return list(found.values())

    def _chunks(self, gathered: list[Gathered], incoming: Tensor) -> Iterator[list[RowGroup]]:
        """Groups cut so that attention's scores stay small, and gathered to chunks of ``rows_at_once`` packed rows."""
        chunk: list[RowGroup] = []
        rows = start = 0
        for each in gathered:
            width = len(each.columns)
            scores = self.bridge.cfg.n_heads * width * self.base.length
            at_once = max(1, min(SCORES_AT_ONCE // scores, self.rows_at_once // width))
            for first in range(0, len(each.edited), at_once):
                edited = each.edited[first : first + at_once]
                count = len(edited) * width
                if chunk and rows + count > self.rows_at_once:
                    yield chunk
                    chunk, rows = [], 0
                residual = incoming[start : start + count].unflatten(0, (len(edited), width))
                chunk.append(RowGroup(edited, each.columns, residual))
                rows += count
                start += count
        if chunk:
            yield chunk

    def _wanted(self, group: RowGroup, layer: int) -> Columns:
        """Columns whose output is wanted."""
        if layer < self.bridge.cfg.n_layers - 1:
            return group.columns
        read = self.read[group.edited[0].row]
        return tuple(column for column in group.columns if column in read)

    def _block(self, layer: int, chunk: list[RowGroup]) -> list[RowGroup]:
        columns = [group.columns for group in chunk]
        wanted = [self._wanted(group, layer) for group in chunk]
        attention = self._attention = PackedAttention(self.base, layer, chunk, wanted, self._fast_bias)
        # The groups of a chunk lie one after the other in one buffer.
        first = chunk[0].residual
        count = sum(group.packed_rows for group in chunk)
        rows = first.as_strided((1, count, first.shape[-1]), (0, first.shape[-1], 1), first.storage_offset())
        block: Any = self.bridge.blocks[layer].module
        if wanted != columns:
            left = rows[:, _kept(chunk, wanted)]  # a copy, made before edits are made in place
            self._locate([(group.edited, group.columns) for group in chunk], layer)
            with suppress(Projected), mixing_by(attention.project):
                block(rows, **self._handed(layer, chunk, columns))
            rows = left
        self._locate([(group.edited, there) for group, there in zip(chunk, wanted, strict=True)], layer)
        with mixing_by(attention):
            output = block(rows, **self._handed(layer, chunk, wanted))
        output = (output[0] if isinstance(output, tuple) else output)[0]
        sizes = [len(group.edited) * len(there) for group, there in zip(chunk, wanted, strict=True)]
        parts = output.split(sizes)
        return [
            RowGroup(group.edited, there, part.unflatten(0, (len(group.edited), len(there))))
            for group, there, part in zip(chunk, wanted, parts, strict=True)
        ]

    def _handed(self, layer: int, chunk: Sequence[RowGroup], columns: Sequence[Columns]) -> dict[str, Any]:
        """What a block is given beside the rows of a chunk that stand at ``columns``."""
        places = [(group.base_rows(), torch.tensor(there)) for group, there in zip(chunk, columns, strict=True)]
        return self.base.handed_at(layer, places)

    # -- edits ---------------------------------------------------------------------------------------------------------

    def _locate(self, groups: Sequence[tuple[list[EditedRow], Columns]], stage: int) -> None:
        """Work out where in the coming packed tensors each write of this stage goes.

        Args:
            groups: edited rows, and the columns of theirs that go through.
            stage: the stage.
        """
        self._now = {}
        start = 0
        for number, (edited, there) in enumerate(groups):
            for i, each in enumerate(edited):
                for write in each.writes.get(stage, ()):
                    present = tuple(k for k in write.kept if write.declared[k] in there)
                    if not present:
                        continue
                    at = torch.tensor([there.index(write.declared[k]) for k in present])
                    by_group = self._now.setdefault(write.spec.name, [[] for _ in groups])
                    alone = fires_by_group(write.spec)
                    place = Place(
                        write.kept_to(present), i if alone else None, at if alone else at + start + i * len(there)
                    )
                    by_group[number].append(place)
            start += len(edited) * len(there)

    def _maker(self, spec: HookSpec) -> Callable[..., None]:
        """The hook function that makes the writes of one hook point."""
        once_a_group = fires_by_group(spec)

        def make(tensor: Tensor, hook: Any) -> None:
            by_group = self._now.get(spec.name, [])
            if once_a_group and by_group:
                assert self._attention is not None
                by_group = [by_group[self._attention.current]]
            for place in chain.from_iterable(by_group):
                # A function of the user's may run the model, which is neither edited nor packed then.
                hooks_suppressed(place.write.make, tensor[place.number or 0], place.places)

        return make


def _by_columns(edited: Iterable[EditedRow]) -> dict[Columns, list[EditedRow]]:
    groups: dict[Columns, list[EditedRow]] = {}
    for each in edited:
        groups.setdefault(each.columns, []).append(each)
    return groups


def _kept(chunk: Sequence[RowGroup], wanted: Sequence[Columns]) -> Tensor:
    """``[packed row]``: which of a chunk's packed rows stand at wanted columns."""
    kept: list[int] = []
    start = 0
    for group, columns in zip(chunk, wanted, strict=True):
        inside = [group.columns.index(column) for column in columns]
        kept += [start + i * len(group.columns) + j for i in range(len(group.edited)) for j in inside]
        start += group.packed_rows
    return torch.tensor(kept, dtype=torch.int64)
