"""One number a document and feature, and how well it tells documents of one label from those of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from typing_extensions import Self

from pellucid.arguments import check_choice, check_count, check_kind, check_list
from pellucid.errors import InputError
from pellucid.running_stats.base import Places, Statistic

Pool = Literal["mean", "max"]


class AveragePrecision(Statistic):
    """Each document's pooled values, from which the average precision of each feature as a classifier follows.

    One of these is kept for each label; ``positive.against([negative, ...])`` is the average precision with the documents of
    the first as positive examples. It keeps a float32 number for each document and feature (``[documents, features]``): it
    grows with the documents, not with their length. Pool documents with ``packing="documents"``: packed rows let one
    document see another.

    ``result()`` is ``[document, *features]`` in float32, documents in the order of the corpus.

    Args:
        pool: ``"mean"`` (as published for expert neurons, whatever that code's help says) or ``"max"`` over the document's
            real tokens.
    """

    kind: ClassVar[str] = "average_precision"

    def __init__(self, pool: Pool = "mean") -> None:
        super().__init__()
        check_choice("pool", pool, ("mean", "max"))
        self.pool: Pool = pool

    @property
    def name(self) -> str:
        """``average_precision``, or ``average_precision_max``."""
        return self.kind if self.pool == "mean" else f"{self.kind}_max"

    def settings(self) -> dict[str, Any]:
        """See :class:`Statistic`."""
        return {"pool": self.pool}

    def result(self) -> Float[Tensor, " document *features"]:
        """``[document, *features]`` float32: each document's mean (or maximum)."""
        features = self._seen()
        _, lengths, pooled = self._joined()
        if self.pool == "mean":
            pooled = (pooled.double() / lengths[:, None]).float()
        return pooled.reshape(-1, *features)

    @property
    def documents(self) -> Int[Tensor, " document"]:
        """``[document]`` int64: their numbers."""
        self._seen()
        return self._joined()[0]

    def against(self, negatives: Sequence[AveragePrecision], what: str = "the scores") -> Float[Tensor, "*features"]:
        """``[*features]`` float64: average precision with these documents as positive and those of ``negatives`` as not.

        Args:
            negatives: those of the other documents.
            what: whose values these are, such as a hook point, for the error.

        Raises:
            InputError: none to compare with, other features or another pooling, values that are not finite.
        """
        for other in check_list("negatives", negatives, "AveragePrecision"):
            check_kind("an entry of negatives", other, AveragePrecision, "an AveragePrecision")
        features = self._seen()
        for other in negatives:
            if other.pool != self.pool or other._seen() != features:
                raise InputError("Average precision compares equally pooled documents of equal features.")
        own = self.result()
        scores = torch.cat([own, *(other.result().to(own.device) for other in negatives)])
        positive = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        positive[: len(own)] = True
        return average_precision(scores, positive, what=what)

    def _begin(self, device: torch.device) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._empty = torch.zeros(0, self._width, device=device)

    def _add(self, values: Tensor, mask: Tensor | None, places: Places | None) -> None:
        if places is None:
            raise InputError(f"{self.name} has to know which document a token is from: give places=.")
        documents = places.documents.reshape(-1).to(values.device)
        if mask is not None:
            values, documents = values[mask], documents[mask]
        if len(documents):
            numbers, where, lengths = documents.unique(return_inverse=True, return_counts=True)
            self._parts.append((numbers, lengths, self._pooled(values.double(), where, len(numbers)).float()))

    def _pooled(self, values: Tensor, where: Tensor, count: int) -> Tensor:
        """Sums, or maxima, of rows that belong together."""
        if self.pool == "mean":
            zeros = torch.zeros(count, values.shape[1], dtype=values.dtype, device=values.device)
            return zeros.index_add_(0, where, values)
        low = torch.full((count, values.shape[1]), -torch.inf, dtype=values.dtype, device=values.device)
        return low.scatter_reduce_(0, where[:, None].expand_as(values), values, "amax")

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers, token counts and sums (or maxima) of all documents; one whose rows lie in two batches is put together."""
        if not self._parts:
            none = torch.zeros(0, dtype=torch.int64, device=self._empty.device)
            return none, none, self._empty
        if len(self._parts) > 1:
            numbers, lengths, pooled = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
            unique, where = numbers.unique(return_inverse=True)
            if len(unique) < len(numbers):
                pooled = self._pooled(pooled.double(), where, len(unique)).float()
                lengths = torch.zeros_like(unique).index_add_(0, where, lengths)
            else:
                order = numbers.argsort()
                lengths, pooled = lengths[order], pooled[order]
            self._parts = [(unique, lengths, pooled)]
        return self._parts[0]

    def _merge(self, other: Self) -> None:
        device = self._empty.device
        numbers, lengths, pooled = other._joined()
        self._parts.append((numbers.to(device), lengths.to(device), pooled.to(device)))

    def _tensors(self) -> dict[str, Tensor]:
        numbers, lengths, pooled = self._joined()
        return {"documents": numbers, "lengths": lengths, "pooled": pooled}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._begin(tensors["pooled"].device)
        self._parts = [(tensors["documents"], tensors["lengths"], tensors["pooled"])]


def average_precision(
    scores: Num[Tensor, " document *features"],
    positive: Bool[Tensor, " document"],
    chunk: int = 4096,
    what: str = "the scores",
) -> Float[Tensor, "*features"]:
    """Average precision of each feature's scores, as scikit-learn's ``average_precision_score`` has it, ties included.

    ``sum over thresholds of (R_i - R_{i-1}) P_i``: documents of equal score pass one threshold together.

    Args:
        scores: ``[document, *features]``, finite.
        positive: ``[document]`` bool: which documents are positive.
        chunk: features at a time, which bounds the memory.
        what: whose scores these are, such as a hook point, for the error.

    Returns:
        ``[*features]`` float64.

    Raises:
        InputError: no positive or no negative document, scores that are not finite (naming the features), other shapes.
    """
    check_kind("scores", scores, Tensor, "a tensor [document, *features]")
    check_kind("positive", positive, Tensor, "a tensor [document] bool")
    if positive.dtype != torch.bool or positive.dim() != 1 or scores.dim() < 1 or len(scores) != len(positive):
        raise InputError(
            "Average precision takes scores [document, *features] and positive [document] bool; found "
            f"{tuple(scores.shape)} and {tuple(positive.shape)} {positive.dtype}."
        )
    check_count("chunk", chunk)
    n_positive = int(positive.sum())
    if n_positive in (0, len(positive)):
        missing = "positive" if n_positive == 0 else "negative"
        raise InputError(f"Average precision needs positive and negative documents; there is no {missing} one.")
    flat = scores.reshape(len(scores), -1)
    wrong = (~flat.isfinite()).any(0).nonzero().flatten().tolist()
    if wrong:
        listed = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        raise InputError(
            f"Average precision needs finite scores; {len(wrong)} of {flat.shape[1]} features of {what} have a NaN or an "
            f"infinite one: {listed}. Leave them out (expertise takes responses by hook and label), or run the model in a "
            "dtype of a wider range (bfloat16 or float32)."
        )
    found = torch.empty(flat.shape[1], dtype=torch.float64, device=flat.device)
    for begin in range(0, flat.shape[1], chunk):
        found[begin : begin + chunk] = _average_precision(flat[:, begin : begin + chunk], positive, n_positive)
    return found.reshape(scores.shape[1:])


def _average_precision(scores: Tensor, positive: Tensor, n_positive: int) -> Tensor:
    ranked, order = scores.sort(dim=0, descending=True)
    hits = positive[order].double().cumsum(0)  # true positives down to each rank, exact
    ranks = torch.arange(1, len(ranked) + 1, dtype=torch.float64, device=ranked.device)[:, None]
    closes = torch.ones_like(ranked, dtype=torch.bool)  # the last of those that are equal
    closes[:-1] = ranked[:-1] != ranked[1:]
    precision = hits / ranks
    # True positives at the threshold before, counted at every rank: hits grow, so a running maximum carries them on.
    before = torch.zeros_like(hits)
    before[1:] = torch.where(closes[:-1], hits[:-1], 0).cummax(0).values
    return torch.where(closes, (hits - before) * precision, 0).sum(0) / n_positive
