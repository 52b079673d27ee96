"""Statistics whose state is integers: they merge exactly, in any order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Self

from pellucid.arguments import check_count, check_list, check_number
from pellucid.errors import InputError
from pellucid.running_stats.base import Places, Statistic, real_tokens

EXACT_IN_FLOAT32 = 2**24
"""Integers up to here are float32 numbers, so sums of so many zeros and ones are exact in any order."""


BLOCK = 2**17
"""Numbers that are compared and summed at a time."""


class CountPositive(Statistic):
    """How many real tokens have a value above ``threshold``; a NaN is not above anything.

    ``result()`` is ``[*features]`` int64.

    Args:
        threshold: values equal to it do not count.
    """

    kind: ClassVar[str] = "count_positive"

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = check_number("threshold", threshold)

    @property
    def name(self) -> str:
        """``count_positive``, or ``count_above_{threshold}``."""
        return self.kind if self.threshold == 0 else f"count_above_{self.threshold:g}"

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {"threshold": self.threshold}

    def result(self) -> Int[Tensor, "*features"]:
        """``[*features]`` int64."""
        self._seen()
        return self._shaped(self._counts)

    def _begin(self, device: torch.device) -> None:
        self._counts = torch.zeros(self._width, dtype=torch.int64, device=device)

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        # Ones and zeros as float32, summed by a matrix product in blocks that stay in the processor's cache: a sixth of the
        # time of summing booleans.
        weights = torch.ones(len(values), device=values.device) if mask is None else mask.float()
        block = max(1, BLOCK // self._width)
        threshold = not_above(self.threshold, values.dtype)
        above = self.workspace.take((min(block, len(values)), self._width), torch.float32, values.device)
        for first in range(0, len(values), EXACT_IN_FLOAT32):
            last = min(first + EXACT_IN_FLOAT32, len(values))
            found = torch.zeros(self._width, device=values.device)
            for begin in range(first, last, block):
                end = min(begin + block, last)
                ones = above[: end - begin]
                torch.gt(values[begin:end], threshold, out=ones)
                found.addmv_(ones.T, weights[begin:end])
            self._counts += found.long()

    def _merge(self, other: Self) -> None:
        self._counts += other._counts.to(self._counts.device)

    def _tensors(self) -> dict[str, Tensor]:
        return {"counts": self._counts}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._counts = tensors["counts"]


class CountTogether(Statistic):
    """How many real tokens have both values of a pair of features above ``threshold``; a NaN is not above anything.

    ``result()`` is ``[feature, feature]`` int64, feature axes flattened. The diagonal is what :class:`CountPositive` counts.

    Args:
        threshold: values equal to it do not count.
        most_features: refuse more: the state is their square in int64.
    """

    kind: ClassVar[str] = "count_together"

    def __init__(self, threshold: float = 0.0, most_features: int = 8192) -> None:
        super().__init__()
        self.threshold = check_number("threshold", threshold)
        self.most_features = check_count("most_features", most_features)

    @property
    def name(self) -> str:
        """``count_together``, or ``count_together_above_{threshold}``."""
        return self.kind if self.threshold == 0 else f"{self.kind}_above_{self.threshold:g}"

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {"threshold": self.threshold, "most_features": self.most_features}

    def result(self) -> Int[Tensor, "feature feature"]:
        """``[feature, feature]`` int64."""
        self._seen()
        return self._counts

    def _begin(self, device: torch.device) -> None:
        width = self._width
        if width > self.most_features:
            self.features = None
            raise InputError(
                f"Counts of the pairs of {width} features take {8 * width**2 / 2**30:.1f} GiB; most_features="
                f"{self.most_features} forbids it."
            )
        self._counts = torch.zeros(width, width, dtype=torch.int64, device=device)

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        above = real_tokens(values, mask) > not_above(self.threshold, values.dtype)
        for part in above.split(EXACT_IN_FLOAT32):
            ones = part.float()
            self._counts += (ones.T @ ones).long()

    def _merge(self, other: Self) -> None:
        self._counts += other._counts.to(self._counts.device)

    def _tensors(self) -> dict[str, Tensor]:
        return {"counts": self._counts}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._counts = tensors["counts"]


class Histogram(Statistic):
    """How many values lie in each bin, as ``numpy.histogram`` counts them: ``[edge, next edge)``, the last bin closed.

    ``result()`` is ``[*features, bin]`` int64; :attr:`outside` has what lies below the first edge and above the last.

    Args:
        edges: increasing, at least two.
    """

    kind: ClassVar[str] = "histogram"

    def __init__(self, edges: Sequence[float]) -> None:
        super().__init__()
        self.edges = [check_number("an entry of edges", edge) for edge in check_list("edges", edges, "numbers")]
        if len(self.edges) < 2 or any(not low < high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise InputError(f"edges increase, two at least; found {self.edges}.")

    @property
    def name(self) -> str:
        """``histogram``."""
        return self.kind

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {"edges": self.edges}

    def result(self) -> Int[Tensor, "*features bin"]:
        """``[*features, bin]`` int64."""
        self._seen()
        return self._shaped(self._counts[:, 1:-1])

    @property
    def trailing(self) -> dict[str, list[float] | range]:
        """``bin``, by its lower edge."""
        return {"bin": self.edges[:-1]}

    @property
    def outside(self) -> Int[Tensor, "*features 2"]:
        """``[*features, 2]`` int64: below the first edge, above the last (a NaN too)."""
        self._seen()
        return self._shaped(self._counts[:, [0, -1]])

    def _begin(self, device: torch.device) -> None:
        self._counts = torch.zeros(self._width, len(self.edges) + 1, dtype=torch.int64, device=device)

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        wide = real_tokens(values, mask).double()  # the edges are Python's floats
        edges = torch.tensor(self.edges, dtype=torch.float64, device=values.device)
        bins = torch.bucketize(wide, edges, right=True)
        bins[wide == self.edges[-1]] -= 1
        count_bins(bins, self._counts)

    def _merge(self, other: Self) -> None:
        self._counts += other._counts.to(self._counts.device)

    def _tensors(self) -> dict[str, Tensor]:
        return {"counts": self._counts}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._counts = tensors["counts"]


def _shares(quantiles: Sequence[float]) -> list[float]:
    listed = check_list("quantiles", quantiles, "numbers from 0 to 1")
    return [check_number("an entry of quantiles", each, at_least=0, at_most=1) for each in listed]


def not_above(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is not above ``threshold``.

    A comparison rounds a threshold to the dtype of the values. In bfloat16 0.1 becomes 0.10009765625, and values that are
    equal to that, though above 0.1, would not count.
    """
    rounded = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    if float(rounded) > threshold:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return float(rounded)


