"""Intervals of activation probabilities, and counting until the chosen set stands."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pellucid import Corpus, TransformerBridge
from pellucid.analysis.language_neurons import lape
from pellucid.analysis.proportions import wilson_interval
from pellucid.analysis.stopping import count_until_stable
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.model_bridge.corpus.corpus_pass import PassBatch
from pellucid.running_stats import CountPositive, TopK
from tests.families import VOCAB, make_family

POST = "blocks.*.mlp.hook_post"
RATES = {"top_rate": 0.3, "filter_rate": 0.5, "activation_bar_ratio": 0.5}


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_ends_are_where_a_test_would_begin_to_refuse(confidence: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    k, n = np.array([0, 1, 7, 50, 99, 100]), np.array([100, 3, 9, 100, 100, 100])
    low, high = wilson_interval(k, n, confidence)
    z = scipy_stats.norm.ppf((1 + confidence) / 2)
    for ends in (low, high):  # (k/n - p)^2 = z^2 p (1 - p) / n
        assert np.allclose((k / n - ends) ** 2, z**2 * ends * (1 - ends) / n, rtol=0, atol=1e-14)
    for place in range(len(k)):
        peer = scipy_stats.binomtest(int(k[place]), int(n[place])).proportion_ci(confidence, "wilson")
        assert (low[place], high[place]) == pytest.approx((peer.low, peer.high), rel=1e-12, abs=1e-15)
    assert low[0] == 0.0
    assert high[-1] == 1.0


def test_intervals_and_stability_of_a_selection() -> None:
    generator = np.random.default_rng(0)
    rates = generator.beta(0.5, 2, (2, 40, 3))
    for n, least, most in ((50, 0.1, 0.9), (10_000_000, 0.99, 1.0)):
        counts = generator.binomial(n, rates)
        found = lape(counts, [n] * 3, **RATES)
        ends = found.intervals(0.9)
        low, high = wilson_interval(counts, n, 0.9)
        assert np.array_equal(ends["low"].values, low)
        assert np.array_equal(ends["high"].values, high)
        stays = found.stability(8, seed=1)
        assert least <= float(stays.mean()) <= most
        assert stays.identical(found.stability(8, seed=1))
        assert found.agreement(found) == 1.0
        row = found.rows()[0]
        place = found.languages.index(row["language"])
        assert row[f"low_{row['language']}"] == found.intervals()["low"].values[row["layer"], row["neuron"], place]


def corpus_of(rows: int) -> Corpus:
    """Two languages of tokens of their own, all rows alike in kind; the second has fewer."""
    generator = torch.Generator().manual_seed(0)
    tokens = {
        label: torch.randint(low, high, (size, 16), generator=generator).tolist()
        for label, low, high, size in (("x", 3, 40, rows), ("y", 40, VOCAB, rows - 3))
    }
    return Corpus.from_tokens(tokens, context=16, packing="documents")


def test_counting_ends_where_the_set_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, corpus = TransformerBridge(make_family("llama")), corpus_of(60)
    extra = {POST: [TopK(2)]}
    whole = count_until_stable(bridge, corpus, first_rows=4, stable_at=0.5, statistics=extra, **RATES)
    assert whole.stands
    assert [look.stands(0.5) for look in whole.looks] == [False] * (len(whole.looks) - 1) + [True]
    assert math.isnan(whole.looks[0].before)
    assert whole.looks[-1].before >= 0.5
    assert [look.tokens["x"] for look in whole.looks] == [64 << part for part in range(len(whole.looks))]
    rows = 4 << (len(whole.looks) - 1)
    assert rows < 57  # not all of the text

    # The same as one pass over as many rows, and as one that was interrupted.
    place = "blocks.*.mlp.hook_pre"  # a gated MLP
    counted = bridge.collect(corpus, {place: [CountPositive()]}, stop_row=rows)
    assert whole.found.neurons == lape(counted.array(place, "count_positive"), counted.tokens, **RATES).neurons
    run, calls = PassBatch.run, []

    def interrupted(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return run(self)

    again = {"first_rows": 4, "stable_at": 0.5, "statistics": extra, "checkpoint": tmp_path, **RATES}
    monkeypatch.setattr(PassBatch, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        count_until_stable(bridge, corpus, **again)
    resumed = count_until_stable(bridge, corpus, **again)
    assert str(resumed.looks) == str(whole.looks)
    assert np.array_equal(resumed.found.counts.values, whole.found.counts.values)
    for label in ("x", "y"):
        one, other = (
            each.collected[label].get("blocks.1.mlp.hook_post", "top_2", label).result() for each in (resumed, whole)
        )
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    before = len(calls)
    assert str(count_until_stable(bridge, corpus, **again).looks) == str(whole.looks)
    assert len(calls) == before  # nothing is counted twice


def test_text_that_is_not_enough_is_all_counted() -> None:
    bridge, corpus = TransformerBridge(make_family("gpt2")), corpus_of(9)
    counted = count_until_stable(bridge, corpus, first_rows=2, stable_at=1.0, last_rows={"x": 7, "y": 2}, **RATES)
    assert not counted.stands
    assert [dict(look.tokens) for look in counted.looks] == [
        {"x": 32, "y": 32},
        {"x": 64, "y": 32},
        {"x": 7 * 16, "y": 32},
    ]


def test_mistakes_are_told() -> None:
    bridge, corpus = TransformerBridge(make_family("gpt2")), corpus_of(9)
    for given, said in (
        ({"last_rows": {"x": 7}}, "last_rows has x; the corpus has x, y"),
        ({"last_rows": {"x": 7, "y": 7}}, r"last_rows\['y'\] must be at most 6"),
    ):
        with pytest.raises(InputError, match=said):
            count_until_stable(bridge, corpus, **given)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="has experts"):
        count_until_stable(TransformerBridge(make_family("qwen2_moe")), corpus)
