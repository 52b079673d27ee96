"""Activation patching against one full forward of the bridge, hooks and all, for each cell; in float64."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest
import scipy.stats
import torch
from torch import Tensor

from pellucid import TransformerBridge, patching
from pellucid.errors import CacheKeyError, HookNameError, HookValueError, InputError, PellucidError, ResultKeyError
from pellucid.patching import cells, statistics
from pellucid.sweep import LogitDifference, LogProbability, Normalized
from tests.models import make_bloom, random_tokens
from tests.patching.sites import FAMILY, hooks_of, shape_of

N_LAYERS, N_HEADS, LENGTH, ROWS = 3, 4, 5, 2
CLEAN = random_tokens(ROWS, LENGTH)
CORRUPTED = CLEAN.clone()
CORRUPTED[:, 1] = (CORRUPTED[:, 1] + 7) % 97
CORRUPTED[1, 0] = (CORRUPTED[1, 0] + 3) % 97
BOUND = 1e-10


@functools.cache
def _model() -> tuple[TransformerBridge, Any, Any]:
    bridge = TransformerBridge(make_bloom(torch.float64))
    with torch.no_grad():
        _, clean = bridge.run_with_cache(CLEAN)
        _, corrupted = bridge.run_with_cache(CORRUPTED)
    return bridge, clean, corrupted


@pytest.fixture
def bridge() -> TransformerBridge:
    return _model()[0]


@pytest.fixture
def clean() -> Any:
    return _model()[1]


@pytest.fixture
def corrupted() -> Any:
    return _model()[2]


def by_row(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def scalar(logits: Tensor) -> Tensor:
    return by_row(logits).mean()


def forward(bridge: TransformerBridge, hooks: Sequence[Any] = (), tokens: Tensor = CORRUPTED, **options: Any) -> Tensor:
    with torch.no_grad():
        return bridge.run_with_hooks(tokens, fwd_hooks=list(hooks), **options)


def reference(bridge: TransformerBridge, name: str, clean: Any, metric: Any = by_row) -> Tensor:
    """``[*axes, row]`` by a plain loop of forwards."""
    shape = shape_of(FAMILY[name], N_LAYERS, N_HEADS, LENGTH)
    scores = [metric(forward(bridge, hooks)) for hooks in hooks_of(FAMILY[name], shape, clean)]
    return torch.stack(scores).unflatten(0, shape)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def function(name: str) -> Any:
    return vars(patching)[f"get_act_patch_{name}"]


# -- the family --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_the_same_numbers_as_full_forwards(bridge: TransformerBridge, clean: Any, name: str) -> None:
    expected = reference(bridge, name, clean)
    result = function(name)(bridge, CORRUPTED, clean, by_row, reduce="none", baseline=True)
    assert result.values.shape == expected.shape
    assert result.values.dtype == torch.float64
    assert result.values.is_contiguous()
    assert largest(result.values - expected) < BOUND
    assert largest(result.effect()) > 1e-4  # a patch that did nothing would pass a test of no patches
    assert largest(result.baseline - by_row(forward(bridge))) < BOUND
    assert len(result.index_df) == expected[..., 0].numel()
    found = function(name)(bridge, CORRUPTED, clean, LogitDifference(3, 5))
    assert largest(found - expected.mean(-1)) < BOUND


def test_the_wrong_clean_run_is_seen(bridge: TransformerBridge, clean: Any, corrupted: Any) -> None:
    expected = reference(bridge, "attn_head_v_by_pos", clean)
    result = patching.get_act_patch_attn_head_v_by_pos(bridge, CORRUPTED, corrupted, by_row, reduce="mean")
    assert largest(result - expected.mean(-1)) > 1e-4


@pytest.mark.parametrize(
    ("every", "names", "order"),
    [
        ("block_every", ["resid_pre", "attn_out", "mlp_out"], (0, 1, 2)),
        ("attn_head_all_pos_every", [f"attn_head_{part}_all_pos" for part in "out q k v pattern".split()], (0, 1, 2)),
        ("attn_head_by_pos_every", [f"attn_head_{part}_by_pos" for part in "out q k v pattern".split()], (0, 1, 2, 3)),
    ],
)
def test_several_sites_at_once(
    bridge: TransformerBridge, clean: Any, every: str, names: list[str], order: tuple[int, ...]
) -> None:
    expected = []
    for name in names:
        scores = reference(bridge, name, clean)
        expected.append(scores.transpose(1, 2) if FAMILY[name].axes == "LHP" else scores)
    stacked = torch.stack(expected)
    found = function(every)(bridge, CORRUPTED, clean, scalar)
    assert found.shape == stacked.shape[:-1]
    assert largest(found - stacked.mean(-1)) < BOUND
    metrics = {"difference": by_row, "other": lambda logits: logits[:, -1, 9]}
    result = function(every)(bridge, CORRUPTED, clean, metrics, reduce="none", baseline=True)
    assert result.values.shape == (2, *stacked.shape)
    assert largest(result["difference"].values - stacked) < BOUND
    swept = ["layer", "head"] if every == "attn_head_all_pos_every" else ["layer", "pos", "head"][: stacked.dim() - 2]
    assert result.axis_names == ["patch_type", *swept]
    assert result.baseline.shape == (2, ROWS)
    for number, metric in enumerate(metrics):
        assert torch.equal(result.effect()[number], result[metric].values - result.baseline[number])
    frame = result.to_dataframe()
    assert len(frame) == result.values.numel()
    assert frame["value"].tolist() == result.values.flatten().tolist()
    assert frame["patch_type_name"].unique().tolist() == result.patch_type_names
    assert len(result.index_df) == stacked[..., 0].numel()


# -- the generic function ----------------------------------------------------------------------------------------------


def swap_neighbours(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> None:
    """Writes in place and returns nothing."""
    _, pos = index
    corrupted[:, [pos, (pos + 1) % LENGTH]] = corrupted[:, [(pos + 1) % LENGTH, pos]]


def halfway(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """Returns another tensor, changing one row and a few neurons only."""
    _, pos = index
    new = corrupted.clone()
    new[1, pos, 4:9] = (corrupted[1, pos, 4:9] + clean[1, pos, 4:9]) / 2
    return new


def nothing(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    return corrupted


def sometimes(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    if index[1] % 2:
        corrupted[:, index[1]] = clean[:, index[1]]
    return corrupted


@pytest.mark.parametrize("setter", [swap_neighbours, halfway, nothing, sometimes])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "mlp_out", "post"])
def test_any_setter(bridge: TransformerBridge, clean: Any, site: str, setter: Any) -> None:
    name = {"post": "mlp.hook_post"}.get(site, f"hook_{site}")
    expected = []
    for layer in range(N_LAYERS):
        for pos in range(LENGTH):

            def hook(tensor: Tensor, hook: Any, layer: int = layer, pos: int = pos) -> Any:
                tensor = tensor.clone()
                answer = setter(tensor, [layer, pos], clean[f"blocks.{layer}.{name}"])
                return tensor if answer is None else answer

            expected.append(scalar(forward(bridge, [(f"blocks.{layer}.{name}", hook)])))
    found = patching.generic_activation_patch(bridge, CORRUPTED, clean, scalar, setter, site, ("layer", "pos"))
    assert largest(found - torch.stack(expected).view(N_LAYERS, LENGTH)) < BOUND


def test_a_setter_is_called_once_a_cell_with_its_own_copy(
    bridge: TransformerBridge, clean: Any, corrupted: Any
) -> None:
    calls: list[list[int]] = []

    def setter(activation: Tensor, index: list[int], clean_activation: Tensor) -> Tensor:
        assert torch.equal(activation, corrupted[f"blocks.{index[0]}.attn.hook_z"])
        assert clean_activation is clean[f"blocks.{index[0]}.attn.hook_z"]
        calls.append(list(index))
        index.append(0)
        activation[:, :, index[1]] = clean_activation[:, :, index[1]]
        return activation

    found, index = patching.generic_activation_patch(
        bridge, CORRUPTED, clean, scalar, setter, "z", ("layer", "head_index"), return_index_df=True
    )
    assert calls == index.to_numpy().tolist()
    assert list(index.columns) == ["layer", "head_index"]
    assert largest(found - reference(bridge, "attn_head_out_all_pos", clean).mean(-1)) < BOUND


def test_an_edit_is_the_smallest_box_of_what_changes(bridge: TransformerBridge, clean: Any, corrupted: Any) -> None:
    def box(hook: str, setter: Any, *index: int) -> tuple[Any, ...]:
        cell = cells.Cell(hook, [0, *index], setter)
        edit = cells.edit_of(bridge.hook_spec(hook), corrupted[hook], cell, clean[hook])
        assert edit is not None
        return edit.rows, edit.positions, edit.heads, edit.neurons, edit.keys, tuple(edit.value.value.shape)

    def few(activation: Tensor, index: Sequence[int], clean_activation: Tensor) -> None:
        activation[1, index[1], 7:9] += 1

    assert box("blocks.0.hook_resid_pre", few, 2) == ([1], [2], None, [7, 8], None, (ROWS, 1, 2))
    head, entry = patching.layer_pos_head_vector_patch_setter, patching.layer_head_dest_src_pos_pattern_patch_setter
    assert box("blocks.0.attn.hook_z", head, 3, 1) == ([0, 1], [3], [1], None, None, (ROWS, 1, 1, 12))
    assert box("blocks.0.attn.hook_pattern", entry, 1, 3, 0) == ([0, 1], [3], [1], None, [0], (ROWS, 1, 1, 1))
    cell = cells.Cell("blocks.0.hook_resid_pre", [0, 1], nothing)
    assert cells.edit_of(bridge.hook_spec(cell.hook), corrupted[cell.hook], cell, clean[cell.hook]) is None


def test_an_index_of_ones_own(bridge: TransformerBridge, clean: Any) -> None:
    expected = reference(bridge, "attn_head_q_by_pos", clean)
    frame = pd.DataFrame({"layer": [2, 0, 2, 1], "pos": [4, 0, 4, 3], "head": [1, 3, 1, 2]}, index=[9, 9, 1, 0])
    options = {"index_axis_names": None, "index_df": frame}
    found = patching.get_act_patch_attn_head_q_by_pos(bridge, CORRUPTED, clean, scalar, **options)
    rows = torch.stack([expected[tuple(row)] for row in frame.to_numpy().tolist()])
    assert found.shape == (4,)
    assert largest(found - rows.mean(-1)) < BOUND
    result = patching.get_act_patch_attn_head_q_by_pos(bridge, CORRUPTED, clean, by_row, reduce="none", **options)
    assert result.axis_names == []
    assert result.index_df is frame
    assert largest(result.values - rows) < BOUND
    assert result.to_dataframe()["pos"].tolist() == [4, 4, 0, 0, 4, 4, 3, 3]
    found, same = patching.get_act_patch_attn_head_q_by_pos(
        bridge, CORRUPTED, clean, scalar, return_index_df=True, **options
    )
    assert same is frame
    empty = patching.get_act_patch_attn_head_q_by_pos(
        bridge, CORRUPTED, clean, scalar, index_axis_names=None, index_df=frame[:0]
    )
    assert empty.shape == (0,)


def test_what_is_returned(bridge: TransformerBridge, clean: Any) -> None:
    patch = patching.get_act_patch_attn_out
    plain = patch(bridge, CORRUPTED, clean, scalar)
    assert isinstance(plain, Tensor)
    assert torch.equal(plain, patch(bridge, CORRUPTED, clean, scalar))
    assert largest(plain - patch(bridge, CORRUPTED, clean, by_row, reduce="mean")) < BOUND
    for options in ({"reduce": "none"}, {"baseline": True, "reduce": "mean"}):
        result = patch(bridge, CORRUPTED, clean, by_row, **options)
        assert isinstance(result, patching.PatchingResult)
        assert result.metric_names == ["metric"]
        assert not result.has_metric_axis
        assert result.reduced == (options["reduce"] == "mean")
        assert largest(result.mean() - plain) < BOUND
        assert result["metric"] is result
    assert result.baseline.shape == ()
    result = patch(bridge, CORRUPTED, clean, {"a": scalar, "b": LogProbability(4)})
    assert result.values.shape == (2, N_LAYERS, LENGTH)
    assert result.has_metric_axis
    assert result["a"].values.shape == (N_LAYERS, LENGTH)
    with pytest.raises(ResultKeyError, match="Nearest"):
        result["c"]


def test_results_have_the_default_dtype() -> None:
    bridge = TransformerBridge(make_bloom(torch.bfloat16))
    _, cache = bridge.run_with_cache(CLEAN)
    found = patching.get_act_patch_resid_pre(bridge, CORRUPTED, cache, lambda logits: logits[0, -1, 3].double())
    assert found.dtype == torch.float32
    found = patching.get_act_patch_resid_pre(bridge, CORRUPTED, cache, lambda logits: logits[0, -1, 3].item())
    assert found.dtype == torch.float32
    found = patching.get_act_patch_resid_pre(bridge, CORRUPTED, cache, lambda logits: logits[0, -1].argmax() == 3)
    assert found.dtype == torch.float32


def test_padded_rows(bridge: TransformerBridge) -> None:
    mask = torch.ones_like(CORRUPTED)
    mask[0, :2] = 0
    with torch.no_grad():
        _, clean = bridge.run_with_cache(CLEAN, attention_mask=mask)
    site = FAMILY["attn_head_k_by_pos"]
    shape = shape_of(site, N_LAYERS, N_HEADS, LENGTH)
    expected = [by_row(forward(bridge, hooks, attention_mask=mask)) for hooks in hooks_of(site, shape, clean)]
    found = patching.get_act_patch_attn_head_k_by_pos(
        bridge, CORRUPTED, clean, by_row, reduce="none", attention_mask=mask
    )
    assert largest(found.values - torch.stack(expected).view_as(found.values)) < BOUND


def test_little_memory(bridge: TransformerBridge, clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = patching.get_act_patch_attn_head_by_pos_every
    expected = patch(bridge, CORRUPTED, clean, scalar)
    with pytest.raises(InputError, match="kept for the edits' values") as refused:
        patch(bridge, CORRUPTED, clean, scalar, memory_limit=1000)
    asked = re.search(r"Give at least ([\d,]+)", str(refused.value))
    assert asked is not None
    limit = 2 * int(asked.group(1).replace(",", ""))
    sweeps: list[int] = []
    run = cells.Sweep.run
    monkeypatch.setattr(
        cells.Sweep, "run", lambda self, edits, **given: sweeps.append(id(self)) or run(self, edits, **given)
    )
    assert largest(patch(bridge, CORRUPTED, clean, scalar, memory_limit=limit) - expected) < BOUND
    assert len(sweeps) == 1
    sweeps.clear()
    # The smallest limit is large beside these models: smaller parts of it, for several groups, each in several parts.
    monkeypatch.setattr(cells, "VALUES", limit // 8_000)
    monkeypatch.setattr(cells, "ACTIVATIONS", limit // 20_000)
    assert largest(patch(bridge, CORRUPTED, clean, scalar, memory_limit=limit) - expected) < BOUND
    assert len(sweeps) > len(set(sweeps)) > 1


def test_functions_of_the_users_own_on_the_bridge(clean: Any) -> None:
    bridge = TransformerBridge(make_bloom(torch.float64))
    bridge.add_hook("blocks.1.attn.hook_z", lambda z, hook: z * 1.5)
    expected = reference(bridge, "attn_head_out_all_pos", clean)
    found = patching.get_act_patch_attn_head_out_all_pos(bridge, CORRUPTED, clean, by_row, reduce="none")
    assert largest(found.values - expected) < BOUND


# -- what a metric may read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric",
    [
        lambda logits: logits.log_softmax(-1)[:, -1, 3].mean(),
        lambda logits: logits[..., 7].sum(),
        lambda logits: torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), CORRUPTED[:, 1:].flatten()),
        lambda logits: logits[torch.arange(ROWS), [2, 4], torch.tensor([3, 8])].sum(),
        lambda logits: float(logits.mean()),
        lambda logits: logits[0, -1].topk(3).values.sum(),
    ],
    ids=["whole", "all positions", "loss", "scattered", "number", "topk"],
)
def test_metrics_that_read_more(bridge: TransformerBridge, clean: Any, metric: Any) -> None:
    expected = reference(bridge, "attn_out", clean, lambda logits: torch.as_tensor(metric(logits), dtype=torch.float64))
    found = patching.get_act_patch_attn_out(bridge, CORRUPTED, clean, metric)
    assert largest(found - expected) < BOUND


def test_a_metric_that_reads_elsewhere_for_some_cells(bridge: TransformerBridge, clean: Any) -> None:
    middle = float(reference(bridge, "resid_pre", clean).mean(-1).median())

    def metric(logits: Tensor) -> Tensor:
        score = by_row(logits).mean()
        return score if score < middle else logits[0, 2, 50] + logits[1].sum()

    expected = reference(bridge, "resid_pre", clean, metric)
    assert len({bool(scalar(forward(bridge, h)) < middle) for h in hooks_of(FAMILY["resid_pre"], (3, 5), clean)}) == 2
    assert largest(patching.get_act_patch_resid_pre(bridge, CORRUPTED, clean, metric) - expected) < BOUND


def test_a_metric_cannot_write(bridge: TransformerBridge, clean: Any) -> None:
    def metric(logits: Tensor) -> Tensor:
        logits[:, -1] -= logits[:, -1].max()
        return logits[:, -1, 3].mean()

    with pytest.raises(InputError, match="clone"):
        patching.get_act_patch_resid_pre(bridge, CORRUPTED, clean, metric)


def test_logit_positions(bridge: TransformerBridge, clean: Any) -> None:
    expected = patching.get_act_patch_resid_pre(bridge, CORRUPTED, clean, scalar)
    found = patching.get_act_patch_resid_pre(bridge, CORRUPTED, clean, scalar, logit_positions=[-1])
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match="logit_positions"):
        patching.get_act_patch_resid_pre(bridge, CORRUPTED, clean, scalar, logit_positions=[0])


# -- identities --------------------------------------------------------------------------------------------------------


def whole(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    return clean


@pytest.mark.parametrize("name", FAMILY)
def test_a_runs_own_value_changes_no_bit(bridge: TransformerBridge, corrupted: Any, name: str) -> None:
    result = function(name)(bridge, CORRUPTED, corrupted, by_row, reduce="none", baseline=True)
    assert torch.equal(result.values, result.baseline.expand_as(result.values))


def test_all_of_one_layers_residual_is_the_other_run(bridge: TransformerBridge, clean: Any) -> None:
    wanted = by_row(forward(bridge, tokens=CLEAN))
    for site in ("resid_pre", "resid_mid", "resid_post"):
        result = patching.generic_activation_patch(
            bridge, CORRUPTED, clean, by_row, whole, site, ("layer",), reduce="none", baseline=True
        )
        if site == "resid_pre":
            assert largest(result.values - wanted) < 1e-13  # up to another order of sums
        assert largest(result.values - wanted) < BOUND
        assert largest(result.normalized(wanted) - 1) < BOUND
        assert largest(result.effect()) > 1e-3


def test_a_normalised_metric_is_0_and_1_at_its_ends(bridge: TransformerBridge, clean: Any, corrupted: Any) -> None:
    metric = Normalized(LogitDifference(3, 5), by_row(forward(bridge)), by_row(forward(bridge, tokens=CLEAN)))
    options = {"index_axis_names": ("layer",), "reduce": "none"}
    for cache, end in ((corrupted, 0), (clean, 1)):
        result = patching.generic_activation_patch(bridge, CORRUPTED, cache, metric, whole, "resid_pre", **options)
        assert largest(result.values - end) < BOUND


@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "mlp_out", "attn_head_v_by_pos"])
def test_positions_before_an_edit_stay(bridge: TransformerBridge, clean: Any, name: str) -> None:
    for read in range(LENGTH - 1):
        result = function(name)(
            bridge, CORRUPTED, clean, lambda logits: logits[:, read].sum(-1), reduce="none", baseline=True
        )
        later = result.values[:, read + 1 :]
        assert torch.equal(later, result.baseline.expand_as(later))
        assert not torch.equal(result.values, result.baseline.expand_as(result.values)) or read == 0


# -- direct paths ------------------------------------------------------------------------------------------------------


def native_direct_path(layer: int, head: int, component: str, write: Tensor) -> Tensor:
    """By Hugging Face's modules, wrapped and run in float64 attention: the receiver's q, k or v recomputed from its norm."""
    bridge = _model()[0]
    block, attention = bridge.hf_model.transformer.h[layer], bridge.hf_model.transformer.h[layer].self_attention
    part = "qkv".index(component)
    d_head = 48 // N_HEADS

    def recompute(tensor: Tensor, hook: Any) -> Tensor:
        residual = _model()[2][f"blocks.{layer}.hook_resid_pre"] + write
        fused = torch.nn.functional.linear(
            block.input_layernorm(residual), attention.query_key_value.weight, attention.query_key_value.bias
        )
        # Each head's d_head queries, keys and values stand beside each other in the fused projection.
        start = head * 3 * d_head + part * d_head
        tensor = tensor.clone()
        tensor[:, :, head] = fused[..., start : start + d_head]
        return tensor

    return forward(bridge, [(f"blocks.{layer}.attn.hook_{component}", recompute)])


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths(bridge: TransformerBridge, clean: Any, corrupted: Any, component: str) -> None:
    found = patching.get_act_patch_direct_path_all_sources(
        bridge, CORRUPTED, clean, corrupted, scalar, component=component
    )
    assert found.shape == (N_LAYERS, N_HEADS, N_LAYERS, N_HEADS)
    assert not bridge.cfg.use_split_qkv_input
    for layer in range(N_LAYERS):
        assert not found[layer, :, : layer + 1].any()
    base = scalar(forward(bridge))
    for src_layer, src_head in ((0, 1), (1, 3)):
        name = f"blocks.{src_layer}.attn.hook_z"
        dense = bridge.hf_model.transformer.h[src_layer].self_attention.dense.weight
        columns = slice(src_head * 12, src_head * 12 + 12)
        write = (clean[name] - corrupted[name])[:, :, src_head] @ dense[:, columns].T
        one = patching.get_act_patch_direct_path(
            bridge, CORRUPTED, clean, corrupted, scalar, src_layer, src_head, component, verbose=False
        )
        assert largest(one - found[src_layer, src_head]) < BOUND
        later = [(layer, head) for layer in range(src_layer + 1, N_LAYERS) for head in range(N_HEADS)]
        expected = torch.stack([scalar(native_direct_path(*to, component, write)) for to in later])
        scores = torch.stack([one[to] for to in later])
        assert largest(scores - expected) < BOUND
        assert largest(scores - base) > 1e-5
    same = patching.get_act_patch_direct_path(bridge, CORRUPTED, clean, clean, LogitDifference(3, 5), 0, 1, component)
    assert torch.equal(same[1:], same[1, 0].expand(N_LAYERS - 1, N_HEADS))


def test_direct_paths_leave_switches_as_they_were(bridge: TransformerBridge, clean: Any, corrupted: Any) -> None:
    patch = patching.get_act_patch_direct_path
    expected = patch(bridge, CORRUPTED, clean, corrupted, scalar, 0, 1)
    bridge.set_use_attn_in(True)
    try:
        assert torch.equal(patch(bridge, CORRUPTED, clean, corrupted, scalar, 0, 1), expected)
        assert bridge.cfg.use_attn_in
        with pytest.raises(RuntimeError, match="mine"):
            patch(bridge, CORRUPTED, clean, corrupted, broken, 0, 1)
        assert bridge.cfg.use_attn_in
        assert not bridge.cfg.use_split_qkv_input
    finally:
        bridge.set_use_attn_in(False)
    bridge.set_use_split_qkv_input(True)
    try:
        patch(bridge, CORRUPTED, clean, corrupted, scalar, 0, 1)
        assert bridge.cfg.use_split_qkv_input
    finally:
        bridge.set_use_split_qkv_input(False)


def broken(logits: Tensor) -> Tensor:
    raise RuntimeError("mine")


# -- mistakes ----------------------------------------------------------------------------------------------------------


def generic(**changed: Any) -> Any:
    bridge, clean, _ = _model()
    arguments: dict[str, Any] = {
        "model": bridge,
        "corrupted_tokens": CORRUPTED,
        "clean_cache": clean,
        "patching_metric": scalar,
        "patch_setter": patching.layer_pos_patch_setter,
        "activation_name": "resid_pre",
        "index_axis_names": ("layer", "pos"),
    }
    return patching.generic_activation_patch(**(arguments | changed))


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"reduce": "sum"}, InputError, "'scalar', 'mean', 'none'"),
        ({"patching_metric": {}}, InputError, "at least one"),
        ({"patching_metric": 3}, InputError, "Metric or a function"),
        ({"patching_metric": by_row}, InputError, r"one number; it gave shape \(2,\)"),
        ({"reduce": "mean"}, InputError, r"one number a row, shape \(2,\); it gave \(\)"),
        ({"reduce": "none", "return_index_df": True}, InputError, "index_df"),
        ({"index_axis_names": None}, InputError, "neither was given"),
        ({"index_df": patching.make_df_from_ranges([2, 2], ["layer", "pos"])}, InputError, "both were given"),
        ({"index_axis_names": ("layer", "position")}, InputError, "Nearest: pos"),
        ({"index_axis_names": ("pos", "layer")}, InputError, "the layer first"),
        ({"index_axis_names": ("layer", "head", "pos")}, InputError, r"index of 2, \[layer, pos\]"),
        ({"activation_name": "resid_pree"}, HookNameError, "blocks.0.hook_resid_pre"),
        ({"clean_cache": {}}, CacheKeyError, "clean cache has no blocks.0.hook_resid_pre"),
        ({"patch_setter": lambda a, i, c: a[:, :1]}, HookValueError, r"\(2, 1, 48\)"),
        ({"patch_setter": lambda a, i, c: a.float()}, HookValueError, "float32"),
        ({"patch_setter": lambda a, i, c: 3}, HookValueError, "int"),
    ],
)
def test_mistakes(changed: dict[str, Any], error: type[PellucidError], says: str) -> None:
    with pytest.raises(error, match=says):
        generic(**changed)


def test_mistakes_in_an_index() -> None:
    options: dict[str, Any] = {"index_axis_names": None}
    frame = pd.DataFrame({"layer": [0, 3], "pos": [0, 0]})
    with pytest.raises(HookNameError, match="0 to 2"):
        generic(index_df=frame, **options)
    with pytest.raises(InputError, match="layer, a whole number"):
        generic(index_df=frame.astype(float), **options)
    with pytest.raises(InputError, match=r"Index \[0, 9\]"):
        generic(index_df=pd.DataFrame({"layer": [0], "pos": [9]}), **options)
    clean = {name: tensor[0] for name, tensor in _model()[1].items()}
    with pytest.raises(InputError, match="batch axis"):
        generic(clean_cache=clean)


def test_mistakes_with_direct_paths(bridge: TransformerBridge, clean: Any, corrupted: Any) -> None:
    patch = patching.get_act_patch_direct_path
    with pytest.raises(InputError, match="component"):
        patch(bridge, CORRUPTED, clean, corrupted, scalar, 0, 1, "z")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="src_head must be at most 3; found 4"):
        patch(bridge, CORRUPTED, clean, corrupted, scalar, 0, 4)
    with pytest.raises(CacheKeyError, match="corrupted cache"):
        patch(bridge, CORRUPTED, clean, {}, scalar, 0, 1)
    assert not bridge.cfg.use_split_qkv_input
    post_norm = TransformerBridge(make_bloom(apply_residual_connection_post_layernorm=True))
    with pytest.raises(PellucidError, match="apply_residual_connection_post_layernorm"):
        patch(post_norm, CORRUPTED, clean, corrupted, scalar, 0, 1)


def test_training_mode_is_refused(clean: Any) -> None:
    bridge = TransformerBridge(make_bloom(torch.float64))
    bridge.train()
    with pytest.raises(InputError, match="training mode"):
        patching.get_act_patch_resid_pre(bridge, CORRUPTED, clean, scalar)


# -- statistics --------------------------------------------------------------------------------------------------------


def a_result(values: Tensor, baseline: Tensor | None) -> patching.PatchingResult:
    index = patching.make_df_from_ranges(values.shape[:-1], ["layer", "pos"])
    return patching.PatchingResult(values, ["layer", "pos"], index, ["metric"], False, baseline)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_the_sign_flip_test_is_scipys(alternative: Any) -> None:
    values = torch.randn(2, 3, 7, dtype=torch.float64) + 0.4
    found = a_result(values, torch.zeros(7, dtype=torch.float64)).permutation_pvalue(alternative=alternative)
    for layer in range(2):
        for pos in range(3):
            test = scipy.stats.permutation_test(
                (values[layer, pos].numpy(),),
                lambda x, axis: x.mean(axis=axis),
                permutation_type="samples",
                n_resamples=math.inf,
                alternative=alternative,
                vectorized=True,
            )
            assert abs(float(found[layer, pos]) - test.pvalue) < 1e-12


def test_many_examples_are_drawn() -> None:
    values = torch.randn(1, 2, 40, dtype=torch.float64)
    values[0, 1] += 3
    result = a_result(values, torch.zeros(40, dtype=torch.float64))
    chances = result.permutation_pvalue(n_permutations=999)
    assert chances[0, 1] == 1 / 1000
    exact = scipy.stats.ttest_1samp(values[0, 0].numpy(), 0).pvalue
    # Five standard deviations of a share of 999 draws, and what separates a t-test from a sign-flip test at n = 40.
    assert abs(float(chances[0, 0]) - exact) < 5 * math.sqrt(exact * (1 - exact) / 999) + 0.02
    assert torch.equal(chances, result.permutation_pvalue(n_permutations=999))
    assert not torch.equal(chances, result.permutation_pvalue(n_permutations=999, seed=1))


def test_bootstrap_and_standard_error() -> None:
    values = torch.tensor([[[0.0, 1, 10], [5, 5, 5]]], dtype=torch.float64)
    result = a_result(values, torch.tensor([0.0, 1, 10], dtype=torch.float64))
    assert largest(result.stderr() - torch.tensor(scipy.stats.sem(values.numpy(), axis=-1))) < 1e-15
    # Of the 27 resamples of three values a fifth have a sum below 2, a fifth one above 20, and neither is a near thing.
    low, high = result.bootstrap_ci(confidence=0.6, n_resamples=4000)
    assert torch.allclose(low, torch.tensor([[2 / 3, 5.0]], dtype=torch.float64))
    assert torch.allclose(high, torch.tensor([[20 / 3, 5.0]], dtype=torch.float64))
    low, high = result.bootstrap_ci(statistic="median", confidence=0.9)
    assert (float(low[0, 0]), float(high[0, 0])) == (0, 10)
    low, high = result.bootstrap_ci(of_effect=True)
    assert float(low[0, 0]) == float(high[0, 0]) == 0


def test_statistics_that_cannot_be_had() -> None:
    values = torch.zeros(1, 2, 3)
    examples = a_result(values, None)
    averaged = patching.PatchingResult(values[..., 0], ["layer", "pos"], examples.index_df, ["metric"], True)
    for call in (averaged.stderr, averaged.bootstrap_ci, averaged.permutation_pvalue):
        with pytest.raises(InputError, match="reduce='none'"):
            call()
    for call in (examples.effect, examples.permutation_pvalue):
        with pytest.raises(InputError, match="baseline=True"):
            call()
    with pytest.raises(InputError, match="shape of baseline"):
        a_result(values, torch.zeros(3)).normalized(torch.zeros(2))
    for wrong in ({"statistic": "mode"}, {"confidence": 1.0}, {"n_resamples": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            examples.bootstrap_ci(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="2 examples"):
        statistics.standard_error(values[..., :1])
