"""Labelled activation patching: every cell against a full forward, labels, refusals, plans, interrupts."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import pellucid.experiments
from pellucid import TransformerBridge
from pellucid.errors import HookDisabledError, HookNameError, InputError
from pellucid.experiments import labelled
from pellucid.experiments.activation_patching import ActivationPatching, activation_patching
from pellucid.experiments.experiment import Experiment
from pellucid.experiments.labelled import from_document, to_document
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.path_patching import PathPatching
from pellucid.experiments.places import SITES, find_site
from pellucid.sweep import KLDivergence, LogitDifference, LogProbability, Normalized
from pellucid.sweep.packing import PackedModel
from tests.models import make_bloom, make_pair, random_tokens

METRIC = LogitDifference(5, 9)
BOUND = 1e-10
LAYERS, HEADS, LENGTH = 3, 4, 6


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return make_pair(torch.float64)[0]


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return random_tokens(2, LENGTH, seed=1)


@pytest.fixture(scope="module")
def corrupted(clean: Tensor) -> Tensor:
    tokens = clean.clone()
    tokens[:, [1, 3]] = random_tokens(2, 2, seed=2)
    return tokens


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def by_hand(bridge: TransformerBridge, base: Tensor, source: Tensor, hook: str, index: Any) -> Tensor:
    """``[row]``: one whole forward, ``tensor[index]`` exchanged."""
    with torch.no_grad():
        _, cache = bridge.run_with_cache(source, names_filter=hook)

        def patch(tensor: Tensor, hook: Any) -> Tensor:
            new = tensor.clone()
            new[index] = cache[hook.name][index]
            return new

        return difference(bridge.run_with_hooks(base, fwd_hooks=[(hook, patch)]))


ALL = slice(None)


@pytest.mark.parametrize(
    ("site", "by", "hook", "index"),
    [
        ("resid_pre", ("layer", "pos"), "blocks.{layer}.hook_resid_pre", lambda layer, pos: (ALL, pos)),
        ("resid_mid", ("pos", "layer"), "blocks.{layer}.hook_resid_mid", lambda layer, pos: (ALL, pos)),
        ("attn_out", ("layer", "pos"), "blocks.{layer}.hook_attn_out", lambda layer, pos: (ALL, pos)),
        ("mlp_out", ("layer", "pos"), "blocks.{layer}.hook_mlp_out", lambda layer, pos: (ALL, pos)),
        ("z", ("layer", "head"), "blocks.{layer}.attn.hook_z", lambda layer, head: (ALL, ALL, head)),
        ("q", ("layer", "head", "pos"), "blocks.{layer}.attn.hook_q", lambda layer, head, pos: (ALL, pos, head)),
        ("v", ("layer", "head"), "blocks.{layer}.attn.hook_v", lambda layer, head: (ALL, ALL, head)),
        ("result", ("layer", "head"), "blocks.{layer}.attn.hook_z", lambda layer, head: (ALL, ALL, head)),
        ("pattern", ("layer", "head"), "blocks.{layer}.attn.hook_pattern", lambda layer, head: (ALL, head)),
        (
            "pattern",
            ("layer", "head", "pos", "key_pos"),
            "blocks.{layer}.attn.hook_pattern",
            lambda layer, head, pos, key_pos: (ALL, head, pos, key_pos),
        ),
        ("mlp_post", ("layer", "pos"), "blocks.{layer}.mlp.hook_post", lambda layer, pos: (ALL, pos)),
        ("ln1.hook_scale", ("layer", "pos"), "blocks.{layer}.ln1.hook_scale", lambda layer, pos: (ALL, pos)),
        ("embed", ("pos",), "hook_embed", lambda pos: (ALL, pos)),
    ],
)
def test_every_cell_is_a_full_forward(
    bridge: TransformerBridge, clean: Tensor, corrupted: Tensor, site: str, by: tuple[str, ...], hook: str, index: Any
) -> None:
    found = activation_patching(bridge, clean, corrupted, METRIC, site, by, normalize=False, rows="each")
    assert found.dims == (*by, "row")
    rng = np.random.default_rng(0)
    cells = list(itertools.product(*(range(found.sizes[axis]) for axis in by)))
    for place in [cells[i] for i in rng.permutation(len(cells))[:12]]:
        at = dict(zip(by, place, strict=True))
        expected = by_hand(bridge, corrupted, clean, hook.format(**at), index(**at))
        assert np.abs(found.isel(at).values - expected.numpy()).max() < BOUND


def test_against_hugging_face_with_its_own_hooks(clean: Tensor, corrupted: Tensor) -> None:
    """``resid_pre`` by forward pre-hooks on Hugging Face's blocks, in float32."""
    bridge, model = make_pair()
    found = activation_patching(bridge, clean, corrupted, METRIC, normalize=False, rows="each")
    entering: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: entering.append(args[0])) for block in model.transformer.h
    ]
    with torch.no_grad():
        model(clean)
    for handle in handles:
        handle.remove()
    for layer, pos in itertools.product(range(LAYERS), range(LENGTH)):

        def patch(module: Any, args: Any) -> Any:
            new = args[0].clone()
            new[:, pos] = entering[layer][:, pos]
            return (new, *args[1:])

        handle = model.transformer.h[layer].register_forward_pre_hook(patch)
        with torch.no_grad():
            expected = difference(model(corrupted).logits)
        handle.remove()
        # float32, sums of a few hundred terms of size 1: a few times 1e-6
        assert np.abs(found.isel(layer=layer, pos=pos).values - expected.numpy()).max() < 2e-5


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_ends_of_the_scale(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor, direction: Any) -> None:
    """All of one layer's residual is the other run; what is equal in both runs changes nothing, to the bit."""
    whole = activation_patching(bridge, clean, corrupted, METRIC, "resid_pre", "layer", direction=direction)
    reached = 1.0 if direction == "denoising" else 0.0
    assert np.abs(whole.values - reached).max() < BOUND
    first = activation_patching(bridge, clean, corrupted, METRIC, direction=direction, layers=[0], rows="each")
    same = [0, 2, 4, 5]
    assert (first.isel(pos=same).values == 1.0 - reached).all()
    assert (first.isel(pos=[1, 3]).values != 1.0 - reached).any()


