"""Ablations: against full forwards, and the identities that hold for every model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import CacheKeyError, HookNameError, InputError
from pellucid.experiments.ablation import Ablation, ablation
from pellucid.sweep import LogitDifference, NextTokenLoss
from tests.models import make_pair, random_tokens

METRIC = LogitDifference(5, 9)
BOUND = 1e-10
LAYERS, HEADS, LENGTH = 3, 4, 6


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return make_pair(torch.float64)[0]


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return random_tokens(4, LENGTH, seed=1)


def score(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def cached(bridge: TransformerBridge, tokens: Tensor, names: str, mask: Tensor | None = None) -> Any:
    with torch.no_grad():
        return bridge.run_with_cache(tokens, names_filter=names, attention_mask=mask)[1]


def changed(
    bridge: TransformerBridge, tokens: Tensor, hook: str, index: Any, value: Any, mask: Tensor | None = None
) -> Tensor:
    """``[row]``: how far the metric moves in a whole forward with ``tensor[index] = value``."""

    def put(tensor: Tensor, hook: Any) -> None:
        tensor[index] = value

    def last(logits: Tensor) -> Tensor:
        if mask is None:
            return score(logits)
        ends = mask.shape[1] - 1 - mask.flip(-1).argmax(-1)
        return (logits[torch.arange(len(logits)), ends, 5] - logits[torch.arange(len(logits)), ends, 9]).clone()

    with torch.no_grad():
        return last(bridge.run_with_hooks(tokens, fwd_hooks=[(hook, put)], attention_mask=mask)) - last(
            bridge(tokens, attention_mask=mask)
        )


ALL = slice(None)


@pytest.mark.parametrize(
    ("site", "by", "hook", "index"),
    [
        ("z", None, "blocks.1.attn.hook_z", (ALL, ALL, 2)),
        ("attn_out", None, "blocks.1.hook_attn_out", ALL),
        ("mlp_out", ("layer", "pos"), "blocks.1.hook_mlp_out", (ALL, 2)),
        ("mlp_post", ("layer", "neuron"), "blocks.1.mlp.hook_post", (ALL, ALL, slice(128, 192))),
        ("resid_mid", ("layer",), "blocks.1.hook_resid_mid", ALL),
    ],
)
@pytest.mark.parametrize("how", ["zero", "mean", "position_mean", "resample"])
def test_every_way_is_a_full_forward(
    bridge: TransformerBridge, tokens: Tensor, site: str, by: Any, hook: str, index: Any, how: Any
) -> None:
    neurons = 64 if site == "mlp_post" else None
    found = ablation(bridge, tokens, METRIC, site, by, how=how, neurons=neurons, rows="each")
    at: dict[str, int] = {"layer": 1}
    at |= {"head": 2} if site == "z" else {"pos": 2} if site == "mlp_out" else {}
    at |= {"neuron": 128} if neurons else {}
    there = cached(bridge, tokens, hook)[hook]
    values = {
        "zero": torch.zeros_like(there),
        "mean": there.mean((0, 1), keepdim=True).expand_as(there),
        "position_mean": there.mean(0, keepdim=True).expand_as(there),
        "resample": there[found.attrs["resampled_rows"]] if how == "resample" else there,
    }
    expected = changed(bridge, tokens, hook, index, values[how][index])
    assert np.abs(found.sel(at).values - expected.numpy()).max() < BOUND


def test_all_heads_in_one_call(bridge: TransformerBridge, tokens: Tensor) -> None:
    found = ablation(bridge, tokens, METRIC, how="zero")
    assert found.dims == ("layer", "head")
    assert found.shape == (LAYERS, HEADS)
    assert (found.attrs["units"], found.attrs["value"], found.attrs["how"]) == ("logits", "change", "zero")
    itself = ablation(bridge, tokens, METRIC, how="zero", change=False)
    assert np.abs(itself.values - itself.attrs["base"][0] - found.values).max() < BOUND


# -- identities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["z", "attn_out", "mlp_out", "mlp_post", "resid_pre"])
def test_the_position_mean_over_identical_prompts_changes_nothing(bridge: TransformerBridge, site: str) -> None:
    """Four equal rows: their sum and its quarter are exact, so each value is itself, to the bit."""
    tokens = random_tokens(1, LENGTH, seed=3).expand(4, -1).contiguous()
    assert (ablation(bridge, tokens, METRIC, site, how="position_mean").values == 0).all()
    three = ablation(bridge, tokens[:1], METRIC, site, how="position_mean", data=tokens[:3])
    assert np.abs(three.values).max() < 1e-12  # a third is not exact


def test_resampling_by_the_identity_changes_nothing(bridge: TransformerBridge, tokens: Tensor) -> None:
    for site in ("z", "attn_out", "pattern"):
        found = ablation(bridge, tokens, METRIC, site, how="resample", permutation=[0, 1, 2, 3])
        assert (found.values == 0).all()
    assert (ablation(bridge, tokens, METRIC, how="resample").values != 0).all()


def test_zeroing_every_heads_result_leaves_the_bias(bridge: TransformerBridge, tokens: Tensor) -> None:
    results = ablation(bridge, tokens, METRIC, "result", "layer", how="zero", rows="each")
    heads = ablation(bridge, tokens, METRIC, "z", "layer", how="zero", rows="each")
    outputs = ablation(bridge, tokens, METRIC, "attn_out", how="zero", rows="each")
    for layer in range(LAYERS):
        bias = bridge.blocks[layer].attn.b_O.detach()
        expected = changed(bridge, tokens, f"blocks.{layer}.hook_attn_out", ALL, bias)
        assert np.abs(results.sel(layer=layer).values - expected.numpy()).max() < BOUND
        assert np.abs(heads.sel(layer=layer).values - expected.numpy()).max() < BOUND
    assert np.abs(outputs.values - heads.values).max() > 1e-3


def test_effects_of_the_mean_cancel_under_a_linear_read_out(bridge: TransformerBridge, tokens: Tensor) -> None:
    """The last MLP feeds the logits through the final norm alone; with its scale held at one number that is linear."""
    handle = bridge.add_hook("ln_final.hook_scale", lambda scale, hook: torch.full_like(scale, 2.0))[0]
    try:
        found = ablation(bridge, tokens, METRIC, "mlp_out", how="position_mean", layers=[LAYERS - 1], rows="each")
    finally:
        handle.remove()
    assert np.abs(found.values).max() > 1e-3
    assert np.abs(found.values.mean()) < 1e-14


def test_a_dead_part_is_not_missed(tokens: Tensor) -> None:
    bridge = make_pair(torch.float64)[0]
    with torch.no_grad():
        bridge.blocks[1].attn.W_O[2] = 0
    for how in ("zero", "mean", "position_mean", "resample"):
        found = ablation(bridge, tokens, METRIC, how=how)
        assert abs(found.sel(layer=1, head=2).item()) < 1e-12
        assert abs(found.sel(layer=1, head=1).item()) > 1e-6


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["mean", "position_mean"])
def test_means_are_over_tokens_and_not_over_padding(
    bridge: TransformerBridge, tokens: Tensor, side: str, how: Any
) -> None:
    data = random_tokens(11, 8, seed=5)  # more than one batch
    lengths = [8, 6, 8, 7, 6, 8, 8, 6, 7, 8, 6]
    mask = torch.zeros(11, 8, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(8 - length, 8) if side == "left" else slice(0, length)] = 1
    found = ablation(bridge, tokens, METRIC, how=how, data=data, data_mask=mask, rows="each")
    assert found.attrs["data_tokens"] == sum(lengths)
    hook = "blocks.2.attn.hook_z"
    rows = [cached(bridge, data[i : i + 1, mask[i].bool()], hook)[hook][0] for i in range(11)]
    if how == "mean":
        value = torch.cat(rows).mean(0)[1]
    else:
        value = torch.stack([torch.stack([row[pos] for row in rows]).mean(0)[1] for pos in range(LENGTH)])
    expected = changed(bridge, tokens, hook, (ALL, ALL, 1), value)
    assert np.abs(found.sel(layer=2, head=1).values - expected.numpy()).max() < BOUND


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_position_mean_lies_where_the_tokens_of_a_padded_input_are(bridge: TransformerBridge, side: str) -> None:
    tokens, data = random_tokens(2, 6, seed=6), random_tokens(5, 7, seed=7)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    found = ablation(
        bridge, tokens, METRIC, "mlp_out", how="position_mean", data=data, attention_mask=mask, rows="each"
    )
    hook = "blocks.1.hook_mlp_out"
    mean = cached(bridge, data, hook)[hook].mean(0)
    alone = tokens[1:, mask[1].bool()]
    expected = changed(bridge, alone, hook, ALL, mean[:4])
    assert np.abs(found.sel(layer=1).values[1] - expected.numpy()).max() < BOUND


def test_a_cache_is_data(bridge: TransformerBridge, tokens: Tensor) -> None:
    data = random_tokens(3, 7, seed=8)
    cache = cached(bridge, data, "*.attn.hook_z")
    for how in ("mean", "position_mean"):
        from_tokens = ablation(bridge, tokens, METRIC, how=how, data=data)
        assert np.abs(ablation(bridge, tokens, METRIC, how=how, data=cache).values - from_tokens.values).max() < BOUND
        plain = dict(cache)
        found = ablation(bridge, tokens, METRIC, how=how, data=plain, data_mask=torch.ones(3, 7))
        assert np.abs(found.values - from_tokens.values).max() < BOUND
    with pytest.raises(CacheKeyError, match=r"lack blocks\.0\.hook_mlp_out"):
        ablation(bridge, tokens, METRIC, "mlp_out", how="mean", data=cache)


def test_resampling_draws_a_cycle_by_its_seed(bridge: TransformerBridge, tokens: Tensor) -> None:
    drawn = [ablation(bridge, tokens, METRIC, how="resample", seed=seed).attrs["resampled_rows"] for seed in range(20)]
    assert all(sorted(rows) == [0, 1, 2, 3] for rows in drawn)
    assert all(row != i for rows in drawn for i, row in enumerate(rows))
    assert len({tuple(rows) for rows in drawn}) > 3
    again = ablation(bridge, tokens, METRIC, how="resample", seed=7)
    assert (again.values == ablation(bridge, tokens, METRIC, how="resample", seed=7).values).all()
    other = ablation(bridge, tokens, METRIC, how="resample", data=random_tokens(9, LENGTH, seed=9))
    assert all(0 <= row < 9 for row in other.attrs["resampled_rows"])


def test_texts_as_data(demo: TransformerBridge) -> None:
    found = ablation(
        demo,
        "Everyone has the right to life",
        NextTokenLoss(),
        how="mean",
        data=["Everyone has the right to work", "No one shall be held"],
    )
    assert found.attrs["units"] == "nats"
    assert found.attrs["data_tokens"] == len(demo.to_tokens("Everyone has the right to work")[0]) + len(
        demo.to_tokens("No one shall be held")[0]
    )
    assert found.values.max() > 0.5


@pytest.mark.parametrize(
    ("keywords", "kind", "said"),
    [
        ({"how": "median"}, InputError, "position_mean"),
        ({"how": "zero", "data": "text"}, InputError, "uses no data"),
        ({"how": "mean", "permutation": [1, 0, 3, 2]}, InputError, "resample"),
        ({"how": "resample", "permutation": [1, 0]}, InputError, "for each of the 4 rows"),
        ({"how": "resample", "permutation": [1, 0, 3, 4]}, InputError, "0 to 3"),
        ({"how": "resample", "data": random_tokens(2, 5)}, InputError, "as many tokens"),
        ({"how": "position_mean", "data": random_tokens(2, 5)}, InputError, "no mean at position 5"),
        ({"how": "mean", "site": "pattern"}, InputError, "key positions"),
        ({"how": "zero", "site": "zz"}, HookNameError, "Nearest"),
        ({"how": "mean", "data": ["a"], "data_mask": torch.ones(1, 1)}, InputError, "that of texts"),
    ],
)
def test_mistakes(bridge: TransformerBridge, tokens: Tensor, keywords: Any, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        ablation(bridge, tokens, METRIC, **keywords)


def test_one_row_has_nothing_to_be_resampled_from(bridge: TransformerBridge, tokens: Tensor) -> None:
    with pytest.raises(InputError, match="several prompts, or data="):
        ablation(bridge, tokens[:1], METRIC, how="resample")


def test_a_plan_comes_before_the_run(bridge: TransformerBridge, tokens: Tensor) -> None:
    assert Ablation(bridge, tokens, METRIC, how="mean").plan().n_edits == LAYERS * HEADS
