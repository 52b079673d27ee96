"""From the residual that leaves the last layer to the metric: the final norm and the unembedding, where they are read.

A metric of ours declares positions and tokens; a plain function of logits is watched on the base run
(:mod:`pellucid.sweep.lazy_logits`), and an edit for which it reads something else is handed back to be run whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import InputError
from pellucid.model_bridge.generalized_components.base import plain_weight
from pellucid.model_bridge.hooking.hook_session import HookSession
from pellucid.model_bridge.running.outputs import scaled_and_capped
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.sweep.lazy_logits import Asked, Cells, LazyLogits, ReadsElsewhere, Recorder, plain
from pellucid.sweep.metrics import Metric, Reads, cells_of

MetricLike: TypeAlias = Metric | Callable[[Tensor], Any]
"""One of our metrics, or a function of logits ``[row, pos, d_vocab]``."""


class Unembedding:
    """Final norm and unembedding of chosen rows, for chosen tokens.

    Args:
        bridge: the model.
        whole: unembed the whole vocabulary whatever is read (an edit is on the logits).
    """

    def __init__(self, bridge: TransformerBridge, whole: bool = False) -> None:
        self._bridge, self._whole = bridge, whole
        self._weights: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def __call__(self, residual: Tensor, tokens: tuple[int, ...] | None) -> Tensor:
        """``[..., d_model]`` to logits ``[..., token]``."""
        flat = residual.reshape(1, -1, residual.shape[-1])
        normed = self._normed(flat)
        head: Any = self._bridge.unembed.module
        if tokens is None or self._whole or not plain_weight(head, nn.Linear):
            logits = self._as_given(head(normed))
            if tokens is not None:
                logits = logits[..., torch.tensor(tokens, device=logits.device)]
        else:
            if tokens not in self._weights:
                index = torch.tensor(tokens, device=head.weight.device)
                bias = None if head.bias is None else head.bias.detach()[index]
                self._weights[tokens] = (head.weight.detach()[index], bias)
            logits = self._as_given(F.linear(normed, *self._weights[tokens]))
        picked: Tensor = logits.view(*residual.shape[:-1], -1)
        return picked

    def _normed(self, flat: Tensor) -> Tensor:
        tree, norm = self._bridge.runner.tree, self._bridge.ln_final
        work: Callable[[], Tensor] = partial(norm.module, flat)
        if tree.is_float64() and norm.widens:
            return HookSession(tree, components=["ln_final"]).during(work)
        return work()

    def _as_given(self, logits: Tensor) -> Tensor:
        """The logits as Hugging Face gives them: scaled and capped, where the model does that."""
        if not self._bridge.adapter.family.logits_change:
            return logits
        return self._bridge.runner.tree.components["model"].fire(
            "hook_logits", scaled_and_capped(logits, self._bridge.cfg)
        )


@dataclass(eq=False)
class Scorer:
    """One metric of a sweep.

    Attributes:
        name: what it is called.
        metric: the metric.
        reads: what it reads.
        n_rows: rows of the base run.
        length: columns of the sequence.
        d_vocab: tokens of the vocabulary.
    """

    name: str
    metric: MetricLike
    reads: Reads
    n_rows: int
    length: int
    d_vocab: int

    def score(self, logits: Tensor) -> list[Tensor | None]:
        """The metric of each edit, from the cells it reads ``[edit, row, read, token]``; ``None`` where they do not do."""
        if isinstance(self.metric, Metric):
            return list(self.metric.score(logits, self.reads))
        columns = self.reads.columns[0].tolist()
        scores: list[Tensor | None] = []
        for numbers in logits:
            shape = (self.n_rows, self.length, self.d_vocab)
            cells = Cells(numbers, columns, self.reads.tokens, shape)
            lazy = LazyLogits(shape, numbers.dtype, numbers.device, cells.fetch)
            try:
                scores.append(_as_tensor(self.metric(lazy), self.name))
            except ReadsElsewhere:
                scores.append(None)
        return scores

    def score_whole(self, logits: Tensor) -> Tensor:
        """The metric of one run from all its logits ``[row, pos, d_vocab]``."""
        if isinstance(self.metric, Metric):
            return self.metric.score(cells_of(logits, self.reads), self.reads)[0]
        return _as_tensor(self.metric(logits), self.name)


@dataclass(eq=False)
class UneditedLogits:
    """Logits of an unedited run, made where they are read.

    Attributes:
        unembed: the final norm and the unembedding.
        final: ``[row, pos, d_model]``, what leaves the last layer.
        logits: ``[row, pos, d_vocab]``, if the run itself gave them; then they are what is read.
    """

    unembed: Unembedding
    final: Tensor
    logits: Tensor | None = None

    def at(self, columns: Tensor, tokens: tuple[int, ...] | None = None) -> Tensor:
        """``[row, column, token]``.

        Args:
            columns: ``[row, column]``.
            tokens: which; by default the whole vocabulary.
        """
        rows = torch.arange(columns.shape[0])[:, None]
        if self.logits is None:
            return self.unembed(self.final[rows, columns], tokens)
        cells = self.logits[rows, columns]
        return cells if tokens is None else cells[..., torch.tensor(tokens)]

    def asked(self, asked: Asked) -> Tensor:
        """``[row, column, token]`` of what a function of logits asks for."""
        columns = torch.tensor(sorted(asked.columns)).expand(self.final.shape[0], -1)
        return self.at(columns, None if asked.tokens is None else tuple(sorted(asked.tokens)))

    def score(self, scorer: Scorer) -> Tensor:
        """One metric of the run."""
        if self.logits is not None:
            return scorer.score_whole(self.logits)
        score = scorer.score(self.at(scorer.reads.columns, scorer.reads.tokens)[None])[0]
        assert score is not None
        return score


def _as_tensor(value: Any, name: str) -> Tensor:
    value = plain(value)
    if isinstance(value, float | int):
        return torch.tensor(value, dtype=torch.get_default_dtype())
    if not isinstance(value, Tensor):
        raise InputError(f"The metric {name!r} must return a number or a tensor; it returned {type(value).__name__}.")
    return value.detach()


def check_metrics(
    metrics: Mapping[str, MetricLike],
    tokens: Tensor,
    attention_mask: Tensor | None,
    d_vocab: int,
    logit_positions: Sequence[int] | None,
) -> None:
    """Refuse, before the base run, what cannot be scored on it.

    Args:
        metrics: by name.
        tokens: ``[row, pos]`` of the base run.
        attention_mask: its mask.
        d_vocab: size of the vocabulary.
        logit_positions: the columns that a plain function may read.

    Raises:
        InputError: no metric; a position or token that there is not; positions for no function.
    """
    functions = [name for name, metric in metrics.items() if not isinstance(metric, Metric)]
    for name, metric in metrics.items():
        if isinstance(metric, Metric):
            metric.check(tokens, attention_mask, d_vocab)
        elif not callable(metric):
            raise InputError(f"The metric {name!r} is a Metric or a function of logits; found {type(metric).__name__}.")
    if logit_positions is not None:
        if not functions:
            raise InputError(
                "logit_positions would have no effect: it is for functions of logits, and these metrics say which positions "
                "they read."
            )
        _allowed(logit_positions, tokens.shape[1])


def make_scorer(
    name: str,
    metric: MetricLike,
    tokens: Tensor,
    attention_mask: Tensor | None,
    bridge: TransformerBridge,
    unedited: UneditedLogits,
    logit_positions: Sequence[int] | None,
) -> Scorer:
    """Find out what a metric reads.

    Args:
        name: what to call it.
        metric: the metric.
        tokens: ``[row, pos]`` of the base run.
        attention_mask: its mask.
        bridge: the model.
        unedited: the base run's logits.
        logit_positions: the columns that a plain function may read; others are refused.

    Raises:
        InputError: the metric reads none, or other columns than ``logit_positions``.
    """
    rows, length = tokens.shape
    d_vocab = bridge.cfg.d_vocab
    if isinstance(metric, Metric):
        metric = metric.bound(tokens, attention_mask)
        return Scorer(name, metric, metric.reads(tokens, attention_mask), rows, length, d_vocab)
    allowed = _allowed(logit_positions, length)

    def logits_of(asked: Asked) -> Cells:
        outside = sorted(asked.columns - allowed)
        if outside:
            raise InputError(
                f"The metric {name!r} reads the logits at position {outside[0]}, which logit_positions="
                f"{list(logit_positions or ())} leaves out. Add it, or leave logit_positions out: what is read is found "
                "out by itself."
            )
        ids = None if asked.tokens is None else sorted(asked.tokens)
        return Cells(unedited.asked(asked), sorted(asked.columns), ids, (rows, length, d_vocab))

    recorder = Recorder(logits_of, (rows, length, d_vocab), bridge.dtype, bridge.device)
    _as_tensor(metric(recorder.logits), name)
    asked = recorder.union()
    if not asked.columns:
        raise InputError(f"The metric {name!r} does not read the logits it is given: every edit would score the same.")
    columns = torch.tensor(sorted(asked.columns)).expand(rows, -1)
    return Scorer(
        name,
        metric,
        Reads(columns, None if asked.tokens is None else tuple(sorted(asked.tokens))),
        rows,
        length,
        d_vocab,
    )


def _allowed(logit_positions: Sequence[int] | None, length: int) -> frozenset[int]:
    if logit_positions is None:
        return frozenset(range(length))
    if not isinstance(logit_positions, Sequence):
        raise InputError(f"logit_positions is a list of positions; found {logit_positions!r}.")
    wrong = [p for p in logit_positions if isinstance(p, bool) or not isinstance(p, int) or not -length <= p < length]
    if wrong or not len(logit_positions):
        raise InputError(f"logit_positions are positions, {-length} to {length - 1}; found {list(logit_positions)!r}.")
    return frozenset(p % length for p in logit_positions)


def by_reads(scorers: Mapping[str, Scorer]) -> list[list[Scorer]]:
    """Scorers that read the same, together."""
    groups: dict[tuple[object, ...], list[Scorer]] = {}
    for scorer in scorers.values():
        groups.setdefault(scorer.reads.key(), []).append(scorer)
    return list(groups.values())
