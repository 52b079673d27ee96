"""Faithfulness: the two ends on every layout, one edge as path patching has it, a known circuit, means; bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pellucid.circuits import Circuit, cmd, cpr, edge_attribution, faithfulness
from pellucid.corpora.pairs import PromptPairs
from pellucid.errors import InputError
from pellucid.experiments.path_patching import path_patching
from pellucid.sweep import LogitDifference
from tests.circuits.handmade import EDGES, handmade, pairs
from tests.circuits.layouts import ANSWER, FOIL, LAYOUTS, bridge_of, difference, pairs_of, tokens

BOUND = 1e-12


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_edges_are_the_base_run_and_none_the_source_run(name: str) -> None:
    """And an edge left in, or left out, makes a difference; points that were off are off again."""
    bridge, (clean, corrupted) = bridge_of(name), tokens()
    circuit = edge_attribution(bridge, pairs_of(clean, corrupted))
    flags, total = dict(bridge.cfg.flags), len(circuit.wiring)
    found = faithfulness(bridge, circuit, pairs_of(clean, corrupted), sizes=[1, 40], randoms=1)
    assert dict(bridge.cfg.flags) == flags
    assert not bridge.has_torch_hooks()
    assert found["size"].values.tolist() == [0, 1, 40, total]
    with torch.no_grad():
        base, source = difference(bridge(clean)).numpy(), difference(bridge(corrupted)).numpy()
    np.testing.assert_allclose(found.metric.values[-1], base, atol=BOUND)
    np.testing.assert_allclose(found.metric.values[0], source, atol=BOUND)
    # One edge alone need not lead anywhere: what comes after it is patched.
    assert np.abs(np.diff(found.metric.values[[0, 2, 3]], axis=0)).min() > 1e-9
    assert found.faithfulness.values[[0, -1]].tolist() == [0, 1]
    assert found.random_faithfulness.shape == (1, 4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "granite"])
def test_one_edge_outside_is_path_patching(name: str) -> None:
    bridge, (clean, corrupted) = bridge_of(name), tokens()
    whole = edge_attribution(bridge, pairs_of(clean, corrupted))
    for sender, receiver in (("L0H2", "L1H1.k"), ("embed", "L1.mlp_in"), ("L0.mlp_out", "L2H4.q"), ("L1H3", "final")):
        rest = [edge for edge in whole.edges if edge != (sender, receiver)]
        named = Circuit.from_edges(bridge, rest)
        found = faithfulness(bridge, named, pairs_of(clean, corrupted), randoms=0)
        expected = path_patching(
            bridge,
            clean,
            corrupted,
            LogitDifference(ANSWER, FOIL),
            sender,
            receiver,
            freeze_mlps=True,
            value="metric",
            rows="each",
        )
        np.testing.assert_allclose(found.metric.values[1], expected.values[0], atol=BOUND)


def test_a_circuit_made_by_hand_keeps_everything() -> None:
    bridge, data = handmade(), pairs()
    circuit = edge_attribution(bridge, data).threshold(1e-6)
    assert sorted(circuit.edges) == sorted(EDGES)
    found = faithfulness(bridge, circuit, data, sizes=[3, 4], randoms=3)
    # What else the signal changes are norms' scales, by its square: 1e-4.
    assert found.faithfulness.sel(size=4) == pytest.approx(1, abs=1e-3)
    assert abs(float(found.faithfulness.sel(size=3))) < 1e-3
    assert np.abs(found.random_faithfulness.sel(size=4)).max() < 0.5
    low, high = found.low.sel(size=4), found.high.sel(size=4)
    assert low <= found.faithfulness.sel(size=4) <= high
    assert found.attrs["cpr"] == pytest.approx(1, abs=0.02)
    assert found.attrs["cmd"] == pytest.approx(0, abs=0.02)
    assert max(found.attrs["random_cpr"]) < 0.7


def test_means_outside() -> None:
    """Every input reads the means: what a whole forward gives whose parts are all set to them."""
    bridge, (clean, corrupted) = bridge_of("gpt2"), tokens()
    circuit = edge_attribution(bridge, pairs_of(clean, corrupted))
    found = faithfulness(bridge, circuit, pairs_of(clean, corrupted), sizes=[0], randoms=0, outside="mean")
    cache = bridge.run_with_cache(corrupted)[1]
    names = ["hook_embed", *(f"blocks.{i}.{site}" for i in range(3) for site in ("attn.hook_z", "hook_mlp_out"))]

    def set_to_mean(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        return cache[hook.name].mean((0, 1)).expand_as(tensor)  # type: ignore[attr-defined]

    with torch.no_grad():
        expected = difference(bridge.run_with_hooks(clean, fwd_hooks=[(name, set_to_mean) for name in names]))
    np.testing.assert_allclose(found.metric.values[0], expected.numpy(), atol=BOUND)


def test_areas() -> None:
    shares = np.array([0, 0.25, 0.5, 1])
    assert cpr(shares, np.array([0, 1, 1, 1])) == 0.875
    assert cmd(shares, np.array([0, 1, 1, 1])) == 0.125
    assert cpr(shares, np.array([0, 3, 1, 1])) == 1.375
    assert cmd(shares, np.array([0, 3, 1, 1])) == 0.625


def test_what_is_refused() -> None:
    bridge, (clean, corrupted) = bridge_of("llama"), tokens()
    data = pairs_of(clean, corrupted)
    circuit = edge_attribution(bridge, data)
    with pytest.raises(InputError, match="a model with other edges"):
        faithfulness(bridge_of("gpt2"), circuit, data)
    with pytest.raises(InputError, match="an entry of sizes must be at most 304"):
        faithfulness(bridge, circuit, data, sizes=[305])
    with pytest.raises(InputError, match="has its own size, 1, and no other"):
        faithfulness(bridge, Circuit.from_edges(bridge, ["embed->final"]), data, sizes=[2])
    with pytest.raises(InputError, match="there is no gap"):
        faithfulness(bridge, circuit, pairs_of(clean, clean), sizes=[3], randoms=0)
    with pytest.raises(InputError, match=r"gives \[\] for 2 rows"):
        faithfulness(bridge, circuit, data, lambda logits: logits[:, -1, 5].mean(), sizes=[3])
    with pytest.raises(InputError, match="different numbers of tokens, 7 and 5"):
        faithfulness(bridge, circuit, PromptPairs([clean[0].tolist()], [corrupted[0, :5].tolist()], [5], [9]))
