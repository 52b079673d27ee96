"""Relevance of neurons: against plain Hugging Face loops with torch hooks, and against neurons planted to be told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid import Corpus, TransformerBridge
from pellucid.analysis import relevance as relevance_module
from pellucid.analysis.criteria import compare_criteria, effects_of_criteria
from pellucid.analysis.language_neurons import lape
from pellucid.analysis.perplexity import perplexity_change
from pellucid.analysis.relevance import NeuronRelevance, neuron_relevance
from pellucid.errors import InputError, OtherJobError, PellucidWarning, UnsupportedModelError
from pellucid.running_stats import CountPositive
from tests.families import CONFIGS, NO_FLOAT64, VOCAB, has_experts, make_family, of_each_layout

LAST = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "fc2")
"""What Hugging Face calls an MLP's last projection."""


FAMILIES = [name for name in of_each_layout() if not has_experts(name)]


def texts(rows: int = 3, context: int = 7) -> Corpus:
    """Two languages of random tokens, the last row of each shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    tokens = {
        label: [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
        for label, lengths in (("x", [context] * (rows - 1) + [4]), ("y", [context] * (rows - 1) + [3]))
    }
    return Corpus.from_tokens(tokens, context=context, packing="documents")


def last_projections(model: Any) -> list[Any]:
    return [
        module
        for name, module in model.named_modules()
        if name.endswith(LAST) and not any(part.startswith(("attn", "self_attn")) for part in name.split(".")[:-1])
    ]


def plain(model: Any, corpus: Corpus) -> dict[str, Tensor]:
    """By language, ``[layer, neuron]``: row by row, what torch hooks see go into the last projections, and its gradient."""
    found = {}
    for label in corpus.labels:
        total, n = 0.0, 0
        for batch in corpus.batches(1, labels=label):
            ids = batch.tokens[:, batch.attention_mask[0].bool()]
            kept: list[Tensor] = []

            def keep(module: Any, inputs: tuple[Tensor, ...], kept: list[Tensor] = kept) -> None:
                inputs[0].retain_grad()
                kept.append(inputs[0])

            handles = [module.register_forward_pre_hook(keep) for module in last_projections(model)]
            with torch.enable_grad():
                logits = model(input_ids=ids, use_cache=False).logits
                F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
            for handle in handles:
                handle.remove()
            both = [(each.grad * each).abs().detach().reshape(ids.shape[1], -1).sum(0) for each in kept]
            total, n = total + torch.stack(both), n + ids.shape[1]
        found[label] = total / n
    model.zero_grad()
    return found


def assert_close(found: Any, expected: dict[str, Tensor]) -> None:
    for label, values in expected.items():
        own = torch.from_numpy(found.sel(language=label).values)
        # Softmax and RMS norms compute in float32 inside, whose step is 1.2e-7 of a number.
        assert float((own - values).abs().max() / values.abs().max()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_times_activation_of_a_plain_loop(name: str) -> None:
    model = make_family(name, torch.float32 if name in NO_FLOAT64 else torch.float64)
    corpus = texts()
    found = neuron_relevance(TransformerBridge(model), corpus, methods=["gradient"], batch_size=3)
    assert_close(found.mean.sel({"method": "gradient"}), plain(model, corpus))
    assert found.n.values.tolist() == [18, 17]


def test_relp_of_a_plain_loop_whose_modules_propagate_by_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama whose norms have constant scales, whose patterns are constants and whose gates are proportional."""
    model, corpus = make_family("llama", torch.float64), texts()
    found = neuron_relevance(TransformerBridge(model), corpus, batch_size=3)
    from transformers.models.llama import modeling_llama as llama

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(llama.nn.functional, "softmax", lambda *given, **named: softmax(*given, **named).detach())

    def norm(self: Any, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (wide * scale).to(x.dtype)

    def mlp(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        half = (self.act_fn(gate) * up).detach() / 2
        return self.down_proj(gate * (half / gate).detach() + up * (half / up).detach())

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(llama.LlamaMLP, "forward", mlp)
    by_rules = plain(model, corpus)
    assert_close(found.mean.sel({"method": "relp"}), by_rules)
    monkeypatch.undo()
    assert_close(found.mean.sel({"method": "gradient"}), plain(model, corpus))
    assert (
        float(
            (torch.from_numpy(found.mean.sel({"method": "gradient"}).sel(language="x").values) - by_rules["x"])
            .abs()
            .max()
        )
        > 1e-3
    )


def planted() -> tuple[TransformerBridge, Corpus, tuple[int, int], tuple[int, int]]:
    """A GPT-2 with a neuron that fires at every token of language x and writes nothing, and one that fires at token 7 alone,
    which is one in 20 of x, and writes much."""
    model = make_family("gpt2", torch.float64)
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(48, 4, generator=generator, dtype=torch.float64)).Q.T
    of_x, of_7, writes = directions[0] - directions[0].mean(), directions[1] - directions[1].mean(), directions[2]
    first = model.transformer.h[0]
    with torch.no_grad():
        embed = model.transformer.wte.weight.detach().clone()
        embed[3:40] += 6 * of_x
        embed[40:80] -= 6 * of_x
        embed[7] += 24 * of_7
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.transformer.wte.weight = torch.nn.Parameter(embed)
        for block in model.transformer.h:
            block.mlp.c_proj.weight *= 0.1
        first.attn.c_proj.weight *= 0.05
        first.attn.c_proj.bias.zero_()
        first.ln_2.weight.fill_(1)
        first.ln_2.bias.zero_()
        for neuron, reads, bias, out in ((3, of_x, 0.0, 0 * writes), (5, of_7, -4.0, 6 * writes)):
            first.mlp.c_fc.weight[:, neuron] = reads
            first.mlp.c_fc.bias[neuron] = bias
            first.mlp.c_proj.weight[neuron] = out
    rows = {}
    for label, low, high in (("x", 8, 40), ("y", 40, 80)):
        tokens = torch.randint(low, high, (8, 20), generator=generator)
        if label == "x":
            tokens[:, 4] = 7
        rows[label] = tokens.tolist()
    return TransformerBridge(model), Corpus.from_tokens(rows, context=20, packing="documents"), (0, 3), (0, 5)


def test_frequent_but_irrelevant_and_rare_but_relevant_are_told_apart() -> None:
    bridge, corpus, frequent, rare = planted()
    hook = "blocks.*.mlp.hook_post"
    counted = bridge.collect(corpus, {hook: [CountPositive()]})
    found = lape(counted.array(hook, "count_positive"), counted.tokens, 0.03, 0.5, 0.5)
    probability = found.probabilities.sel(language="x").values
    assert probability[frequent] > 0.95
    assert 0.03 < probability[rare] < 0.1
    assert frequent in found.neurons["x"]
    assert rare not in found.neurons["x"]
    measured = neuron_relevance(bridge, corpus)
    assert not measured.mean.values[:, frequent[0], frequent[1]].any()
    for method in measured.methods:
        for against in ("nothing", "others"):
            top = measured.top(12, method, against)["x"]
            assert rare in top
            assert frequent not in top
    table = compare_criteria(found, measured)
    assert table.attrs["method"] == "relp"
    for language in ("x", "y"):
        own, other = set(found.neurons[language]), set(measured.top(found)[language])
        line = table.sel(language=language)
        assert int(line["size"]) == len(own) == len(other)
        assert int(line["shared"]) == len(own & other)
        assert float(line["jaccard"]) == len(own & other) / len(own | other)
        assert float(line["expected"]) == len(own) ** 2 / (found.n_layers * found.d_mlp)
        scores = measured.scores().sel(language=language).values
        ranks = [float((scores < scores[neuron]).mean()) for neuron in found.neurons[language]]
        assert float(line["relevance_of_entropy"]) == pytest.approx(np.median(ranks), abs=1e-12)
    sets = {"entropy": {"x": found.neurons["x"]}, "relp": {"x": [rare]}}
    effects = effects_of_criteria(bridge, corpus, sets, random_sets=[{"x": [(1, 1)]}])
    for name, own in sets.items():
        alone = perplexity_change(bridge, corpus, own, random_sets=[{"x": [(1, 1)]}])
        assert effects["change"].sel(criterion=name).values.tolist() == alone["change"].values.tolist()
        assert effects["random"].values.tolist() == alone["random"].values.tolist()
    own = effects["change"].sel(silenced="x", language="x")
    assert abs(float(own.sel(criterion="relp"))) > 1e-3


def test_scores_against_the_other_languages() -> None:
    found = neuron_relevance(TransformerBridge(make_family("gpt2")), texts(), methods=["gradient"])
    x, y = (found.scores("gradient").sel(language=each).values for each in ("x", "y"))
    assert np.allclose(found.scores("gradient", "others").sel(language="x").values, x - y)
    order = sorted(np.ndindex(*x.shape), key=lambda place: (-(x - y)[place], place))
    assert found.top(5, "gradient", "others")["x"] == tuple(sorted((int(a), int(b)) for a, b in order[:5]))
    assert found.top({"y": 0}, "gradient") == {"y": ()}


def test_interrupted_it_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, corpus = TransformerBridge(make_family("llama")), texts(6)
    plainly = neuron_relevance(bridge, corpus, batch_size=2)
    run, calls = relevance_module.run_with_gradients, []

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(relevance_module, "run_with_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            neuron_relevance(bridge, corpus, batch_size=2, checkpoint=tmp_path, every=0)
        assert len(calls) == 4
        resumed = neuron_relevance(bridge, corpus, batch_size=2, checkpoint=tmp_path)
    assert len(calls) == 4 + 3  # three of six batches were kept
    for name in ("mean", "standard_error", "n"):
        assert getattr(resumed, name).identical(getattr(plainly, name)), name
    resumed.save(tmp_path / "relevance.safetensors")
    assert NeuronRelevance.load(tmp_path / "relevance.safetensors").mean.identical(plainly.mean)
    with pytest.raises(OtherJobError, match="statistics"):
        neuron_relevance(bridge, corpus, batch_size=2, checkpoint=tmp_path, methods=["relp"])
    assert not bridge.live_hooks()


def test_rows_of_a_corpus_may_end_with_the_padding_token() -> None:
    """Texts are packed with the token that ends one between them, which pads too in many models: nothing is guessed."""
    bridge = TransformerBridge(make_family("llama"))
    pad = bridge.hf_model.config.pad_token_id
    rows = Corpus.from_tokens({"x": [[5, 6, 7, 8, 9, pad], [8, 7, 6, 5, 4, pad]]}, context=6, packing="documents")
    with pytest.warns(PellucidWarning, match="ends with the padding token"):  # where nobody knows what they are
        bridge(torch.tensor([[5, 6, pad], [8, 7, pad]]))
    neuron_relevance(bridge, rows, progress=False)  # a warning of ours is an error in these tests


def test_moments_are_of_tokens() -> None:
    """Mean and standard error, against the numbers themselves, padding left out."""
    bridge, corpus = TransformerBridge(make_family("gpt2", torch.float64)), texts()
    found = neuron_relevance(bridge, corpus, batch_size=3, methods=["gradient"])
    one = neuron_relevance(bridge, corpus, batch_size=1, methods=["gradient"])
    assert np.allclose(found.mean.values, one.mean.values, rtol=1e-6)
    assert np.allclose(found.standard_error.values, one.standard_error.values, rtol=1e-6)
    left = neuron_relevance(bridge, corpus, batch_size=3, methods=["gradient"], padding_side="left")
    assert np.allclose(found.mean.values, left.mean.values, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if has_experts(name)][:2])
def test_experts_are_refused_by_name(name: str) -> None:
    bridge = TransformerBridge(make_family(name))
    title = bridge.adapter.family.title
    with pytest.raises(UnsupportedModelError, match=f"{title} has experts"):
        neuron_relevance(bridge, texts())


def test_mistakes_are_told(tmp_path: Path) -> None:
    bridge, corpus = TransformerBridge(make_family("gpt2")), texts()
    one = neuron_relevance(bridge, corpus, labels="x", methods=["relp"])
    for call, said in (
        (lambda: one.scores("gradient"), "Invalid method: 'gradient'. method must be one of 'relp'"),
        (lambda: one.scores("relp", "others"), "compares languages; there is one"),
        (lambda: one.top({"y": 1}), "sizes has the language 'y'; relevance is of x"),
        (lambda: one.top(10_000), "sizes must be at most"),
        (
            lambda: NeuronRelevance.of(bridge.collect(corpus, {"blocks.*.mlp.hook_post": [CountPositive()]})),
            "no relevance",
        ),
        (
            lambda: compare_criteria(lape(torch.ones(3, 5, 1), [9], 0.5, languages=["x"]), one),
            "3 x 5 neurons and x; relevance of",
        ),
    ):  # type: tuple[Callable[[], Any], str]
        with pytest.raises(InputError, match=said):
            call()
    bridge.hf_model.train()
    with pytest.raises(InputError, match="train"):
        neuron_relevance(bridge, corpus)
    bridge.hf_model.eval()
