"""``generate`` of every family, token for token Hugging Face's: greedy, sampled and with beams, padded on the left or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.hook_points import HookPoint
from tests.families import make_family, mask_of, of_each_layout
from tests.models import is_pristine, random_tokens

NEW = {"max_new_tokens": 5, "min_new_tokens": 5}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 3},
}


def look(tensor: Tensor, hook: HookPoint) -> None:
    return None


def generated(model: Any, tokens: Tensor, mask: Tensor | None, way: str) -> Tensor:
    torch.manual_seed(3)
    found: Tensor = model.generate(tokens, attention_mask=mask, pad_token_id=0, **NEW, **WAYS[way])
    return found


@pytest.mark.parametrize("family", of_each_layout())
def test_generate(family: str) -> None:
    native = make_family(family)
    bridge = TransformerBridge(make_family(family))
    tokens = random_tokens()
    for way in WAYS:
        for side in (None, "left"):
            mask = torch.ones_like(tokens) if side is None else mask_of(tokens, side)
            wanted = generated(native, tokens, mask, way)
            assert torch.equal(generated(bridge.hf_model, tokens, mask, way), wanted), (way, side)
            with bridge.hooks([(lambda name: True, look)]):
                assert torch.equal(generated(bridge.hf_model, tokens, mask, way), wanted), (way, side)
    assert is_pristine(bridge.hf_model)


@pytest.mark.parametrize("family", of_each_layout())
def test_an_edit_of_a_position_acts_with_a_cache_as_without(family: str) -> None:
    """A prompt's column is edited in the first step alone: its keys and values stay in the cache."""
    bridge = TransformerBridge(make_family(family))
    tokens = random_tokens()

    def edit(residual: Tensor, hook: HookPoint) -> None:
        at = (hook.run.positions == 2).nonzero()
        residual[at[:, 0], at[:, 1]] = 0

    with bridge.hooks([("blocks.1.hook_resid_pre", edit)]):
        first, second = (
            bridge.hf_model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                pad_token_id=0,
                use_cache=cache,
                output_logits=True,
                return_dict_in_generate=True,
                do_sample=False,
                **NEW,
            )
            for cache in (True, False)
        )
    assert torch.equal(first.sequences, second.sequences)
    # The two add up in another order: a few units in the last place a layer.
    for with_cache, without in zip(first.logits, second.logits, strict=True):
        bound = 64 * bridge.cfg.n_layers * torch.finfo(torch.float32).eps * float(without.abs().max())
        assert float((with_cache - without).abs().max()) <= bound
