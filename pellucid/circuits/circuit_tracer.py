"""A circuit in the JSON that circuit-tracer's viewer reads (github.com/safety-research/circuit-tracer, graph_models.py).

There a node is a feature at a layer and a position; here it is a part of the model, over all positions. So every node stands
at the prompt's last position, a head's number or, for an MLP, the number of heads is its feature, and an input is one node
with the part that it feeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx

from pellucid.arguments import check_text, check_texts
from pellucid.circuits.wiring import Wiring

SCHEMA_VERSION = 1


def graph_document(
    graph: nx.DiGraph, wiring: Wiring, model: str, slug: str, prompt_tokens: Sequence[str]
) -> dict[str, Any]:
    """See :meth:`pellucid.circuits.circuit.Circuit.circuit_tracer`."""
    check_text("slug", slug)
    tokens = check_texts("prompt_tokens", prompt_tokens)
    last = len(tokens) - 1
    feeds: dict[str, list[str]] = {"final": ["final"]}
    for input, part in wiring.inside():
        feeds.setdefault(input, []).append(part)
    ids: dict[str, str] = {}
    nodes: dict[str, dict[str, Any]] = {}

    def node(name: str) -> str:
        if name not in ids:
            made = _node(name, wiring.n_layers, wiring.n_heads, last)
            ids[name], nodes[name] = made["node_id"], made
        return ids[name]

    weights: dict[tuple[str, str], float] = {}
    for sender, receiver, data in graph.edges(data=True):
        if data["inside"]:
            continue
        score = data["score"] if data["score"] == data["score"] else 1.0  # a circuit without scores: NaN
        for part in feeds[receiver]:
            ends = node(sender), node(part)
            weights[ends] = weights.get(ends, 0.0) + score
    return {
        "metadata": {
            "slug": slug,
            "scan": model,
            "transcoder_list": [],
            "prompt_tokens": tokens,
            "prompt": "".join(tokens),
            "node_threshold": None,
            "schema_version": SCHEMA_VERSION,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": list(nodes.values()),
        "links": [
            {"source": source, "target": target, "weight": weight} for (source, target), weight in weights.items()
        ],
    }


def _node(name: str, n_layers: int, n_heads: int, last: int) -> dict[str, Any]:
    if name == "embed":
        layer, feature, kind, number = "E", last, "embedding", 0
    elif name == "final":
        layer, feature, kind, number = str(n_layers + 1), 0, "logit", 0
    else:
        layer_text, _, rest = name[1:].partition("H" if "H" in name else ".")
        layer, kind = layer_text, "cross layer transcoder"
        number = int(rest) if rest.isdigit() else n_heads
        first, second = int(layer_text), number
        feature = (first + second) * (first + second + 1) // 2 + second  # their pairing of layer and feature
    node_id = f"{layer}_{number}_{last}"
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": last,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": name == "final",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{'L' if name == 'final' else layer}_{number}-0",
        "clerp": name,
        "influence": None,
        "activation": None,
    }