def count_bins(bins: Int[Tensor, "token feature"], counts: Int[Tensor, "feature bin"]) -> None:
    """Add how often each feature's column of ``bins`` ``[token, feature]`` has each bin to ``counts`` ``[feature, bin]``."""
    width, size = counts.shape
    places = bins + torch.arange(width, device=bins.device) * size
    counts += torch.bincount(places.reshape(-1), minlength=width * size).view(width, size).to(counts.dtype)


class Quantiles(Statistic):
    """Quantiles from a sketch of logarithmic bins (Masson, Rim and Lee 2019, DDSketch), with a bound on their error.

    The quantile ``q`` of ``n`` values is the one of rank ``floor(q (n - 1))``, ``numpy``'s method ``"lower"``. With ``x``
    that value and ``y`` what is returned:

    * ``|y - x| <= relative_error |x|`` where ``smallest <= |x| <= largest``;
    * ``|y - x| <= smallest`` where ``|x| < smallest``;
    * where ``|x| > largest``, ``y`` lies between ``largest`` and the extreme value seen; :attr:`beyond` counts such values.

    The state is integers: equal for any batch size and any order of merging. It takes ``4 (2 bins + 3)`` bytes a feature,
    with the defaults 3.7 kB.

    ``result()`` is ``[*features, quantile]`` in float64.

    Args:
        quantiles: in 0 to 1.
        relative_error: see above.
        smallest: values nearer to 0 are taken for 0.
        largest: see above.
    """

    kind: ClassVar[str] = "quantiles"

    def __init__(
        self,
        quantiles: Sequence[float] = (0.5,),
        relative_error: float = 0.02,
        smallest: float = 1e-4,
        largest: float = 1e4,
    ) -> None:
        super().__init__()
        self.quantiles = _shares(quantiles)
        self.relative_error = check_number("relative_error", relative_error, at_least=1e-3)
        self.smallest = check_number("smallest", smallest, above=0)
        self.largest = check_number("largest", largest, above=self.smallest)
        if self.relative_error >= 1:
            raise InputError(f"relative_error must be below 1; found {self.relative_error}.")
        # The bins are a little narrower than the error allows, by more than float32 puts a value into the wrong one: at
        # log2 up to 128 and over bins of 0.003 quotients go up to 2**16, with steps of 2**-8 bins, 1e-5 of a value.
        error = self.relative_error - 3e-5
        self._width_log2 = math.log2((1 + error) / (1 - error))
        self._n_bins = math.ceil(math.log2(self.largest / self.smallest) / self._width_log2)

    @property
    def name(self) -> str:
        """``quantiles``."""
        return self.kind

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {
            "quantiles": self.quantiles,
            "relative_error": self.relative_error,
            "smallest": self.smallest,
            "largest": self.largest,
        }

    def result(self) -> Float[Tensor, "*features quantile"]:
        """``[*features, quantile]`` float64; NaN where no value was seen."""
        return self.at(self.quantiles)

    @property
    def trailing(self) -> dict[str, list[float] | range]:
        """``quantile``."""
        return {"quantile": self.quantiles}

    @property
    def beyond(self) -> Int[Tensor, "*features"]:
        """``[*features]`` int64: values over ``largest`` in size, for which the bound does not hold."""
        self._seen()
        return self._shaped(self._counts[:, [0, -1]].long().sum(-1))

    def at(self, quantiles: Sequence[float]) -> Float[Tensor, "*features quantile"]:
        """``[*features, quantile]`` float64: any quantiles, within the same bound."""
        quantiles = _shares(quantiles)
        self._seen()
        if self.n == 0:
            return self._shaped(torch.full((self._width, len(quantiles)), math.nan, dtype=torch.float64))
        ranks = [math.floor(quantile * (self.n - 1)) for quantile in quantiles]
        upto = self._counts.long().cumsum(-1)
        wanted = torch.tensor(ranks, device=upto.device).expand(self._width, -1).contiguous()
        bins = torch.searchsorted(upto, wanted, right=True).clamp(max=upto.shape[1] - 1)
        found = self._centres().to(upto.device)[bins]
        low, high = self._extremes[:, :1], self._extremes[:, 1:]
        return self._shaped(found.clamp(low, high))

    def _centres(self) -> Tensor:
        """The value of each bin: ``2 a b / (a + b)`` between its edges ``a`` and ``b``, equally wrong at both."""
        edges = self.smallest * 2 ** (torch.arange(self._n_bins + 1, dtype=torch.float64) * self._width_log2)
        low, high = edges[:-1], edges[1:]
        above = torch.cat([2 * low * high / (low + high), torch.tensor([math.inf], dtype=torch.float64)])
        return torch.cat([-above.flip(0), torch.zeros(1, dtype=torch.float64), above])

    def _begin(self, device: torch.device) -> None:
        size = 2 * self._n_bins + 3
        self._counts = torch.zeros(self._width, size, dtype=torch.int32, device=device)
        extremes = torch.tensor([math.inf, -math.inf], dtype=torch.float64, device=device)
        self._extremes = extremes.repeat(self._width, 1)

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        real = real_tokens(values, mask)
        if real.shape[0] == 0:
            return
        wide = real if real.dtype == torch.float64 else real.float()
        size = wide.abs()
        exact = (size / self.smallest).log2_().div_(self._width_log2).floor_()
        bins = exact.clamp_(0, self._n_bins - 1).nan_to_num_(nan=self._n_bins).long() + 1
        bins[size < self.smallest] = 0
        bins[(size > self.largest) | size.isnan()] = self._n_bins + 1
        count_bins(torch.where(wide < 0, -bins, bins) + self._n_bins + 1, self._room_for(real.shape[0]))
        low, high = (extreme.double() for extreme in wide.aminmax(dim=0))
        self._widen(low, high)

    def _room_for(self, more: int) -> Tensor:
        if self.n + more >= 2**31 and self._counts.dtype == torch.int32:
            self._counts = self._counts.long()
        return self._counts

    def _widen(self, low: Tensor, high: Tensor) -> None:
        self._extremes[:, 0] = torch.minimum(self._extremes[:, 0], low)
        self._extremes[:, 1] = torch.maximum(self._extremes[:, 1], high)

    def _merge(self, other: Self) -> None:
        self._room_for(other.n)
        self._counts += other._counts.to(self._counts.device)
        extremes = other._extremes.to(self._extremes.device)
        self._widen(extremes[:, 0], extremes[:, 1])

    def _tensors(self) -> dict[str, Tensor]:
        return {"counts": self._counts, "extremes": self._extremes}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._counts, self._extremes = tensors["counts"], tensors["extremes"]
