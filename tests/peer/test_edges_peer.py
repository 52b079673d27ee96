"""Edge attribution and faithfulness beside TransformerLens 4.3.0's own, on processed BLOOM and GPT-2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.peer.edges_peer import FAMILIES

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra 'peer')")

BOUND = 32 * torch.finfo(torch.float32).eps
"""Of the largest number: they process weights in float32, each of which three layers multiply by."""


@pytest.fixture(scope="module")
def measured(measured_beside: dict[str, Any]) -> Any:
    return measured_beside["edges_peer"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_edges_signs_and_scores(name: str, measured: Any) -> None:
    found = measured[name]
    for mine, other, raw in zip(found["ours"], found["theirs"]["scores"], found["raw"], strict=True):
        assert mine.keys() == other.keys() == raw.keys()
        size = max(map(abs, mine.values()))
        assert max(abs(mine[edge] - other[edge]) for edge in mine) < BOUND * size
        assert max(abs(mine[edge] - raw[edge]) for edge in mine) < 1e-12 * size  # processing changes no edge
        assert max(abs(mine[edge] + other[edge]) for edge in mine) > size  # what another sign would be


@pytest.mark.parametrize("name", FAMILIES)
def test_a_circuit_keeps_the_same(name: str, measured: Any) -> None:
    assert measured[name]["kept"] == pytest.approx(measured[name]["theirs"]["kept"], rel=BOUND)
    assert abs(measured[name]["kept"] - 1) > 0.01  # not all of it, and not as if no edge were patched


def test_theirs_refuses_bloom_until_its_points_are_wired(measured: Any) -> None:
    assert "missing from the cache: blocks.0.hook_mlp_in" in measured["bloom"]["theirs"]["refused"]
    assert not measured["gpt2"]["theirs"]["refused"]
