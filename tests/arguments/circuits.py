"""Edge attribution, circuits and their faithfulness."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from pellucid import circuits
from pellucid.circuits import Circuit, EdgeScores, Wiring
from pellucid.corpora.pairs import PromptPairs
from tests.arguments.bench import (
    BRIDGE,
    Bench,
    Call,
    Line,
    Of,
    a_path,
    a_text,
    bound,
    choice,
    made,
    not_run,
    number,
    whole,
)

DATA = PromptPairs([[5, 6, 7], [5, 9, 7]], [[5, 8, 7], [5, 6, 8]], [5, 5], [6, 6])
UNEQUAL = PromptPairs([[5, 6, 7]], [[5, 6]], [5], [6])
NO_ANSWER = PromptPairs([[5, 6, 7]], [[5, 8, 7]])
GIVEN: dict[str, Any] = {"bridge": BRIDGE, "pairs": DATA}


@cache
def scores(n_layers: int = 4, n_heads: int = 8) -> EdgeScores:
    """Of the demo's edges, at random."""
    wiring = Wiring(n_layers, n_heads, n_heads)
    values = np.random.default_rng(0).normal(size=(3, len(wiring))).astype(np.float32)
    return EdgeScores(wiring, values, np.ones(3, np.int64))


def circuit(bench: Bench) -> Circuit:
    """Some of them."""
    return Circuit.whole(scores()).top(20)


def of_circuit(name: str, /, **works: Any) -> Call:
    """A method of a circuit."""
    return bound(circuit, getattr(Circuit, name), **works)


CALLS: dict[str, Call] = {
    "edge_attribution": not_run(made(circuits.edge_attribution, **GIVEN)),
    "EdgeAttribution": made(circuits.EdgeAttribution, **GIVEN),
    "EdgeAttribution.run": not_run(
        bound(lambda bench: circuits.EdgeAttribution(bench.bridge, DATA), circuits.EdgeAttribution.run)
    ),
    "faithfulness": not_run(made(circuits.faithfulness, **GIVEN, circuit=Of(circuit), sizes=[3])),
    "Faithfulness": made(circuits.Faithfulness, **GIVEN, circuit=Of(circuit), sizes=[3]),
    "Faithfulness.run": not_run(
        bound(
            lambda bench: circuits.Faithfulness(bench.bridge, circuit(bench), DATA, sizes=[3]),
            circuits.Faithfulness.run,
        )
    ),
    "Circuit": made(Circuit, scores=scores(), chosen=np.arange(3)),
    "Circuit.whole": Call(Circuit.whole, lambda _: Circuit.whole, lambda _: {"scores": scores()}),
    "Circuit.from_edges": Call(
        Circuit.from_edges,
        lambda _: Circuit.from_edges,
        lambda bench: {"bridge": bench.bridge, "edges": ["embed->final"]},
    ),
    "Circuit.select": of_circuit("select", edges=["embed->final"]),
    "Circuit.top": of_circuit("top", n=3),
    "Circuit.threshold": of_circuit("threshold", t=0.1),
    "Circuit.random": of_circuit("random"),
    "Circuit.jaccard": of_circuit("jaccard", other=Of(circuit)),
    "Circuit.stability": of_circuit("stability"),
    "Circuit.dataset": of_circuit("dataset"),
    "Circuit.graph": of_circuit("graph"),
    "Circuit.save": not_run(of_circuit("save", path="circuit.safetensors")),
    "Circuit.load": not_run(Call(Circuit.load, lambda _: Circuit.load, lambda _: {"path": "circuit.safetensors"})),
    "Circuit.export": not_run(of_circuit("export", path="circuit.json")),
    "Circuit.circuit_tracer": of_circuit("circuit_tracer", slug="a", prompt_tokens=["a"]),
}

