"""What docs/families.md says of TransformerLens 4.3.0, measured in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra 'peer')")

FAMILIES = ("llama", "gpt2", "qwen3", "gemma2", "phi3", "olmo2")


@pytest.fixture(scope="module")
def measured(measured_beside: dict[str, Any]) -> Any:
    return measured_beside["families_peer"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_returned_edit_of_the_stream_is_another_model_there_and_the_same_here(name: str, measured: Any) -> None:
    found = measured[name]
    assert found["ours"] == 0
    assert found["theirs"] > 1
    assert found["theirs from ours, in place"] < 2e-6  # in place they agree with us, to rounding


def test_logits_with_nothing_hooked(measured: Any) -> None:
    assert 0 < measured["gpt2"]["theirs from Hugging Face, nothing hooked"] < 1e-5


def test_points_after_the_rotation(measured: Any) -> None:
    assert measured["llama"]["rotated"]["fired"]
    for name in ("gpt_neox", "phi3"):
        assert not measured[name]["rotated"]["fired"]
