"""Hooks in training: the masks of every dropout, an adapter's own among them, are those that PEFT alone draws.

Queries, keys, values and heads are computed once more where a hook acts on what feeds or leaves one of them. That calls
the adapted layer again: it has to draw the same mask and take no random number of the run's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pellucid import TransformerBridge
from tests.models import make_bloom, random_tokens

ADAPTED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings"]
TOKENS = random_tokens(3, 11)
MASK = torch.ones_like(TOKENS)
MASK[0, :4] = 0
LAYERS, WIDTH = 4, 32


def looks(tensor: Tensor, hook: Any) -> None:
    pass


def returns_a_copy(tensor: Tensor, hook: Any) -> Tensor:
    return tensor.clone()


def make_adapted(checkpointing: str | None, dropout: float) -> Any:
    """An adapted BLOOM in training, every adapter with weights that do something and a dropout of its own."""
    model = make_bloom(
        n_layer=LAYERS,
        hidden_size=WIDTH,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.3, target_modules=ADAPTED))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        adapted.enable_input_require_grads()
    return adapted.train()


def trained(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits, gradients and where the generator stands after one step of the same seed."""
    model.zero_grad()
    torch.manual_seed(7)
    output = model(TOKENS, attention_mask=MASK, labels=TOKENS, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients, torch.get_rng_state()


OPT_IN = {
    "none": (),
    "split": ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"),
    "shared": ("use_attn_in", "use_attn_result"),
}


@pytest.mark.parametrize("checkpointing", [None, "not reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("flags", OPT_IN)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_is_pefts_own(checkpointing: str | None, dropout: float, flags: str) -> None:
    if checkpointing == "reentrant" and flags != "none":
        pytest.skip("torch's reentrant kind and a head's own input end in an error of autograd's")
    model = make_adapted(checkpointing, dropout)
    logits, gradients, state = trained(model)
    bridge = TransformerBridge(model)
    for flag in OPT_IN[flags]:
        getattr(bridge, f"set_{flag}")(True)
    # A side computation adds up in another order: gradients through it are equal up to rounding.
    bound = LAYERS * 4 * WIDTH * torch.finfo(torch.float32).eps
    for function in (looks, returns_a_copy):
        with bridge.hooks(fwd_hooks=[("*", function)]):
            found, through, after = trained(model)
        assert torch.equal(found, logits)
        assert torch.equal(after, state)
        assert through.keys() == gradients.keys()
        for name, expected in gradients.items():
            assert float((through[name] - expected).abs().max()) <= bound * float(expected.abs().max()), name


@pytest.mark.parametrize("name", ["attn.q.hook_in", "hook_v_input", "hook_attn_in", "attn.hook_result"])
def test_an_edit_keeps_the_masks_of_the_other_layers(name: str) -> None:
    """An edit of the last position, which no other sees: all before it is PEFT's to the bit, and the draws after it."""

    def nudged(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[:, -1] += 1.0
        return tensor

    model = make_adapted(None, 0.2)
    logits, _, state = trained(model)
    bridge = TransformerBridge(model)
    for flag in ("use_attn_in", "use_attn_result") if name == "hook_attn_in" else OPT_IN["split"]:
        getattr(bridge, f"set_{flag}")(True)
    with bridge.hooks(fwd_hooks=[(f"blocks.*.{name}", nudged)]):
        found, _, after = trained(model)
    unpadded = slice(1, None)  # padding sees every position
    assert torch.equal(found[unpadded, :-1], logits[unpadded, :-1])
    assert not torch.equal(found[unpadded, -1], logits[unpadded, -1])
    assert torch.equal(after, state)


def test_a_users_own_draws_go_on() -> None:
    """What a hook draws is the run's: two points give it two different tensors."""
    drawn: list[Tensor] = []
    keep: Callable[..., None] = lambda tensor, hook: drawn.append(torch.rand(4))  # noqa: E731
    model = make_adapted(None, 0.2)
    bridge = TransformerBridge(model)
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.*.hook_in", keep)]):
        trained(model)
    assert len(drawn) > 2
    assert len({tuple(each.tolist()) for each in drawn}) == len(drawn)