REFUSED: list[Line] = [
    *(
        line
        for name in ("edge_attribution", "faithfulness")
        for line in (
            (name, {"pairs": 3}, "pairs is PromptPairs"),
            (name, {"metric": 3}, "metric is a class of metrics"),
            (name, {"pairs": UNEQUAL}, "clean of row 0 and corrupted of row 0 have different numbers of tokens"),
            (name, {"pairs": NO_ANSWER}, "The pairs have no answers"),
            *choice(name, "direction"),
            *whole(name, "batch_size", 1),
        )
    ),
    *choice("edge_attribution", "method"),
    *choice("edge_attribution", "rule"),
    *whole("edge_attribution", "points", 1),
    *whole("edge_attribution", "memory_limit", 1),
    ("edge_attribution", {"memory_limit": 5}, "memory_limit=5. Give more"),
    ("EdgeAttribution", {"pairs": 3}, "pairs is PromptPairs"),
    ("EdgeAttribution", {"metric": 3}, "metric is a class of metrics"),
    ("Faithfulness", {"pairs": 3}, "pairs is PromptPairs"),
    ("Faithfulness", {"metric": 3}, "metric is a class of metrics"),
    *(
        line
        for name in ("edge_attribution", "EdgeAttribution.run", "faithfulness", "Faithfulness.run")
        for line in (
            (name, {"checkpoint": ""}, "checkpoint is a path"),
            (name, {"every": -1.0}, "every must be at least 0"),
        )
    ),
    *choice("EdgeAttribution", "method"),
    *choice("EdgeAttribution", "rule"),
    *choice("EdgeAttribution", "direction"),
    *whole("EdgeAttribution", "points", 1),
    *whole("EdgeAttribution", "memory_limit", 1),
    *whole("EdgeAttribution", "batch_size", 1),
    *(
        line
        for name in ("faithfulness", "Faithfulness")
        for line in (
            (name, {"circuit": 3}, "circuit is a Circuit"),
            (name, {"circuit": Circuit.whole(scores(2))}, "The circuit is of a model with other edges"),
            (name, {"sizes": 3}, "sizes is a list of whole numbers"),
            (name, {"sizes": [True]}, "an entry of sizes is a whole number"),
            (name, {"sizes": [-1]}, "an entry of sizes must be at least 0"),
            (name, {"sizes": [10**6]}, "an entry of sizes must be at most"),
            *choice(name, "outside"),
            *choice(name, "direction"),
            *whole(name, "randoms", 0),
            *whole(name, "seed", 0),
            *whole(name, "batch_size", 1),
        )
    ),
    ("Circuit", {"scores": 3}, "scores is the scores of a model's edges"),
    ("Circuit", {"chosen": np.arange(0)}, "The circuit has no edge"),
    ("Circuit.whole", {"scores": 3}, "scores is the scores of a model's edges"),
    *(
        line
        for name in ("Circuit.from_edges", "Circuit.select")
        for line in (
            (name, {"edges": 3}, "edges is a list of edges"),
            (name, {"edges": []}, "edges is a list of edges"),
            (name, {"edges": ["embed->L9.mlp_in"]}, "has no receiver 'L9.mlp_in'"),
            (name, {"edges": ["L3H0->L0.mlp_in"]}, "runs backwards"),
        )
    ),
    *whole("Circuit.top", "n", 1),
    ("Circuit.top", {"n": 21}, "n must be at most 20"),
    *number("Circuit.threshold", "t", -1.0),
    *whole("Circuit.random", "seed", 0),
    ("Circuit.jaccard", {"other": 3}, "other is a circuit"),
    ("Circuit.jaccard", {"other": Circuit.whole(scores(2))}, "other is of a model with other edges"),
    *whole("Circuit.stability", "resamples", 2),
    *whole("Circuit.stability", "seed", 0),
    ("Circuit.dataset", {"stability": 3}, "stability is what circuit.stability"),
    ("Circuit.graph", {"stability": 3}, "stability is what circuit.stability"),
    ("Circuit.export", {"stability": 3}, "stability is what circuit.stability"),
    *a_path("Circuit.save", "path"),
    *a_path("Circuit.load", "path"),
    *a_path("Circuit.export", "path"),
    ("Circuit.save", {"path": "circuit.pt"}, r"path: the file's name ends in \.safetensors"),
    ("Circuit.load", {"path": "nothing.safetensors"}, "nothing.safetensors is missing"),
    ("Circuit.export", {"path": "circuit.txt"}, r"path: the file's name ends in \.json"),
    *a_text("Circuit.circuit_tracer", "slug"),
    ("Circuit.circuit_tracer", {"prompt_tokens": "a"}, "prompt_tokens is a list of strings"),
    ("Circuit.circuit_tracer", {"prompt_tokens": []}, "prompt_tokens is a list of strings"),
]
