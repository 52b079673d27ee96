"""TransformerLens 4.3.0's patching functions beside ours, in one process: the same arguments, index and numbers.

Where they are wrong on BLOOM, plain Hugging Face modules say who is right. Runs where TransformerLens is installed.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid import patching as ours
from tests.models import make_bloom, random_tokens
from tests.patching.sites import FAMILY

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (extra 'peer')")

ROWS, LENGTH = 3, 6
CLEAN = random_tokens(ROWS, LENGTH)
CORRUPTED = CLEAN.clone()
CORRUPTED[:, 1] = (CORRUPTED[:, 1] + 7) % 97
CORRUPTED[2, 0] = (CORRUPTED[2, 0] + 3) % 97
BOUND = 1e-5
FUNCTIONS = sorted(name for name in ours.__all__ if name.startswith(("get_act_patch", "layer_", "make_", "generic")))
EVERY = ["block_every", "attn_head_all_pos_every", "attn_head_by_pos_every"]


@functools.cache
def lens() -> Any:
    import transformer_lens.patching

    return transformer_lens.patching


@functools.cache
def models() -> tuple[TransformerBridge, Any, Any, Any, Any]:
    """Ours and theirs, their clean caches, and an untouched Hugging Face model."""
    from transformer_lens.model_bridge import TransformerBridge as Theirs

    from pellucid.demo import load_demo_bridge

    model = make_bloom()
    theirs = Theirs.boot_transformers(
        "bloom", hf_model=copy.deepcopy(model), tokenizer=load_demo_bridge().tokenizer, device="cpu"
    )
    theirs.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    bridge = TransformerBridge(copy.deepcopy(model))
    with torch.no_grad():
        return bridge, theirs, bridge.run_with_cache(CLEAN)[1], theirs.run_with_cache(CLEAN)[1], model


def by_row(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def scalar(logits: Tensor) -> Tensor:
    return by_row(logits).mean()


def entropy(logits: Tensor) -> Tensor:
    chances = logits.log_softmax(-1)
    return -(chances.exp() * chances).sum(-1).mean(-1)


def both(name: str, metric: Any, **options: Any) -> tuple[Any, Any]:
    bridge, theirs, clean, their_clean, _ = models()
    found = vars(ours)[f"get_act_patch_{name}"](bridge, CORRUPTED, clean, metric, **options)
    with torch.no_grad():
        wanted = vars(lens())[f"get_act_patch_{name}"](theirs, CORRUPTED, their_clean, metric, **options)
    return found, wanted


def agree(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        assert isinstance(found, Tensor)
        assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
        return bool((found - wanted).abs().max() < BOUND)
    assert type(found).__name__ == type(wanted).__name__ == "PatchingResult"
    for attribute in ("axis_names", "metric_names", "reduced", "has_metric_axis", "patch_type_names"):
        assert getattr(found, attribute) == getattr(wanted, attribute), attribute
    pd.testing.assert_frame_equal(found.index_df, wanted.index_df)
    assert (found.baseline is None) == (wanted.baseline is None)
    same = found.baseline is None or agree(found.baseline, wanted.baseline)
    return same and agree(found.values, wanted.values)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_arguments(name: str) -> None:
    mine = inspect.signature(vars(ours)[name]).parameters
    theirs = inspect.signature(vars(lens())[name]).parameters
    shared = [parameter for parameter in theirs.values() if parameter.kind is not parameter.VAR_KEYWORD]
    assert [p for p in mine if p in theirs] == [p.name for p in shared]
    for parameter in shared:
        found = mine[parameter.name]
        assert found.kind is parameter.kind, parameter.name
        if callable(parameter.default) and parameter.default is not parameter.empty:
            assert found.default.__name__ == parameter.default.__name__
        else:
            assert found.default == parameter.default, parameter.name
    for extra in mine.values():
        if extra.name not in theirs:
            assert extra.kind is extra.KEYWORD_ONLY, extra.name
            assert extra.default is not extra.empty, extra.name


def test_none_is_missing() -> None:
    public = {name for name in vars(lens()) if name.startswith(("get_act_patch", "layer_", "make_", "generic"))}
    assert public == set(FUNCTIONS)
    methods = {name for name in vars(lens().PatchingResult) if not name.startswith("_")}
    assert methods <= set(vars(ours.PatchingResult)) | set(ours.PatchingResult.__dataclass_fields__)
    assert list(lens().PatchingResult.__dataclass_fields__) == list(ours.PatchingResult.__dataclass_fields__)
    for method in ("bootstrap_ci", "permutation_pvalue", "normalized"):
        mine, theirs = (inspect.signature(vars(m.PatchingResult)[method]).parameters for m in (ours, lens()))
        assert [(p.name, p.kind, p.default) for p in mine.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_the_same_numbers(name: str) -> None:
    found, wanted = both(name, by_row, reduce="none", baseline=True)
    assert agree(found, wanted)
    assert float(wanted.effect().abs().max()) > 100 * BOUND
    assert not agree(found.values.roll(1, 0), wanted.values)  # what the comparison would see


@pytest.mark.parametrize("name", EVERY)
def test_the_same_numbers_of_several_sites(name: str) -> None:
    assert agree(*both(name, scalar))
    if name != "attn_head_by_pos_every":
        assert agree(*both(name, {"a": by_row, "b": entropy}, reduce="none", baseline=True))
        assert agree(*both(name, by_row, reduce="mean", baseline=True))


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        (scalar, {}),
        (by_row, {"reduce": "mean"}),
        (by_row, {"reduce": "mean", "baseline": True}),
        ({"one": scalar}, {}),
        ({"a": by_row, "b": entropy}, {"reduce": "none"}),
        ({"a": by_row, "b": entropy}, {"reduce": "mean", "baseline": True}),
        (lambda logits: logits[0, -1, 3].item(), {}),
        (lambda logits: logits[0, -1].argmax() == 3, {}),
    ],
)
def test_the_same_kinds_of_result(metric: Any, options: dict[str, Any]) -> None:
    found, wanted = both("attn_out", metric, **options)
    assert agree(found, wanted)
    if not isinstance(wanted, Tensor):
        frame, other = found.to_dataframe(), wanted.to_dataframe()
        assert list(frame.columns) == list(other.columns)
        pd.testing.assert_frame_equal(frame, other, atol=BOUND, rtol=0)


def test_the_same_index_of_ones_own() -> None:
    frame = pd.DataFrame({"layer": [2, 0, 1], "pos": [5, 0, 3], "head": [1, 3, 2]})
    for options in ({}, {"return_index_df": True}):
        found, wanted = both("attn_head_v_by_pos", scalar, index_axis_names=None, index_df=frame, **options)
        if options:
            (found, mine), (wanted, theirs) = found, wanted
            assert mine is theirs is frame
        assert agree(found, wanted)
    assert agree(*both("attn_head_v_by_pos", by_row, index_axis_names=None, index_df=frame, reduce="none"))
    (found, mine), (wanted, theirs) = both("resid_pre", scalar, return_index_df=True)
    pd.testing.assert_frame_equal(mine, theirs)
    assert agree(found, wanted)


def test_the_same_statistics() -> None:
    found, wanted = both("attn_head_out_all_pos", by_row, reduce="none", baseline=True)
    # On the same values: what is compared is the statistics, seeds and all.
    mine = ours.PatchingResult(wanted.values, wanted.axis_names, wanted.index_df, ["metric"], False, wanted.baseline)
    for options in ({}, {"statistic": "median", "seed": 3}, {"of_effect": True, "confidence": 0.5, "n_resamples": 300}):
        for end, other in zip(mine.bootstrap_ci(**options), wanted.bootstrap_ci(**options), strict=True):
            assert torch.equal(end, other)
    clean = wanted.baseline + 1
    assert torch.equal(mine.stderr(), wanted.stderr())
    assert torch.equal(mine.mean(), wanted.mean())
    assert torch.equal(mine.normalized(clean), wanted.normalized(clean))
    for alternative in ("two-sided", "greater", "less"):
        assert torch.equal(
            mine.permutation_pvalue(alternative=alternative), wanted.permutation_pvalue(alternative=alternative)
        )
    many = torch.randn(2, 3, 30)
    index = ours.make_df_from_ranges([2, 3], ["layer", "pos"])
    results = [
        kind(many, ["layer", "pos"], index, ["metric"], False, many[0, 0])
        for kind in (ours.PatchingResult, lens().PatchingResult)
    ]
    assert torch.equal(results[0].permutation_pvalue(seed=5), results[1].permutation_pvalue(seed=5))


# -- who is right ------------------------------------------------------------------------------------------------------


def native_direct_path(model: Any, layer: int, head: int, part: int, delta: Tensor) -> Tensor:
    """The receiver's queries, keys or values recomputed from its own norm and projection, by Hugging Face's modules."""
    block = model.transformer.h[layer]
    projection = block.self_attention.query_key_value
    d_head = model.config.hidden_size // model.config.n_head
    columns = slice(head * 3 * d_head + part * d_head, head * 3 * d_head + (part + 1) * d_head)
    seen: dict[str, Tensor] = {}

    def note(module: Any, args: Any) -> None:
        seen["residual"] = args[0]

    def replace(module: Any, args: Any, output: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(
            seen["residual"] + delta,
            (model.config.hidden_size,),
            block.input_layernorm.weight,
            block.input_layernorm.bias,
            model.config.layer_norm_epsilon,
        )
        output = output.clone()
        output[..., columns] = torch.nn.functional.linear(normed, projection.weight, projection.bias)[..., columns]
        return output

    handles = [block.register_forward_pre_hook(note), projection.register_forward_hook(replace)]
    with torch.no_grad():
        logits = model(CORRUPTED).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths_who_is_right(component: Any) -> None:
    bridge, theirs, clean, their_clean, model = models()
    with torch.no_grad():
        _, corrupted = bridge.run_with_cache(CORRUPTED)
        _, their_corrupted = theirs.run_with_cache(CORRUPTED)
    source = (0, 1)
    name = f"blocks.{source[0]}.attn.hook_z"
    d_head = model.config.hidden_size // model.config.n_head
    dense = model.transformer.h[source[0]].self_attention.dense.weight
    columns = slice(source[1] * d_head, (source[1] + 1) * d_head)
    delta = ((clean[name] - corrupted[name])[:, :, source[1]] @ dense[:, columns].T).detach()
    found = ours.get_act_patch_direct_path(bridge, CORRUPTED, clean, corrupted, scalar, *source, component)
    wanted = lens().get_act_patch_direct_path(
        theirs, CORRUPTED, their_clean, their_corrupted, scalar, *source, component, verbose=False
    )
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    native = torch.zeros_like(found)
    for layer in range(source[0] + 1, model.config.n_layer):
        for head in range(model.config.n_head):
            native[layer, head] = scalar(native_direct_path(model, layer, head, "qkv".index(component), delta))
    assert (found - native).abs().max() < BOUND
    assert (wanted - native).abs().max() > 10 * BOUND  # theirs adds it after the norm


def test_resid_mid_by_a_setter_that_returns_who_is_right() -> None:
    bridge, theirs, clean, their_clean, model = models()

    def setter(corrupted: Tensor, index: Any, clean_activation: Tensor) -> Tensor:
        new = corrupted.clone()
        new[:, index[1]] = clean_activation[:, index[1]]
        return new

    arguments: tuple[Any, ...] = (scalar, setter, "resid_mid", ("layer", "pos"))
    found = ours.generic_activation_patch(bridge, CORRUPTED, clean, *arguments)
    with torch.no_grad():
        wanted = lens().generic_activation_patch(theirs, CORRUPTED, their_clean, *arguments)
    native = torch.zeros_like(found)
    for layer in range(model.config.n_layer):
        for pos in range(LENGTH):

            def patch(module: Any, args: Any, output: Any, layer: int = layer, pos: int = pos) -> Any:
                residual = output[0].clone()
                residual[:, pos] = clean[f"blocks.{layer}.hook_resid_mid"][:, pos]
                return (residual, *output[1:])

            handle = model.transformer.h[layer].self_attention.register_forward_hook(patch)
            with torch.no_grad():
                native[layer, pos] = scalar(model(CORRUPTED).logits)
            handle.remove()
    assert (found - native).abs().max() < BOUND
    assert (wanted - native).abs().max() > 100 * BOUND  # theirs reaches the MLP's branch alone
    assert (ours.get_act_patch_resid_mid(bridge, CORRUPTED, clean, scalar) - native).abs().max() < BOUND
