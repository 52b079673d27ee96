"""bridge.collect against a plain loop over the bare Hugging Face model."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.demo import MODEL_FOLDER
from pellucid.errors import HookNameError, InputError, OtherJobError, PellucidError
from pellucid.model_bridge.corpus.collected import Collected
from pellucid.model_bridge.corpus.corpus_pass import PassBatch
from pellucid.running_stats import (
    AveragePrecision,
    CountPositive,
    CountTogether,
    Covariance,
    Histogram,
    MeanVariance,
    MinMax,
    Quantiles,
    TopK,
)
from tests.families import make_family, native_arguments
from tests.models import VOCAB, is_pristine, make_bloom, make_pair

POST = "blocks.*.mlp.hook_post"


def ragged(seed: int, count: int, longest: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def documents_corpus(context: int = 11, count: int = 37) -> Corpus:
    return Corpus.from_tokens(
        {"en": ragged(1, count), "fr": ragged(2, count // 2)}, context=context, packing="documents"
    )


def packed_corpus(context: int = 9) -> Corpus:
    return Corpus.from_tokens({"en": ragged(1, 60), "fr": ragged(2, 40)}, context=context)


def bare_post(model: Any, batch: CorpusBatch) -> list[Tensor]:
    """Each layer's neurons as plain torch hooks see them: the input of the second MLP matrix."""
    found: list[Tensor] = []
    handles = [
        block.mlp.dense_4h_to_h.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        for block in model.transformer.h
    ]
    mask = batch.attention_mask.long() if not bool(batch.attention_mask.all()) else None
    with torch.no_grad():
        model(batch.tokens, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def plain_counts(model: Any, corpus: Corpus, batch_size: int, side: Any = "right") -> dict[str, Tensor]:
    counts: dict[str, Tensor] = {}
    for batch in corpus.batches(batch_size, padding_side=side):
        layers = [(post[batch.attention_mask] > 0).sum(0) for post in bare_post(model, batch)]
        counts[batch.label] = counts.get(batch.label, 0) + torch.stack(layers)
    return counts


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("family", "attention"), [("gpt2", "eager"), ("opt", "eager"), ("llama", "sdpa"), ("bloom", "sdpa")]
)
def test_what_leaves_the_final_norm_is_that_of_a_run(family: str, attention: Any, side: Any) -> None:
    """A pass that needs no logits calls the backbone alone: with the position ids and the attention of a whole run."""
    model = make_bloom() if family == "bloom" else make_family(family, attention=attention)
    native, bridge = copy.deepcopy(model), TransformerBridge(model)
    bridge.set_attn_implementation(attention)
    corpus, name = documents_corpus(count=5), "ln_final.hook_out"
    expected: list[Tensor] = []
    for batch in corpus.batches(3, padding_side=side):
        mask = batch.attention_mask.long()
        with torch.no_grad():
            if (
                family == "bloom"
            ):  # its fused attention is Pellucid's: the run of the bridge, which has tests of its own
                final = bridge.run_with_cache(batch.tokens, attention_mask=mask, names_filter=name)[1][name]
            else:
                given = native_arguments(native, mask, batch.tokens.shape[1])
                final = native(batch.tokens, use_cache=False, output_hidden_states=True, **given).hidden_states[-1]
        expected += [final[batch.attention_mask]] if batch.label == "en" else []
    for requests in ({name: [MinMax()]}, {name: [MinMax()], "hook_unembed": [MinMax()]}):
        found = bridge.collect(corpus, requests, batch_size=3, padding_side=side).get(name, "min_max", "en").result()
        low, high = torch.cat(expected).aminmax(dim=0)
        assert torch.equal(found.minimum, low)
        assert torch.equal(found.maximum, high)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("make", [documents_corpus, packed_corpus])
