"""Corpus work on families: collections, harvests, neurons, perplexity and a job's identity, against loops over bare modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pellucid import TransformerBridge
from pellucid.analysis.expert_neurons import expertise
from pellucid.analysis.language_neurons import lape
from pellucid.analysis.linear_units import linears_of, unit_places
from pellucid.analysis.neuron_files import read_expertise
from pellucid.analysis.neurons import activity_place, zero
from pellucid.analysis.perplexity import log_perplexity, perplexity_change
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.errors import InputError, OtherJobError
from pellucid.model_bridge.corpus.job_identity import conditions, job_identity
from pellucid.plots.attention import attention_pattern
from pellucid.running_stats import AveragePrecision, CountPositive, MeanVariance, TopK
from pellucid.scale.harvest import harvest
from pellucid.scale.saelens import export_to_saelens
from pellucid.scale.stored_activations import StoredActivations
from tests.families import make_family
from tests.tiny_tokenizers import byte_level

FAMILIES = ("llama", "gpt2", "gemma2")
TEXTS = {
    "one": ["the cat sat", "a dog!", "who goes there?", "nobody", "it was, it is."],
    "two": ["0123 45", "9-8-7", "1.5 and 2.5", "31 41 59 26"],
}
PATHS = {  # by family: blocks, gate and down of an MLP, keys
    "llama": ("model.layers", "mlp.gate_proj", "mlp.down_proj", "self_attn.k_proj"),
    "gpt2": ("transformer.h", "mlp.act", "mlp.c_proj", "attn.c_attn"),
    "gemma2": ("model.layers", "mlp.gate_proj", "mlp.down_proj", "self_attn.k_proj"),
}


def make(name: str) -> TransformerBridge:
    return TransformerBridge(make_family(name), byte_level("bos" if name != "gpt2" else "nothing"))


def documents(bridge: TransformerBridge) -> Corpus:
    return Corpus.from_documents(TEXTS, bridge.tokenizer, context=16, packing="documents")


def bare(
    name: str, batches: Iterator[CorpusBatch], read: Callable[[nn.Module, int], tuple[nn.Module, bool]], layers: int
) -> list[list[Tensor]]:
    """By layer, what one module is given or gives at real tokens, by Hugging Face's model and torch hooks alone."""
    model = make_family(name)
    blocks = model.get_submodule(PATHS[name][0])
    found: list[list[Tensor]] = [[] for _ in range(layers)]
    shown: dict[int, Tensor] = {}
    for layer in range(layers):
        module, is_input = read(blocks[layer], layer)
        if is_input:
            module.register_forward_pre_hook(lambda _, args, layer=layer: shown.update({layer: args[0]}))
        else:
            module.register_forward_hook(lambda *_, layer=layer: shown.update({layer: _[2]}))
    with torch.no_grad():
        for batch in batches:
            run_bare(model, batch)
            for layer in range(layers):
                found[layer].append(shown[layer][batch.attention_mask])
    return found


