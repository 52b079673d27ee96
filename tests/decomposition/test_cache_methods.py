"""A cache's own habits: labels, slices, changes in place, files, and what it refuses by name."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pellucid import ActivationCache, TransformerBridge
from pellucid.analysis.attribution import logit_attribution
from pellucid.errors import CacheKeyError, InputError, PellucidWarning, StoreError
from pellucid.model_bridge.generalized_components.block import BlockBridge
from pellucid.slices import Slice
from tests.families import make_family
from tests.models import make_bloom, random_tokens

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return TransformerBridge(make_bloom(DOUBLE))


@pytest.fixture
def cached(bridge: TransformerBridge) -> ActivationCache:
    with torch.no_grad():
        cache: ActivationCache = bridge.run_with_cache(random_tokens())[1]
    return cache


def test_labels(cached: ActivationCache) -> None:
    _, labels = cached.accumulated_resid(1, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre"]
    _, labels = cached.accumulated_resid(2, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "2_mid"]
    assert cached.accumulated_resid(return_labels=True)[1] == ["0_pre", "1_pre", "2_pre", "final_post"]
    _, labels = cached.decompose_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["embed", "0_attn_out", "0_mlp_out", "1_attn_out"]
    assert cached.decompose_resid(2, mode="mlp", incl_embeds=False, return_labels=True)[1] == ["0_mlp_out", "1_mlp_out"]
    _, labels = cached.stack_head_results(1, incl_remainder=True, return_labels=True)
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3", "remainder"]
    _, labels = cached.stack_neuron_results(2, neuron_slice=(4, 6), return_labels=True)
    assert labels == ["L0N4", "L0N5", "L1N4", "L1N5"]
    _, labels = cached.get_full_resid_decomposition(1, expand_neurons=False, return_labels=True)
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3", "0_mlp_out", "embed", "bias"]
    llama = TransformerBridge(make_family("llama")).run_with_cache(random_tokens())[1]
    assert "bias" not in llama.get_full_resid_decomposition(1, return_labels=True)[1]
    gpt2 = TransformerBridge(make_family("gpt2")).run_with_cache(random_tokens())[1]
    assert gpt2.decompose_resid(0, return_labels=True)[1] == ["embed", "pos_embed"]


@pytest.mark.parametrize("pos", [3, -1, (2, 5), (None, 4), [4, 1], Slice(2), torch.arange(9) > 6], ids=str)
def test_positions_are_taken_everywhere(cached: ActivationCache, pos: Any) -> None:
    taken = Slice.of(pos)
    direction = torch.randn(48, 2, dtype=DOUBLE)
    for method, arguments in (
        (ActivationCache.accumulated_resid, {"apply_ln": True}),
        (ActivationCache.accumulated_resid, {"layer": 1, "apply_ln": True}),
        (ActivationCache.decompose_resid, {"apply_ln": True}),
        (ActivationCache.stack_head_results, {"incl_remainder": True}),
        (ActivationCache.stack_neuron_results, {"layer": 1, "neuron_slice": [5], "incl_remainder": True}),
        (ActivationCache.get_full_resid_decomposition, {"layer": 2, "apply_ln": True}),
    ):
        found: Any = method(cached, pos_slice=pos, **arguments)  # type: ignore[operator]
        torch.testing.assert_close(found, taken.apply(method(cached, **arguments), 2))  # type: ignore[operator]
    found = cached.get_full_resid_decomposition(pos_slice=pos, project_output_onto=direction)
    torch.testing.assert_close(found, taken.apply(cached.get_full_resid_decomposition(), 2) @ direction)
    torch.testing.assert_close(
        cached.get_neuron_results(1, 7, pos), taken.apply(cached.get_neuron_results(1), 1)[..., 7, :]
    )


def test_rows_and_neurons_that_are_taken(cached: ActivationCache) -> None:
    stack = cached.decompose_resid()
    read = cached.apply_ln_to_stack(stack, batch_slice=1)
    torch.testing.assert_close(read, cached.apply_ln_to_stack(stack)[:, 1])
    one = cached.apply_slice_to_batch_dim(1)
    assert not one.has_batch_dim
    assert one.model is cached.model
    torch.testing.assert_close(one.decompose_resid(apply_ln=True), read)
    torch.testing.assert_close(one.logit_attrs(stack[:, 1], 5), cached.logit_attrs(stack, 5)[:, 1])
    two = cached.apply_slice_to_batch_dim([1, 0])
    assert torch.equal(two.tokens, cached.tokens.flip(0))
    assert torch.equal(two["resid_post", -1], cached["resid_post", -1].flip(0))
    with pytest.raises(InputError, match="no batch axis"):
        one.apply_slice_to_batch_dim(0)
    neurons = cached.get_neuron_results(0)
    assert neurons.shape == (2, 9, 192, 48)
    assert torch.equal(cached.get_neuron_results(0, neuron_slice=(3, 5)), neurons[:, :, 3:5])


def test_tokens_of_logit_attrs(cached: ActivationCache) -> None:
    stack, tokens = cached.decompose_resid(), random_tokens(seed=4)
    each = torch.stack([cached.logit_attrs(stack, int(token)) for token in tokens.flatten()], -1)
    each = each.unflatten(-1, tokens.shape)  # [part, batch, pos, batch of the token, pos of the token]
    by_row = torch.stack([each[:, row, :, row, 0] for row in range(2)], 1)
    torch.testing.assert_close(cached.logit_attrs(stack, tokens[:, 0]), by_row)
    by_cell = torch.stack([torch.stack([each[:, r, p, r, p] for p in range(9)], -1) for r in range(2)], 1)
    torch.testing.assert_close(cached.logit_attrs(stack, tokens), by_cell)
    by_pos = torch.stack([each[:, :, p, 0, p] for p in range(9)], -1)
    torch.testing.assert_close(cached.logit_attrs(stack, tokens[0]), by_pos)


def test_head_results_are_kept_when_asked(bridge: TransformerBridge, cached: ActivationCache) -> None:
    assert not any("hook_result" in name for name in cached)
    before = cached.stack_head_results()
    assert not any("hook_result" in name for name in cached)
    cached.compute_head_results()
    bridge.set_use_attn_result(True)
    try:
        run = bridge.run_with_cache(random_tokens(), names_filter="blocks.*.hook_result")[1]
    finally:
        bridge.set_use_attn_result(False)
    torch.testing.assert_close(cached["result", 1], run["result", 1])
    torch.testing.assert_close(cached.stack_head_results(), before)
    with pytest.warns(PellucidWarning, match="in the cache already"):
        cached.compute_head_results()
    assert cached.stack_activation("result").shape == (3, 2, 9, 4, 48)
    assert torch.equal(cached.stack_activation("scale", 2, "ln1")[1], cached["scale", 1, "ln1"])


def test_changes_are_in_place(bridge: TransformerBridge) -> None:
    cache = bridge.run_with_cache(random_tokens(1))[1]
    assert cache.remove_batch_dim() is cache
    assert not cache.has_batch_dim
    assert cache["hook_embed"].shape == (9, 48)
    assert cache.remove_batch_dim()["hook_embed"].shape == (9, 48)
    assert cache.to(dtype=torch.float32) is cache
    assert cache["hook_embed"].dtype == torch.float32
    assert cache["embed.hook_in"].dtype == torch.int64
    assert float((cache.decompose_resid().sum(0) - cache["resid_post", -1]).abs().max()) < 1e-4
    several = bridge.run_with_cache(random_tokens(2))[1]
    with pytest.raises(InputError, match="this run had 2"):
        several.remove_batch_dim()
    assert several["hook_embed"].shape == (2, 9, 48)


def test_views_show_names(cached: ActivationCache) -> None:
    for view in (cached.items(), cached.values()):
        assert "blocks.*.hook_resid_pre" in repr(view)
        assert len(repr(view)) < 5000
        assert "<table>" in view._repr_html_()
    assert [name for name, _ in cached.items()] == list(cached)
    assert all(isinstance(tensor, Tensor) for tensor in cached.values())


def test_files(bridge: TransformerBridge, tmp_path: Path) -> None:
    tokens, mask = random_tokens(), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = False
    for first in (bridge.run_with_cache(tokens, attention_mask=mask)[1], bridge.run_with_cache(tokens[:1])[1]):
        if first.tokens.shape[0] == 1:
            first.remove_batch_dim()
        first.save(tmp_path / "cache.safetensors")
        again = ActivationCache.load(tmp_path / "cache.safetensors", bridge)
        assert list(again) == list(first)
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert again.has_batch_dim == first.has_batch_dim
        assert torch.equal(again.tokens, first.tokens)
        assert torch.equal(again.real, first.real)
        assert torch.equal(again.decompose_resid(), first.decompose_resid())
    other = TransformerBridge(make_bloom(hidden_size=32))
    with pytest.raises(InputError, match="of another model: embed.hook_out has d_model 48, and this model's is 32"):
        ActivationCache.load(tmp_path / "cache.safetensors", other)
    with pytest.raises(InputError, match="of another model: this one has no blocks.2"):
        ActivationCache.load(tmp_path / "cache.safetensors", TransformerBridge(make_bloom(n_layer=2)))
    with pytest.raises(StoreError, match="is missing"):
        ActivationCache.load(tmp_path / "none.safetensors", bridge)


def test_a_cache_without_its_model(bridge: TransformerBridge, cached: ActivationCache) -> None:
    for alone in (ActivationCache(dict(cached), bridge.hook_index), pickle.loads(pickle.dumps(cached))):
        assert torch.equal(alone["pattern", 0], cached["pattern", 0])
        with pytest.raises(InputError, match="set cache.model = bridge"):
            alone.decompose_resid()
        alone.model = bridge
        assert torch.equal(alone.decompose_resid(), cached.decompose_resid())
    assert copy.deepcopy(cached).model is None


def test_what_was_not_kept(bridge: TransformerBridge) -> None:
    cache = bridge.run_with_cache(random_tokens(), names_filter=["hook_embed", "blocks.*_out", "ln_final.hook_scale"])[
        1
    ]
    assert cache.decompose_resid(apply_ln=True).shape == (7, 2, 9, 48)
    with pytest.raises(CacheKeyError, match=r"blocks.0.attn.hook_z exists but was not kept"):
        cache.stack_head_results()
    with pytest.raises(CacheKeyError, match=r"blocks.1.ln1.hook_scale was not kept: add it"):
        cache.decompose_resid(1, apply_ln=True)


def test_toggling_gradients_warns() -> None:
    cache = ActivationCache({}, TransformerBridge(make_bloom()))
    try:
        with pytest.warns(PellucidWarning, match="gradients are off from here on"):
            cache.toggle_autodiff()
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


# -- the lens ----------------------------------------------------------------------------------------------------------


def test_what_a_lens_keeps(bridge: TransformerBridge, cached: ActivationCache) -> None:
    whole = cached.logit_lens(positions=None, incl_mid=True)
    assert whole.labels[:3] == ["0_pre", "0_mid", "1_pre"]
    logits = whole.values
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(whole.entropy, -(probabilities * probabilities.log()).sum(-1))
    some = cached.logit_lens(positions=None, incl_mid=True, vocab=[3, 90])
    assert torch.equal(some.values, logits[..., [3, 90]])
    top = cached.logit_lens(positions=None, incl_mid=True, top_k=4, return_type="probs")
    assert top.top_ids is not None
    assert torch.equal(top.top_ids, logits.topk(4).indices)
    torch.testing.assert_close(top.values, probabilities.topk(4).values)
    ranked = cached.logit_lens(positions=None, incl_mid=True, targets=[3, 90], return_type="log_probs")
    torch.testing.assert_close(ranked.values, logits.log_softmax(-1)[..., [3, 90]])
    assert torch.equal(ranked.rank_trajectory(90), (logits > logits[..., [90]]).sum(-1))
    tokens = random_tokens(seed=7)
    by_cell = cached.logit_lens(positions=None, incl_mid=True, targets=tokens)
    asked = tokens.expand(7, -1, -1)[..., None]
    assert torch.equal(by_cell.values, logits.gather(-1, asked))
    assert torch.equal(by_cell.rank_trajectory(), (logits > logits.gather(-1, asked)).sum(-1))
    few = cached.logit_lens(positions=None, incl_mid=True, targets=tokens, chunk_size=4)
    torch.testing.assert_close(few.values, by_cell.values)
    last = cached.logit_lens(layers=[-1, 0], batch_slice=1)
    assert last.labels == ["final_post", "0_pre"]
    torch.testing.assert_close(last.values, logits[[-1, 0], 1, -1])
    assert not last.has_batch_dim
    twice = cached.logit_lens(positions=None, lens=lambda residual, place: residual * (place + 1))
    torch.testing.assert_close(twice.values[0], logits[0])
    raw = cached.logit_lens(positions=None, apply_ln=False).values[0]
    torch.testing.assert_close(raw, cached["resid_pre", 0] @ bridge.W_U.detach())


def test_a_lens_as_an_array(cached: ActivationCache) -> None:
    whole = cached.logit_lens(positions=None).to_xarray()
    assert whole.dims == ("layer", "row", "pos", "token")
    assert whole.attrs["units"] == "logits"
    assert whole.sel(layer="final_post", token=5).shape == (2, 9)
    frame = cached.logit_lens(positions=None, vocab=[3, 5]).to_dataframe()
    line = frame[(frame.layer == "final_post") & (frame.pos == 2) & (frame.token == 5)]
    assert line[whole.name].to_list() == whole.sel(layer="final_post", pos=2, token=5).values.flatten().tolist()
    assert {"rank", "token_id"} <= set(cached.logit_lens(top_k=3).to_dataframe().columns)
    top = cached.logit_lens(top_k=3).to_xarray()
    assert top.dims == ("layer", "row", "token")
    assert top.coords["token_id"].shape == (4, 2, 3)


def test_ranks_that_were_not_asked_for(cached: ActivationCache) -> None:
    with pytest.raises(InputError, match="Ranks are of targets"):
        cached.logit_lens().rank_trajectory()
    with pytest.raises(InputError, match="target is one of 3, 90; found 4"):
        cached.logit_lens(targets=[3, 90]).rank_trajectory(4)
    with pytest.raises(InputError, match="Top tokens are of top_k"):
        cached.logit_lens().top_tokens(None)


# -- models that are special -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_tied", [False, True])
@pytest.mark.parametrize("family", ["bloom", "gpt2", "gemma"])
def test_processed_weights(family: str, keep_tied: bool) -> None:
    bridge = TransformerBridge(make_bloom(DOUBLE) if family == "bloom" else make_family(family, DOUBLE))
    if keep_tied:
        bridge.process_weights(keep_tied=True, center_writing_weights=False, center_unembed=False)
    else:
        bridge.process_weights()
    with torch.no_grad():
        logits, cached = bridge.run_with_cache(random_tokens())
        stack = cached.get_full_resid_decomposition()
        found = cached.logit_attrs(stack, 5, 7).sum(0) + cached.logit_bias(5, 7)
        lens = cached.accumulated_resid(apply_ln=True) @ bridge.W_U + bridge.b_U
    wanted = logits[..., 5] - logits[..., 7]
    bound = (1e-9 if family != "gemma" else 1e-5) * float(logits.abs().max())
    assert float((found - wanted).abs().max()) < bound
    assert float((lens[-1] - logits).abs().max()) < bound
    assert float((cached.logit_lens(positions=None).values - lens).abs().max()) < bound


def test_slow_but_exact_adds_no_biases() -> None:
    bridge = TransformerBridge(make_bloom(DOUBLE, slow_but_exact=True, pretraining_tp=2))
    cached = bridge.run_with_cache(random_tokens())[1]
    stack, labels = cached.get_full_resid_decomposition(return_labels=True)
    assert "bias" not in labels
    assert float((stack.sum(0) - cached["resid_post", -1]).abs().max()) < 1e-9


def test_an_adapters_numbers_are_those_that_run() -> None:
    peft = pytest.importorskip("peft")
    model = make_family("llama")
    settings = peft.LoraConfig(target_modules=["o_proj", "down_proj"], r=2, init_lora_weights=False)
    with torch.no_grad():
        bridge = TransformerBridge(peft.get_peft_model(model, settings).eval())
        cached = bridge.run_with_cache(random_tokens())[1]
        whole = cached["resid_post", -1]
        for neurons in (True, False):
            parts = cached.get_full_resid_decomposition(expand_neurons=neurons)
            assert float((parts.sum(0) - whole).abs().max()) < 1e-5 * float(whole.abs().max())


def test_a_stream_that_is_no_sum_is_refused() -> None:
    bridge = TransformerBridge(make_bloom(apply_residual_connection_post_layernorm=True))
    cached = bridge.run_with_cache(random_tokens())[1]
    for method in ("decompose_resid", "stack_head_results", "get_full_resid_decomposition"):
        with pytest.raises(InputError, match=f"{method} shows .*apply_residual_connection_post_layernorm=True"):
            getattr(cached, method)()
    with pytest.raises(InputError, match="apply_residual_connection_post_layernorm=True"):
        cached.stack_neuron_results(1)
    assert torch.equal(cached.accumulated_resid()[-1], cached["resid_post", -1])


def test_neurons_that_cannot_be_seen_are_refused() -> None:
    bridge = TransformerBridge(make_family("llama"))
    bridge._tree.adapter.leave_out({"blocks.{i}.mlp.hook_post"})
    bridge._tree.table = bridge._tree.adapter.hook_index()
    cached = bridge.run_with_cache(random_tokens(), names_filter=lambda name: "mlp.out" not in name)[1]
    for call in (cached.stack_neuron_results, cached.get_neuron_results):
        with pytest.raises(InputError, match="Neurons are read at mlp.hook_post, and this model has no such point"):
            call(1)
    with pytest.raises(InputError, match="cannot be seen apart"):
        cached.get_full_resid_decomposition()
    assert (
        float((cached.get_full_resid_decomposition(expand_neurons=False).sum(0) - cached["resid_post", -1]).abs().max())
        < 1e-4
    )
    with pytest.raises(InputError, match="Neurons are read at"):
        logit_attribution(bridge, random_tokens(), 5, by="neuron")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["bloom", "gemma2"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """Sums to within the rounding of as many roundings as there are parts; a row of the lens is the logits to the bit."""
    bridge = TransformerBridge(make_bloom(dtype) if family == "bloom" else make_family(family, dtype))
    with torch.no_grad():
        logits, cached = bridge.run_with_cache(random_tokens())
    whole = cached["resid_post", -1].double()
    bound = 8 * torch.finfo(dtype).eps * float(whole.abs().max())
    for neurons in (True, False):
        stack = cached.get_full_resid_decomposition(expand_neurons=neurons)
        assert float((stack.double().sum(0) - whole).abs().max()) < bound
    found = cached.logit_attrs(cached.decompose_resid(), 5, 7).double().sum(0) + cached.logit_bias(5, 7)
    head = cached["hook_unembed"].double()
    assert float((found - head[..., 5] + head[..., 7]).abs().max()) < 8 * torch.finfo(dtype).eps * float(
        head.abs().max()
    )
    assert torch.equal(cached.logit_lens(positions=None).values[-1], logits)
    assert logit_attribution(bridge, random_tokens(), 5, by="head", check=1).dtype == "float32"


def test_residuals_that_a_parallel_block_has_not() -> None:
    cached = TransformerBridge(make_family("gpt_neox")).run_with_cache(random_tokens())[1]
    with pytest.raises(InputError, match="incl_mid=True asks for hook_resid_mid"):
        cached.accumulated_resid(incl_mid=True)
    with pytest.raises(InputError, match="mlp_input=True asks for the residual between"):
        cached.decompose_resid(1, mlp_input=True)


def test_what_a_block_multiplies_its_branches_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that adds half of what its branches give, with weights twice as large, is the same model: so are its parts."""
    plain, doubled = (TransformerBridge(make_bloom(DOUBLE)) for _ in range(2))
    cached = plain.run_with_cache(random_tokens())[1]
    with torch.no_grad():
        for block in doubled.blocks:
            for weight in (block.attn.W_O, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
                weight *= 2
    monkeypatch.setattr(BlockBridge, "factor", 0.5)
    half = ActivationCache(dict(cached), doubled)
    direction = torch.randn(48, dtype=DOUBLE)
    for given in (None, direction):
        torch.testing.assert_close(
            half.get_full_resid_decomposition(project_output_onto=given),
            _with_factor_of_one(monkeypatch, cached, given),
        )


def _with_factor_of_one(monkeypatch: pytest.MonkeyPatch, cached: ActivationCache, direction: Tensor | None) -> Any:
    with monkeypatch.context() as usual:
        usual.setattr(BlockBridge, "factor", 1.0)
        return cached.get_full_resid_decomposition(project_output_onto=direction)
