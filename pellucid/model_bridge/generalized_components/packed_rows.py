"""Rows of many runs in one batch: what attention has to know to keep them apart.

A sweep runs many edited copies of one base run, each only at the columns where it can differ. All steps of a block but
attention work on each position alone, so the columns of all runs are laid one after the other, ``[1, row, d_model]``.
Attention alone needs to know which packed rows belong to one run, at which columns of the sequence they stand, and the
base run's keys and values at the columns before. It takes them as its ``layer_past``: :class:`PackedRuns` is to a sweep
what a key/value cache is to generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class RunGroup:
    """Runs that stand at the same columns, packed one after the other.

    Attributes:
        start: first packed row; run ``i`` has the rows from ``start + i * len(columns)``.
        base_rows: ``[run]``, the row of the base run that each continues.
        columns: ``[col]``, columns of the sequence, ascending.
        wanted: indices into ``columns`` of the positions whose output is wanted, ``None`` for all. The others still give
            keys and values.
    """

    start: int
    base_rows: Tensor
    columns: Tensor
    wanted: Tensor | None = None

    @property
    def runs(self) -> int:
        """How many runs."""
        return self.base_rows.shape[0]

    @property
    def rows(self) -> int:
        """How many packed rows go in."""
        return self.runs * self.columns.shape[0]

    @property
    def rows_out(self) -> int:
        """How many packed rows come out of attention."""
        return self.runs * (self.columns.shape[0] if self.wanted is None else self.wanted.shape[0])


@dataclass(eq=False)
class PackedRuns:
    """All groups of a packed batch, and the base run's keys and values in one layer.

    Attributes:
        groups: in packed order.
        keys: ``[base row, n_heads, key_pos, d_head]``.
        values: the same.
        alibi: ``[base row, n_heads, 1, key_pos]``.
        mask: additive, ``[base row, 1, pos, key_pos]``, or ``None``.
        fast_bias: ALiBi and mask as one, ``[base row or 1, n_heads, pos or 1, key_pos]``, where the fused kernel is wanted.
        current: the group whose scores and pattern are being computed; hooks on those fire once a group.
    """

    groups: Sequence[RunGroup]
    keys: Tensor
    values: Tensor
    alibi: Tensor
    mask: Tensor | None
    fast_bias: Tensor | None = None
    current: int = field(default=0)

    def bias_of(self, base_rows: Tensor, columns: Tensor) -> Tensor | None:
        """The fused kernel's bias for some runs at some columns, ``[run or 1, n_heads, col or 1, key_pos]``."""
        bias = self.fast_bias
        if bias is None:
            return None
        if bias.shape[-2] > 1:
            bias = bias[:, :, columns]
        return bias if bias.shape[0] == 1 else bias[base_rows]
