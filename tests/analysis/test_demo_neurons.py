"""Language neurons of the embedded model, measured on text that it was not trained on and they were not found on."""

from __future__ import annotations

import numpy as np
import torch

from pellucid import TransformerBridge
from pellucid.analysis.language_neurons import lape
from pellucid.analysis.perplexity import own_and_others, perplexity_change
from pellucid.corpora import Corpus
from pellucid.demo.texts import held_out_halves, written_text
from pellucid.running_stats import CountPositive
from tests.analysis.test_neurons import torch_hooks

POST = "blocks.*.mlp.hook_post"


def test_each_language_has_neurons_that_serve_it(demo: TransformerBridge) -> None:
    """At the 5 % rate: own harm over 5 times that of the others (their mean), and over 5 times that of random sets."""
    corpus = Corpus.from_documents(written_text(), demo.tokenizer, context=128)
    counted = demo.collect(corpus, {POST: [CountPositive()]}, batch_size=32)
    found = lape(counted.array(POST, "count_positive"), counted.tokens, top_rate=0.05)
    assert len(found.selected) == 102
    assert all(len(neurons) >= 5 for neurons in found.neurons.values())

    some = {language: paragraphs[:10] for language, paragraphs in held_out_halves()[1].items()}
    unseen = Corpus.from_documents(some, demo.tokenizer, context=128)
    change = perplexity_change(demo, unseen, found.neurons, random_sets=found.random_sets(1), batch_size=32)
    result = own_and_others(change["change"])
    control = own_and_others(change["random"])["own"]
    assert (result["own"] > 0.1).all()
    assert (result["own"] > 5 * result["others"]).all()
    assert (result["own"] > 5 * control.mean("set")).all()

    # What is counted is what plain Hugging Face has above zero, neuron by neuron.
    label, counts = "zh", np.zeros((4, 512), dtype=np.int64)
    for batch in corpus.batches(32, labels=label):

        def note(layer: int, hidden: torch.Tensor) -> torch.Tensor:
            counts[layer] += (hidden > 0).sum((0, 1)).numpy()
            return hidden

        with torch.no_grad(), torch_hooks(demo.hf_model, note):
            demo.hf_model(batch.tokens)
    assert np.array_equal(counts, found.counts.sel(language=label).values)


def test_text_to_measure_on_is_apart() -> None:
    written, (lent, unseen) = written_text(), held_out_halves()
    assert list(written) == list(lent) == list(unseen)
    for language, paragraphs in written.items():
        own = set(paragraphs)
        assert not own & set(unseen[language])
        assert not set(lent[language]) & set(unseen[language])
        assert "\ufffd" not in "".join(paragraphs)
