"""Gradients of activations on a model of each layout: against Hugging Face's modules and differences; RelP's conservation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.gradients import run_with_gradients
from tests.attribution.cases import LAYOUTS, METRIC, bridge_of, close, exactness, pair, runs, score, smooth_bridge_of
from tests.families import has_experts, make_family, smooth
from tests.models import make_bloom


def derivative(bridge: TransformerBridge, tokens: Tensor, hook: str, way: Tensor, stays: dict[str, Tensor]) -> Tensor:
    """``[row]``: of the metric along ``way``, by central differences.

    The error is of the square of the step, and of what the model rounds over the step: 1e-15 or, where a part of it
    computes in float32, 1e-7; there the step is wide and the difference extrapolated once (Richardson), to its fourth power.
    """

    def difference(size: float) -> Tensor:
        ends = [moved_score(bridge, tokens, {hook: sign * size * way}, stays) for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * size)

    if bridge.adapter.family.float64:
        return difference(3e-5)
    return (4 * difference(1.5e-2) - difference(3e-2)) / 3


def difference_bound(bridge: TransformerBridge) -> float:
    """Of :func:`derivative`, relative."""
    return 1e-7 if bridge.adapter.family.float64 else 1e-4


def moved_score(bridge: TransformerBridge, tokens: Tensor, moves: dict[str, Tensor], puts: dict[str, Tensor]) -> Tensor:
    """``[row]``: the metric with something added at some points, and others set."""

    def change(tensor: Tensor, hook: Any) -> Tensor:
        return puts[hook.name] if hook.name in puts else tensor + moves[hook.name]

    with torch.no_grad():
        return score(bridge.run_with_hooks(tokens, fwd_hooks=[(name, change) for name in [*moves, *puts]]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_the_stream_are_those_of_hugging_faces_modules(name: str) -> None:
    bridge, (base, _) = bridge_of(name), runs(bridge_of(name))
    model = copy.deepcopy(bridge.hf_model)
    entered: list[Tensor] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden.retain_grad()
        entered.append(hidden)

    for block in model.get_submodule(bridge.adapter.family.blocks_path):
        block.register_forward_pre_hook(enter, with_kwargs=True)
    score(model(base.tokens).logits).sum().backward()
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in range(bridge.cfg.n_layers)]
    found = run_with_gradients(base, METRIC, hooks).gradients()
    for hidden, hook in zip(entered, hooks, strict=True):
        assert hidden.grad is not None
        # Where Hugging Face rounds to float32 inside (norms, a softmax), its 6e-8 grows with the depth: a few times 1e-6.
        close(found[hook], hidden.grad, 1e-5)


def errors_of_derivatives(bridge: TransformerBridge) -> Iterator[tuple[str, float]]:
    """Points outside the blocks and of a middle layer: a gradient along a random direction, less the difference.

    Relative to the difference, or absolute where that is under 1.
    """
    base, _ = runs(bridge, rows=1)
    specs = [spec for spec in bridge.hook_index.values() if spec.layer in (None, 1) and spec.flag is None]
    names = [
        spec.name for spec in specs if spec.kind != "int" and "ln_final" not in spec.name and "logit" not in spec.name
    ]
    names = [hook for hook in names if hook not in ("hook_unembed", "hook_logits") and "router" not in hook]
    run = run_with_gradients(base, METRIC, names)
    gradients, generator = run.gradients(), torch.Generator().manual_seed(3)
    for hook in names:
        tensor = run.activations[hook].detach()
        way = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if hook.endswith("scores"):
            way = way.masked_fill(tensor < -1e4, 0)
        way = way.to(tensor) * tensor[tensor.abs() < 1e4].std()
        expected = derivative(bridge, base.tokens, hook, way, {})
        found = (gradients[hook] * way).flatten(1).sum(1)
        yield hook, float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_point_against_central_differences(name: str) -> None:
    bridge = smooth_bridge_of(name)
    for hook, error in errors_of_derivatives(bridge):
        assert error < difference_bound(bridge), hook


@pytest.mark.parametrize("name", sorted({"mixtral", *filter(has_experts, set(LAYOUTS) - {"bloom"})}))
def test_a_derivative_is_that_of_the_choice_that_was_made(name: str) -> None:
    """Of experts: where the ends of a difference choose as the run did, it is the gradient; a choice that changes is a jump."""
    bridge, chosen = TransformerBridge(make_family(name, torch.float64)), list[Tensor]()
    for block in bridge.hf_model.model.layers:
        block.mlp.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].sort(-1).values))
    bridge(pair(1)[1])
    usual, errors = torch.stack(chosen), {True: list[float](), False: list[float]()}
    for _, error in errors_of_derivatives(bridge):
        ran = torch.stack(chosen).unflatten(0, (-1, bridge.cfg.n_layers))
        errors[bool((ran == usual).all())].append(error)  # the first has the run as well
        chosen.clear()
    assert len(errors[True]) >= 10
    assert max(errors[True]) < difference_bound(bridge)
    assert name != "mixtral" or max(errors[False]) > 0.1  # why derivatives are compared where all experts are chosen


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_left_out_passes_nothing(name: str) -> None:
    """GradDrop: as if what the layer adds stayed what it is; a layer before a node changes nothing, its own leaves nothing."""
    bridge = smooth_bridge_of(name)
    base, _ = runs(bridge)
    last = bridge.cfg.n_layers - 1
    names = [
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
        f"blocks.{last}.hook_mlp_out",
    ]
    run = run_with_gradients(base, METRIC, names, gates=True)
    plain, dropped = run.gradients(), run.gradients(without_layer=1)
    first, mlp = names[0], names[-1]
    way = torch.randn(plain[first].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    way *= run.activations[first].detach().std()
    stays = {hook: run.activations[hook].detach() for hook in names[1:3]}
    expected = derivative(bridge, base.tokens, first, way, stays)
    close((dropped[first] * way).flatten(1).sum(1), expected, difference_bound(bridge))
    assert torch.equal(dropped[mlp], plain[mlp])
    assert not run.gradients([mlp], without_layer=last)[mlp].any()


@pytest.mark.parametrize("rules", [False, True])
def test_the_last_pass_gives_equal_bits_and_lets_go_of_the_graph(rules: bool) -> None:
    bridge = bridge_of("llama")
    base, _ = runs(bridge)
    hooks = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"]
    run = run_with_gradients(base, METRIC, hooks, rules=rules)
    before, last = run.gradients(rules=rules), run.gradients(rules=rules, last=True)
    for hook in hooks:
        assert torch.equal(before[hook], last[hook])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(run.scores.sum(), [run.activations[hook] for hook in hooks])
    with pytest.raises(InputError, match="last backward pass"):
        run.gradients()


def test_after_an_interrupted_last_pass_the_run_is_over() -> None:
    def interrupt(gradient: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    bridge = bridge_of("llama")
    base, _ = runs(bridge)
    with bridge.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", interrupt)]):
        run = run_with_gradients(base, METRIC, ["blocks.0.hook_resid_pre"])
        with pytest.raises(KeyboardInterrupt):
            run.gradients(last=True)
        with pytest.raises(InputError, match="last backward pass"):
            run.gradients()


def without_biases(name: str) -> TransformerBridge:
    model = make_bloom(torch.float64) if name == "bloom" else make_family(name, torch.float64, **smooth(name))
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if parameter.endswith("bias"):
                weight.zero_()
    return TransformerBridge(model)


@pytest.mark.parametrize("name", LAYOUTS)
def test_relp_conserves_the_metric_layer_by_layer(name: str) -> None:
    """Without biases the linearised model has no constants: activations times what flows back are the metric, at each cut."""
    bridge = without_biases(name)
    base, _ = runs(bridge)
    if bridge.cfg.num_experts:
        with pytest.raises(UnsupportedModelError, match="no tensor"):
            run_with_gradients(base, METRIC, ["blocks.0.hook_resid_pre"], rules=True)
        return
    hooks = [f"blocks.{layer}.hook_resid_{which}" for layer in range(bridge.cfg.n_layers) for which in ("pre", "post")]
    run = run_with_gradients(base, METRIC, hooks, rules=True)
    flowing = run.gradients(rules=True)
    for hook in hooks:
        relevance = (run.activations[hook].detach() * flowing[hook]).flatten(1).sum(1)
        close(relevance, run.scores.detach(), exactness(bridge))


@pytest.mark.parametrize("name", LAYOUTS)
def test_rules_change_no_bit_until_they_are_asked_for(name: str) -> None:
    bridge, (base, _) = bridge_of(name), runs(bridge_of(name))
    hooks = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"]
    ruling = not bridge.cfg.num_experts
    # A hooked norm's gradient flows through its parts, and rounds otherwise than torch's own: the same points are hooked.
    seen = [name for name in bridge.hook_index if name.endswith(("hook_scale", "hook_pattern", "hook_logits"))]
    with bridge.hooks(fwd_hooks=[(name, lambda tensor, hook: None) for name in seen]):
        plain, ruled, gated = (
            run_with_gradients(base, METRIC, hooks, rules=rules, gates=gates)
            for rules, gates in ((False, False), (ruling, False), (False, True))
        )
    assert torch.equal(plain.scores, ruled.scores)
    assert torch.equal(plain.scores, gated.scores)
    for hook, gradient in plain.gradients().items():
        assert torch.equal(gated.gradients([hook])[hook], gradient)
        assert torch.equal(ruled.gradients([hook])[hook], gradient)
        if not bridge.cfg.num_experts:
            assert not torch.equal(ruled.gradients([hook], rules=True)[hook], gradient)