def test_noising_edits_the_clean_run(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    found = activation_patching(
        bridge, clean, corrupted, METRIC, "z", direction="noising", normalize=False, rows="each", layers=1, heads=[3, 0]
    )
    assert found.coords["layer"].values.tolist() == [1]
    assert found.coords["head"].values.tolist() == [3, 0]
    expected = by_hand(bridge, clean, corrupted, "blocks.1.attn.hook_z", (ALL, ALL, 3))
    assert np.abs(found.sel(layer=1, head=3).values - expected.numpy()).max() < BOUND


def test_the_mean_over_rows_is_of_numerators_and_denominators(
    bridge: TransformerBridge, clean: Tensor, corrupted: Tensor
) -> None:
    raw = activation_patching(bridge, clean, corrupted, METRIC, "z", normalize=False, rows="each")
    with torch.no_grad():
        one, zero = difference(bridge(clean)).numpy(), difference(bridge(corrupted)).numpy()
    each = activation_patching(bridge, clean, corrupted, METRIC, "z", rows="each")
    assert np.abs(each.values - (raw.values - zero) / (one - zero)).max() < BOUND
    mean = activation_patching(bridge, clean, corrupted, METRIC, "z")
    assert np.abs(mean.values - (raw.values - zero).mean(-1) / (one - zero).mean()).max() < BOUND


def test_layers_that_are_not_named_are_patched_together(
    bridge: TransformerBridge, clean: Tensor, corrupted: Tensor
) -> None:
    found = activation_patching(bridge, clean, corrupted, METRIC, "attn_out", "pos", normalize=False, rows="each")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean, names_filter="*.hook_attn_out")

        def patch(tensor: Tensor, hook: Any) -> None:
            tensor[:, 3] = cache[hook.name][:, 3]

        expected = difference(bridge.run_with_hooks(corrupted, fwd_hooks=[("*.hook_attn_out", patch)]))
    assert np.abs(found.sel(pos=3).values - expected.numpy()).max() < BOUND


def test_patching_the_embedding_all_heads_and_all_mlps_is_the_other_run(
    bridge: TransformerBridge, clean: Tensor, corrupted: Tensor
) -> None:
    """Every part that writes to the stream: a check of the sites' completeness, by an edit set over the engine."""
    from pellucid.sweep import Edit, FromRun, Sweep

    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        names = ["hook_embed", *(f"blocks.{i}.attn.hook_z" for i in range(LAYERS))]
        names += [f"blocks.{i}.hook_mlp_out" for i in range(LAYERS)]
        found = Sweep(bridge, corrupted, METRIC).run([[Edit(name, FromRun(cache)) for name in names]])
        assert (found.values["metric"][0] - difference(bridge(clean))).abs().max() < BOUND