def test_counts_are_those_of_a_plain_loop_over_bare_hugging_face(make: Any, batch_size: int, side: Any) -> None:
    bridge, bare = make_pair()
    corpus = make()
    expected = plain_counts(bare, corpus, batch_size, side)
    collected = bridge.collect(corpus, {POST: [CountPositive()]}, batch_size=batch_size, padding_side=side)
    found = collected.array(POST, "count_positive")
    assert found.dims == ("layer", "neuron", "label")
    assert found.shape == (3, 192, 2)
    assert found.dtype == np.int64
    for label in corpus.labels:
        assert np.array_equal(found.sel(label=label).values, expected[label].numpy())
        assert collected.n_tokens[label] == corpus.tokens(label) == int(collected.tokens.sel(label=label))
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("make", [documents_corpus, packed_corpus])
def test_counts_in_float64_do_not_depend_on_batch_size_or_padding(make: Any) -> None:
    bridge = TransformerBridge(make_bloom(torch.float64))
    corpus = make()
    found = [
        bridge.collect(corpus, {POST: [CountPositive()]}, batch_size=size, padding_side=side).array(
            POST, "count_positive"
        )
        for size in (1, 7, 64)
        for side in ("left", "right")
    ]
    assert all(other.equals(found[0]) for other in found)
    assert 0 < found[0].sum() < found[0].size * 500


def every_statistic() -> list[Any]:
    return [
        CountPositive(),
        CountPositive(0.1),
        CountTogether(0.1),
        MeanVariance(),
        MinMax(),
        Quantiles((0.1, 0.5)),
        Histogram((-1.0, 0.0, 0.5, 2.0)),
        TopK(3),
        Covariance(),
        AveragePrecision(),
    ]