def run_bare(model: Any, batch: CorpusBatch) -> Tensor:
    mask = batch.attention_mask.long()
    ids = (mask.cumsum(-1) - 1).clamp(min=0) * mask
    given = {"attention_mask": mask, "position_ids": ids} if batch.is_padded else {}
    return model(batch.tokens, use_cache=False, **given).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_of_neurons_are_those_of_a_plain_loop(name: str) -> None:
    bridge = make(name)
    n_layers, corpus = bridge.cfg.n_layers, documents(bridge)
    place = activity_place(bridge)
    assert place == ("mlp.hook_post" if name == "gpt2" else "mlp.hook_pre")
    asked: dict[str, list[Any]] = {f"blocks.*.{place}": [CountPositive()], "blocks.*.attn.hook_k": [MeanVariance()]}
    asked.setdefault("blocks.*.mlp.hook_post", []).append(TopK(2))
    collected = bridge.collect(corpus, asked, batch_size=3, progress=False)
    counts = collected.array(f"blocks.*.{place}", "count_positive")
    assert counts.dims == ("layer", "neuron", "label")
    keys = collected.array("blocks.*.attn.hook_k", "mean_variance", "mean")
    assert keys.dims == ("layer", "head" if name == "gpt2" else "kv_head", "d_head", "label")
    activation = make_family(name).get_submodule(PATHS[name][0])[0].mlp
    act = activation.act if name == "gpt2" else activation.act_fn
    for number, label in enumerate(corpus.labels):

        def gate(block: nn.Module, layer: int) -> tuple[nn.Module, bool]:
            return block.get_submodule(PATHS[name][1]), False

        by_layer = bare(name, corpus.batches(3, labels=label), gate, n_layers)
        for layer, found in enumerate(by_layer):
            # The published procedure: where the activated gate (GPT-2: the activated neuron) is above zero.
            values = torch.cat(found) if name == "gpt2" else act(torch.cat(found))
            assert counts.values[layer, :, number].tolist() == (values > 0).sum(0).tolist()

        def projection(block: nn.Module, layer: int) -> tuple[nn.Module, bool]:
            return block.get_submodule(PATHS[name][3]), False

        for layer, found in enumerate(bare(name, corpus.batches(3, labels=label), projection, n_layers)):
            width = bridge.cfg.n_key_value_heads * bridge.cfg.d_head
            whole = torch.cat(found).double()
            whole = whole[:, width : 2 * width] if name == "gpt2" else whole
            mean = whole.mean(0).view(-1, bridge.cfg.d_head)
            torch.testing.assert_close(
                torch.from_numpy(keys.values[layer, ..., number]).double(), mean, rtol=1e-5, atol=1e-6
            )
    found = lape(counts, {label: collected.n_tokens[label] for label in corpus.labels}, 0.1, 0.5, 0.5)
    assert found.d_mlp == bridge.cfg.d_mlp


