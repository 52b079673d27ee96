"""Attention of packed rows: each edited row over its own keys and values, and before its first column the base run's.

All steps of a block but attention work on each position alone, so the columns of many edited rows go through it side by
side, ``[1, packed row, d_model]``. Attention alone has to know which packed rows belong together, and at which columns of
the sequence they stand. :class:`PackedAttention` knows, and stands in for attention over the rows of a batch
(:func:`~pellucid.model_bridge.generalized_components.mixing.mixing_by`); the arithmetic is the component's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.model_bridge.generalized_components.mixing import Attends, Projection
from pellucid.sweep.base_run import BaseRun
from pellucid.sweep.edited_rows import EditedRow

Columns = tuple[int, ...]


@dataclass(eq=False)
class RowGroup:
    """Edited rows that stand at the same columns, and their residual there.

    Attributes:
        edited: the rows.
        columns: where they stand, ascending.
        residual: ``[edited row, col, d_model]``.
    """

    edited: list[EditedRow]
    columns: Columns
    residual: Tensor

    @property
    def packed_rows(self) -> int:
        """Packed rows."""
        return len(self.edited) * len(self.columns)

    def base_rows(self) -> Tensor:
        """``[edited row]``: the row of the base run that each continues."""
        return torch.tensor([each.row for each in self.edited], device=self.residual.device)


class Projected(Exception):  # noqa: N818 (no error: it ends a pass that was for keys and values)
    """All rows have their keys and values."""


class PackedAttention:
    """Attention of one chunk of packed rows in one layer.

    Args:
        base: the unedited run.
        layer: the layer.
        groups: in packed order.
        wanted: for each group, the columns that attention is to give; the others give keys and values alone.
        fast_bias: ALiBi and mask as one, ``[base row or 1, n_heads, pos or 1, key_pos]``, where the fused kernel is wanted.
    """

    def __init__(
        self,
        base: BaseRun,
        layer: int,
        groups: Sequence[RowGroup],
        wanted: Sequence[Columns],
        fast_bias: Tensor | None,
    ) -> None:
        self._base, self._layer, self._groups, self._wanted = base, layer, groups, wanted
        self._fast_bias = fast_bias
        self._projected: tuple[Tensor, Tensor, Tensor] | None = None
        self.current = 0
        """The group whose scores and pattern are being computed; hooks on those fire once a group."""

    def project(self, attention: Attends, project: Projection) -> Tensor:
        """Keep what all rows project, for a pass of the wanted columns that follows; nothing else of this pass is used.

        Raises:
            Projected: always.
        """
        self._projected = project()
        raise Projected

    def __call__(self, attention: Attends, project: Projection) -> Tensor:
        """``[1, packed row, n_heads, d_head]`` of the wanted columns, from queries, keys and values of all of them."""
        q, k, v = self._projected or project()
        base, may_fuse = self._base, self._fast_bias is not None and attention.may_fuse()
        whole_mask, alibi = base.mask(self._layer), base.alibi
        parts, start = [], 0
        for number, (group, wanted) in enumerate(zip(self._groups, self._wanted, strict=True)):
            self.current = number
            here, rows = slice(start, start + group.packed_rows), group.base_rows()
            start += group.packed_rows
            own_q, own_k, own_v = (part[0, here].unflatten(0, (len(rows), -1)) for part in (q, k, v))
            columns = torch.tensor(group.columns)
            # The base run's keys and values, with the edited row's own in place of those it may change.
            keys, values = base.keys[self._layer][rows], base.values[self._layer][rows]
            keys[:, :, columns], values[:, :, columns] = own_k.transpose(1, 2), own_v.transpose(1, 2)
            if wanted != group.columns:
                asking = torch.tensor([group.columns.index(column) for column in wanted], dtype=torch.int64)
                columns, own_q = columns[asking], own_q[:, asking]
            if may_fuse:
                z, _ = attention.attend(own_q, keys, values, None, alibi, self._bias_of(rows, columns))
            else:
                mask = whole_mask
                if mask is not None:
                    mask = (mask if mask.shape[0] == 1 else mask[rows])[:, :, columns]
                z, _ = attention.attend(own_q, keys, values, mask, None if alibi is None else alibi[rows])
            parts.append(z.flatten(0, 1))
        return torch.cat(parts)[None]

    def _bias_of(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """The fused kernel's bias at some columns of some base rows, ``[row or 1, n_heads, col or 1, key_pos]``."""
        bias = self._fast_bias
        assert bias is not None
        if bias.shape[-2] > 1:
            bias = bias[:, :, columns]
        return bias if bias.shape[0] == 1 else bias[rows]
