"""Estimates on a model of each layout, against runs in which the thing is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.attribution.estimates import Estimates, Estimator
from pellucid.attribution.qk_fix import pattern_change, pattern_hooks
from pellucid.experiments.options import Method
from pellucid.gradients import run_with_gradients
from pellucid.sweep.unedited import Unedited
from tests.attribution.cases import (
    LAYOUTS,
    METRIC,
    bridge_of,
    cells,
    close,
    exactness,
    pair,
    runs,
    score,
    smooth_bridge_of,
)


def estimates(
    bridge: TransformerBridge, site: str, by: Any, *methods: Method, points: int = 20, **options: Any
) -> Estimates:
    return Estimator(bridge, [cells(bridge, site, by, **options)], methods, points).estimate(*runs(bridge), METRIC)


def activations(
    bridge: TransformerBridge, tokens: Tensor, names: list[str], patches: dict[str, Any]
) -> dict[str, Tensor]:
    """At some points of a run with others patched by functions of the tensor."""
    found: dict[str, Tensor] = {}

    def change(tensor: Tensor, hook: Any) -> Tensor:
        made: Tensor = patches[hook.name](tensor.clone())
        return made

    def keep(tensor: Tensor, hook: Any) -> None:
        found[hook.name] = tensor

    functions: list[Any] = [(name, change) for name in patches] + [(name, keep) for name in names]
    with torch.no_grad():
        found["score"] = score(bridge.run_with_hooks(tokens, fwd_hooks=functions))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_error_of_atp_falls_with_the_square_of_the_step(name: str) -> None:
    bridge = smooth_bridge_of(name)
    (base, _), hook = runs(bridge), "blocks.0.hook_mlp_out"
    run = run_with_gradients(base, METRIC, [hook])
    way = torch.randn(run.activations[hook].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    way *= 0.2 * run.activations[hook].detach().std()
    linear = (way * run.gradients()[hook]).flatten(1).sum(1)
    errors = []
    for step in (1.0, 0.25):
        moved = activations(bridge, base.tokens, [], {hook: lambda tensor, step=step: tensor + step * way})["score"]
        errors.append(float((moved - run.scores.detach() - step * linear).abs().sum()))
    # 16 for a quarter of the step, as far as the third order is small beside the second, and float32 inside
    assert 8 < errors[0] / errors[1] < 32, errors


@pytest.mark.parametrize("name", LAYOUTS)
def test_relp_is_exact_where_what_follows_is_linear(name: str) -> None:
    """The last layer's contributions, each position alone, the final norm's scale kept."""
    bridge = bridge_of(name)
    if bridge.cfg.num_experts or bridge.adapter.family.logits_change:
        pytest.skip("no rules, or a cap of the logits")
    clean, corrupted = pair()
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_mlp_out"
    found = estimates(bridge, "mlp_out", ("layer", "pos"), "relp", layers=[-1]).effects["mlp_out", "relp"][:, 0]
    source = activations(bridge, clean, [last], {})[last]
    kept = activations(bridge, corrupted, ["ln_final.hook_scale"], {})
    expected = torch.zeros_like(found)
    for pos in (3, clean.shape[1] - 1):

        def put(tensor: Tensor, pos: int = pos) -> Tensor:
            tensor[:, pos] = source[:, pos]
            return tensor

        patches = {last: put, "ln_final.hook_scale": lambda tensor: kept["ln_final.hook_scale"]}
        expected[:, pos] = activations(bridge, corrupted, [], patches)["score"] - kept["score"]
    close(found, expected, exactness(bridge))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_fix_of_queries_and_keys_is_the_first_order_effect_through_the_pattern(name: str) -> None:
    """One query or key of one head is patched in a run of its own, and the pattern it makes is read."""
    bridge = bridge_of(name)
    attention = bridge.adapter.family.attention
    flat = bool(attention.q_norm) and attention.head_norm == "flat"
    (base, source), corrupted, layer = runs(bridge), pair()[1], 1
    n_heads, n_key_heads = bridge.cfg.n_heads, bridge.cfg.n_key_value_heads
    pattern = f"blocks.{layer}.attn.hook_pattern"
    patterns = [f"blocks.{each}.attn.hook_pattern" for each in range(bridge.cfg.n_layers)]
    gradient = run_with_gradients(base, METRIC, patterns).gradients()  # all layers are patched in one run
    before = activations(bridge, corrupted, [pattern], {})[pattern]
    for part, heads in (("q", n_heads), ("k", n_key_heads)):
        site = f"attn.hook_{part}_normed" if flat else part
        hook = f"blocks.{layer}.attn.hook_{part}{'_normed' if flat else ''}"
        where = cells(bridge, site, ("layer", "pos", "head"))
        base_run, source_run = (
            run.observe([*where.hooks, *pattern_hooks(where)]).activations for run in (base, source)
        )
        found = where.summed(pattern_change(bridge, base, where, base_run, source_run).products(gradient))[:, layer]
        for pos, head in ((4, heads - 1), (3, 0), (3, heads - 1)):

            def put(tensor: Tensor, pos: int = pos, head: int = head) -> Tensor:
                tensor[:, pos, head] = source_run[hook][:, pos, head]
                return tensor

            after = activations(bridge, corrupted, [pattern], {hook: put})[pattern]
            expected = ((after - before) * gradient[pattern]).flatten(1).sum(1)
            assert expected.abs().max() > 0
            # The softmax's own rounding to float32 where the family has it, else nothing is rounded.
            close(found[:, pos, head], expected, exactness(bridge))


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_keys_of_a_head_are_patched_together_where_positions_are_no_axis(name: str) -> None:
    bridge = bridge_of(name)
    attention = bridge.adapter.family.attention
    if attention.q_norm and attention.head_norm == "flat":
        pytest.skip("its norm is over all heads")
    (base, source), (_, corrupted), hook = runs(bridge), pair(), "blocks.1.attn.hook_k"
    pattern = "blocks.1.attn.hook_pattern"
    gradient, head = run_with_gradients(base, METRIC, [pattern]).gradients(), bridge.cfg.n_key_value_heads - 1
    where = cells(bridge, "k", ("layer", "head"), layers=[1], positions=[1, 3])
    base_run, source_run = (run.observe([hook, *pattern_hooks(where)]).activations for run in (base, source))
    found = where.summed(pattern_change(bridge, base, where, base_run, source_run).products(gradient))[:, 0]

    def put(tensor: Tensor) -> Tensor:
        tensor[:, [1, 3], head] = source_run[hook][:, [1, 3], head]
        return tensor

    after, before = (activations(bridge, corrupted, [pattern], patches)[pattern] for patches in ({hook: put}, {}))
    close(found[:, head], ((after - before) * gradient[pattern]).flatten(1).sum(1), exactness(bridge))


@pytest.mark.parametrize("name", LAYOUTS)
def test_grad_drop_at_its_limits(name: str) -> None:
    """In the last layer nothing that can be left out stands between: the magnitude is AtP's. Before it is the mean."""
    bridge = bridge_of(name)
    by, n_layers = ("layer", "pos"), bridge.cfg.n_layers
    found = (
        Estimator(bridge, [cells(bridge, "mlp_out", by)], ("atp", "atp*"), 1).estimate(*runs(bridge), METRIC).effects
    )
    plain, star = found["mlp_out", "atp"], found["mlp_out", "atp*"]
    close(star[:, -1], plain[:, -1], 1e-12)
    base, source = runs(bridge)
    hooks = [f"blocks.{layer}.hook_mlp_out" for layer in range(n_layers)]
    run = run_with_gradients(base, METRIC, hooks, gates=True)
    moved = source.observe(hooks).activations
    way = moved[hooks[0]] - run.activations[hooks[0]].detach()
    each = [(way * run.gradients([hooks[0]], without_layer=drop)[hooks[0]]).sum(-1) for drop in range(n_layers)]
    assert not each[0].any()
    expected = torch.stack(each).abs().sum(0) / (n_layers - 1) * plain[:, 0].sign()
    close(star[:, 0], expected, 1e-12)


