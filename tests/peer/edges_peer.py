"""TransformerLens' edge attribution beside ours on processed weights, as :mod:`tests.peer.beside` runs it.

Its edges are of one position each: summed over positions they are ours, of the same sign and expansion point with ``direction="denoising"``.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from pellucid import TransformerBridge
from pellucid.circuits import Circuit, edge_attribution, faithfulness
from tests.circuits.layouts import difference, pairs_of, tokens
from tests.families import make_family
from tests.models import make_bloom

FAMILIES = ("bloom", "gpt2")
CLEAN, CORRUPTED = tokens(2)
KEPT = 120
"""Edges of the circuit whose faithfulness is compared."""


def made(name: str) -> Any:
    return make_bloom(torch.float64) if name == "bloom" else make_family(name, torch.float64)


def ours(name: str, processed: bool) -> tuple[Circuit, float]:
    """Scores of all edges and pairs, and the share of the first pair's gap that the strongest keep."""
    bridge = TransformerBridge(made(name))
    if processed:
        bridge.process_weights()
    whole = edge_attribution(bridge, pairs_of(CLEAN, CORRUPTED), direction="denoising")
    curve = faithfulness(bridge, whole, pairs_of(CLEAN[:1], CORRUPTED[:1]), sizes=[KEPT], randoms=0)
    return whole, float(curve.faithfulness.sel(size=KEPT))


def edge_of(writer: Any, reader: Any) -> str:
    """A pair of their nodes by our names."""
    ends = []
    for node in (writer, reader):
        plain = {"embed": "embed", "logits": "final"}
        part = f"L{node.layer}" if node.head is None else f"L{node.layer}H{node.head}"
        suffix = {"attn_head_out": "", "q_input": ".q", "k_input": ".k", "v_input": ".v"}
        ends.append(plain.get(node.kind, part + suffix.get(node.kind, f".{node.kind}")))
    return "->".join(ends)


def theirs(name: str, tokenizer: Any, strongest: list[str]) -> dict[str, Any]:
    """Of each pair their scores summed over positions; of the first, what they say the strongest of our edges keep."""
    from transformer_lens.model_bridge import TransformerBridge as Theirs
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
    from transformer_lens.tools.analysis.attribution_patching import faithfulness as their_faithfulness

    model = made(name)
    model.config.architectures = [type(model).__name__]
    bridge = Theirs.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu", dtype=torch.float64)
    bridge.enable_compatibility_mode(disable_warnings=True)
    scores, kept, refused = [], 0.0, ""
    config = EdgeAttributionConfig(granularity="edge")

    def metric(logits: Any) -> Any:
        return difference(logits)[0]

    try:
        attribution_patch(bridge, CLEAN[:1], CORRUPTED[:1], metric, config)
    except ValueError as error:  # of BLOOM: its block does not call what puts the points there, so we do
        refused = str(error)
        for block in bridge.blocks:
            block._maybe_wire_capture_hooks()

    for row in range(len(CLEAN)):
        pair = CLEAN[[row]], CORRUPTED[[row]]
        found = attribution_patch(bridge, *pair, metric, config)
        total: dict[str, float] = defaultdict(float)
        for (writer, reader), score in found.edge_scores.items():
            total[edge_of(writer, reader)] += score
        scores.append(total)
        if row == 0:
            circuit = [edge for edge in found.edge_scores if edge_of(*edge) in strongest]
            kept = their_faithfulness(bridge, *pair, metric, circuit).recovered
    return {"scores": scores, "kept": kept, "refused": refused}


def before() -> dict[tuple[str, bool], tuple[Circuit, float]]:
    """Ours of each family, processed and not."""
    return {(name, processed): ours(name, processed) for name in FAMILIES for processed in (True, False)}


def beside(mine: dict[tuple[str, bool], tuple[Circuit, float]], tokenizer: Any) -> dict[str, Any]:
    """By family the scores of both, by edge."""
    found: dict[str, Any] = {}
    for name in FAMILIES:
        whole, kept = mine[name, True]
        strongest = ["->".join(edge) for edge in whole.top(KEPT).edges]
        names = ["->".join(edge) for edge in whole.wiring.names(whole.chosen)]
        found[name] = {
            "ours": [dict(zip(names, row, strict=True)) for row in whole.scores.values.tolist()],
            "raw": [dict(zip(names, row, strict=True)) for row in mine[name, False][0].scores.values.tolist()],
            "kept": kept,
            "theirs": theirs(name, tokenizer, strongest),
        }
    return found
