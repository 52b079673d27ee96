"""Parts of the residual stream add up to it, and say together what the logits say: on every family, gains and biases random.

The whole is never ours: residuals, branches' outputs and logits are Hugging Face's, shown by hooks. Tolerances are relative to
the largest number of the whole: 1e-9 in float64 where the family's norm is a LayerNorm; 1e-5 where Hugging Face's norm
computes in float32 inside, or the model does.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from pellucid import ActivationCache, TransformerBridge
from pellucid.errors import InputError
from tests.families import NO_FLOAT64, has_experts, make_family, of_each_layout
from tests.models import make_bloom, random_tokens

FAMILIES = sorted({"bloom", "granite", "qwen2_moe", *of_each_layout()})
EXPERTS = [family for family in FAMILIES if family != "bloom" and has_experts(family)]
"""Whose neurons cannot be seen: asking for them is refused."""

RIGHT, WRONG = torch.tensor([5, 11]), torch.tensor([7, 3])


@cache
def ran(family: str) -> tuple[TransformerBridge, Tensor, ActivationCache]:
    """A float64 model, its logits and its cache; the same for all tests, which change none of them."""
    dtype = torch.float32 if family in NO_FLOAT64 else torch.float64
    bridge = TransformerBridge(make_bloom(dtype) if family == "bloom" else make_family(family, dtype))
    with torch.no_grad():
        logits, cached = bridge.run_with_cache(random_tokens())
    return bridge, logits, cached


def tolerance(bridge: TransformerBridge) -> float:
    exact = bridge.adapter.family.norm.kind == "layer" and bridge.dtype is torch.float64
    return 1e-9 if exact else 1e-5


def assert_close(found: Tensor, whole: Tensor, bridge: TransformerBridge) -> None:
    assert found.shape == whole.shape
    assert float((found - whole).abs().max()) <= tolerance(bridge) * float(whole.abs().max())


def is_parallel(bridge: TransformerBridge) -> bool:
    return bool(bridge.adapter.family.block.parallel)


def depths(bridge: TransformerBridge) -> list[tuple[int | None, bool]]:
    """Layers to decompose the input of, and whether of its MLP."""
    inside = [] if is_parallel(bridge) else [(1, True), (0, True)]
    return [(0, False), (1, False), (None, False), *inside]


def whole_at(bridge: TransformerBridge, cached: ActivationCache, layer: int | None, mlp_input: bool) -> Tensor:
    """The residual that enters a layer, its MLP, or the final norm."""
    if layer is None:
        return cached["resid_post", -1]
    return cached["resid_mid" if mlp_input else "resid_pre", layer]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_heads_and_neurons_add_up_to_the_residual(family: str) -> None:
    bridge, _, cached = ran(family)
    for layer, mlp_input in depths(bridge):
        whole = whole_at(bridge, cached, layer, mlp_input)
        assert_close(cached.decompose_resid(layer, mlp_input).sum(0), whole, bridge)
        for neurons in (True, False) if family not in EXPERTS else (False,):
            stack, labels = cached.get_full_resid_decomposition(
                layer, mlp_input, expand_neurons=neurons, return_labels=True
            )
            assert len(labels) == len(set(labels)) == len(stack)
            assert_close(stack.sum(0), whole, bridge)


@pytest.mark.parametrize("family", EXPERTS)
def test_neurons_of_experts_are_refused_by_name(family: str) -> None:
    _, _, cached = ran(family)
    for call in (cached.get_full_resid_decomposition, lambda: cached.stack_neuron_results(-1)):
        with pytest.raises(InputError, match=r"mlp\.hook_post"):
            call()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXPERTS])
def test_heads_and_neurons_add_up_to_their_branch(family: str) -> None:
    bridge, _, cached = ran(family)
    layer, heads = 1, bridge.cfg.n_heads
    full, labels = cached.get_full_resid_decomposition(layer + 1, return_labels=True)
    before, earlier = cached.get_full_resid_decomposition(layer, return_labels=True)
    bias = full[labels.index("bias")] - before[earlier.index("bias")] if "bias" in labels else 0
    of_heads = cached.stack_head_results(layer + 1)[layer * heads :].sum(0)
    of_neurons = cached.get_neuron_results(layer).sum(-2)
    assert_close(of_heads + of_neurons + bias, cached["attn_out", layer] + cached["mlp_out", layer], bridge)
    if bridge.stream.norm_after(layer, "mlp") is None:
        b_out = 0 if bridge.stream.bias(layer, "mlp") is None else bridge.blocks[layer].mlp.b_out
        assert_close(of_neurons + b_out, cached["mlp_out", layer], bridge)


@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_and_the_bias_add_up_to_the_logits(family: str) -> None:
    bridge, _, cached = ran(family)
    head = cached["hook_unembed"]  # before a cap or a scale
    rows = torch.arange(2)
    stacks = {
        "layers": cached.decompose_resid(),
        "parts": cached.get_full_resid_decomposition(expand_neurons=family not in EXPERTS),
        "heads": cached.stack_head_results(incl_remainder=True),
    }
    if family not in EXPERTS:
        stacks["neurons"] = cached.stack_neuron_results(-1, incl_remainder=True)
    for stack in stacks.values():
        found = cached.logit_attrs(stack, RIGHT).sum(0) + cached.logit_bias(RIGHT)[:, None]
        assert_close(found, head[rows, :, RIGHT], bridge)
        found = cached.logit_attrs(stack, RIGHT, WRONG).sum(0) + cached.logit_bias(RIGHT, WRONG)[:, None]
        assert_close(found, head[rows, :, RIGHT] - head[rows, :, WRONG], bridge)
    last = cached.decompose_resid(pos_slice=-1)
    found = cached.logit_attrs(last, 5, 7, pos_slice=-1).sum(0) + cached.logit_bias(5, 7)
    assert_close(found, head[:, -1, 5] - head[:, -1, 7], bridge)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXPERTS])
def test_projecting_is_multiplying_the_parts(family: str) -> None:
    bridge, _, cached = ran(family)
    directions = torch.randn(bridge.cfg.d_model, 2, generator=torch.Generator().manual_seed(3)).to(bridge.dtype)
    for apply_ln in (False, True):
        for given in (directions, directions[:, 0]):
            parts = cached.get_full_resid_decomposition(apply_ln=apply_ln, pos_slice=(2, 5))
            found = cached.get_full_resid_decomposition(apply_ln=apply_ln, pos_slice=(2, 5), project_output_onto=given)
            assert_close(found, parts @ given, bridge)
    found = cached.stack_neuron_results(1, neuron_slice=[3, 1], incl_remainder=True, project_output_onto=directions)
    assert_close(found, cached.stack_neuron_results(1, None, [3, 1], incl_remainder=True) @ directions, bridge)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_read_by_a_blocks_norm(family: str) -> None:
    """Each norm that reads the stream: parts through it, and its bias, are what it gave."""
    bridge, _, cached = ran(family)
    for name, layer, mlp_input in (("ln1", 1, False), ("ln2", 1, True)):
        norm = bridge.stream.norm(f"blocks.1.{name}")
        if mlp_input and is_parallel(bridge):
            with pytest.raises(InputError, match="mlp_input"):
                cached.decompose_resid(layer, mlp_input=True)
            continue
        if norm is None:
            with pytest.raises(InputError, match=f"apply_ln=True asks for blocks.1.{name}"):
                cached.decompose_resid(layer, mlp_input, apply_ln=True)
            continue
        read = cached.decompose_resid(layer, mlp_input, apply_ln=True).sum(0)
        given = cached[f"blocks.1.{name}.hook_out"]
        assert_close(read if norm.bias is None else read + norm.bias, given, bridge)
        read = cached.accumulated_resid(layer, apply_ln=True, mlp_input=mlp_input)[-1]
        assert_close(read if norm.bias is None else read + norm.bias, given, bridge)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_at_the_last_layer_is_the_logits(family: str) -> None:
    bridge, logits, cached = ran(family)
    lens = cached.logit_lens(positions=None)
    assert torch.equal(lens.values[-1], logits)
    assert torch.equal(cached.accumulated_resid(apply_ln=True)[-1], cached["ln_final.hook_out"])
    rows = cached.accumulated_resid()
    for place, label in enumerate(lens.labels[:-1]):
        assert label == f"{place}_pre"
        assert torch.equal(lens.values[place], bridge(rows[place], start_at_layer=bridge.cfg.n_layers))
