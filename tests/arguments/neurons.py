"""Neurons: lists of them, changes of them, and what the changes do."""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr

from pellucid.analysis import expert_neurons, language_neurons, neuron_files, neurons, perplexity
from tests.arguments.bench import (
    BRIDGE, CORPUS, NAN, POST, TEXT, Bench, Call, Line, Of, a_path, a_text, bound, choice, entered, made, not_run, number, whole,
)  # fmt: skip

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


UNITS = Of(lambda bench: [bench.unit])

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
    "LanguageNeurons.random_sets": languages("random_sets"),
    "LanguageNeurons.save": languages("save", path="out.safetensors"),
    "LanguageNeurons.load": made(
        language_neurons.LanguageNeurons.load, path=Of(lambda bench: bench.folder / "languages.safetensors")
    ),
    "log_perplexity": not_run(made(perplexity.log_perplexity, bridge=BRIDGE, text=CORPUS)),
    "perplexity_change": not_run(
        made(perplexity.perplexity_change, bridge=BRIDGE, text=CORPUS, neurons={"en": ONE})
    ),
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
    "read_language_neurons": not_run(
        made(neuron_files.read_language_neurons, path="no.pth", languages=["en", "fr"])
    ),
    "read_expertise": not_run(
        made(neuron_files.read_expertise, path="no.csv", cfg=Of(lambda bench: bench.bridge.cfg))
    ),
}

REFUSED: list[Line] = []
