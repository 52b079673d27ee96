"""How queries, keys and values (or gate and up) lie in the output of one projection.

Every part is a view of the fused tensor's last axis, so that reading copies nothing and writing reaches the model. Each
comes from ``narrow`` or an index: autograd forbids writing to the views that one ``split`` gives together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor


class PartsOfFused(ABC):
    """Where the parts of a fused projection are.

    Attributes:
        names: of the parts.
    """

    names: tuple[str, ...]

    @abstractmethod
    def parts(self, fused: Tensor) -> Mapping[str, Tensor]:
        """By name: ``[..., heads, d_head]`` (or ``[..., groups, heads, d_head]``, or ``[..., features]``), views of
        ``fused``.

        Args:
            fused: ``[..., width]``.
        """


@dataclass(frozen=True)
class Stacked(PartsOfFused):
    """One part after the other: GPT-2 and Phi-3 (queries, keys, values), Phi-3 again (gate, up).

    Attributes:
        names: in order.
        widths: features of each.
        d_head: features of a head, ``None`` where there are no heads.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    d_head: int | None = None

    def parts(self, fused: Tensor) -> Mapping[str, Tensor]:
        """See :class:`PartsOfFused`."""
        starts = accumulate(self.widths[:-1], initial=0)
        pieces = [fused.narrow(-1, start, width) for start, width in zip(starts, self.widths, strict=True)]
        if self.d_head is not None:
            pieces = [piece.unflatten(-1, (-1, self.d_head)) for piece in pieces]
        return dict(zip(self.names, pieces, strict=True))


@dataclass(frozen=True)
class Grouped(PartsOfFused):
    """The queries of each key/value head, then its key, then its value: BLOOM and NeoX (one query each), Falcon.

    Attributes:
        names: of queries, keys and values.
        n_key_value_heads: groups; 1 in multi-query attention.
        d_head: features of a head.
    """

    names: tuple[str, str, str]
    n_key_value_heads: int
    d_head: int

    def parts(self, fused: Tensor) -> Mapping[str, Tensor]:
        """See :class:`PartsOfFused`; several queries in several groups are ``[..., groups, heads, d_head]``."""
        by_group = fused.unflatten(-1, (self.n_key_value_heads, -1, self.d_head))
        queries = by_group[..., :-2, :]
        if self.n_key_value_heads == 1:
            queries = queries.squeeze(-3)
        elif queries.shape[-2] == 1:
            queries = queries.squeeze(-2)
        return dict(zip(self.names, (queries, by_group[..., -2, :], by_group[..., -1, :]), strict=True))