def real_values(bare: Any, corpus: Corpus, label: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values ``[token, neuron]``, documents and positions of all real tokens, by plain hooks."""
    parts = []
    for batch in corpus.batches(4, labels=label):
        keep = batch.attention_mask
        parts.append((bare_post(bare, batch)[layer][keep], batch.documents[keep], batch.positions[keep]))
    values, documents, positions = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, documents, positions


def test_every_statistic_at_once_is_what_the_plain_values_give() -> None:
    bridge, bare = make_pair()
    corpus = documents_corpus()
    name = "blocks.1.mlp.hook_post"
    collected = bridge.collect(corpus, {name: every_statistic()})
    values, documents, positions = real_values(bare, corpus, "en", 1)
    wide = values.double().numpy()

    def result(statistic: str) -> Any:
        return collected.get(name, statistic, "en").result()

    assert torch.equal(result("count_above_0.1"), (values > 0.1).sum(0))
    together = result("count_together_above_0.1")
    assert torch.equal(together, ((values > 0.1).double().T @ (values > 0.1).double()).long())
    mean, variance = result("mean_variance")
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(variance, wide.var(0), rtol=1e-12)
    low, high = result("min_max")
    assert torch.equal(low, values.amin(0))
    assert torch.equal(high, values.amax(0))
    exact = np.quantile(wide, [0.1, 0.5], axis=0, method="lower").T
    assert (np.abs(result("quantiles").numpy() - exact) <= np.maximum(0.02 * np.abs(exact), 1e-4)).all()
    for neuron in (0, 100):
        expected, _ = np.histogram(wide[:, neuron], [-1.0, 0.0, 0.5, 2.0])
        assert np.array_equal(result("histogram")[neuron].numpy(), expected)
        order = np.lexsort((positions, documents, -wide[:, neuron]))[:3]
        top = result("top_3")
        assert np.array_equal(top.values[neuron], values[order, neuron])
        assert np.array_equal(top.documents[neuron], documents[order])
        assert np.array_equal(top.positions[neuron], positions[order])
    np.testing.assert_allclose(result("covariance").covariance, np.cov(wide.T, bias=True), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("statistic", every_statistic(), ids=lambda each: each.name)
def test_every_result_is_an_array_or_refused(statistic: Any) -> None:
    bridge, _ = make_pair()
    name = "blocks.1.attn.hook_q"
    collected = bridge.collect(documents_corpus(), {name: [statistic]}, progress=False)
    found = collected.get(name, statistic.name, "en").result()
    not_by_feature = {"count_together_above_0.1", "covariance", "average_precision"}
    for field in found._fields if isinstance(found, tuple) else [None]:
        if (field or statistic.name) in not_by_feature:
            with pytest.raises(InputError, match=rf"{statistic.name} is no array by feature: it has the shape \(\d"):
                collected.array(name, statistic.name, field)
        else:
            values = found if field is None else getattr(found, field)
            array = collected.array(name, statistic.name, field).sel(label="en")
            assert array.dims == ("head", "d_head", *statistic.trailing)
            assert np.array_equal(array.values, values.numpy())


def test_labels_and_rows_are_divided_and_merged_without_a_trace() -> None:
    bridge = TransformerBridge(make_bloom(torch.float64))
    corpus = packed_corpus()
    exact = [CountPositive(), MinMax(), Quantiles(), Histogram((0.0, 1.0)), TopK(5)]
    whole = bridge.collect(corpus, {POST: exact}, batch_size=4)
    rows = max(corpus.rows(label) for label in corpus.labels)
    # Products of few rows may round otherwise than those of many, on some processors: batches stay whole.
    for bounds in ([0, 4, rows], [0, 4, 8, rows], [0, 8, rows]):
        merged: Collected | None = None
        for low, high in itertools.pairwise(bounds):
            part = bridge.collect(corpus, {POST: exact}, batch_size=4, start_row=low, stop_row=high)
            merged = part if merged is None else merged.merge(part)
        assert merged is not None
        assert merged.n_tokens == whole.n_tokens
        for hook in whole.hooks:
            for statistic in exact:
                for label in corpus.labels:
                    key = (hook.spec.name, statistic.name, label)
                    assert_same(merged.get(*key).state_dict(), whole.get(*key).state_dict())


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# -- what is run -------------------------------------------------------------------------------------------------------


def modules_run(model: Any, call: Any) -> list[str]:
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
        for name, module in model.named_modules()
    ]
    call()
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize(
    ("name", "runs", "leaves_out"),
    [
        ("blocks.0.mlp.hook_post", "transformer.h.0.mlp", "transformer.h.1.self_attention"),
        ("blocks.1.hook_resid_pre", "transformer.h.0.mlp", "transformer.h.1.self_attention"),
        ("blocks.2.hook_resid_post", "transformer.h.2.mlp", "lm_head"),
        ("hook_embed", "transformer.word_embeddings_layernorm", "transformer.h.0.self_attention"),
        ("ln_final.hook_out", "transformer.ln_f", "lm_head"),
        ("hook_unembed", "lm_head", "nothing"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_forward_ends_after_the_last_layer_asked_for(
    name: str, runs: str, leaves_out: str, dtype: torch.dtype
) -> None:
    bridge = TransformerBridge(make_bloom(dtype))
    corpus = Corpus.from_tokens({"a": torch.arange(12) % VOCAB}, context=6)
    results = []
    ran = modules_run(bridge.hf_model, lambda: results.append(bridge.collect(corpus, {name: [MeanVariance()]})))
    assert runs in ran
    assert leaves_out not in ran
    expected = torch.cat([bridge.run_with_cache(batch.tokens)[1][name] for batch in corpus.batches(4)])
    mean = results[0].get(name, "mean_variance", "a").result().mean
    torch.testing.assert_close(mean, expected.double().mean((0, 1)), rtol=1e-12, atol=1e-14)
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("site", ["q", "k", "v", "z"])
def test_heads_have_their_axes(site: str) -> None:
    bridge, _ = make_pair()
    name = f"blocks.*.attn.hook_{site}"
    collected = bridge.collect(packed_corpus(), {name: [CountPositive(), MeanVariance()]})
    array = collected.array(name, "count_positive")
    assert array.dims == ("layer", "head", "d_head", "label")
    assert array.shape == (3, 4, 12, 2)
    means = collected.array(name, "mean_variance", field="mean")
    assert means.shape == array.shape


def test_hooks_on_the_bridge_act_and_what_they_leave_is_counted() -> None:
    bridge, _ = make_pair()
    corpus = packed_corpus()

    def silence(tensor: Tensor, hook: Any) -> None:
        tensor[..., 7] = 0.0

    with bridge.hooks([("blocks.1.mlp.hook_post", silence)]):
        found = bridge.collect(corpus, {POST: [CountPositive()]}).array(POST, "count_positive")
    assert (found.sel(layer=1, neuron=7) == 0).all()
    assert (found.sel(layer=0, neuron=7) > 0).all()


def test_a_model_run_inside_a_hook_is_not_counted() -> None:
    bridge, _ = make_pair()
    corpus = packed_corpus()
    expected = bridge.collect(corpus, {POST: [CountPositive()]}).array(POST, "count_positive")

    def run_again(tensor: Tensor, hook: Any) -> None:
        handle.remove()
        bridge(torch.arange(5)[None])

    handle = bridge.add_hook("hook_embed", run_again)[0]
    assert bridge.collect(corpus, {POST: [CountPositive()]}).array(POST, "count_positive").equals(expected)


# -- interrupted and resumed -------------------------------------------------------------------------------------------


def everything(collected: Collected) -> dict[str, dict[str, Tensor]]:
    return {"|".join(key): one.state_dict() for key, one in collected._statistics.items()}


@pytest.mark.parametrize("stop_at", [1, 5, 12])
def test_an_interrupted_job_goes_on_with_equal_bits(stop_at: int, tmp_path: Path) -> None:
    bridge, _ = make_pair()
    corpus = documents_corpus()
    request = {POST: every_statistic()}
    expected = bridge.collect(corpus, request)
    seen = 0

    def press(tensor: Tensor, hook: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    handle = bridge.add_hook("blocks.0.mlp.hook_pre", press)[0]
    with pytest.raises(KeyboardInterrupt):
        bridge.collect(corpus, request, checkpoint=tmp_path)
    held = Collected.load(tmp_path / "collected.safetensors")
    assert 0 < sum(held.n_rows.values()) < sum(expected.n_rows.values())
    found = bridge.collect(corpus, request, checkpoint=tmp_path)
    handle.remove()
    assert found.n_tokens == expected.n_tokens
    for key, state in everything(expected).items():
        assert_same(everything(found)[key], state)


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    bridge, _ = make_pair()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def press(tensor: Tensor, hook: Any) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)

    handle = bridge.add_hook("blocks.0.mlp.hook_pre", press)[0]
    try:
        bridge.collect(documents_corpus(), {POST: [CountPositive()]}, checkpoint=tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        handle.remove()
        signal.signal(signal.SIGINT, before)


def test_a_job_that_broke_down_goes_on_after_its_last_state(tmp_path: Path) -> None:
    bridge, _ = make_pair()
    corpus = documents_corpus()
    request = {POST: every_statistic()}

    class Breaks:
        """Raises in the middle of a forward: statistics of block 0 have seen the batch, others have not."""

        def __init__(self) -> None:
            self.at, self.seen = [5, 8], 0

        def job_identity(self) -> str:
            return "changes no number"  # without it, a function that has counted on since the last state is another one

        def __call__(self, tensor: Tensor, hook: Any) -> None:
            self.seen += 1
            if self.seen in self.at:
                self.at.remove(self.seen)
                raise RuntimeError("the machine is gone")

    breaks = Breaks()
    handle = bridge.add_hook("blocks.1.mlp.hook_pre", breaks)[0]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the machine is gone"):
            bridge.collect(corpus, request, checkpoint=tmp_path, every=0)
    ran = breaks.seen
    found = bridge.collect(corpus, request, checkpoint=tmp_path, every=0)
    expected = bridge.collect(corpus, request)
    handle.remove()
    batches = len(list(corpus.batches(4)))
    assert breaks.seen - ran == (batches - 6) + batches  # two forwards were lost, each batch before them was kept
    for key, state in everything(expected).items():
        assert_same(everything(found)[key], state)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_finished_job_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, _ = make_pair()
    corpus = packed_corpus()
    first = bridge.collect(corpus, {POST: [CountPositive()]}, checkpoint=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PassBatch, "run", None)
        again = bridge.collect(corpus, {POST: [CountPositive()]}, checkpoint=tmp_path)
    assert again.array(POST, "count_positive").equals(first.array(POST, "count_positive"))


def test_another_job_on_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    bridge, _ = make_pair()
    corpus = packed_corpus()
    bridge.collect(corpus, {POST: [CountPositive()]}, checkpoint=tmp_path)
    before = (tmp_path / "collected.safetensors").read_bytes()
    other_corpus = Corpus.from_tokens({"en": ragged(1, 60), "fr": ragged(3, 40)}, context=9)
    with pytest.raises(OtherJobError, match='corpus "'):
        bridge.collect(other_corpus, {POST: [CountPositive()]}, checkpoint=tmp_path)
    with pytest.raises(OtherJobError, match=r"statistics\.blocks\.0\.mlp\.hook_post"):
        bridge.collect(corpus, {POST: [CountPositive(0.5)]}, checkpoint=tmp_path)
    with pytest.raises(OtherJobError, match=r"batch_size 4 \(asked for: 5\)"):
        bridge.collect(corpus, {POST: [CountPositive()]}, batch_size=5, checkpoint=tmp_path)
    with bridge.hooks([("hook_embed", lambda tensor, hook: None)]):
        with pytest.raises(OtherJobError, match=r"hooks \[\] \(asked for: .*hook_embed: <lambda>"):
            bridge.collect(corpus, {POST: [CountPositive()]}, checkpoint=tmp_path)
    with torch.no_grad():
        bridge.hf_model.transformer.h[0].mlp.dense_4h_to_h.bias[0] += 1e-3
    with pytest.raises(OtherJobError, match=r"model\.weights_sha256"):
        bridge.collect(corpus, {POST: [CountPositive()]}, checkpoint=tmp_path)
    assert (tmp_path / "collected.safetensors").read_bytes() == before


def test_equal_jobs_write_equal_bytes(tmp_path: Path) -> None:
    bridge, _ = make_pair()
    corpus = documents_corpus()
    for folder in ("a", "b"):
        bridge.collect(corpus, {POST: every_statistic()}, checkpoint=tmp_path / folder)
    assert (tmp_path / "a" / "collected.safetensors").read_bytes() == (
        tmp_path / "b" / "collected.safetensors"
    ).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_saved_and_loaded(tmp_path: Path) -> None:
    bridge, _ = make_pair()
    collected = bridge.collect(documents_corpus(), {POST: every_statistic()})
    collected.save(tmp_path / "x.safetensors")
    loaded = Collected.load(tmp_path / "x.safetensors")
    for key, state in everything(collected).items():
        assert_same(everything(loaded)[key], state)
    assert loaded.array(POST, "top_3", "values").equals(collected.array(POST, "top_3", "values"))
    damaged = (tmp_path / "x.safetensors").read_bytes()[:-100]
    (tmp_path / "x.safetensors").write_bytes(damaged)
    with pytest.raises(InputError, match=r"x\.safetensors"):
        Collected.load(tmp_path / "x.safetensors")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ({}, InputError, "statistics maps hook names"),
        ({"blocks.0.mlp.hook_pots": [CountPositive()]}, HookNameError, "blocks.0.mlp.hook_post"),
        ({POST: []}, InputError, "list of statistics"),
        ({POST: [CountPositive]}, InputError, "list of statistics"),
        ({POST: [CountPositive(), CountPositive()]}, InputError, "twice"),
        ([(POST, [CountPositive()]), ("blocks.0.mlp.hook_post", [CountPositive()])], InputError, "twice"),
        ({"blocks.0.attn.hook_pattern": [CountPositive()]}, InputError, "pairs of positions"),
        ({"embed.hook_in": [CountPositive()]}, InputError, "token ids"),
        ({"blocks.0.attn.hook_result": [CountPositive()]}, PellucidError, "set_use_attn_result"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(request_: Any, error: type[Exception], words: str) -> None:
    bridge, _ = make_pair()
    ran = []
    bridge.add_hook("hook_embed", lambda tensor, hook: ran.append(1))
    with pytest.raises(error, match=words):
        bridge.collect(packed_corpus(), request_)
    assert not ran


def test_bad_arguments_are_refused() -> None:
    bridge, _ = make_pair()
    corpus = packed_corpus()
    for arguments, words in (
        ({"labels": "de"}, "no label 'de'"),
        ({"batch_size": 0}, "batch_size"),
        ({"padding_side": "top"}, "padding_side"),
        ({"start_row": -1}, "start_row"),
    ):
        with pytest.raises(InputError, match=words):
            bridge.collect(corpus, {POST: [CountPositive()]}, **arguments)
    collected = bridge.collect(corpus, {POST: [MeanVariance()]})
    for call, words in (
        (lambda: collected.array(POST, "mean_variance"), "field"),
        (lambda: collected.array(POST, "mean_variance", "men"), "'mean'"),
        (lambda: collected.array("blocks.9.mlp.hook_post", "mean_variance", "mean"), "hook"),
        (lambda: collected.array(POST, "count_positive"), "mean_variance"),
        (lambda: collected.get("blocks.0.mlp.hook_post", "mean_variance", "de"), "label"),
        (lambda: collected.average_precision(POST, "en"), "average"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_token_ids_that_the_model_does_not_have_are_named() -> None:
    bridge, _ = make_pair()
    corpus = Corpus.from_tokens({"a": torch.arange(90, 102)}, context=6)
    with pytest.raises(InputError, match=r"Token id 10\d is outside"):
        bridge.collect(corpus, {POST: [CountPositive()]})
    assert is_pristine(bridge.hf_model)


# -- the trained model -------------------------------------------------------------------------------------------------


def held_out(tokenizer: Any, **settings: Any) -> Corpus:
    text = json.loads((MODEL_FOLDER / "held_out.json").read_text("utf-8"))
    documents = {label: parts["declaration"][:40] for label, parts in text.items()}
    return Corpus.from_documents(documents, tokenizer, **settings)


def test_float32_signs_flip_by_batch_size_and_padding_at_most_once_in_a_million(demo: TransformerBridge) -> None:
    corpus = held_out(demo.tokenizer, packing="documents", context=96)

    def signs(batch_size: int, side: Any) -> Tensor:
        kept: list[Tensor] = []

        def keep(tensor: Tensor, hook: Any) -> None:
            kept.append(tensor[hook.run.real] > 0)

        with demo.hooks([(POST, keep)]):
            demo.collect(corpus, {POST: [CountPositive()]}, batch_size=batch_size, padding_side=side)
        layers = [torch.cat(kept[layer :: demo.cfg.n_layers]) for layer in range(demo.cfg.n_layers)]
        return torch.stack(layers)  # rows, and so real tokens, come in one order whatever the batches are

    first = signs(1, "right")
    flips = {
        (size, side): int((signs(size, side) != first).sum())
        for size, side in ((7, "right"), (7, "left"), (64, "right"), (64, "left"))
    }
    print(f"flips of {first.numel():,} signs against batches of one row: {flips}")
    assert first.numel() > 3e6
    assert max(flips.values()) <= first.numel() / 1e6


def test_examples_come_with_their_text_and_concepts_with_their_neurons(demo: TransformerBridge) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    corpus = held_out(demo.tokenizer, packing="documents", context=96)
    name = "blocks.3.mlp.hook_post"
    collected = demo.collect(corpus, {name: [TopK(3), AveragePrecision()]}, batch_size=16)
    for neuron in (0, 77):
        examples = collected.examples(corpus, name, "fr", neuron)
        assert len(examples) == 3
        assert examples[0].value >= examples[1].value >= examples[2].value
        for example in examples:
            text = corpus.text_of("fr", example.document)
            tokens = demo.to_tokens(text)
            assert demo.to_string(tokens[0, example.position]) == example.context.token or "⟨" in example.context.token
            _, cache = demo.run_with_cache(tokens, names_filter=name)
            if tokens.shape[1] <= 96:
                assert abs(float(cache[name][0, example.position, neuron]) - example.value) < 1e-4
    found = collected.average_precision(name, "zh")
    assert found.dims == ("neuron",)
    pooled = {label: collected.get(name, "average_precision", label).result() for label in corpus.labels}
    truth = np.concatenate([np.full(len(rows), label == "zh") for label, rows in pooled.items()])
    scores = torch.cat(list(pooled.values())).numpy()
    for neuron in range(0, 512, 97):
        assert abs(float(found[neuron]) - metrics.average_precision_score(truth, scores[:, neuron])) <= 1e-12
    layers = demo.collect(corpus, {POST: [AveragePrecision()]}, batch_size=16).average_precision(POST, "zh")
    assert layers.dims == ("layer", "neuron")
    np.testing.assert_array_equal(layers.sel(layer=3), found)