# -- neurons -----------------------------------------------------------------------------------------------------------


def test_neurons_in_groups(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    found = activation_patching(
        bridge, clean, corrupted, METRIC, "mlp_post", ("layer", "neuron"), neurons=80, normalize=False, rows="each"
    )
    n_neurons = bridge.cfg.d_mlp
    assert found.coords["neuron"].values.tolist() == [0, 80, 160]
    for first in (0, 160):
        group = slice(first, min(first + 80, n_neurons))
        expected = by_hand(bridge, corrupted, clean, "blocks.2.mlp.hook_post", (ALL, ALL, group))
        assert np.abs(found.sel(layer=2, neuron=first).values - expected.numpy()).max() < BOUND


def test_neurons_in_groups_over_layers(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    groups = {"fr": {0: [3, 5], 2: [7]}, "es": {1: [0, 100]}, "none": {}}
    found = activation_patching(
        bridge, clean, corrupted, METRIC, "mlp_post", "group", neurons=groups, normalize=False, rows="each"
    )
    assert found.coords["group"].values.tolist() == ["fr", "es", "none"]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean, names_filter="*.mlp.hook_post")

        def patch(tensor: Tensor, hook: Any) -> None:
            chosen = groups["fr"].get(hook.layer(), [])
            tensor[..., chosen] = cache[hook.name][..., chosen]

        expected = difference(bridge.run_with_hooks(corrupted, fwd_hooks=[("*.mlp.hook_post", patch)]))
        base = difference(bridge(corrupted))
    assert np.abs(found.sel(group="fr").values - expected.numpy()).max() < BOUND
    assert np.abs(found.sel(group="none").values - base.numpy()).max() < BOUND


@pytest.mark.parametrize(
    ("by", "neurons", "said"),
    [
        ("group", None, "needs neurons="),
        ("group", 3, "needs neurons="),
        (("layer", "neuron"), {"a": {0: [1]}}, "by='group'"),
        (("layer", "neuron"), 0, "1 or more"),
        (("layer", "pos"), 3, "goes with"),
        (("group", "layer"), {"a": {0: [1]}}, "leave 'layer' out"),
        ("group", {"a": {9: [1]}}, "0 to 2"),
        ("group", {"a": {0: [1000]}}, "0 to 191"),
    ],
)
def test_neurons_that_make_no_sense(
    bridge: TransformerBridge, clean: Tensor, corrupted: Tensor, by: Any, neurons: Any, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        activation_patching(bridge, clean, corrupted, METRIC, "mlp_post", by, neurons=neurons)


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_several_metrics_and_functions(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    with torch.no_grad():
        reference = bridge(clean)
    metrics = {
        "LD": METRIC,
        "KL": KLDivergence(reference),
        "mine": lambda logits: (logits[:, -1, 5] - logits[:, -1, 9]).mean(),
        "rows": lambda logits: logits[:, -1, 5] - logits[:, -1, 9],
    }
    found = activation_patching(bridge, clean, corrupted, metrics, "z")
    assert found.dims == ("metric", "layer", "head")
    assert found.attrs["metric"] == ["LD", "KL", "mine", "rows"]
    assert found.attrs["units"] == ["1"] * 4
    for name in ("mine", "rows"):
        assert np.abs(found.sel(metric=name).values - found.sel(metric="LD").values).max() < BOUND
    alone = activation_patching(bridge, clean, corrupted, metrics["LD"], "z")
    assert np.abs(found.sel(metric="LD").values - alone.values).max() < BOUND


def test_what_a_result_says_of_itself(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    found = activation_patching(bridge, clean, corrupted, LogProbability(3), "z", normalize=False)
    assert (found.name, found.attrs["units"], found.attrs["value"]) == ("log-probability", "nats", "metric")
    assert found.attrs["site"] == "z"
    assert found.attrs["hooks"][1] == "blocks.1.attn.hook_z"
    assert found.attrs["differs"] == [1, 3]
    assert found.attrs["cells"] == found.attrs["done"] == LAYERS * HEADS
    for value in found.attrs.values():
        entries = value if isinstance(value, list) else [value]
        assert all(isinstance(entry, str | int | float) and not isinstance(entry, bool) for entry in entries)
    assert labelled.words_of(Normalized(METRIC, 0.0, 1.0)) == ("normalized logit difference", "1")


def test_a_metric_of_the_wrong_shape_is_refused_before_the_sweep(
    bridge: TransformerBridge, clean: Tensor, corrupted: Tensor, monkeypatch: Any
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the sweep was run")

    monkeypatch.setattr(PackedModel, "run", fail)
    with pytest.raises(InputError, match=r"gives shape \(2, 97\)"):
        activation_patching(bridge, clean, corrupted, lambda logits: logits[:, -1], normalize=False)
    for normalize in (True, False):
        with pytest.raises(InputError, match="gives one for all"):
            activation_patching(
                bridge, clean, corrupted, lambda logits: logits[0, -1, 5], normalize=normalize, rows="each"
            )


def test_runs_that_score_the_same_cannot_be_normalized(bridge: TransformerBridge, clean: Tensor) -> None:
    with pytest.raises(InputError, match="nothing between them"):
        activation_patching(bridge, clean, clean, METRIC)
    assert (activation_patching(bridge, clean, clean, METRIC, normalize=False).values != 0).all()


# -- text --------------------------------------------------------------------------------------------------------------


def test_labels_are_tokens_as_a_person_should_see_them(demo: TransformerBridge) -> None:
    metric = LogitDifference(demo.to_single_token(" work"), demo.to_single_token(" law"))
    found = activation_patching(demo, "right to work and", "right to law and", metric, normalize=False)
    assert "".join(found.coords["token"].values.tolist()) == "right·to·law·and"
    assert found.sizes["pos"] == found.coords["token"].size > 3
    assert found.attrs["clean"] == ["right·to·work·and"]


def test_prompts_of_other_lengths_are_refused_with_what_to_do(demo: TransformerBridge) -> None:
    with pytest.raises(InputError, match=r"different numbers of tokens, 3 and 4: .*·the\|·law.*reword one of them"):
        activation_patching(demo, "Everyone has the", "Everyone has the law", METRIC)
    with pytest.raises(InputError, match="tokens in row 1, "):
        activation_patching(
            demo, ["Everyone has the", "Everyone has the law"], ["Everyone has the", "Everyone has"], METRIC
        )
    with pytest.raises(InputError, match="2 rows and corrupted 1"):
        activation_patching(demo, ["Everyone", "Everyone"], ["Everyone"], METRIC)


def test_padding_never_counts(demo: TransformerBridge) -> None:
    """Rows of different lengths in one batch give what each gives alone; a position of padding is no cell of that row."""
    pairs = [("Everyone has the right", "Everyone has the law"), ("Everyone has", "Everyone is")]
    metric = LogitDifference(demo.to_single_token(" to"), demo.to_single_token(" law"))
    for side in ("left", "right"):
        both = activation_patching(
            demo, [c for c, _ in pairs], [d for _, d in pairs], metric, padding_side=side, normalize=False, rows="each"
        )
        for row, (c, d) in enumerate(pairs):
            alone = activation_patching(demo, c, d, metric, normalize=False).values
            found = both.isel(row=row).values
            real = ~np.isnan(found[0])
            assert real.sum() == alone.shape[1]
            assert np.abs(found[:, real] - alone).max() < 1e-4  # float32, other shapes of products
    mean = activation_patching(demo, [c for c, _ in pairs], [d for _, d in pairs], metric, padding_side="right")
    assert np.isfinite(mean.values).all()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "kind", "said"),
    [
        ({"site": "resid_per"}, HookNameError, "Nearest: resid_pre"),
        ({"site": "z", "by": ("layer", "neuron")}, InputError, "layer, pos, head"),
        ({"by": ()}, InputError, "at least one"),
        ({"by": ("pos", "pos")}, InputError, "twice"),
        ({"site": "embed", "by": "pos", "layers": [0]}, InputError, "leave layers out"),
        ({"site": "embed", "by": ("layer", "pos")}, InputError, "can lie along pos"),
        ({"layers": [7]}, InputError, "0 to 2"),
        ({"positions": [9]}, InputError, "0 to 5"),
        ({"heads": [0]}, InputError, "no heads"),
        ({"site": "z", "heads": [4]}, InputError, "0 to 3"),
        ({"direction": "both"}, InputError, "denoising"),
        ({"rows": "all"}, InputError, "mean"),
        ({"memory_limit": 1}, InputError, "too little"),
    ],
)
def test_mistakes(
    bridge: TransformerBridge, clean: Tensor, corrupted: Tensor, keywords: Any, kind: Any, said: str
) -> None:
    with pytest.raises(kind, match=said):
        activation_patching(bridge, clean, corrupted, METRIC, **keywords)


def test_training_mode_is_refused(clean: Tensor, corrupted: Tensor) -> None:
    bridge = TransformerBridge(make_bloom())
    bridge.train()
    with pytest.raises(InputError, match="training mode"):
        activation_patching(bridge, clean, corrupted, METRIC)


def test_every_site_of_the_list_exists(bridge: TransformerBridge) -> None:
    for site in SITES:
        assert find_site(bridge, site).specs


# -- runs of the model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "metric", [METRIC, difference, {"LD": METRIC, "mine": difference}], ids=["ours", "any", "both"]
)
@pytest.mark.parametrize("site", ["resid_pre", "result"])
def test_each_prompt_is_run_once(
    clean: Tensor, corrupted: Tensor, entered: list[int], direction: Any, normalize: bool, metric: Any, site: str
) -> None:
    bridge = make_pair(torch.float64)[0]
    entered.clear()
    settings: Any = {"direction": direction, "normalize": normalize}
    found = activation_patching(bridge, clean, corrupted, metric, site, **settings)
    assert entered == [LENGTH, LENGTH]
    entered.clear()
    experiment = ActivationPatching(bridge, clean, corrupted, None, site=site, **settings)
    logits = experiment.last_logits()
    experiment = experiment.with_metric(metric)
    experiment.plan()
    xr.testing.assert_identical(experiment.run(), found)
    xr.testing.assert_identical(experiment.run(), found)
    assert entered == [LENGTH, LENGTH]
    experiment.with_metric(LogProbability(3)).run()
    assert entered == [LENGTH, LENGTH]
    for name, tokens in (("clean", clean), ("corrupted", corrupted)):
        assert (logits[name] - bridge(tokens)[:, -1]).abs().max() < BOUND


def test_runs_of_another_model_are_made_anew(clean: Tensor, corrupted: Tensor, entered: list[int]) -> None:
    bridge = make_pair(torch.float64)[0]
    experiment = ActivationPatching(bridge, clean, corrupted, METRIC, site="z")
    before = experiment.run()
    with torch.no_grad():
        bridge.hf_model.transformer.h[0].mlp.dense_h_to_4h.weight.mul_(1.5)
    entered.clear()
    after = experiment.run()
    assert entered == [LENGTH, LENGTH]
    assert not np.allclose(after.values, before.values)
    xr.testing.assert_identical(after, activation_patching(bridge, clean, corrupted, METRIC, "z"))


def test_an_experiment_without_a_metric_says_so(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    with pytest.raises(InputError, match="with_metric"):
        ActivationPatching(bridge, clean, corrupted, None).run()


def test_options_that_say_nothing_here_are_refused(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    for name in ("layers", "heads", "neurons"):
        with pytest.raises(InputError, match=f"takes no {name}="):
            PathPatching(
                bridge, clean, corrupted, METRIC, "L*H*", "final", freeze_mlps=True, options=SweepOptions(**{name: 1})
            )
    with pytest.raises(InputError, match="rows_at_once"):
        SweepOptions(rows_at_once=0)
    with pytest.raises(InputError, match="Invalid rows"):
        ActivationPatching(bridge, clean, corrupted, METRIC, options=SweepOptions(rows="all"))  # type: ignore[arg-type]


def experiments() -> Iterator[tuple[str, Any]]:
    """The name of its function, and the experiment: of every one that there is."""
    for found in pkgutil.iter_modules(pellucid.experiments.__path__, "pellucid.experiments."):
        for name, kind in vars(importlib.import_module(found.name)).items():
            own = inspect.isclass(kind) and issubclass(kind, Experiment) and kind.__module__ == found.name
            if own and kind is not Experiment:
                yield re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), kind


WITHOUT = {PathPatching: ("layers", "heads", "neurons")}
"""Options that an experiment refuses, and its function does not take."""


@pytest.mark.parametrize(("function", "experiment"), experiments())
def test_a_function_takes_the_fields_of_its_experiment(function: str, experiment: Any) -> None:
    """Names, defaults and meanings are written once: a function that differs from its experiment is a mistake."""
    called = getattr(importlib.import_module(experiment.__module__), function)
    arguments = dict(inspect.signature(called).parameters)
    for name in ("progress", "on_interrupt"):
        del arguments[name]
    fields = dict(inspect.signature(experiment).parameters) | dict(inspect.signature(SweepOptions).parameters)
    del fields["options"]
    for name in WITHOUT.get(experiment, ()):
        del fields[name]
    assert arguments.keys() == fields.keys()
    for name, argument in arguments.items():
        if experiment is not ActivationPatching or name != "metric":
            assert argument.default == fields[name].default, name
        assert f"{name}: " in (called.__doc__ or "") + (experiment.__doc__ or ""), name


# -- the sweep ---------------------------------------------------------------------------------------------------------


def test_a_plan_comes_before_the_run(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    prepared = ActivationPatching(bridge, clean, corrupted, METRIC)
    plan = prepared.plan()
    assert plan.n_edits == LAYERS * LENGTH
    assert plan.flops < plan.flops_whole
    xr.testing.assert_identical(prepared.run(), activation_patching(bridge, clean, corrupted, METRIC))


def test_an_interrupted_sweep_is_returned_with_gaps(
    bridge: TransformerBridge, clean: Tensor, corrupted: Tensor, monkeypatch: Any
) -> None:
    prepared = ActivationPatching(bridge, clean, corrupted, METRIC, options=SweepOptions(rows_at_once=1))
    whole = prepared.run()
    run, ran = PackedModel.run, []

    def stop(self: Any, runs: Any) -> Any:
        ran.append(len(runs))
        if len(ran) > 1:
            raise KeyboardInterrupt
        return run(self, runs)

    monkeypatch.setattr(PackedModel, "run", stop)
    found = prepared.run(on_interrupt="return")
    done = ~np.isnan(found.values)
    assert 0 < done.sum() < found.size
    assert found.attrs["done"] == done.sum()
    assert (found.values[done] == whole.values[done]).all()
    with pytest.raises(KeyboardInterrupt):
        prepared.run()


def test_opt_in_points_are_left_as_they_were(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    before = dict(bridge.cfg.flags)
    activation_patching(bridge, clean, corrupted, METRIC, "result")
    assert bridge.cfg.flags == before
    with pytest.raises(ZeroDivisionError):
        activation_patching(bridge, clean, corrupted, lambda logits: 1 / 0 + logits[0, 0, 0], "result")
    assert bridge.cfg.flags == before
    bridge.set_use_attn_in(True)
    try:
        with bridge.points_on(["use_split_qkv_input"]):
            assert bridge.cfg.use_split_qkv_input
            assert not bridge.cfg.use_attn_in
        assert bridge.cfg.use_attn_in
        assert not bridge.cfg.use_split_qkv_input
        handle = bridge.add_hook("blocks.0.hook_attn_in", lambda tensor, hook: None)[0]
        with pytest.raises(HookDisabledError), bridge.points_on(["use_split_qkv_input"]):
            pass
        assert bridge.cfg.use_attn_in
        handle.remove()
        with bridge.points_on("use_attn_result"), pytest.raises(ZeroDivisionError), bridge.points_on("use_hook_mlp_in"):
            assert bridge.cfg.flags == before | dict.fromkeys(
                ("use_attn_in", "use_attn_result", "use_hook_mlp_in"), True
            )
            _ = 1 / 0
        assert bridge.cfg.flags == before | {"use_attn_in": True}
    finally:
        bridge.set_use_attn_in(False)


def test_functions_on_the_bridge_are_honoured(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    def double(tensor: Tensor, hook: Any) -> Tensor:
        return tensor * 2

    with bridge.hooks([("blocks.1.hook_mlp_out", double)]):
        found = activation_patching(
            bridge, clean, corrupted, METRIC, normalize=False, rows="each", layers=[1], positions=[3]
        )
        expected = by_hand(bridge, corrupted, clean, "blocks.1.hook_resid_pre", (ALL, 3))
    assert np.abs(found.values[0, 0] - expected.numpy()).max() < BOUND


def test_a_result_survives_json(bridge: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    for rows in ("mean", "each"):
        found = activation_patching(bridge, clean, corrupted, METRIC, rows=rows)
        found.values[0, 0] = np.nan
        text = json.dumps(to_document(found), allow_nan=False)
        xr.testing.assert_identical(from_document(json.loads(text)), found)
    single = found.astype("float32", keep_attrs=True)
    xr.testing.assert_identical(from_document(json.loads(json.dumps(to_document(single)))), single)
    with pytest.raises(InputError, match="no saved result"):
        from_document({})
