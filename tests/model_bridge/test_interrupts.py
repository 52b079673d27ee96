"""Ctrl-C at any line of a public operation leaves nothing acting and nothing that the next call does not repair.

Lines are counted by a trace function, which raises ``KeyboardInterrupt`` at the n-th; a sample of all n is tried here, every
one in ``benchmarks/interrupts.py``, which also sends real signals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import WeightError
from tests.interrupts import OPERATIONS, count_lines, interrupt_at, what_is_wrong, zero
from tests.models import is_pristine, make_pair, random_tokens

LINES_OF_PROCESSING = 60
SAMPLE = 12
"""Lines tried of each operation, spread evenly; every operation also has its first and last three."""


def lines_of(operation: Callable[[TransformerBridge, Tensor], Any]) -> list[int]:
    bridge, _ = make_pair()
    tokens = random_tokens()
    operation(bridge, tokens)  # what is made once is made
    total = count_lines(lambda: operation(bridge, tokens))
    bridge.reset_hooks()
    assert total > 20
    spread = {1 + index * (total - 1) // (SAMPLE - 1) for index in range(SAMPLE)}
    return sorted(spread | {1, 2, 3, total - 2, total - 1, total})


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_a_line(name: str) -> None:
    operation = OPERATIONS[name]
    bridge, native = make_pair()
    tokens = random_tokens()
    expected = native(tokens).logits
    edited = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", zero)])
    interrupted = 0
    for line in lines_of(operation):
        if interrupt_at(line, lambda: operation(bridge, tokens)):
            interrupted += 1
        else:
            bridge.reset_hooks()
        assert what_is_wrong(bridge, tokens, expected, edited) is None, f"interrupted at line {line}"
    assert interrupted > SAMPLE / 2


def test_a_removal_that_was_interrupted_is_made_again() -> None:
    bridge, native = make_pair()
    tokens = random_tokens()
    names = ["blocks.1.attn.hook_z", "hook_embed"]
    for line in range(1, 1 + count_lines(bridge.add_hook(names, zero).remove)):
        handles = bridge.add_hook(names, zero)
        interrupt_at(line, handles.remove)
        handles.remove()
        assert is_pristine(bridge.hf_model)
        assert torch.equal(bridge(tokens), native(tokens).logits)


def test_an_interrupt_while_weights_are_processed() -> None:
    """At each of some lines: the model is what it was, or the state says which part is half done and how to go back."""
    tokens = random_tokens()

    def made() -> tuple[TransformerBridge, Tensor]:
        bridge, native = make_pair(torch.float64, n_layer=1)
        return bridge, native(tokens).logits.log_softmax(-1)

    bridge, _ = made()
    bridge.process_weights(keep_originals=True)
    bridge, _ = made()
    total = count_lines(lambda: bridge.process_weights(keep_originals=True))
    for line in range(1, total, max(1, total // LINES_OF_PROCESSING)):
        bridge, expected = made()
        before = {name: tensor.clone() for name, tensor in bridge.hf_model.state_dict().items()}
        try:
            interrupt_at(line, lambda bridge=bridge: bridge.process_weights(keep_originals=True))
        except WeightError:  # which says that a part is half done
            assert bridge.weights_state.damaged is not None
        state = bridge.weights_state
        if state.damaged is not None:
            assert "could not be finished" in str(state)
        else:
            moved = (bridge(tokens).log_softmax(-1) - expected).abs().max()
            assert moved < 1e-6, f"line {line} of {total}"  # Hugging Face's softmax is in float32
            if str(state) == "weights as loaded":
                now = bridge.hf_model.state_dict()
                assert all(torch.equal(now[name], tensor) for name, tensor in before.items()), f"line {line} of {total}"
        if state.has_originals:
            bridge.unprocess_weights()
            now = bridge.hf_model.state_dict()
            assert all(torch.equal(now[name], tensor) for name, tensor in before.items()), f"line {line} of {total}"


def test_detach_takes_off_whatever_is_ours() -> None:
    bridge, native = make_pair()
    tokens = random_tokens()
    block = bridge.hooks([("blocks.1.attn.hook_z", zero)])
    block.__enter__()
    bridge.add_perma_hook("hook_embed", zero)
    model = bridge.detach()
    assert is_pristine(model)
    assert torch.equal(model(tokens).logits, native(tokens).logits)
    block.__exit__(None, None, None)
    assert is_pristine(model)
