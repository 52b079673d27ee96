"""Neurons: lists of them, changes of them, and what the changes do."""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr

from pellucid.analysis import (
    criteria,
    expert_neurons,
    language_neurons,
    linear_units,
    neuron_files,
    neurons,
    perplexity,
    proportions,
    relevance,
    stopping,
)
from pellucid.analysis.language_neurons import lape
from tests.arguments.bench import (
    BRIDGE,
    CORPUS,
    NAN,
    POST,
    TEXT,
    Bench,
    Call,
    Line,
    Of,
    a_path,
    a_text,
    bound,
    choice,
    entered,
    made,
    not_run,
    number,
    whole,
)

ONE = [(0, 1)]
COUNTS = torch.arange(48).reshape(2, 8, 3)


def change(name: str, /, **works: Any) -> Call:
    """A method of a change."""
    return bound(lambda _: neurons.zero(ONE), getattr(neurons.NeuronChange, name), bridge=BRIDGE, **works)


def languages(name: str, /, **works: Any) -> Call:
    """A method of selected language neurons."""
    return bound(lambda bench: bench.languages, getattr(language_neurons.LanguageNeurons, name), **works)


def experts(name: str, /, **works: Any) -> Call:
    """A method of expert neurons."""
    return bound(lambda bench: bench.experts, getattr(expert_neurons.ExpertNeurons, name), **works)


def measured(bench: Bench) -> relevance.NeuronRelevance:
    """Relevance for one language, from one row."""
    return relevance.neuron_relevance(bench.bridge, bench.corpus, methods=["relp"], stop_row=1, progress=False)


def relevant(name: str, /, **works: Any) -> Call:
    """A method of relevance."""
    return bound(measured, getattr(relevance.NeuronRelevance, name), **works)


UNITS = Of(lambda bench: [bench.unit])

VALUES = {"zero": "", "force": "values", "scale": "factors", "add": "amounts"}
"""What each change is given beside the neurons."""

