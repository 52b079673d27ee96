"""Pairs as a model reads them: rows of one length together, sets of tokens with the metric that takes them."""

from __future__ import annotations

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.corpora import PromptPairs
from pellucid.errors import InputError
from pellucid.experiments.pairs import pair_batches
from pellucid.sweep import LogitDifference, LogProbability, Probability, ProbabilityDifference

PAIRS = PromptPairs(
    clean=["Everyone has the right", "Everyone has", "Everyone has the law"],
    corrupted=["Everyone has the law", "Everyone and", "Everyone has the right"],
    answer=[" to", " the", " to"],
    foil=[" and", " and", " the"],
)
SETS = PromptPairs(
    PAIRS.clean, PAIRS.corrupted, answer=[[" to", " the"], " the", 5], foil=[" and", [" and", 7], [8, 9]]
)


def test_rows_of_one_length_run_together(demo: TransformerBridge) -> None:
    batches = pair_batches(demo, PAIRS)
    assert [batch.rows for batch in batches] == [(0, 2), (1,)]
    for batch in batches:
        for place, row in enumerate(batch.rows):
            assert torch.equal(batch.clean.tokens[place], demo.to_tokens(str(PAIRS.clean[row]))[0])
            assert torch.equal(batch.corrupted.tokens[place], demo.to_tokens(str(PAIRS.corrupted[row]))[0])
    assert isinstance(batches[0].metric, LogitDifference)
    assert batches[0].metric.foil == [demo.to_single_token(" and"), demo.to_single_token(" the")]


def test_sets_of_tokens_are_scored_by_their_sums(demo: TransformerBridge) -> None:
    batch = pair_batches(demo, SETS)[0]
    assert isinstance(batch.metric, ProbabilityDifference)
    to, the, and_ = (demo.to_single_token(f" {word}") for word in ("to", "the", "and"))
    assert batch.metric.answer == [[to, the], [5]]
    assert batch.metric.foil == [[and_], [8, 9]]
    logits = demo(batch.clean.tokens)
    p = logits[:, -1].softmax(-1)
    expected = ((p[0, to] + p[0, the] - p[0, and_]) + (p[1, 5] - p[1, 8] - p[1, 9])) / 2
    torch.testing.assert_close(batch.metric(logits), expected)
    assert pair_batches(demo, SETS, lambda logits: logits[:, -1, 0])[0].metric is not batch.metric


@pytest.mark.parametrize("metric", [LogitDifference, LogProbability, Probability])
def test_a_metric_of_one_token_refuses_sets(demo: TransformerBridge, metric: type) -> None:
    with pytest.raises(InputError, match=f"The pairs have sets of tokens, and {metric.__name__} takes one token a row"):
        pair_batches(demo, SETS, metric)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (PromptPairs(["Everyone has"], ["Everyone"]), "clean of row 0"),
        (PromptPairs(["Everyone"], ["Everyone"]), "The pairs have no answers"),
        (PromptPairs(["Everyone"], ["Everyone"], [" nothinglikethis"]), "answer of row 0: .*not a single token"),
        (PromptPairs(["Everyone"], ["Everyone"], [[5, " nothinglikethis"]]), "answer of row 0: .*not a single token"),
        (PromptPairs(["Everyone"], ["Everyone"], [[5, 99999]]), "answer of row 0: answer must be at most 2047"),
    ],
)
def test_a_bad_row_is_told(demo: TransformerBridge, pairs: PromptPairs, said: str) -> None:
    with pytest.raises(InputError, match=said):
        pair_batches(demo, pairs)


@pytest.mark.parametrize("metric", [LogProbability, Probability])
def test_a_metric_of_the_answer_alone_takes_no_foil(demo: TransformerBridge, metric: type) -> None:
    """The foils of the pairs are not its position."""
    for batch in pair_batches(demo, PAIRS, metric):
        answers = [demo.to_single_token(str(PAIRS.answer[row])) for row in batch.rows]  # type: ignore[index]
        logits = demo(batch.clean.tokens)
        assert torch.equal(batch.metric(logits), metric(answers)(logits))
