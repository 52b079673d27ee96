"""The cache's methods beside TransformerLens 4.3.0's: the same on processed weights, and where it is not, who is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra 'peer')")

BOUND = 32 * torch.finfo(torch.float32).eps
"""Of the largest number: products of float32 in another order, in each of 3 or 4 layers."""

THROUGH_POST_NORMS = ("head", "neuron", "get_full")
"""Methods that show parts of a branch, which a norm follows in Gemma 2: there each part is left as it is."""

READ_BY_A_NORM = ("of ln1", "of ln2", "projected", "apply_ln_to_stack", "logit_attrs")
"""Methods that apply a norm with the run's scale: there its gain is left out, which is right when it is folded."""


@pytest.fixture(scope="module")
def measured(measured_beside: dict[str, Any]) -> Any:
    return measured_beside["cache_methods_peer"]


@pytest.mark.parametrize("family", ["bloom", "gpt2", "llama", "gemma2"])
def test_the_same_on_processed_weights(family: str, measured: Any) -> None:
    found = measured[f"{family} processed"]
    for method, result in found["methods"].items():
        assert result["labels"] is True, (method, result)
        assert result["extra"] == 0, method  # their row of biases in a model that has none
        if family == "gemma2" and any(word in method for word in THROUGH_POST_NORMS):
            continue
        assert result["centred" if family == "bloom" else "apart"] < BOUND, (method, result)
    assert max(found["ours"].values()) < BOUND
    if family != "gemma2":
        assert max(found["theirs"].values()) < BOUND


def test_parts_before_a_norm_do_not_add_up_there(measured: Any) -> None:
    found = measured["gemma2 processed"]
    assert found["theirs"]["heads"] > 0.4
    assert found["theirs"]["neurons"] > 0.6
    assert found["theirs"]["logits"] < BOUND  # layers' outputs are after the norm


@pytest.mark.parametrize("family", ["bloom", "gpt2", "llama", "gemma2"])
def test_unprocessed_weights(family: str, measured: Any) -> None:
    """What no norm with the run's scale is applied to is the same; attributions miss the logits there, and not here."""
    found = measured[f"{family} raw"]
    for method, result in found["methods"].items():
        assert result["labels"] is True, method
        if any(word in method for word in READ_BY_A_NORM):
            assert result["apart"] > 0.01, method
        elif family != "gemma2" or not any(word in method for word in THROUGH_POST_NORMS):
            assert result["apart"] < BOUND, (method, result)
    assert max(found["ours"].values()) < BOUND
    assert found["theirs"]["logits"] > 0.04
