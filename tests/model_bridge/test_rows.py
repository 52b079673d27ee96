"""README's bound for batches: what a row's real positions hold, padded on either side, beside the prompt alone.

The bound is relative: 3e-6 of the tensor's largest value, at every hook point of the embedded model. float32 has a relative
rounding of 6e-8, and a value passes some tens of them; 1.7e-6 was seen.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from pellucid.demo import load_demo_bridge

TEXTS = [
    "Everyone",
    "Everyone has the right to life, liberty and the security of person",
    "Toute personne a droit",
]
BOUND = 3e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_itself_in_a_batch(side: Literal["left", "right"]) -> None:
    bridge = load_demo_bridge()
    ids, mask = bridge.to_tokens(TEXTS, padding_side=side, return_mask=True)
    with torch.no_grad():
        logits, batch = bridge.run_with_cache(ids, attention_mask=mask)
        for row, text in enumerate(TEXTS):
            own_logits, alone = bridge.run_with_cache(text)
            length = int(mask[row].sum())
            here = slice(ids.shape[1] - length, None) if side == "left" else slice(0, length)
            assert relative(logits[row, here], own_logits[0]) < BOUND
            compared = 0
            for name, tensor in alone.items():
                spec = bridge.hook_spec(name)
                found, wanted = batch[name][row], tensor[0]
                if spec.kind == "int":
                    assert torch.equal(found[here], wanted)
                    continue
                if "key_pos" in spec.axes:
                    seen = torch.ones(length, length, dtype=torch.bool).tril()  # later keys are masked, on either side
                    found, wanted = found[:, here, here][:, seen], wanted[:, seen]
                else:
                    found = found[here]
                assert relative(found, wanted) < BOUND, name
                compared += 1
            assert compared > 50


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())
