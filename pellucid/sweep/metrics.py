"""Metrics: one number a row from a run's logits, saying beforehand which logits they read.

A sweep unembeds only what its metric reads, so a :class:`Metric` declares positions and tokens. Each may also be called on
a full tensor of logits ``[batch, pos, d_vocab]``, as a plain function would be.

Formulas: logit difference, log-probability, probability and KL divergence as in Zhang and Nanda (2024, arXiv 2309.16042),
who advise logit difference; the normalised form is theirs too. All are in nats, computed in float32 at least.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pellucid.arguments import check_kind, check_whole
from pellucid.errors import InputError
from pellucid.losses import next_token_loss
from pellucid.padding import last_real, targets
from pellucid.tables import BriefFields

TokenIds: TypeAlias = int | Sequence[int] | Tensor
"""One token id for all rows, or one a row."""

TokenSets: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]]
"""One set of token ids for all rows (or one id), or a list of sets, one a row."""


@dataclass(frozen=True, eq=False, repr=False)
class Reads(BriefFields):
    """What a metric reads of the logits.

    Attributes:
        columns: ``[row, read]``, columns of the padded sequence.
        tokens: token ids in ascending order, ``None`` for the whole vocabulary.
    """

    columns: Tensor
    tokens: tuple[int, ...] | None

    def key(self) -> tuple[object, ...]:
        """Equal for metrics that read the same."""
        return (tuple(map(tuple, self.columns.tolist())), self.tokens)


class Metric(ABC):
    """A number a row of a run's logits."""

    @abstractmethod
    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """What it reads on this batch.

        Args:
            tokens: ``[row, pos]``.
            attention_mask: ``[row, pos]``, or ``None``.
        """

    def named_tokens(self) -> Mapping[str, TokenIds]:
        """The token ids that it was given, by argument."""
        return {}

    def check(self, tokens: Tensor, attention_mask: Tensor | None, d_vocab: int) -> None:
        """Refuse what cannot be read of a batch, before it is run.

        Args:
            tokens: ``[row, pos]``.
            attention_mask: ``[row, pos]``, or ``None``.
            d_vocab: size of the vocabulary.

        Raises:
            InputError: a position that the batch has not, or a token id that the vocabulary has not.
        """
        self.reads(tokens, attention_mask)
        for argument, ids in self.named_tokens().items():
            outside = [token for token in _ids(ids, tokens.shape[0], argument).tolist() if not 0 <= token < d_vocab]
            if outside:
                raise InputError(f"{argument}: token id {outside[0]} is outside the vocabulary, 0 to {d_vocab - 1}.")

    def bound(self, tokens: Tensor, attention_mask: Tensor | None) -> Metric:
        """The same metric, knowing the batch it is for."""
        return self

    @abstractmethod
    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """The metric of each edit and row.

        Args:
            logits: ``[edit, row, read, token]``, the cells of ``reads``.
            reads: what :meth:`reads` said.

        Returns:
            ``[edit, row]``.
        """

    def __call__(self, logits: Tensor) -> Tensor:
        """The mean over rows, from full logits ``[batch, pos, d_vocab]`` of unpadded rows."""
        tokens = torch.zeros(logits.shape[:2], dtype=torch.int64)
        self.check(tokens, None, logits.shape[-1])
        reads = self.reads(tokens, None)
        return self.score(cells_of(logits, reads), reads).mean()


def cells_of(logits: Tensor, reads: Reads) -> Tensor:
    """``[1, row, read, token]``: what ``reads`` names of full logits ``[row, pos, d_vocab]``."""
    rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
    cells = logits[rows, reads.columns.to(logits.device)]
    if reads.tokens is not None:
        cells = cells[..., torch.tensor(reads.tokens, device=logits.device)]
    return cells[None]