CALLS: dict[str, Call] = {
    "zero": made(neurons.zero, neurons=ONE),
    "force": made(neurons.force, neurons=ONE, values=1.0),
    "scale": made(neurons.scale, neurons=ONE, factors=1.0),
    "add": made(neurons.add, neurons=ONE, amounts=1.0),
    "changed": not_run(entered(made(neurons.changed, bridge=BRIDGE, changes=[neurons.zero(ONE)]))),
    "NeuronChange.on": not_run(entered(change("on"))),
    "NeuronChange.fwd_hooks": change("fwd_hooks"),
    "random_neurons": made(neurons.random_neurons, neurons=ONE, n_layers=2, width=8, seed=0),
    "lape": made(language_neurons.lape, counts=COUNTS, n=[60, 60, 60], top_rate=0.5),
    "LanguageNeurons.rethreshold": languages("rethreshold"),
    "LanguageNeurons.intervals": languages("intervals"),
    "LanguageNeurons.stability": languages("stability", draws=2),
    "LanguageNeurons.agreement": languages("agreement", other=Of(lambda bench: bench.languages)),
    "wilson_interval": made(proportions.wilson_interval, k=[1, 2], n=[3, 3]),
    "neuron_relevance": not_run(made(relevance.neuron_relevance, bridge=BRIDGE, corpus=CORPUS)),
    "NeuronRelevance.scores": relevant("scores"),
    "NeuronRelevance.top": relevant("top", sizes=1),
    "NeuronRelevance.save": relevant("save", path="out.safetensors"),
    "NeuronRelevance.of": not_run(made(relevance.NeuronRelevance.of, collected=Of(lambda bench: bench.collected))),
    "NeuronRelevance.load": not_run(
        made(relevance.NeuronRelevance.load, path=Of(lambda bench: bench.folder / "collected.safetensors"))
    ),
    "count_until_stable": not_run(made(stopping.count_until_stable, bridge=BRIDGE, corpus=CORPUS)),
    "compare_criteria": not_run(
        made(
            criteria.compare_criteria,
            found=Of(lambda bench: lape(torch.ones(4, 512, 1), [9], 0.5, languages=["en"])),
            relevance=Of(measured),
        )
    ),
    "effects_of_criteria": not_run(
        made(criteria.effects_of_criteria, bridge=BRIDGE, text=CORPUS, sets={"entropy": {"en": ONE}})
    ),
    "LanguageNeurons.random_sets": languages("random_sets"),
    "LanguageNeurons.save": languages("save", path="out.safetensors"),
    "LanguageNeurons.load": made(
        language_neurons.LanguageNeurons.load, path=Of(lambda bench: bench.folder / "languages.safetensors")
    ),
    "log_perplexity": not_run(made(perplexity.log_perplexity, bridge=BRIDGE, text=CORPUS)),
    "perplexity_change": not_run(made(perplexity.perplexity_change, bridge=BRIDGE, text=CORPUS, neurons={"en": ONE})),
    "own_and_others": not_run(made(perplexity.own_and_others, change=Of(lambda bench: bench.array))),
    "continuations": not_run(
        made(perplexity.continuations, bridge=BRIDGE, prompts=[TEXT], neurons={"en": ONE}, max_new_tokens=1)
    ),
    "language_shares": made(
        perplexity.language_shares,
        texts=xr.DataArray([["a"]], dims=("silenced", "prompt"), coords={"silenced": ["none"]}),
        language_of=lambda text: "en",
    ),
    "expertise": made(
        expert_neurons.expertise,
        responses={POST: {"en": torch.tensor([[0.0], [1.0]]), "fr": torch.tensor([[0.5], [2.0]])}},
    ),
    "ExpertNeurons": not_run(made(expert_neurons.ExpertNeurons, table=xr.Dataset())),
    "ExpertNeurons.best": experts("best", label="en", k=1),
    "ExpertNeurons.values": experts("values", label="en", units=UNITS),
    "ExpertNeurons.forced": experts("forced", label="en", k=1),
    "ExpertNeurons.rows": experts("rows", label="en"),
    "force_units": made(expert_neurons.force_units, units=UNITS, values=1.0),
    "unit_of_linear": made(
        expert_neurons.unit_of_linear, module="mlp.dense_h_to_4h", layer=0, index=1, n_heads=2, d_head=4
    ),
    "head_unit": made(expert_neurons.head_unit, unit=expert_neurons.Unit("attn.hook_q", 0, 5), d_head=4),
    "activity_words": made(neurons.activity_words, bridge=BRIDGE),
    "activity_place": made(neurons.activity_place, bridge=BRIDGE),
    "published_places": made(linear_units.published_places, family=Of(lambda bench: bench.bridge.adapter.family)),
    "read_language_neurons": not_run(made(neuron_files.read_language_neurons, path="no.pth", languages=["en", "fr"])),
    "read_expertise": not_run(made(neuron_files.read_expertise, path="no.csv", cfg=Of(lambda bench: bench.bridge.cfg))),
}

