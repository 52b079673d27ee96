"""Beside TransformerLens 4.3.0: same names, shapes and values where it is right; where it is wrong, who is right.

Runs where TransformerLens is installed (the ``peer`` extra), and says so where it is not.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from tests.models import make_bloom, random_tokens

lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra 'peer')")

TOKENS = random_tokens()
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from pellucid.demo import load_demo_bridge

    return load_demo_bridge().tokenizer


@pytest.fixture
def trio(tokenizer: Any) -> tuple[TransformerBridge, Any, Any]:
    """Ours, theirs, and an untouched Hugging Face copy."""
    from transformer_lens.model_bridge import TransformerBridge as Theirs

    model = make_bloom()
    theirs = Theirs.boot_transformers("bloom", hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu")
    return TransformerBridge(model, tokenizer), theirs, copy.deepcopy(model)


def test_same_names_shapes_and_values(trio: tuple[TransformerBridge, Any, Any]) -> None:
    ours, theirs, _ = trio
    with torch.no_grad():
        _, cache = ours.run_with_cache(TOKENS)
        _, their_cache = theirs.run_with_cache(TOKENS)
    assert set(their_cache.keys()) - {"blocks.0.attn.qkv.hook_in"} <= set(ours._tree.index.all_names())
    for name in their_cache.keys():  # noqa: SIM118 (their cache does not iterate names)
        wanted = their_cache[name]
        found = cache[name]
        assert found.shape == wanted.shape, name
        assert found.dtype == wanted.dtype, name
        if found.is_floating_point():
            # They compute queries, keys and values as three products and norms in Python: a few ulps at each of 3 layers.
            finite = wanted.abs() < 1e30
            bound = 256 * EPS * max(1.0, float(wanted[finite].abs().max()))
            assert (found - wanted)[finite].abs().max() <= bound, name
        else:
            assert torch.equal(found, wanted)
    for alias in ("hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"):
        assert alias in ours.hook_dict


def test_same_weights(trio: tuple[TransformerBridge, Any, Any]) -> None:
    ours, theirs, _ = trio
    for name in (
        "W_E",
        "W_U",
        "b_U",
        "W_Q",
        "W_K",
        "W_V",
        "W_O",
        "W_in",
        "W_out",
        "b_Q",
        "b_K",
        "b_V",
        "b_O",
        "b_in",
        "b_out",
    ):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_same_losses_and_padding(trio: tuple[TransformerBridge, Any, Any]) -> None:
    ours, theirs, _ = trio
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            wanted = theirs(TOKENS, return_type="loss", loss_per_token=True, **options)
            assert torch.allclose(ours(TOKENS, return_type="loss", loss_per_token=True, **options), wanted, atol=1e-5)


CALLS = (
    "run_with_cache",
    "run_with_hooks",
    "hooks",
    "add_hook",
    "add_perma_hook",
    "reset_hooks",
    "to_tokens",
    "to_string",
    "to_str_tokens",
    "to_single_token",
    "get_token_position",
    "tokens_to_residual_directions",
    "generate",
    "forward",
)
"""Methods whose arguments ours share with theirs."""
NOT_OURS = {
    # Arguments of theirs that belong to other kinds of model, or to a later issue of ours, with the reason.
    "pixel_values",
    "input_values",
    "labels",
    "kwargs",
    "names_filter",
    "return_cache",
    "device",
    "forced_bos_token_id",
    "multimodal_kwargs",
    "hf_kwargs",
}


@pytest.mark.parametrize("call", CALLS)
def test_same_arguments(trio: tuple[TransformerBridge, Any, Any], call: str) -> None:
    ours, theirs, _ = trio
    mine = inspect.signature(getattr(ours, call)).parameters
    for name, parameter in inspect.signature(getattr(theirs, call)).parameters.items():
        if name in NOT_OURS or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        assert name in mine, f"{call}({name})"
        default = parameter.default
        if call == "to_tokens" and name == "truncate":
            continue  # theirs cuts long input off by default; ours never does
        if isinstance(default, bool | int | float | str):
            assert mine[name].default == default, f"{call}({name}={default})"


def write(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


def native_resid_mid(model: Any, edit: Any) -> Tensor:
    handle = model.transformer.h[0].self_attention.register_forward_hook(lambda m, a, o: (edit(o[0]), o[1]))
    with torch.no_grad():
        logits = model(TOKENS).logits
    handle.remove()
    return logits


def test_resid_mid_who_is_right(trio: tuple[TransformerBridge, Any, Any]) -> None:
    ours, theirs, model = trio
    hook = [("blocks.0.hook_resid_mid", lambda t, hook: t * 0)]
    native = native_resid_mid(model, lambda t: t * 0)
    with torch.no_grad():
        assert torch.equal(ours.run_with_hooks(TOKENS, fwd_hooks=hook), native)
        assert (theirs.run_with_hooks(TOKENS, fwd_hooks=hook) - native).abs().max() > 0.1


def test_start_at_layer_who_is_right(trio: tuple[TransformerBridge, Any, Any]) -> None:
    ours, theirs, model = trio
    with torch.no_grad():
        native = model(TOKENS, output_hidden_states=True)
        residual = native.hidden_states[1]
        assert torch.equal(ours(residual, start_at_layer=1), native.logits)
        assert (theirs(residual, start_at_layer=1) - native.logits).abs().max() > 0.1


def test_fused_weight_who_is_right(trio: tuple[TransformerBridge, Any, Any]) -> None:
    ours, theirs, model = trio
    with torch.no_grad():
        for net in (ours.hf_model, theirs.original_model, model):
            for name, parameter in net.named_parameters():
                if "1." in name and "query_key_value" in name and name.endswith("weight"):
                    parameter.mul_(2)
        native = model(TOKENS).logits
        assert torch.equal(ours(TOKENS), native)
        assert (theirs(TOKENS) - native).abs().max() > 1e-3


def test_split_inputs_who_is_right(trio: tuple[TransformerBridge, Any, Any]) -> None:
    ours, theirs, model = trio
    for bridge in (ours, theirs):
        bridge.set_use_split_qkv_input(True)
    with torch.no_grad():
        residual = model(TOKENS, output_hidden_states=True).hidden_states[1]
        _, cache = ours.run_with_cache(TOKENS, names_filter="blocks.1.hook_q_input")
        _, their_cache = theirs.run_with_cache(TOKENS)
    assert torch.equal(cache["blocks.1.hook_q_input"][:, :, 0], residual)
    assert (their_cache["blocks.1.attn.hook_q_input"][:, :, 0] - residual).abs().max() > 0.1


def test_bitwise_who_is(trio: tuple[TransformerBridge, Any, Any]) -> None:
    ours, theirs, model = trio
    with torch.no_grad():
        native = model(TOKENS).logits
        assert torch.equal(ours.run_with_cache(TOKENS)[0], native)
        assert not torch.equal(theirs(TOKENS), native)


def test_generated_texts() -> None:
    """Greedy texts, ended rows and prompts with a special token among them: without special tokens in both."""
    from transformer_lens.model_bridge import TransformerBridge as Theirs

    from pellucid.demo import load_demo_bridge

    ours = load_demo_bridge()
    theirs = Theirs.boot_transformers(
        "bloom", hf_model=copy.deepcopy(ours.hf_model), tokenizer=ours.tokenizer, device="cpu"
    )
    ended = "Everyone has the right to life, liberty and security of person."
    for prompt in ("Everyone has", "Everyone has the right to</s>", ended, ["Everyone has", ended]):
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "return_type": "str"}
        assert ours.generate(prompt, **options) == theirs.generate(prompt, **options)