def read_columns(position: int | None, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``[row, 1]``: the column of ``position``, or of each row's last real token for ``None``.

    Raises:
        InputError: the position is outside the sequence, or padding.
    """
    rows, length = tokens.shape
    if position is not None:
        position = check_whole("position", position)
    if position is None:
        if attention_mask is None:
            return torch.full((rows, 1), length - 1)
        return last_real(attention_mask.cpu())[:, None]
    if not -length <= position < length:
        raise InputError(f"The metric reads position {position}; the sequence has {length}, 0 to {length - 1}.")
    column = position % length
    if attention_mask is not None:
        padded = (~attention_mask.bool()[:, column]).nonzero().flatten().tolist()
        if padded:
            raise InputError(
                f"The metric reads column {column}, which is padding in row {padded[0]}. Leave position out for each row's "
                "last real token."
            )
    return torch.full((rows, 1), column)


def _ids(tokens: TokenIds, rows: int, what: str) -> Tensor:
    try:
        ids = torch.as_tensor(tokens).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{what} is a token id, or one a row; found {tokens!r}.") from None
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() > 1:
        raise InputError(f"{what} is a token id, or one a row; found {tokens!r}. bridge.to_single_token gives ids.")
    if ids.dim() == 1 and ids.numel() not in (1, rows):
        raise InputError(f"{what} has {ids.numel()} token ids for {rows} rows.")
    return ids.to(torch.int64).expand(rows)


def _sets(sets: TokenSets, rows: int, what: str) -> list[list[int]]:
    """The token ids of each row.

    Raises:
        InputError: something else; an empty set, or one with a token twice, which would count twice.
    """
    whole = isinstance(sets, Sequence) and not isinstance(sets, str)
    found: list[Any] = list(sets) if whole else [sets]  # type: ignore[arg-type]
    by_row = [list(each) if isinstance(each, Sequence) and not isinstance(each, str) else each for each in found]
    if not any(isinstance(each, list) for each in by_row):
        by_row = [by_row] * rows
    for row, each in enumerate(by_row):
        if not isinstance(each, list) or not each or not all(type(token) is int for token in each):
            raise InputError(
                f"{what} is a set of token ids, or a list of sets, one a row; found {each!r} in row {row}."
            )
        if len(set(each)) < len(each):
            raise InputError(f"{what} has a token twice in row {row}, whose probability would count twice.")
    if len(by_row) not in (1, rows):
        raise InputError(f"{what} has {len(by_row)} sets of token ids for {rows} rows.")
    return by_row if len(by_row) == rows else by_row * rows


def _number_or_numbers(argument: str, value: Any) -> Tensor:
    try:
        if not isinstance(value, bool | str):
            return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise InputError(f"Normalized: {argument} is a number, or one a row; found {value!r} ({type(value).__name__}).")


def _places(ids: Tensor, reads: Reads) -> Tensor:
    """Where each id is among the tokens read."""
    if reads.tokens is None:
        return ids
    place = {token: i for i, token in enumerate(reads.tokens)}
    return torch.tensor([place[token] for token in ids.tolist()])


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _pick(logits_erv: Tensor, ids_r: Tensor) -> Tensor:
    """``[edit, row]``: one token of each row."""
    index = ids_r.to(logits_erv.device)[None, :, None].expand(logits_erv.shape[0], -1, 1)
    return logits_erv.gather(-1, index)[..., 0]


@dataclass(frozen=True, eq=False, repr=False)
class LogitDifference(BriefFields, Metric):
    """``logit[answer] - logit[foil]``.

    Attributes:
        answer: token id, or one a row.
        foil: token id, or one a row.
        position: column read; by default each row's last real token.
    """

    answer: TokenIds
    foil: TokenIds
    position: int | None = None

    def named_tokens(self) -> Mapping[str, TokenIds]:
        """Both."""
        return {"answer": self.answer, "foil": self.foil}

    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """Two tokens at one position a row."""
        rows = tokens.shape[0]
        both = torch.cat([_ids(self.answer, rows, "answer"), _ids(self.foil, rows, "foil")])
        return Reads(read_columns(self.position, tokens, attention_mask), tuple(sorted(set(both.tolist()))))

    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """``[edit, row]``."""
        wide, rows = _wide(logits[:, :, 0]), logits.shape[1]
        answer = _places(_ids(self.answer, rows, "answer"), reads)
        foil = _places(_ids(self.foil, rows, "foil"), reads)
        return _pick(wide, answer) - _pick(wide, foil)


@dataclass(frozen=True, eq=False, repr=False)
class LogProbability(BriefFields, Metric):
    """``log p(answer)``, natural.

    Attributes:
        answer: token id, or one a row.
        position: column read; by default each row's last real token.
    """

    answer: TokenIds
    position: int | None = None

    def named_tokens(self) -> Mapping[str, TokenIds]:
        """The answer."""
        return {"answer": self.answer}

    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """The whole vocabulary at one position a row."""
        _ids(self.answer, tokens.shape[0], "answer")
        return Reads(read_columns(self.position, tokens, attention_mask), None)

    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """``[edit, row]``."""
        wide = _wide(logits[:, :, 0])
        return _pick(wide, _ids(self.answer, logits.shape[1], "answer")) - torch.logsumexp(wide, dim=-1)


@dataclass(frozen=True, eq=False, repr=False)
class Probability(BriefFields, Metric):
    """``p(answer)``: hides what makes an unlikely answer less likely still; prefer a logit difference.

    Attributes:
        answer: token id, or one a row.
        position: column read; by default each row's last real token.
    """

    answer: TokenIds
    position: int | None = None

    def named_tokens(self) -> Mapping[str, TokenIds]:
        """The answer."""
        return {"answer": self.answer}

    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """The whole vocabulary at one position a row."""
        return LogProbability(self.answer, self.position).reads(tokens, attention_mask)

    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """``[edit, row]``."""
        return LogProbability(self.answer, self.position).score(logits, reads).exp()


@dataclass(frozen=True, eq=False, repr=False)
class ProbabilityDifference(BriefFields, Metric):
    """``p(any of answer) - p(any of foil)``: sums over sets of tokens, such as later and earlier years (Hanna et al. 2023).

    Attributes:
        answer: token ids, one set for all rows or one a row.
        foil: the same; ``None`` subtracts nothing.
        position: column read; by default each row's last real token.
    """

    answer: TokenSets
    foil: TokenSets | None = None
    position: int | None = None

    def check(self, tokens: Tensor, attention_mask: Tensor | None, d_vocab: int) -> None:
        """See :class:`Metric`; no token is in both sets of a row."""
        self.reads(tokens, attention_mask)
        for row, (answer, foil) in enumerate(self._by_row(tokens.shape[0])):
            for name, ids in (("answer", answer), ("foil", foil)):
                outside = [token for token in ids if not 0 <= token < d_vocab]
                if outside:
                    raise InputError(f"{name}: token id {outside[0]} is outside the vocabulary, 0 to {d_vocab - 1}.")
            both = sorted(set(answer) & set(foil))
            if both:
                raise InputError(f"The token id {both[0]} is in answer and in foil of row {row}.")

    def _by_row(self, rows: int) -> list[tuple[list[int], list[int]]]:
        foils = [list[int]()] * rows if self.foil is None else _sets(self.foil, rows, "foil")
        return list(zip(_sets(self.answer, rows, "answer"), foils, strict=True))

    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """The whole vocabulary at one position a row."""
        self._by_row(tokens.shape[0])
        return Reads(read_columns(self.position, tokens, attention_mask), None)

    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """``[edit, row]``."""
        wide = _wide(logits[:, :, 0])
        by_row = self._by_row(logits.shape[1])
        most = max(len(answer) + len(foil) for answer, foil in by_row)
        # Shorter sets are filled with token 0, which counts for nothing.
        ids = torch.tensor([(a + f + [0] * most)[:most] for a, f in by_row], device=wide.device)
        signs = torch.tensor(
            [([1] * len(a) + [-1] * len(f) + [0] * most)[:most] for a, f in by_row], device=wide.device
        )
        picked = wide.gather(-1, ids.expand(len(wide), -1, -1)) - torch.logsumexp(wide, dim=-1, keepdim=True)
        return (picked.exp() * signs).sum(-1)


@dataclass(frozen=True, eq=False, repr=False)
class KLDivergence(BriefFields, Metric):
    """``KL(reference || run)`` of the next-token distributions, in nats.

    Attributes:
        reference: logits of the reference run, ``[row, pos, d_vocab]``, or ``[row, d_vocab]`` at the position read.
        position: column read; by default each row's last real token.
    """

    reference: Tensor
    position: int | None = None

    def check(self, tokens: Tensor, attention_mask: Tensor | None, d_vocab: int) -> None:
        """See :class:`Metric`; the reference has the batch's positions and the vocabulary's tokens."""
        super().check(tokens, attention_mask, d_vocab)
        wanted = (*tokens.shape, d_vocab) if self.reference.dim() == 3 else (tokens.shape[0], d_vocab)
        if tuple(self.reference.shape) != wanted:
            raise InputError(f"KLDivergence: reference must have shape {wanted}; found {tuple(self.reference.shape)}.")

    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """The whole vocabulary at one position a row."""
        if not isinstance(self.reference, Tensor):
            raise InputError(f"KLDivergence: reference is a tensor of logits; found {type(self.reference).__name__}.")
        if self.reference.dim() not in (2, 3) or self.reference.shape[0] != tokens.shape[0]:
            raise InputError(
                f"KLDivergence: reference is logits [row, d_vocab] or [row, pos, d_vocab] with {tokens.shape[0]} rows; "
                f"found {tuple(self.reference.shape)}."
            )
        return Reads(read_columns(self.position, tokens, attention_mask), None)

    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """``[edit, row]``."""
        reference = self.reference if self.reference.dim() == 2 else cells_of(self.reference, reads)[0, :, 0]
        log_p = torch.log_softmax(_wide(reference.to(logits.device)), dim=-1)
        log_q = torch.log_softmax(_wide(logits[:, :, 0]), dim=-1)
        if log_q.requires_grad:
            return ((log_p - log_q) * log_p.exp()).sum(-1)
        # p (log p - log q) in the place of log q, which is ours: nothing else of [edit, row, d_vocab] is made.
        return log_q.neg_().add_(log_p).mul_(log_p.exp()).sum(-1)


@dataclass(frozen=True, eq=False, repr=False)
class NextTokenLoss(BriefFields, Metric):
    """Mean cross-entropy of each row's tokens given those before them, padding left out, in nats.

    Attributes:
        tokens: ``[row, pos]``: the targets, when it is called on logits; a sweep knows its own.
        attention_mask: theirs.
    """

    tokens: Tensor | None = None
    attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.attention_mask is not None and self.tokens is None:
            raise InputError("NextTokenLoss: attention_mask would have no effect without tokens, whose mask it is.")

    def check(self, tokens: Tensor, attention_mask: Tensor | None, d_vocab: int) -> None:
        """See :class:`Metric`; targets and mask have the batch's shape."""
        for argument, given in (("tokens", self.tokens), ("attention_mask", self.attention_mask)):
            if (
                given is not None
                and check_kind(f"NextTokenLoss: {argument}", given, Tensor, "a tensor").shape != tokens.shape
            ):
                raise InputError(
                    f"NextTokenLoss: {argument} must have shape {tuple(tokens.shape)}; found {tuple(given.shape)}."
                )
        if self.tokens is not None and (self.tokens.is_floating_point() or self.tokens.dtype == torch.bool):
            raise InputError(f"NextTokenLoss: tokens are integers; found {self.tokens.dtype}.")

    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """Everything."""
        rows, length = tokens.shape
        return Reads(torch.arange(length).expand(rows, length), None)

    def bound(self, tokens: Tensor, attention_mask: Tensor | None) -> Metric:
        """The same metric with its targets."""
        return self if self.tokens is not None else NextTokenLoss(tokens, attention_mask)

    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """``[edit, row]``."""
        if self.tokens is None:
            raise InputError(
                "NextTokenLoss called on logits needs their tokens: NextTokenLoss(tokens, attention_mask)."
            )
        losses = []
        for row, tokens in enumerate(self.tokens):
            mask = None if self.attention_mask is None else self.attention_mask[row].expand(len(logits), -1)
            each = next_token_loss(logits[:, row], tokens.expand(len(logits), -1), mask, per_token=True)
            count = targets(tokens[None], None if mask is None else mask[:1]).sum().to(each)
            losses.append(each.sum(-1) / count)
        return torch.stack(losses, dim=1)

    def __call__(self, logits: Tensor) -> Tensor:
        """The mean over rows, from full logits."""
        return self.score(logits[None], self.reads(torch.zeros(logits.shape[:2]), None)).mean()


@dataclass(frozen=True, eq=False, repr=False)
class Normalized(BriefFields, Metric):
    """``(metric - zero) / (one - zero)``: 0 where the metric is ``zero``, 1 where it is ``one``.

    For activation patching ``zero`` is the metric of the corrupted run and ``one`` that of the clean run.

    Attributes:
        metric: what is normalised.
        zero: its value, or one a row, that becomes 0.
        one: its value, or one a row, that becomes 1.
    """

    metric: Metric
    zero: Tensor | float
    one: Tensor | float

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric):
            raise InputError(f"Normalized: metric is one of pellucid.sweep's; found {type(self.metric).__name__}.")

    def check(self, tokens: Tensor, attention_mask: Tensor | None, d_vocab: int) -> None:
        """See :class:`Metric`; bounds are one number, or one a row."""
        self.metric.check(tokens, attention_mask, d_vocab)
        for argument, bound in (("zero", self.zero), ("one", self.one)):
            shape = tuple(_number_or_numbers(argument, bound).shape)
            if shape not in ((), (1,), (tokens.shape[0],)):
                raise InputError(f"Normalized: {argument} is a number, or one a row; found shape {shape}.")
        self.reads(tokens, attention_mask)

    def reads(self, tokens: Tensor, attention_mask: Tensor | None) -> Reads:
        """What the metric reads."""
        span = _number_or_numbers("one", self.one) - _number_or_numbers("zero", self.zero)
        if not bool(torch.isfinite(span).all()) or bool((span == 0).any()):
            raise InputError(
                f"Normalized: zero and one must be finite and differ; found zero={self.zero!r}, one={self.one!r}. "
                "Where both runs score the same there is nothing to recover."
            )
        return self.metric.reads(tokens, attention_mask)

    def bound(self, tokens: Tensor, attention_mask: Tensor | None) -> Metric:
        """The same metric, knowing the batch it is for."""
        return Normalized(self.metric.bound(tokens, attention_mask), self.zero, self.one)

    def score(self, logits: Tensor, reads: Reads) -> Tensor:
        """``[edit, row]``."""
        value = self.metric.score(logits, reads)
        zero, one = torch.as_tensor(self.zero).to(value), torch.as_tensor(self.one).to(value)
        return (value - zero) / (one - zero)