POINTS = {"olmo2": 60, "gemma2": 40, "gemma3": 40}
"""More where the way turns sharply."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_integrated_gradients_are_complete(name: str) -> None:
    """Their sum is what patching the whole layer does; with another prompt's embedding as baseline only what differs counts."""
    bridge = smooth_bridge_of(name)
    found = estimates(bridge, "z", ("layer", "head"), "ig", points=POINTS.get(name, 20), layers=[1])
    assert float(found.deltas["z"].abs().max()) < exactness(bridge)


def test_integrated_gradients_of_the_embedding() -> None:
    bridge = bridge_of("bloom")
    base, source = runs(bridge)
    found = Estimator(bridge, [cells(bridge, "embed", "pos")], ("ig",), 60).estimate(base, source, METRIC)
    effect = found.effects["embed", "ig"]
    close(effect.sum(1), found.source - found.base, 1e-9)
    assert not effect[:, [0, 2, 4, 5, 6]].any()


def embedding_score(bridge: TransformerBridge, base: Unedited) -> Any:
    def forward(embedding: Tensor) -> Tensor:
        rows = embedding.shape[0] // base.tokens.shape[0]
        tokens = base.tokens.repeat(rows, 1)
        return score(bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda tensor, hook: embedding)]))

    return forward


def test_integrated_gradients_against_captum() -> None:
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    bridge = bridge_of("bloom")
    base, source = runs(bridge)
    ends = [run.observe(["hook_embed"]).activations["hook_embed"] for run in (source, base)]
    theirs = captum.IntegratedGradients(embedding_score(bridge, base), multiply_by_inputs=True)
    expected = theirs.attribute(ends[0], ends[1], n_steps=20, method="gausslegendre").sum(-1)
    found = Estimator(bridge, [cells(bridge, "embed", "pos")], ("ig",), 20).estimate(base, source, METRIC)
    close(found.effects["embed", "ig"], expected, 1e-7)  # captum holds the weights of the points in float32: 6e-8
