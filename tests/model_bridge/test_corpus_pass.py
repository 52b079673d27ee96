"""The one pass over a corpus: its batches, its runs, and what taps are shown, against plain calls of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.corpora import Corpus
from pellucid.errors import InputError
from pellucid.model_bridge.corpus.corpus_pass import PassBatch, RowPlan, corpus_pass, stop_after
from tests.model_bridge.test_collecting import documents_corpus
from tests.models import VOCAB, is_pristine, make_bloom

NAMES = ("blocks.0.mlp.hook_post", "blocks.1.hook_resid_pre")


def plan(corpus: Corpus, **settings: Any) -> RowPlan:
    return RowPlan(corpus.labels, **{"batch_size": 4} | settings)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_run_is_the_models_own_and_taps_see_what_a_cache_has(side: Any) -> None:
    bridge, corpus = TransformerBridge(make_bloom()), documents_corpus(count=9)
    shown: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda values, batch: shown.update({name: values.clone()})

    batches = plan(corpus, padding_side=side).batches(corpus)
    for batch in corpus_pass(bridge, batches, {name: keep(name) for name in NAMES}):
        shown.clear()
        logits = batch.run()
        assert is_pristine(bridge.hf_model)
        assert not logits.requires_grad
        mask = batch.rows.attention_mask if batch.rows.is_padded else None
        assert mask is None if batch.mask is None else torch.equal(batch.mask, batch.rows.attention_mask)
        with torch.no_grad():
            expected, cache = bridge.run_with_cache(batch.rows.tokens, names_filter=list(NAMES), attention_mask=mask)
            bare: Any = bridge.hf_model
            assert torch.equal(logits, bare(batch.rows.tokens, attention_mask=mask, use_cache=False).logits)
        assert torch.equal(logits, expected)
        assert all(torch.equal(shown[name], cache[name]) for name in NAMES)


def test_a_batch_is_run_again_under_other_hooks_and_breaking_off_leaves_nothing() -> None:
    bridge, corpus = TransformerBridge(make_bloom()), documents_corpus(count=9)
    for batch in corpus_pass(bridge, plan(corpus).batches(corpus), {NAMES[0]: lambda values, batch: None}):
        assert repr(batch).startswith("PassBatch(label='en', tokens=int64[4, ")
        plain = batch.run()
        with bridge.hooks([(NAMES[1], lambda tensor, hook: tensor * 2)]):
            assert not torch.equal(batch.run(), plain)
        assert torch.equal(batch.run(), plain)
        break
    assert is_pristine(bridge.hf_model)
    assert not bridge.live_hooks()


def test_a_plan_goes_on_after_the_rows_that_are_done() -> None:
    corpus = documents_corpus(count=9)
    rows = {label: corpus.rows(label) for label in corpus.labels}
    whole = list(plan(corpus, start_row=1).batches(corpus))
    assert plan(corpus, start_row=1).n_tokens(corpus.index()) > 0
    for done in ({"en": 0, "fr": 0}, {"en": 4, "fr": 0}, {"en": rows["en"] - 1, "fr": 0}):
        left = list(plan(corpus, start_row=1).batches(corpus, done))
        expected = [batch for batch in whole if batch.first_row >= 1 + done[batch.label]]
        assert [(batch.label, batch.first_row) for batch in left] == [(b.label, b.first_row) for b in expected]
        assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(left, expected, strict=True))


def test_the_end_of_a_run_is_the_earliest_that_passes_every_point() -> None:
    bridge = TransformerBridge(make_bloom())
    index = bridge.adapter.hook_index()
    wanted = {
        "hook_embed": 0,
        "blocks.0.hook_resid_pre": 0,
        "blocks.1.hook_resid_pre": 1,
        "blocks.1.hook_resid_post": 2,
        "blocks.2.hook_resid_post": 3,
        "ln_final.hook_normalized": 4,
        "hook_unembed": None,
    }
    specs = {name: index[name] for name in wanted}
    assert {name: stop_after([spec], 3) for name, spec in specs.items()} == wanted
    assert stop_after([specs["blocks.1.hook_resid_pre"], specs["hook_embed"]], 3) == 1
    assert stop_after(list(specs.values()), 3) is None


def test_an_id_that_the_model_does_not_have_is_named_at_its_batch() -> None:
    bridge = TransformerBridge(make_bloom())
    corpus = Corpus.from_tokens({"a": torch.arange(VOCAB - 6, VOCAB + 6)}, context=6)
    batches: list[PassBatch[Any]] = []
    with pytest.raises(InputError, match=rf"Token id {VOCAB + 5} is outside"):
        for batch in corpus_pass(bridge, plan(corpus, batch_size=1).batches(corpus)):
            batches.append(batch)
            batch.run()
    assert len(batches) == 2
    assert is_pristine(bridge.hf_model)
