"""The tokens at which each feature is largest, with where they stand in the corpus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Self

from pellucid.arguments import check_count
from pellucid.errors import InputError
from pellucid.running_stats.base import Places, Statistic
from pellucid.tables import brief

_LATEST = 2**63 - 1


class TopExamples(NamedTuple):
    """The largest values and their places, largest first.

    Attributes:
        values: ``[*features, k]``, ``-inf`` where fewer tokens were seen.
        documents: ``[*features, k]`` int64, number of the document within its label; -1 there.
        positions: ``[*features, k]`` int64, position in the document; -1 there.
    """

    values: Float[Tensor, "*features k"]
    documents: Int[Tensor, "*features k"]
    positions: Int[Tensor, "*features k"]

    def __repr__(self) -> str:
        return brief(type(self).__name__, self._asdict())


class TopK(Statistic):
    """The ``k`` real tokens with the largest value of each feature; ``result()`` is :class:`TopExamples`.

    Of equal values the one that comes first in the corpus is kept, so the outcome does not depend on batch size or on
    how the corpus was divided. A NaN is no example. ``corpus.contexts(label, places)`` has their text.

    Args:
        k: how many.
    """

    kind: ClassVar[str] = "top"

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = check_count("k", k)

    @property
    def name(self) -> str:
        """``top_{k}``."""
        return f"top_{self.k}"

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {"k": self.k}

    def result(self) -> TopExamples:
        """Values and places ``[*features, k]``."""
        self._seen()
        there = self._keys != _LATEST
        documents = torch.where(there, self._keys >> 32, -1)
        positions = torch.where(there, self._keys & 0xFFFFFFFF, -1)
        values = self._values.masked_fill(~there, -math.inf)
        return TopExamples(*(self._shaped(part.T.contiguous()) for part in (values, documents, positions)))

    @property
    def trailing(self) -> dict[str, list[float] | range]:
        """``rank``, 0 the largest."""
        return {"rank": range(self.k)}

    def _begin(self, device: torch.device) -> None:
        # Key: the document in the upper half, the position in the lower one.
        self._keys = torch.full((self.k, self._width), _LATEST, device=device)
        self._values = torch.full((self.k, self._width), -math.inf, device=device)

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        if places is None:
            raise InputError(f"{self.name} remembers where its examples stand: give places=.")
        if self.n == 0:
            self._values = self._values.to(values.dtype)
        documents, positions = (part.reshape(-1).to(values.device) for part in (places.documents, places.positions))
        keys = (documents << 32) | positions
        if mask is not None:
            values, keys = values[mask], keys[mask]
        if values.shape[0] == 0:
            return
        if bool(values.isnan().any()):
            values = torch.where(values.isnan(), -math.inf, values)
        # Later tokens of equal value give way to earlier ones, so nothing changes for the other features.
        highest, least = values.amax(0), self._values[-1]
        earlier = (highest == least) & (keys.min() < self._keys[-1])  # of a batch that is given out of order
        rising = ((highest > least) | earlier).nonzero()[:, 0]
        if not len(rising):
            return
        values = values[:, rising]
        best = values.topk(min(self.k, values.shape[0]), dim=0)
        # Of the values that equal the least of these any may be among them: there, all are compared.
        shared = (values >= best.values[-1]).sum(0) > self.k
        self._take(best.values[:, ~shared], keys[best.indices[:, ~shared]], rising[~shared])
        if bool(shared.any()):
            values = values[:, shared]
            self._take(values, keys[:, None].expand_as(values), rising[shared])

    def _take(self, values: Tensor, keys: Tensor, features: Tensor) -> None:
        """Put candidates ``[token, feature]`` beside what is held and keep the largest."""
        values = torch.cat([self._values[:, features], values])
        keys = torch.cat([self._keys[:, features], keys])
        lost = values.isnan() | (values == -math.inf)
        values, keys = values.masked_fill(lost, -math.inf), keys.masked_fill(lost, _LATEST)
        order = keys.argsort(dim=0, stable=True)
        values, keys = values.gather(0, order), keys.gather(0, order)
        order = values.argsort(dim=0, descending=True, stable=True)[: self.k]
        self._values[:, features], self._keys[:, features] = values.gather(0, order), keys.gather(0, order)

    def _merge(self, other: Self) -> None:
        device = self._values.device
        if self.n == 0:
            self._values = self._values.to(other._values.dtype)
        every = torch.arange(self._width, device=device)
        self._take(other._values.to(device), other._keys.to(device), every)

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self._values, "keys": self._keys}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._values, self._keys = tensors["values"], tensors["keys"]
