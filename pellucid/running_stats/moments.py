"""Mean, variance, covariance, extrema.

Moments are kept in float64 as number, mean and sum of squared differences from it, and merged by Chan, Golub and LeVeque
(1983): with ``d`` the difference of the means, ``M = M_a + M_b + d d' n_a n_b / (n_a + n_b)``. Sums of squares, of which the
square of the mean is subtracted at the end, would lose every digit where the mean is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from typing_extensions import Self

from pellucid.arguments import check_count, check_text
from pellucid.errors import InputError
from pellucid.running_stats.base import Places, Statistic, real_tokens
from pellucid.tables import brief


class Moments(NamedTuple):
    """``mean`` and ``variance`` ``[*features]``, float64."""

    mean: Float[Tensor, "*features"]
    variance: Float[Tensor, "*features"]

    def __repr__(self) -> str:
        return brief(type(self).__name__, self._asdict())


class Extrema(NamedTuple):
    """``minimum`` and ``maximum`` ``[*features]``, in the dtype of the values."""

    minimum: Shaped[Tensor, "*features"]
    maximum: Shaped[Tensor, "*features"]

    def __repr__(self) -> str:
        return brief(type(self).__name__, self._asdict())


class CovarianceResult(NamedTuple):
    """``mean`` ``[*features]`` and ``covariance`` ``[feature, feature]``, float64."""

    mean: Float[Tensor, "*features"]
    covariance: Float[Tensor, "feature feature"]

    def __repr__(self) -> str:
        return brief(type(self).__name__, self._asdict())


class MeanVariance(Statistic):
    """Mean and variance over real tokens; ``result()`` is :class:`Moments`.

    Args:
        correction: the variance divides by ``n - correction``.
        label: a word added to its name, to tell two at one place apart.
    """

    kind: ClassVar[str] = "mean_variance"

    def __init__(self, correction: int = 0, label: str | None = None) -> None:
        super().__init__()
        self.correction = check_count("correction", correction, at_least=0)
        self.label = None if label is None else check_text("label", label)

    @property
    def name(self) -> str:
        """``mean_variance``, with its label if it has one."""
        return self.kind if self.label is None else f"{self.kind}_{self.label}"

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {"correction": self.correction} | ({} if self.label is None else {"label": self.label})

    def result(self) -> Moments:
        """Mean and variance ``[*features]``, float64; NaN where there are too few tokens."""
        self._seen()
        divisor = self.n - self.correction
        variance = self._squares / divisor if divisor > 0 else torch.full_like(self._squares, math.nan)
        mean = self._mean if self.n else torch.full_like(self._mean, math.nan)
        return Moments(self._shaped(mean), self._shaped(variance))

    def _begin(self, device: torch.device) -> None:
        self._mean = torch.zeros(self._width, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._mean)

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        real = real_tokens(values, mask).double()
        if real.shape[0]:
            variance, mean = torch.var_mean(real, dim=0, correction=0)
            self._take(real.shape[0], mean, variance * real.shape[0])

    def _take(self, n: int, mean: Tensor, squares: Tensor) -> None:
        total = self.n + n
        delta = mean - self._mean
        self._mean += delta * (n / total)
        self._squares += squares + delta**2 * (self.n / total * n)

    def _merge(self, other: Self) -> None:
        if other.n:
            device = self._mean.device
            self._take(other.n, other._mean.to(device), other._squares.to(device))

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self._mean, "squares": self._squares}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._mean, self._squares = tensors["mean"], tensors["squares"]


class Covariance(Statistic):
    """Mean and covariance over real tokens; ``result()`` is :class:`CovarianceResult`. Feature axes are flattened.

    Args:
        correction: the covariance divides by ``n - correction``.
        most_features: refuse more: the state is their square in float64.
    """

    kind: ClassVar[str] = "covariance"

    def __init__(self, correction: int = 0, most_features: int = 8192) -> None:
        super().__init__()
        self.correction = check_count("correction", correction, at_least=0)
        self.most_features = check_count("most_features", most_features)

    @property
    def name(self) -> str:
        """``covariance``."""
        return self.kind

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {"correction": self.correction, "most_features": self.most_features}

    def result(self) -> CovarianceResult:
        """Mean ``[*features]`` and covariance ``[feature, feature]``, float64; NaN where there are too few tokens."""
        self._seen()
        divisor = self.n - self.correction
        products = self._products / divisor if divisor > 0 else torch.full_like(self._products, math.nan)
        mean = self._mean if self.n else torch.full_like(self._mean, math.nan)
        return CovarianceResult(self._shaped(mean), products)

    def _begin(self, device: torch.device) -> None:
        width = self._width
        if width > self.most_features:
            self.features = None
            raise InputError(
                f"The covariance of {width} features takes {8 * width**2 / 2**30:.1f} GiB; most_features="
                f"{self.most_features} forbids it."
            )
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        real = real_tokens(values, mask).double()
        if real.shape[0]:
            mean = real.mean(0)
            centred = real - mean
            self._take(real.shape[0], mean, centred.T @ centred)

    def _take(self, n: int, mean: Tensor, products: Tensor) -> None:
        total = self.n + n
        delta = mean - self._mean
        self._mean += delta * (n / total)
        self._products += products
        self._products.addr_(delta, delta, alpha=self.n / total * n)

    def _merge(self, other: Self) -> None:
        if other.n:
            device = self._mean.device
            self._take(other.n, other._mean.to(device), other._products.to(device))

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self._mean, "products": self._products}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._mean, self._products = tensors["mean"], tensors["products"]


class MinMax(Statistic):
    """Smallest and largest value over real tokens, exactly; ``result()`` is :class:`Extrema`. A NaN is both."""

    kind: ClassVar[str] = "min_max"

    def __init__(self) -> None:
        super().__init__()
        self._extremes: Tensor | None = None

    @property
    def name(self) -> str:
        """``min_max``."""
        return self.kind

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {}

    def result(self) -> Extrema:
        """``[*features]``, in the dtype of the values.

        Raises:
            InputError: no token was seen.
        """
        self._seen()
        if self._extremes is None:
            raise InputError("min_max has seen padding only.")
        return Extrema(self._shaped(self._extremes[0]), self._shaped(self._extremes[1]))

    def _begin(self, device: torch.device) -> None:
        self._extremes = None

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        real = real_tokens(values, mask)
        if real.shape[0]:
            self._take(torch.stack(real.aminmax(dim=0)))

    def _take(self, extremes: Tensor) -> None:
        held = self._extremes
        if held is not None:
            low, high = torch.minimum(held[0], extremes[0]), torch.maximum(held[1], extremes[1])
            extremes = torch.stack([low, high])
        self._extremes = extremes

    def _merge(self, other: Self) -> None:
        if other._extremes is not None:
            held = self._extremes
            self._take(other._extremes if held is None else other._extremes.to(held.device))

    def _tensors(self) -> dict[str, Tensor]:
        return {} if self._extremes is None else {"extremes": self._extremes}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._extremes = tensors.get("extremes")