REFUSED: list[Line] = [
    *(
        line
        for name, values in VALUES.items()
        for line in (
            (name, {"neurons": 3}, "neurons is a list"),
            (name, {"neurons": "x"}, "neurons is a list"),
            (name, {"neurons": [3]}, "neurons is a list of .layer, index. pairs; found 3"),
            (name, {"neurons": [(0, 1.5)]}, "neurons is a list of pairs of whole numbers"),
            (name, {"neurons": [(True, 1)]}, "neurons is a list of pairs of whole numbers"),
            (name, {"neurons": {0: 3}}, r"neurons\[0\] is a list"),
            *a_text(name, "place"),
            *(
                (name, {values: wrong}, words)
                for wrong, words in (
                    (True, f"{values} is a number"),
                    ("x", f"{values} is a list of numbers"),
                    (NAN, f"{values} must be finite"),
                    ([1.0, 2.0], f"1 neurons and 2 {values}"),
                    (["x"], f"an entry of {values} is a number"),
                    ({}, f"{values} has no value for neuron"),
                )
                if values
            ),
        )
    ),
    ("changed", {"changes": 3}, "changes is a list"),
    ("changed", {"changes": neurons.zero(ONE)}, "changes is a list of changes; found one"),
    ("changed", {"changes": [3]}, "an entry of changes is a change of neurons"),
    ("changed", {"changes": []}, "The list of neurons is empty"),
    ("changed", {"changes": [neurons.zero([(9, 0)])]}, "There is no layer 9"),
    ("random_neurons", {"neurons": 3}, "neurons is a list"),
    ("random_neurons", {"neurons": [(5, 0)]}, r"neurons has \(5, 0\)"),
    *whole("random_neurons", "n_layers", 1),
    *whole("random_neurons", "width", 1),
    ("random_neurons", {"seed": 1.5}, "seed is a whole number"),
    ("random_neurons", {"seed": -1}, "seed must be at least 0"),
    ("random_neurons", {"seed": [-1]}, "an entry of seed must be at least 0"),
    *choice("random_neurons", "match"),
    ("lape", {"counts": 3}, "counts are"),
    ("lape", {"counts": "x"}, "counts are"),
    ("lape", {"n": 3}, "n has a number of tokens"),
    ("lape", {"n": [60, 60]}, "n has a number of tokens"),
    ("lape", {"languages": 3}, "languages is a list"),
    ("lape", {"languages": "abc"}, "languages is a list of labels; found the string"),
    ("lape", {"languages": ["a", "a", "b"]}, "languages have labels of their own"),
    ("lape", {"languages": ["a"]}, "counts have 3 languages; 1 labels"),
    *(
        line
        for name in ("lape", "LanguageNeurons.rethreshold")
        for rate in ("top_rate", "filter_rate", "activation_bar_ratio")
        for line in number(name, rate, -0.1, 1.5)
    ),
    *(
        (name, {"confidence": wrong}, words)
        for name in ("LanguageNeurons.intervals", "wilson_interval")
        for wrong, words in (
            (0.0, "confidence must be above 0"),
            (1.0, "confidence must be below 1"),
            (NAN, "confidence must be finite"),
            ("x", "confidence is a number"),
        )
    ),
    *whole("LanguageNeurons.stability", "draws", 1),
    *whole("LanguageNeurons.stability", "seed", 0),
    ("LanguageNeurons.agreement", {"other": 3}, "other is what lape gives"),
    ("wilson_interval", {"k": [-1, 2]}, "k is a count, from 0 to n"),
    ("wilson_interval", {"k": [4, 2]}, "k is a count, from 0 to n"),
    ("wilson_interval", {"k": "x"}, "k are counts"),
    ("wilson_interval", {"n": [0, 3]}, "n must be at least 1"),
    *(
        line
        for name in ("neuron_relevance", "count_until_stable")
        for line in ((name, {"corpus": 3}, "corpus is a Corpus"), *whole(name, "batch_size", 1))
    ),
    ("neuron_relevance", {"methods": []}, "methods is a list of methods"),
    ("neuron_relevance", {"methods": "relp"}, "methods is a list of methods"),
    ("neuron_relevance", {"methods": ["lrp"]}, "Invalid methods: 'lrp'"),
    ("neuron_relevance", {"labels": "de"}, "no label 'de'"),
    *whole("neuron_relevance", "start_row", 0),
    ("neuron_relevance", {"start_row": 3, "stop_row": 2}, "stop_row must be at least 3"),
    *choice("neuron_relevance", "padding_side"),
    *number("neuron_relevance", "every", -1.0),
    ("neuron_relevance", {"checkpoint": ""}, "checkpoint is a path"),
    ("NeuronRelevance.of", {"collected": 3}, "collected is a collection of neuron_relevance"),
    ("NeuronRelevance.of", {}, "holds no relevance of neurons"),
    *a_path("NeuronRelevance.load", "path"),
    ("NeuronRelevance.load", {}, "holds no relevance of neurons"),
    *number("count_until_stable", "stable_at", 0.0, 1.5),
    *whole("count_until_stable", "draws", 1),
    *whole("count_until_stable", "seed", 0),
    *whole("count_until_stable", "first_rows", 1),
    ("count_until_stable", {"last_rows": 3}, "last_rows maps languages"),
    ("count_until_stable", {"last_rows": {"de": 1}}, "last_rows has de; the corpus has en"),
    ("count_until_stable", {"statistics": 3}, "statistics maps hook names"),
    ("count_until_stable", {"checkpoint": ""}, "checkpoint is a path"),
    *(
        line
        for rate in ("top_rate", "filter_rate", "activation_bar_ratio")
        for line in number("count_until_stable", rate, -0.1, 1.5)
    ),
    *choice("NeuronRelevance.scores", "method"),
    *choice("NeuronRelevance.scores", "against"),
    ("NeuronRelevance.scores", {"against": "others"}, "against='others' compares languages; there is one"),
    *whole("NeuronRelevance.top", "sizes", 0),
    ("NeuronRelevance.top", {"sizes": {"de": 1}}, "sizes has the language 'de'; relevance is of en"),
    ("NeuronRelevance.top", {"sizes": 9999}, "sizes must be at most 2048"),
    *choice("NeuronRelevance.top", "method"),
    *choice("NeuronRelevance.top", "against"),
    *a_path("NeuronRelevance.save", "path"),
    *choice("compare_criteria", "method"),
    *choice("compare_criteria", "against"),
    ("compare_criteria", {"found": lape(COUNTS, [60, 60, 60], 0.5)}, "found is of 2 x 8 neurons"),
    ("compare_criteria", {"found": 3}, "found is what lape gives"),
    ("compare_criteria", {"relevance": 3}, "relevance is what neuron_relevance gives"),
    ("effects_of_criteria", {"sets": 3}, "sets maps criteria"),
    ("effects_of_criteria", {"sets": {}}, "found no criterion"),
    ("effects_of_criteria", {"sets": {"entropy": 3}}, r"sets\['entropy'\] maps languages"),
    ("effects_of_criteria", {"sets": {"a": {"en": ONE}, "b": {"fr": ONE}}}, r"sets\['b'\] has other languages"),
    ("effects_of_criteria", {"text": 3}, "text is a Corpus"),
    ("effects_of_criteria", {"random_sets": 3}, "random_sets is a list"),
    *whole("effects_of_criteria", "batch_size", 1),
    *whole("LanguageNeurons.random_sets", "n_sets", 1),
    *whole("LanguageNeurons.random_sets", "seed", 0),
    *choice("LanguageNeurons.random_sets", "match"),
    *a_path("LanguageNeurons.save", "path"),
    *a_path("LanguageNeurons.load", "path"),
    *(
        line
        for name in ("log_perplexity", "perplexity_change")
        for line in (
            (name, {"text": 3}, "text is a Corpus"),
            *whole(name, "batch_size", 1),
            *choice(name, "average"),
        )
    ),
    *(
        line
        for name in ("perplexity_change", "continuations")
        for line in (
            (name, {"neurons": 3}, "neurons maps each language"),
            (name, {"neurons": [(0, 1)]}, "neurons maps each language"),
            (name, {"neurons": {}}, "neurons maps each language .*found no language"),
            (name, {"neurons": {"en": 3}}, r"neurons\['en'\] is a list"),
            (name, {"neurons": {"en": [(9, 0)]}}, "There is no layer 9"),
            (name, {"change": 3}, "change is a function"),
        )
    ),
    ("perplexity_change", {"random_sets": 3}, "random_sets is a list"),
    ("perplexity_change", {"random_sets": [3]}, "an entry of random_sets maps each language"),
    ("perplexity_change", {"random_sets": [{"fr": ONE}]}, "random_sets has one with the languages"),
    ("perplexity_change", {"neurons": {"en": []}}, "The language 'en' has no neurons"),
    ("own_and_others", {"change": 3}, "change is an array"),
    ("own_and_others", {"change": xr.DataArray([1.0])}, "change is .*with labels"),
    ("continuations", {"prompts": []}, "prompts is a list of strings; found an empty one"),
    ("continuations", {"prompts": TEXT}, "prompts is a list of strings; found the string"),
    ("continuations", {"prompts": [3]}, "an entry of prompts is a string"),
    ("continuations", {"prompts": 3}, "prompts is a list"),
    *whole("continuations", "max_new_tokens", 1),
    *number("continuations", "temperature", 0.0, do_sample=True),
    ("continuations", {"temperature": 0.5}, "temperature=0.5 would have no effect"),
    *whole("continuations", "seed"),
    ("continuations", {"seed": 2**64}, "seed must be at most"),
    ("language_shares", {"texts": 3}, "texts is an array"),
    ("language_shares", {"texts": xr.DataArray([1.0])}, "texts is .silenced, prompt."),
    ("language_shares", {"language_of": 3}, "language_of is a function"),
    ("expertise", {"responses": 3}, "responses maps hook names"),
    ("expertise", {"responses": {}}, "responses is empty"),
    ("expertise", {"responses": {POST: 3}}, "responses.* maps labels"),
    ("expertise", {"responses": {POST: {"en": 3}}}, "responses.* is a tensor"),
    ("expertise", {"labels": 3}, "labels is a list"),
    ("expertise", {"labels": "en"}, "labels is a list of strings; found the string"),
    ("expertise", {"labels": ["de"]}, "labels asks for"),
    ("expertise", {"statistic": "average_precision_max"}, "statistic='average_precision_max' would have no effect"),
    ("ExpertNeurons", {"table": 3}, "table is an xarray.Dataset"),
    ("ExpertNeurons", {}, "table is of expertise and has no ap"),
    *(
        line
        for name in ("best", "values", "forced", "rows")
        for name in (f"ExpertNeurons.{name}",)
        for line in (*a_text(name, "label"), (name, {"label": "de"}, "no label 'de'"))
    ),
    *(
        line
        for name in ("ExpertNeurons.best", "ExpertNeurons.forced")
        for line in (*whole(name, "k", 1), *choice(name, "which"), (name, {"k": 999}, "k=999 with which="))
    ),
    *(line for name in ("ExpertNeurons.values", "ExpertNeurons.forced") for line in choice(name, "value")),
    ("ExpertNeurons.values", {"units": 3}, "units is a list"),
    ("ExpertNeurons.values", {"units": [3]}, "an entry of units is a Unit"),
    ("ExpertNeurons.values", {"units": [expert_neurons.Unit("mlp.hook_post", 9, 9)]}, "The table has no Unit"),
    ("force_units", {"units": 3}, "units is a list"),
    ("force_units", {"units": [3]}, "an entry of units is a Unit"),
    ("force_units", {"values": True}, "values is a number"),
    ("force_units", {"values": "x"}, "values is a list of numbers"),
    ("force_units", {"values": [NAN]}, "an entry of values must be finite"),
    *a_text("unit_of_linear", "module"),
    ("unit_of_linear", {"module": "nonsense"}, "no linear layer 'nonsense'"),
    *whole("unit_of_linear", "layer", 0),
    *whole("unit_of_linear", "index", 0),
    *whole("unit_of_linear", "n_heads", 1),
    *whole("unit_of_linear", "d_head", 1),
    ("head_unit", {"unit": 3}, "unit is a Unit"),
    *whole("head_unit", "d_head", 1),
    *a_path("read_language_neurons", "path"),
    ("read_language_neurons", {"languages": 3}, "languages is a list"),
    ("read_language_neurons", {"languages": "en"}, "languages is a list of strings; found the string"),
    *whole("read_language_neurons", "n_layers", 1),
    *whole("read_language_neurons", "d_mlp", 1),
    *a_path("read_expertise", "path"),
    ("read_expertise", {"cfg": 3}, "cfg is a model's sizes"),
    *a_text("read_expertise", "label"),
    ("published_places", {"family": "bloom"}, "family is a model's family"),
    ("read_expertise", {"family": "bloom"}, "family is a model's family"),
]
