"""Mixtures of experts: an edit of the router's logits changes the choice that Hugging Face makes; the inside is refused.

That every point is the oracle's, to the bit, is tested with the other families.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import Corpus, TransformerBridge
from pellucid.analysis.linear_units import published_places
from pellucid.analysis.neurons import activity_place, zero
from pellucid.errors import HookNameError, UnsupportedModelError, WeightError
from pellucid.experiments.places import find_site
from pellucid.hook_points import HookPoint
from pellucid.running_stats import CountPositive
from pellucid.sweep import Edit, LogitDifference, Sweep, Zero
from tests.families import KIN, make_family
from tests.models import random_tokens

MIXTURES = ("qwen2_moe", *KIN)


def choices_in(model: Any, layer: int, run: Any) -> tuple[Tensor, Tensor]:
    """What Hugging Face's experts are given in a run: the chosen ones ``[batch * pos, k]``, and their weights."""
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append((args[1].clone(), args[2].clone())))
    run()
    handle.remove()
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("family", MIXTURES)
def test_an_edit_of_the_logits_is_another_choice(family: str) -> None:
    bridge, tokens = TransformerBridge(make_family(family)), random_tokens()
    config = bridge.original_model.config
    kept: list[Tensor] = []

    def other(logits: Tensor, hook: HookPoint) -> Tensor:
        assert logits.shape == (*tokens.shape, bridge.cfg.num_experts)
        kept.append(-3 * logits)
        return kept[-1]

    with torch.no_grad():
        chosen, weights = choices_in(
            bridge.hf_model, 1, lambda: bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mlp.gate.hook_out", other)])
        )
        wanted, places = kept[0].flatten(0, 1).softmax(-1).topk(bridge.cfg.experts_per_token)
        if getattr(config, "norm_topk_prob", True):
            wanted = wanted / wanted.sum(-1, keepdim=True)
        usual, _ = choices_in(bridge.hf_model, 1, lambda: bridge(tokens))
    assert torch.equal(chosen, places)
    assert not torch.equal(chosen, usual)
    torch.testing.assert_close(weights, wanted, rtol=2e-7, atol=0)


def test_a_gradient_passes_through_the_logits() -> None:
    bridge, gradients = TransformerBridge(make_family("mixtral")), list[Tensor]()
    with bridge.hooks(bwd_hooks=[("blocks.1.mlp.hook_router_logits", lambda grad, hook: gradients.append(grad))]):
        bridge(random_tokens())[:, -1].logsumexp(-1).sum().backward()
    assert gradients[0].shape == (2, 9, 5)
    assert bool(gradients[0].any(-1).all())


def test_the_inside_of_an_expert_is_refused_by_name() -> None:
    bridge, tokens = TransformerBridge(make_family("mixtral")), random_tokens()
    why = r"The MLP is a mixture of experts, .*mlp\.hook_router_logits and what it adds, hook_mlp_out"
    for name in ("blocks.1.mlp.hook_post", "blocks.*.mlp.hook_pre"):
        with pytest.raises(HookNameError, match=why):
            bridge.run_with_cache(tokens, names_filter=name)
    with pytest.raises(HookNameError, match=why):
        find_site(bridge, "mlp_post")
    corpus = Corpus.from_tokens({"x": [tokens[0]], "y": [tokens[1]]}, context=9)
    with pytest.raises(HookNameError, match=why):  # what language neurons count
        bridge.collect(corpus, {f"blocks.*.{activity_place(bridge)}": [CountPositive()]}, progress=False)
    with pytest.raises(HookNameError, match=why):
        zero([(0, 1)]).check(bridge)
    with pytest.raises(WeightError, match=r"model\.layers\.0\.mlp is a mixture of experts, and has no W_in"):
        _ = bridge.W_in
    assert published_places(bridge.adapter.family) == ("attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_attn_out")


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2: some layers would have a plain MLP"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = .*: some layers would have a plain MLP"),
        ("olmoe", {"clip_qkv": 1.0}, r"clip_qkv = 1\.0: queries, keys and values would be cut off"),
    ],
)
def test_what_would_have_other_points_is_refused(family: str, settings: dict[str, Any], why: str) -> None:
    model = make_family(family)
    model.config.update(settings)
    with pytest.raises(UnsupportedModelError, match=why):
        TransformerBridge(model)


def close_choice() -> Any:
    """A model with two experts that a router can hardly tell apart, and that give different things."""
    model = make_family("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight[1] = torch.nextafter(weight[0], torch.tensor(9.0))
    return model


def test_sweeps_are_whole_forwards_to_the_bit() -> None:
    """Packed rows round otherwise, and there a close choice falls otherwise: by 0.1 and more in a logit, not by a rounding."""
    model = close_choice()
    tokens = torch.cat([random_tokens(1, 12, seed) for seed in range(4)])
    with torch.no_grad():
        together, alone = (
            model(tokens, use_cache=False).logits,
            torch.cat([model(row[None], use_cache=False).logits for row in tokens]),
        )
    assert (together - alone).abs().max() > 0.01  # why
    bridge = TransformerBridge(model)
    edits = [Edit(f"blocks.{layer}.hook_resid_pre", Zero(), positions=at) for layer in range(3) for at in (1, 4)]
    edits.append(Edit("blocks.1.mlp.hook_router_logits", Zero(), positions=4, neurons=2))
    sweep = Sweep(bridge, tokens[:1], LogitDifference(5, 6))
    assert "Mixtral's router chooses experts" in sweep.plan(edits).why_whole
    values = sweep.run(edits).values["metric"][:, 0]
    for edit, value in zip(edits, values, strict=True):

        def zeroed(tensor: Tensor, hook: HookPoint, edit: Edit = edit) -> None:
            tensor[:, edit.positions, slice(None) if edit.neurons is None else edit.neurons] = 0

        logits = bridge.run_with_hooks(tokens[:1], fwd_hooks=[(edit.hook, zeroed)])[0, -1].detach()
        assert float(logits[5] - logits[6]) == float(value)


@pytest.mark.parametrize("family", MIXTURES)
def test_processing_keeps_log_probabilities(family: str) -> None:
    bridge, tokens = TransformerBridge(make_family(family)), random_tokens()
    gain = bridge.blocks[0].ln2.module.weight.clone()
    with torch.no_grad():
        before = bridge(tokens).log_softmax(-1)
        state = bridge.process_weights()
        assert (bridge(tokens).log_softmax(-1) - before).abs().max() < 1e-5
    assert "fold_ln" in str(state)
    assert torch.equal(bridge.blocks[0].ln2.module.weight, gain)  # router and experts read it
    assert bool((bridge.blocks[0].ln1.module.weight == 1).all())
    with pytest.raises(WeightError, match="center_writing_weights would change"):
        bridge.process_weights(center_writing_weights=True)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_original_weights_come_back_from_files_that_name_each_expert(family: str, tmp_path: Path) -> None:
    bridge = TransformerBridge(make_family(family))
    before = bridge.weights_hash()
    bridge.save_pretrained(tmp_path)
    bridge.process_weights()
    assert bridge.weights_hash() != before
    bridge.unprocess_weights(tmp_path)
    assert bridge.weights_hash() == before
