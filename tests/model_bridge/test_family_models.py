"""Models of every family as people have them: with hidden states collected, checkpointed, offloaded, with learnt prompts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from pellucid import TransformerBridge
from tests.families import CONFIGS, make_family, mask_of, of_the_turn
from tests.models import is_pristine, random_tokens

FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox", "olmo2")
TOKENS = random_tokens()
VECTOR = torch.randn(48, generator=torch.Generator().manual_seed(0))


def add_returned(tensor: Tensor, hook: Any) -> Tensor:
    return tensor + VECTOR


def add_in_place(tensor: Tensor, hook: Any) -> None:
    tensor.add_(VECTOR)


def without_dropout(model: Any) -> Any:
    """Training mode, every dropout off: two runs can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(vars(module).get("attention_dropout"), float):
            module.attention_dropout = 0.0
    return model.train()


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_hold_what_hooks_made_of_them(name: str) -> None:
    bridge = TransformerBridge(make_family(name))
    collected = []
    with torch.no_grad():
        base = bridge.hf_model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
        for function in (add_returned, add_in_place):
            with bridge.hooks([("blocks.1.hook_resid_pre", function)]):
                collected.append(bridge.hf_model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states)
    returned, in_place = collected
    assert all(torch.equal(one, other) for one, other in zip(returned, in_place, strict=True))
    assert torch.equal(returned[0], base[0])
    assert torch.equal(returned[1], base[1] + VECTOR)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_that_is_run_again_runs_with_its_hooks(name: str) -> None:
    """Gradient checkpointing: the gradients of a hooked model are those without it."""
    plain = without_dropout(make_family(name))
    gradients = []
    mid = "hook_mlp_out" if plain.config.model_type == "gpt_neox" else "hook_resid_mid"
    scaled = [(f"blocks.1.{mid}", 1.5), ("blocks.1.attn.hook_pattern", 0.9), ("blocks.0.attn.hook_k", 1.1)]
    hooks = [(point, lambda tensor, hook, factor=factor: tensor * factor) for point, factor in scaled]
    for checkpoints in (False, True):
        model = copy.deepcopy(plain)
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        bridge = TransformerBridge(model)
        with bridge.hooks(hooks):
            bridge(TOKENS, return_type="loss").backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
        assert is_pristine(model)
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_offloaded_weights(name: str) -> None:
    from accelerate import cpu_offload

    plain = TransformerBridge(make_family(name))
    model = cpu_offload(make_family(name), execution_device=torch.device("cpu"))
    bridge = TransformerBridge(model)
    edits = [("blocks.1.hook_resid_pre", add_returned), ("blocks.1.attn.hook_pattern", lambda t, hook: t * 0.5)]
    edits.append(
        ("blocks.0.ln1_post.hook_scale" if name == "olmo2" else "blocks.0.ln1.hook_scale", lambda t, hook: t * 1.5)
    )
    with torch.no_grad():
        native = plain.hf_model(TOKENS, use_cache=False).logits
        logits, cache = bridge.run_with_cache(TOKENS)
        assert torch.equal(logits, native)
        assert torch.equal(bridge(cache["resid_pre", 1], start_at_layer=1), native)
        assert torch.equal(
            bridge.run_with_hooks(TOKENS, fwd_hooks=edits), plain.run_with_hooks(TOKENS, fwd_hooks=edits)
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_learnt_prompts(name: str, kind: Any) -> None:
    """PEFT numbers the positions after its prompt itself, so that it is given none."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(make_family(name), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    bridge, mask = TransformerBridge(model), mask_of(TOKENS, "left")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of position ids
        assert torch.equal(bridge(TOKENS), model(input_ids=TOKENS, use_cache=False).logits)
        native = model(input_ids=TOKENS, attention_mask=mask, use_cache=False).logits
        assert torch.equal(bridge(TOKENS, attention_mask=mask), native)
        _, cache = bridge.run_with_cache(TOKENS)
        assert cache["resid_pre", 1].shape[1] == TOKENS.shape[1] + (4 if kind is PromptTuningConfig else 0)


@pytest.mark.parametrize("name", of_the_turn(CONFIGS))
def test_a_pass_over_all_points_leaves_the_model_as_it_was(name: str) -> None:
    model = make_family(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bridge = TransformerBridge(model)
    with torch.no_grad():
        bridge.run_with_cache(TOKENS)
    assert is_pristine(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
