"""Pairs of prompts as a model reads them: batches of rows of one length, each with its metric.

Rows of one number of tokens run together and nothing is padded. Which rows run together changes no row's numbers but by the
rounding of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TypeAlias

import torch

from pellucid.arguments import check_count, check_function, check_kind
from pellucid.corpora.pairs import PromptPairs, Word, Words
from pellucid.errors import InputError
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.places import Prompts, read_prompts, refuse_different_lengths
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.sweep import LogitDifference, LogProbability, MetricLike, Probability, ProbabilityDifference
from pellucid.sweep.metrics import Metric
from pellucid.tables import BriefFields

PairMetric: TypeAlias = MetricLike | Callable[..., Metric]
"""A class of metrics, made for each batch of its answers and foils (:class:`LogitDifference`); a metric; or a function of
logits ``[row, pos, d_vocab]`` that gives a number a row."""

Ids: TypeAlias = list[int] | list[list[int]]
"""Of each row a token id, or its set of token ids."""


@dataclass(frozen=True, eq=False, repr=False)
class PairBatch(BriefFields):
    """Rows that run together.

    Attributes:
        rows: which of the data set.
        clean: their clean prompts.
        corrupted: their corrupted prompts, of as many tokens.
        metric: what is measured on either.
    """

    rows: tuple[int, ...]
    clean: Prompts
    corrupted: Prompts
    metric: MetricLike


def check_pairs(pairs: PromptPairs, metric: PairMetric | None) -> None:
    """Refuse what is no data set, or no metric of one.

    Raises:
        InputError: with the argument.
    """
    check_kind("pairs", pairs, PromptPairs, "PromptPairs(clean, corrupted, answer, foil)")
    if metric is not None:
        check_function("metric", metric, "a class of metrics, a metric, or a function of logits")


def pair_batches(
    bridge: TransformerBridge,
    pairs: PromptPairs,
    metric: PairMetric | None = None,
    batch_size: int = 16,
    *,
    prepend_bos: bool | None = None,
) -> list[PairBatch]:
    """The batches of a data set, all of it checked before anything runs; strings are read as the tokenizer reads them.

    Args:
        bridge: the model.
        pairs: the data set.
        metric: see :data:`PairMetric`; by default the logit difference of answer and foil, or without foils the
            log-probability of the answer; where an answer or a foil is a set of tokens, the difference of the sums of their
            probabilities.
        batch_size: most rows that run together.
        prepend_bos: texts with the beginning-of-sequence token first or without; by default as the tokenizer does.

    Raises:
        InputError: a row whose prompts have different numbers of tokens; an answer that is not one token; no answer where
            the metric needs one; sets of tokens where it takes one a row.
    """
    check_pairs(pairs, metric)
    check_count("batch_size", batch_size)
    read = {name: [_read(bridge, prompt, prepend_bos) for prompt in column] for name, column in _prompts(pairs).items()}
    for row, (clean, corrupted) in enumerate(zip(read["clean"], read["corrupted"], strict=True)):
        refuse_different_lengths(clean, corrupted, (f"clean of row {row}", f"corrupted of row {row}"))
    answers, foils = (_ids(bridge, "answer", pairs.answer, pairs), _ids(bridge, "foil", pairs.foil, pairs))
    if pairs.has_sets:
        metric = _of_sets(metric)
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(read["clean"]):
        by_length.setdefault(prompt.length, []).append(row)
    return [
        PairBatch(
            tuple(some),
            _together([read["clean"][row] for row in some]),
            _together([read["corrupted"][row] for row in some]),
            _metric_of(metric, _at(answers, some), _at(foils, some)),
        )
        for rows in by_length.values()
        for some in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    ]


def _prompts(pairs: PromptPairs) -> dict[str, Sequence[str | Sequence[int]]]:
    return {"clean": pairs.clean, "corrupted": pairs.corrupted}


def _read(bridge: TransformerBridge, prompt: str | Sequence[int], prepend_bos: bool | None) -> Prompts:
    given = prompt if isinstance(prompt, str) else torch.tensor([list(prompt)])
    return read_prompts(bridge, given, SweepOptions(prepend_bos=prepend_bos))


def _together(prompts: Sequence[Prompts]) -> Prompts:
    tokens = torch.cat([prompt.tokens for prompt in prompts])
    return Prompts(tokens, None, tuple(prompt.labels[0] for prompt in prompts), prompts[0].virtual)


def _ids(bridge: TransformerBridge, what: str, words: Sequence[Words] | None, pairs: PromptPairs) -> Ids | None:
    """Of each row the token id, or the set of token ids where any row of the pairs has a set."""
    if words is None:
        return None
    found: list[list[int]] = []
    for row, entry in enumerate(words):
        try:
            listed = [entry] if isinstance(entry, str | int) else list(entry)
            found.append([_id(bridge, what, word) for word in listed])
        except InputError as error:
            raise InputError(f"{what} of row {row}: {error}") from None
    return found if pairs.has_sets else [ids[0] for ids in found]


def _id(bridge: TransformerBridge, what: str, word: Word) -> int:
    return bridge.to_single_token(word) if isinstance(word, str) else check_count(what, word, 0, bridge.cfg.d_vocab - 1)


def _of_sets(metric: PairMetric | None) -> PairMetric:
    """What scores sets of tokens.

    Raises:
        InputError: a class of metrics that takes one token a row.
    """
    if metric is None:
        return ProbabilityDifference
    if metric in (LogitDifference, LogProbability, Probability):
        raise InputError(
            f"The pairs have sets of tokens, and {metric.__name__} takes one token a row: take "
            "ProbabilityDifference, which is the default, or a function of logits."
        )
    return metric


def _at(ids: Ids | None, rows: Sequence[int]) -> Ids | None:
    return None if ids is None else [ids[row] for row in rows]  # type: ignore[return-value]


def _metric_of(metric: PairMetric | None, answers: Ids | None, foils: Ids | None) -> MetricLike:
    if isinstance(metric, Metric) or (metric is not None and not isinstance(metric, type)):
        return metric
    if answers is None:
        raise InputError("The pairs have no answers: give them, or a metric that needs none, a function of logits.")
    if metric is None:
        metric = LogProbability if foils is None else LogitDifference
    # Of LogProbability(answer, position=None) the second argument is no foil.
    takes_foil = foils is not None and "foil" in signature(metric).parameters
    made: Metric = metric(answers, foil=foils) if takes_foil else metric(answers)
    return made