@pytest.mark.parametrize("name", FAMILIES)
def test_silencing_a_neuron_is_zeroing_the_input_of_the_last_projection(name: str) -> None:
    bridge, model = make(name), make_family(name)
    corpus = documents(bridge)
    neurons = {"one": [(0, 3), (1, 7)], "two": [(2, 11)]}
    text = perplexity_change(bridge, corpus, neurons, batch_size=3, progress=False)
    assert text.sizes["language"] == 2
    blocks = model.get_submodule(PATHS[name][0])

    def silence(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            changed = args[0].clone()
            changed[..., index] = 0
            return (changed, *args[1:])

        return hook

    for layer, index in neurons["one"]:
        blocks[layer].get_submodule(PATHS[name][2]).register_forward_pre_hook(silence(index))
    with torch.no_grad():
        for batch in corpus.batches(3):
            given = {"attention_mask": batch.attention_mask.long()} if batch.is_padded else {}
            with zero(neurons["one"]).on(bridge):
                ours = bridge(batch.tokens, **given)
            real = batch.attention_mask.bool()
            assert torch.equal(ours[real], run_bare(model, batch)[real])


@pytest.mark.parametrize("name", FAMILIES)
def test_perplexity_is_that_of_a_plain_loop(name: str) -> None:
    bridge, model = make(name), make_family(name).double()
    corpus = documents(bridge)
    ours = log_perplexity(bridge, corpus, batch_size=3, progress=False)
    for label in corpus.labels:
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in corpus.batches(1, labels=label):
                row = batch.tokens[batch.attention_mask.bool()]
                logits = model(row[None], use_cache=False).logits[0, :-1]
                total += float(nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
                count += len(row) - 1
        assert math.isclose(float(ours.sel(language=label)), total / count, rel_tol=2e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_harvest_holds_what_the_modules_give_and_goes_on_for_this_model_only(name: str, tmp_path: Path) -> None:
    bridge = make(name)
    corpus = Corpus.from_documents(TEXTS, bridge.tokenizer, context=8)
    hooks = ["blocks.1.attn.hook_k", "blocks.0.mlp.hook_post"]
    settings: dict[str, Any] = {"batch_size": 2, "batches_per_shard": 2, "hooks": hooks, "progress": False}
    harvest(bridge, corpus, out=tmp_path / "store", **settings)
    store = StoredActivations(tmp_path / "store")

    def last(block: nn.Module, layer: int) -> tuple[nn.Module, bool]:
        return block.get_submodule(PATHS[name][2]), True

    order = [batch for label in corpus.labels for batch in corpus.batches(2, labels=label)]
    expected = torch.cat(bare(name, iter(order), last, 1)[0])
    stored = torch.cat([store.shard(index, hooks[1]).flatten(0, -2) for index in range(store.n_shards)])
    assert torch.equal(stored, expected)
    width = bridge.cfg.n_key_value_heads * bridge.cfg.d_head
    assert store.job.hook(hooks[0]).width == width
    changed = make(name)
    with torch.no_grad():
        next(changed.hf_model.parameters()).mul_(1.5)
    with pytest.raises(OtherJobError):
        harvest(changed, corpus, out=tmp_path / "store", **settings)
    pytest.importorskip("datasets")
    assert export_to_saelens(store, hooks, tmp_path / "sae", progress=False) == len(store) // 8


DECIDING = {  # by family: the attribute, and an argument that changes it
    "llama": ("rope_parameters", {"rope_theta": 100.0}),
    "gpt2": ("scale_attn_by_inverse_layer_idx", {"scale_attn_by_inverse_layer_idx": True}),
    "gemma2": ("sliding_window", {"sliding_window": 3}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_jobs_identity_is_all_that_the_familys_code_reads(name: str) -> None:
    one = job_identity(make(name))
    assert one == job_identity(make(name))
    key, settings = DECIDING[name]
    other = conditions(TransformerBridge(make_family(name, **settings)))
    assert other["model"]["configuration"][key] != one["model"]["configuration"][key]  # type: ignore[index, call-overload]
    renamed = make(name)
    renamed.hf_model.config._name_or_path = "elsewhere"  # type: ignore[union-attr]
    assert job_identity(renamed) == one
    fast = make(name)
    if name != "gemma2":
        fast.set_attn_implementation("sdpa")
        assert conditions(fast)["run"]["attention"] == "sdpa"


@pytest.mark.parametrize("name", FAMILIES)
def test_expert_units_and_their_places(name: str) -> None:
    bridge = make(name)
    corpus = documents(bridge)
    collected = bridge.collect(
        corpus,
        {f"blocks.*.{place}": [AveragePrecision()] for place in ("attn.hook_k", "mlp.hook_pre", "hook_mlp_out")},
        batch_size=3,
        progress=False,
    )
    found = expertise(collected)
    keys = bridge.cfg.n_key_value_heads * bridge.cfg.d_head
    per_layer = keys + bridge.cfg.d_mlp + bridge.cfg.d_model  # type: ignore[operator]
    assert found.table.sizes["unit"] == bridge.cfg.n_layers * per_layer
    assert ((found.table["ap"] >= 0) & (found.table["ap"] <= 1)).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3", "qwen3", "olmo2"])
def test_each_output_feature_of_a_linear_layer_is_the_unit_that_its_hook_shows(name: str, tmp_path: Path) -> None:
    """Each feature of each linear layer of a block, by a torch hook on Hugging Face's module and by the bridge's points."""
    bridge = TransformerBridge(make_family(name))
    family, cfg = bridge.adapter.family, bridge.cfg
    tokens = torch.arange(5)[None]
    _, cache = bridge.run_with_cache(tokens)
    model, shown = make_family(name), dict[str, Tensor]()
    block = model.get_submodule(family.blocks_path)[1]
    for path in linears_of(family):
        block.get_submodule(path).register_forward_hook(lambda _, args, output, path=path: shown.update({path: output}))
    with torch.no_grad():
        model(tokens, use_cache=False)
    rows = ["layer,unit,ap,concept"]
    for path in linears_of(family):
        units = unit_places(family, cfg, path)
        assert len(set(units)) == len(units) == shown[path].shape[-1]
        ours = torch.stack([cache[f"blocks.1.{place}"][0].flatten(1)[:, index] for place, index in units], -1)
        assert torch.equal(ours, shown[path][0])
        rows.append(f"{family.blocks_path}.1.{path}:0,{len(units) - 1},0.5,x")
    table = tmp_path / "expertise.csv"
    table.write_text("\n".join(rows))
    read = read_expertise(table, cfg, family=family)
    assert len(read.table["place"]) == len(rows) - 1
    if name != "gpt2":
        with pytest.raises(InputError, match=r"no linear layer of a BLOOM.*bridge\.adapter\.family"):
            read_expertise(table, cfg)


def test_patterns_have_the_queries_heads() -> None:
    bridge = make("llama")
    _, cache = bridge.run_with_cache("the cat sat")
    figure = attention_pattern(cache, 0, tokenizer=bridge.tokenizer)
    assert len(figure.data) == bridge.cfg.n_heads
