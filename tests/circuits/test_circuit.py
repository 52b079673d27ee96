"""Circuits: a known one is found, resampling, pruning, files; bad input."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from pellucid.circuits import Circuit, EdgeScores, Wiring, edge_attribution
from pellucid.errors import InputError, StoreError
from tests.circuits.handmade import EDGES, handmade, pairs
from tests.circuits.layouts import bridge_of, pairs_of, tokens

WIRING = Wiring(3, 6, 2)


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return edge_attribution(bridge_of("llama"), pairs_of(*tokens(4)))


def made(seed: int = 0, n_pairs: int = 30, noise: float = 1.0, wiring: Wiring = WIRING) -> EdgeScores:
    """Scores whose means fall off from edge to edge, and noise of each pair."""
    rng = np.random.default_rng(seed)
    means = np.linspace(3, 0, len(wiring))
    return EdgeScores(wiring, means + noise * rng.normal(size=(n_pairs, len(wiring))), np.ones(n_pairs, np.int64))


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_a_circuit_made_by_hand_is_found(method: str) -> None:
    """Every edge of it and no other, whichever the method: precision and recall 1."""
    whole = edge_attribution(handmade(), pairs(), method=method, direction="noising")  # type: ignore[arg-type]
    size = float(np.abs(whole.scores.mean).max())
    # eap-ig stands off the clean run, where the signal changes norms' scales, by its strength squared.
    found = whole.threshold(1e-9 * size if method == "eap" else 1e-3 * size)
    assert sorted(found.edges) == sorted(EDGES)
    assert found.prune().edges == found.edges
    assert (whole.scores.mean[found.chosen] < 0).all()  # the signal takes the metric down


def test_edges_of_a_wiring() -> None:
    """Counted by hand, in order, none backwards; parallel blocks have fewer."""
    heads, kv = 6, 2
    total = 0
    for layer in range(3):
        before = 1 + layer * (heads + 1)
        total += (heads + 2 * kv) * before + before + heads
    assert len(WIRING) == total + 1 + 3 * (heads + 1)
    assert len(Wiring(3, 6, 2, parallel=True)) == len(WIRING) - 3 * heads
    for number in (0, 17, len(WIRING) - 1):
        assert WIRING.number(WIRING.names([number])[0]) == number
    senders, receivers = WIRING.ends
    assert all(WIRING.receivers[r].comes_after(WIRING.senders[s]) for s, r in zip(senders, receivers, strict=True))
    every = sum(r.comes_after(s) for s in WIRING.senders for r in WIRING.receivers)
    assert every == len(WIRING)


@pytest.mark.parametrize(
    ("edge", "words"),
    [
        ("L1H0->L1H1.q", "runs backwards: L1H1.q reads the stream before L1H0 adds to it"),
        ("L1.mlp_out->L1.mlp_in", "runs backwards"),
        ("L9H0->final", "has no sender 'L9H0'"),
        ("embed->L0H2.k", "has no receiver 'L0H2.k'. Nearest: L0H1.k"),
        ("L0.attn_out->final", "has no sender 'L0.attn_out'"),
        ("embed", "An edge is written"),
        (("embed", "final", "x"), "An edge is written"),
        (3, "An edge is written"),
    ],
)
def test_edges_that_are_none(edge: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        WIRING.number(edge)  # type: ignore[arg-type]


def test_no_edge_runs_from_a_parallel_blocks_attention_to_its_mlp() -> None:
    assert WIRING.number("L1H0->L1.mlp_in") > 0
    with pytest.raises(InputError, match="runs backwards"):
        Wiring(3, 6, 2, parallel=True).number("L1H0->L1.mlp_in")


def test_larger_and_smaller(circuit: Circuit) -> None:
    top = circuit.top(10)
    size = np.abs(circuit.scores.mean)
    assert len(top) == 10
    assert size[top.chosen].min() >= np.delete(size, top.chosen).max()
    assert circuit.threshold(float(size[top.chosen].min())).edges == top.edges
    assert top.top(3).edges == top.edges[:3]
    assert top.edges[0] in top
    assert circuit.edges[-1] not in top
    assert top.jaccard(circuit.top(20)) == 0.5
    random = top.random(seed=1)
    assert len(random) == 10
    assert random.edges == top.random(seed=1).edges
    assert random.edges != top.random(seed=2).edges
    named = Circuit.from_edges(bridge_of("llama"), ["L0H1->final", ("embed", "L0H1.v")])
    assert named.edges == [("embed", "L0H1.v"), ("L0H1", "final")]
    assert circuit.select(named.edges).edges != []
    assert "no scores" in repr(named)
    for wrong, words in (
        (lambda: circuit.threshold(1e9), "The circuit has no edge"),
        (lambda: circuit.top(0), "n must be at least 1"),
        (lambda: circuit.select([]), "found an empty one"),
        (lambda: named.top(1), "ranks edges by score"),
        (lambda: top.jaccard(Circuit.whole(made(wiring=Wiring(2, 6, 2)))), "a model with other edges"),
    ):
        with pytest.raises(InputError, match=words):
            wrong()


def test_pruning() -> None:
    """What does not reach the end goes, and what is not reached; a head of keys feeds its whole group."""
    bridge = bridge_of("llama")
    ways = ["embed->L0H0.k", "L0H2->L1.mlp_in", "L1.mlp_out->final", "embed->L0H5.q", "L0H5->final"]
    astray = ["L0H3->final", "embed->L1H0.v", "L0H0->L2H1.v", "L1H1->L2.mlp_in"]
    pruned = Circuit.from_edges(bridge, [*ways[:3], *ways[3:], *astray]).prune()
    # L0H3 is of L0H1.k's group, which nothing reaches; L1H0.v feeds L1H0 to L1H2, which send nowhere.
    assert sorted(f"{u}->{v}" for u, v in pruned.edges) == sorted(ways)
    assert nx.has_path(pruned.graph(), "embed", "final")
    with pytest.raises(InputError, match="has no edge"):
        Circuit.from_edges(bridge, astray).prune()


# -- resampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [30, 3])
def test_resampling_against_a_loop(count: int) -> None:
    """Of three pairs of which one has small scores, draws are unlike each other."""
    scores, n = made(n_pairs=count, noise=2), 20
    scores.values[0] *= 0.05
    found = scores.stability(n, resamples=40, seed=3)
    rng = np.random.default_rng(3)
    sets = []

    def top(rows: np.ndarray) -> set[int]:
        return set(np.argsort(-np.abs(rows.mean(0)))[:n].tolist())

    for drawn in rng.multinomial(count, np.full(count, 1 / count), size=40):
        sets.append(top(np.repeat(scores.values, drawn, axis=0)))
    for edge in range(len(WIRING)):
        assert found.in_top[edge] == pytest.approx(np.mean([edge in one for one in sets]))
    pairs_of_sets = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    assert found.resamples.mean == pytest.approx(np.mean(pairs_of_sets))
    assert found.resamples.low == pytest.approx(np.quantile(pairs_of_sets, 0.025))
    halves = []
    for _ in range(40):
        order = rng.permutation(count)
        one, other = top(scores.values[order[: count // 2]]), top(scores.values[order[count // 2 :]])
        halves.append(len(one & other) / len(one | other))
    assert found.halves.mean == pytest.approx(np.mean(halves))
    assert found.halves.high == pytest.approx(np.quantile(halves, 0.975))
    assert found.halves.low <= found.halves.mean <= found.halves.high
    assert count == 3 or found.halves.high < found.resamples.mean


def test_resampling_says_what_is_sure() -> None:
    sure, unsure = made(noise=1e-6).stability(20), made(noise=30).stability(20)
    assert sure.resamples.mean == sure.halves.mean == 1
    assert set(np.unique(sure.in_top)) == {0, 1}
    assert unsure.resamples.mean < 0.5
    assert unsure.halves.mean < 0.3
    # The standard error is the spread of means of many data sets.
    many = np.stack([made(seed).mean for seed in range(200)])
    assert made(7).error.mean() == pytest.approx(many.std(0).mean(), rel=0.05)
    with pytest.raises(InputError, match="give at least two pairs"):
        made(n_pairs=1).stability(5)
    assert np.isnan(made(n_pairs=1).error).all()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(circuit: Circuit) -> Circuit:
    return circuit.top(12)


def test_labelled(small: Circuit) -> None:
    stability = small.stability()
    found = small.dataset(stability)
    assert found.sizes == {"edge": 12}
    assert [*zip(found.sender.values.tolist(), found.receiver.values.tolist(), strict=True)] == small.edges
    order = small.wiring.numbers(small.edges)
    np.testing.assert_array_equal(found.score.values, small.scores.mean[order])
    np.testing.assert_array_equal(found.in_top.values, stability.in_top[order])
    for sender, layer, head in zip(
        found.sender.values, found.sender_layer.values, found.sender_head.values, strict=True
    ):
        assert sender in (f"L{layer}H{head}", f"L{layer}.mlp_out", "embed")
    assert found.attrs["sign"].startswith("estimated change of the metric in the clean run")
    assert found.score.attrs["units"] == "logits"


def test_saved_and_loaded(small: Circuit, tmp_path: Path) -> None:
    path = small.save(tmp_path / "circuit.safetensors")
    again = Circuit.load(path)
    assert again.edges == small.edges
    assert again.wiring == small.wiring
    assert dict(again.scores.about) == dict(small.scores.about)
    np.testing.assert_array_equal(again.scores.values, small.scores.values)
    assert again.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="exists"):
        small.save(path)
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        small.save(tmp_path / "circuit.pt")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(StoreError, match="cut off"):
        Circuit.load(path)


def test_exported(small: Circuit, tmp_path: Path) -> None:
    document = json.loads(small.export(tmp_path / "circuit.json").read_text())
    assert [(row["sender"], row["receiver"]) for row in document["edges"]] == small.edges
    assert document["about"]["method"] == "eap"
    graph = nx.read_graphml(small.export(tmp_path / "circuit.graphml"))
    ours = {(u, v) for u, v, data in graph.edges(data=True) if not data["inside"]}
    assert ours == set(small.edges)
    u, v = small.edges[0]
    assert graph.edges[u, v]["score"] == pytest.approx(float(small.scores.mean[small.wiring.number((u, v))]))
    assert small.export(tmp_path / "circuit.csv").read_text().splitlines()[0].startswith("score,error,sender,")
    with pytest.raises(InputError, match=r"ends in \.json, \.graphml, \.csv"):
        small.export(tmp_path / "circuit.txt")


def test_circuit_tracers_document() -> None:
    """The fields of its models (graph_models.py), each link between nodes that are there."""
    chosen = edge_attribution(bridge_of("llama"), pairs_of(*tokens())).select(
        ["embed->L0H1.k", "L0H0->L1.mlp_in", "L1.mlp_out->final"]
    )
    made = chosen.circuit_tracer("a-circuit", ["The", " cat"])
    assert set(made) == {"metadata", "qParams", "nodes", "links"}
    assert made["metadata"]["prompt"] == "The cat"
    names = {node["node_id"]: node["clerp"] for node in made["nodes"]}
    assert len(names) == len(made["nodes"])
    links = {(names[link["source"]], names[link["target"]]) for link in made["links"]}
    # Three heads of queries read with the keys of head 1.
    assert links == {
        *(("embed", f"L0H{head}") for head in (3, 4, 5)),
        ("L0H0", "L1.mlp_out"),
        ("L1.mlp_out", "final"),
    }
    for node in made["nodes"]:
        assert {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"} <= set(node)
        assert node["node_id"].count("_") == 2
        assert node["ctx_idx"] == 1
    with pytest.raises(InputError, match="prompt_tokens is a list of strings"):
        chosen.circuit_tracer("a", "The cat")
