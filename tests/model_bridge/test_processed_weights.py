"""Processed weights on live models: the function stays, the invariants hold, nothing is changed by a refused call."""

from __future__ import annotations

import copy
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import BloomForCausalLM

from pellucid import TransformerBridge
from pellucid.errors import PellucidWarning, WeightError
from pellucid.model_bridge.generalized_components import BloomAttentionBridge
from pellucid.model_bridge.generalized_components.weight_writes import all_finite
from pellucid.model_bridge.weights import rewriting
from pellucid.weight_processing import STEPS, process_block
from tests.models import VOCAB, make_bloom, make_generator, make_pair, random_tokens

SUBSETS = [dict(zip(STEPS, bits, strict=True)) for bits in itertools.product((False, True), repeat=len(STEPS))]
EVERYTHING = dict.fromkeys(STEPS, True)
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
BARE64 = 3e-7
"""Hugging Face takes the softmax in float32 in a float64 model too."""
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
RESIDUALS = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")


def name_of(flags: dict[str, bool]) -> str:
    return "+".join(step for step, wanted in flags.items() if wanted) or "none"


def log_probabilities(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    output = model(tokens, **kwargs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.detach().double().log_softmax(-1)


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


def contents(model: nn.Module) -> dict[str, Tensor]:
    """Every number of a model, and whether the tie is there."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return state | {
        "tied": torch.tensor(
            model.get_submodule("lm_head").weight is model.get_submodule("transformer.word_embeddings").weight
        )
    }


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = contents(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


# -- the function stays, the invariants hold ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("flags", SUBSETS, ids=name_of)
def test_log_probabilities_stay(flags: dict[str, bool], dtype: torch.dtype) -> None:
    tokens = random_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    real = mask.bool()
    for settings in ({"n_head": 1}, {"n_head": 2}, {"n_head": 6}, {"n_head": 12}, {"vocab_size": 48, "n_head": 4}):
        bridge, native = make_pair(dtype, **settings)
        ids = tokens % settings.get("vocab_size", VOCAB)
        reference = bridge if dtype == torch.float64 else native
        alone, padded = log_probabilities(reference, ids), log_probabilities(reference, ids, attention_mask=mask)
        bare = log_probabilities(native, ids)
        bridge.process_weights(**flags)
        assert largest(log_probabilities(bridge, ids) - alone) < BOUND[dtype]
        assert largest((log_probabilities(bridge, ids, attention_mask=mask) - padded)[real]) < BOUND[dtype]
        bound = BARE64 if dtype == torch.float64 else BOUND[dtype]
        assert largest(log_probabilities(bridge.hf_model, ids) - bare) < bound


@pytest.mark.parametrize("flags", [{"center_unembed": True}, dict(EVERYTHING)], ids=name_of)
@pytest.mark.parametrize(
    "part", ["lm_head.weight", "transformer.h.1.self_attention.dense.bias", "transformer.ln_f.bias"]
)
def test_a_planted_error_in_a_weight_is_seen(flags: dict[str, bool], part: str) -> None:
    bridge, native = make_pair()
    tokens = random_tokens()
    before = log_probabilities(native, tokens)
    bridge.process_weights(**{**dict.fromkeys(STEPS, False), **flags})
    with torch.no_grad():
        bridge.hf_model.get_parameter(part).flatten()[5] += 0.05
    assert largest(log_probabilities(bridge, tokens) - before) > BOUND[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("flags", SUBSETS, ids=name_of)
def test_invariants(flags: dict[str, bool], dtype: torch.dtype) -> None:
    for n_head in (1, 4):
        bridge, _ = make_pair(dtype, n_head=n_head)
        state = bridge.process_weights(**flags)
        assert state.complete == {step for step, wanted in flags.items() if wanted}
        assert not state.partial
        # A mean of n numbers of size one, each rounded once, is off by at most eps; twice that where two steps round.
        eps = 2 * EPS[dtype]
        if flags["fold_ln"]:
            for block in bridge.blocks:
                for norm in (block.ln1.module, block.ln2.module):
                    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
                    assert not norm.bias.any()
            norm = bridge.ln_final.module
            assert torch.equal(norm.weight, torch.ones_like(norm.weight))
            assert not norm.bias.any()
            assert bridge.b_U.any()
            assert largest(bridge.W_in.mean(1)) < eps
            if not flags["refactor_factored_attn_matrices"]:
                assert largest(bridge.W_Q.mean(2)) < eps
                assert largest(bridge.W_V.mean(2)) < eps
            if not flags["center_unembed"]:
                assert largest(bridge.W_U.mean(0)) < eps
        if flags["center_writing_weights"]:
            for writer in (bridge.W_O, bridge.b_O, bridge.W_out, bridge.b_out):
                assert largest(writer.mean(-1)) < eps
            assert largest(bridge.W_E_eff.mean(-1)) < 10 * EPS[dtype] * largest(bridge.W_E_eff)
        if flags["center_unembed"]:
            assert largest(bridge.W_U.mean(1)) < eps
            assert largest(bridge.b_U.mean()) < eps
        if flags["fold_value_biases"] or flags["refactor_factored_attn_matrices"]:
            assert not bridge.b_V.any()
        if flags["refactor_factored_attn_matrices"]:
            # The decompositions run in float64 and are rounded once: columns are orthogonal to d_model times eps.
            q = torch.cat([bridge.W_Q, bridge.b_Q[:, :, None]], dim=2)
            for factor in (q, bridge.W_O.transpose(2, 3)):
                gram = factor.transpose(2, 3) @ factor
                gram = gram - gram.diagonal(dim1=2, dim2=3).diag_embed()
                assert largest(gram) < 48 * EPS[dtype] * max(1.0, largest(q) ** 2)
        assert bridge.cfg.tie_word_embeddings == bridge.hf_model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_residual_stream_is_centred(dtype: torch.dtype) -> None:
    bridge, _ = make_pair(dtype)
    tokens = random_tokens()
    points = [
        "hook_embed",
        "*.hook_resid_pre",
        "*.hook_resid_mid",
        "*.hook_resid_post",
        "*.hook_attn_out",
        "*.hook_mlp_out",
    ]
    _, before = bridge.run_with_cache(tokens, names_filter=points)
    bridge.process_weights(fold_ln=False, center_unembed=False, fold_value_biases=False)
    _, after = bridge.run_with_cache(tokens, names_filter=points)
    for name, value in after.items():
        # Sums of up to d_mlp products: each number is off by that many roundings at most, and so is their mean.
        assert largest(value.mean(-1)) < 192 * EPS[dtype] * largest(value), name
        centred = before[name] - before[name].mean(-1, keepdim=True)
        assert largest(centred - value) < 192 * EPS[dtype] * largest(before[name]) * 10, name
    assert min(largest(value.mean(-1)) for name, value in before.items() if name.endswith(RESIDUALS)) > 0.02


def test_the_embedding_alone_carries_the_mean_that_the_peer_leaves() -> None:
    """What subtracting the table's row means does: nothing, the norm's bias puts a mean back."""
    bridge, _ = make_pair(torch.float64)
    with torch.no_grad():
        weight = bridge.embed.module.weight
        weight.sub_(weight.mean(1, keepdim=True))
    assert largest(bridge.W_E_eff.mean(-1)) > 0.02
    bridge.process_weights(**{**dict.fromkeys(STEPS, False), "center_writing_weights": True})
    assert largest(bridge.W_E_eff.mean(-1)) < 1e-14


def test_norm_hooks_tell_the_truth() -> None:
    bridge, _ = make_pair(torch.float64)
    tokens = random_tokens()
    _, before = bridge.run_with_cache(tokens, names_filter="*ln*")
    bridge.process_weights()
    _, after = bridge.run_with_cache(tokens, names_filter="*ln*")
    for name in ("blocks.0.ln1", "blocks.2.ln2", "ln_final"):
        assert largest(before[f"{name}.hook_scale"] - after[f"{name}.hook_scale"]) < 1e-12
        assert largest(before[f"{name}.hook_normalized"] - after[f"{name}.hook_normalized"]) < 1e-12
        output = after["blocks.2.ln2.hook_out" if name == "blocks.2.ln2" else f"{name}.hook_out"]
        assert largest(after[f"{name}.hook_normalized"] - output) < 1e-13
    # The embedding's norm is in the new terms: it divides by little more than the root of its eps.
    assert (after["embed_ln.hook_scale"] <= (2 * bridge.cfg.eps) ** 0.5 * (1 + 1e-12)).all()


def test_points_whose_meaning_changed_say_so() -> None:
    bridge, _ = make_pair()
    assert "rewritten" not in bridge.explain("embed.hook_out")
    bridge.process_weights()
    assert "rewritten embedding" in bridge.explain("embed.hook_out")
    assert "rewritten" not in bridge.explain("hook_embed")


def test_logits_are_the_final_norm_times_the_unembedding() -> None:
    for settings in ({}, {"keep_tied": True, "center_writing_weights": False, "center_unembed": False}):
        bridge, _ = make_pair(torch.float64)
        bridge.process_weights(**settings)
        logits, cache = bridge.run_with_cache(random_tokens())
        predicted = cache["ln_final.hook_normalized"] @ bridge.W_U + bridge.b_U
        assert largest(predicted - logits) < 1e-13


# -- cache and generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"refactor_factored_attn_matrices": True}], ids=str)
def test_with_a_cache_and_while_generating(settings: dict[str, bool]) -> None:
    from transformers import DynamicCache

    native = make_generator(n_head=6)
    bridge = TransformerBridge(copy.deepcopy(native))
    bridge.process_weights(**settings)
    tokens = random_tokens(3, 8)
    whole = log_probabilities(native, tokens)
    for model in (bridge, bridge.hf_model):
        past = DynamicCache()
        model(tokens[:, :5], past_key_values=past)
        # A model with larger weights: the bound grows with the logits, as 64 layers eps max|logit| does in verify().
        bound = 64 * bridge.cfg.n_layers * EPS[torch.float32] * largest(native(tokens).logits)
        assert largest(log_probabilities(model, tokens[:, 5:], past_key_values=past) - whole[:, 5:]) < bound
    wanted = native.generate(tokens, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        bridge.generate(tokens, max_new_tokens=12, do_sample=False, verbose=False, stop_at_eos=False), wanted
    )
    assert torch.equal(bridge.hf_model.generate(tokens, max_new_tokens=12, do_sample=False), wanted)
    assert len(wanted[:, 8:].unique()) > 4


def test_the_bridge_checks_itself_after_processing() -> None:
    bridge, _ = make_pair()
    bridge.process_weights(refactor_factored_attn_matrices=True)
    report = bridge.verify()
    assert report.ok, report


# -- once or several times ---------------------------------------------------------------------------------------------


def test_steps_one_by_one_in_any_order_come_to_the_same() -> None:
    at_once, _ = make_pair(torch.float64)
    at_once.process_weights(**EVERYTHING)
    tokens = random_tokens()
    for order in (STEPS, STEPS[::-1], (STEPS[4], STEPS[1], STEPS[0], STEPS[3], STEPS[2])):
        bridge, _ = make_pair(torch.float64)
        before = log_probabilities(bridge, tokens)
        for step in order:
            bridge.process_weights(**{**dict.fromkeys(STEPS, False), step: True})
        assert bridge.weights_state.complete == set(STEPS)
        assert largest(log_probabilities(bridge, tokens) - before) < 1e-12
        for name in ("W_in", "W_out", "b_in", "b_out", "b_O", "b_V", "W_U", "b_U"):
            assert largest(getattr(bridge, name) - getattr(at_once, name)) < 1e-12, (order, name)
        for name in ("QK", "OV"):
            assert largest(getattr(bridge, name).AB - getattr(at_once, name).AB) < 1e-12
            assert largest(getattr(bridge, name).S - getattr(at_once, name).S) < 1e-12
        assert largest(bridge.W_Q.norm(dim=2) - at_once.W_Q.norm(dim=2)) < 1e-12  # in the basis of the last step


def test_a_second_call_applies_what_is_missing_and_says_so() -> None:
    bridge, _ = make_pair()
    bridge.process_weights(fold_ln=False, center_unembed=False)
    with pytest.warns(
        PellucidWarning, match="Already applied.*center_writing_weights.*Applied now: center_unembed, fold_ln"
    ):
        bridge.process_weights()
    before = contents(bridge.hf_model)
    with pytest.warns(PellucidWarning, match="Applied now: nothing"):
        bridge.process_weights()
    assert unchanged(bridge.hf_model, before)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert unchanged(bridge.hf_model, before)


def test_weights_loaded_over_processed_ones_are_processed_again() -> None:
    bridge, native = make_pair(torch.float64, tie_word_embeddings=False)
    bridge.process_weights(fold_ln=True, center_unembed=False)
    state = native.state_dict() | {"lm_head.bias": torch.zeros(VOCAB, dtype=torch.float64)}
    for load in (bridge.load_state_dict, bridge.hf_model.load_state_dict):
        load(state)
        tokens = random_tokens()
        before = log_probabilities(bridge, tokens)
        assert "fold_ln" not in bridge.weights_state.complete
        bridge.process_weights()
        assert largest(log_probabilities(bridge, tokens) - before) < 1e-12
        assert largest(bridge.W_in.mean(1)) < 1e-15


@pytest.mark.parametrize("step", [step for step in STEPS if step != "center_unembed"])
def test_one_step_undone_from_outside_is_noticed(step: str) -> None:
    """``center_unembed`` alone leaves no vector to tell by: reading a whole table at each look would be too dear."""
    bridge, native = make_pair(tie_word_embeddings=False)
    bridge.process_weights(**{**dict.fromkeys(STEPS, False), step: True})
    assert step in bridge.weights_state.complete
    bridge.hf_model.load_state_dict(native.state_dict(), strict=False)
    assert not bridge.weights_state.is_processed


def test_loading_through_the_bridge_forgets_every_step() -> None:
    bridge, native = make_pair(tie_word_embeddings=False)
    bridge.process_weights(**{**dict.fromkeys(STEPS, False), "center_unembed": True})
    bridge.load_state_dict(native.state_dict())
    assert not bridge.weights_state.is_processed


def test_a_processed_model_can_be_offloaded() -> None:
    bridge, native = make_pair()
    tokens = random_tokens()
    before = log_probabilities(native, tokens)
    state = bridge.process_weights()
    cpu_offload(bridge.hf_model)
    assert bridge.weights_state == state
    assert largest(log_probabilities(bridge, tokens) - before) < BOUND[torch.float32]


def test_transformer_lens_words() -> None:
    bridge, _ = make_pair()
    before = contents(bridge.hf_model)
    bridge.enable_compatibility_mode(no_processing=True)
    assert unchanged(bridge.hf_model, before)
    bridge.enable_compatibility_mode(fold_value_biases=False)
    assert bridge.weights_state.complete == {"fold_ln", "center_writing_weights", "center_unembed"}
    assert "fold_value_biases               not done" in str(bridge.weights_state)
    assert str(make_pair()[0].weights_state) == "weights as loaded"


# -- storage -----------------------------------------------------------------------------------------------------------


def test_everything_is_written_where_it_was() -> None:
    bridge, _ = make_pair()
    model = bridge.hf_model
    view = bridge.blocks[1].attn.W_Q
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    bridge.process_weights()
    now = {name: value.data_ptr() for name, value in model.named_parameters()}
    assert {name: now[name] for name in places} == places
    assert set(now) - set(places) == {"lm_head.weight", "lm_head.bias"}
    assert torch.equal(view, bridge.W_Q[1])
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    bridge(random_tokens(), return_type="loss").backward()
    assert model.lm_head.bias.grad is not None


def test_called_in_inference_mode_it_makes_ordinary_parameters() -> None:
    bridge, _ = make_pair()
    with torch.inference_mode():
        bridge.process_weights()
    assert not any(parameter.is_inference() for parameter in bridge.hf_model.parameters())
    bridge(random_tokens(), return_type="loss").backward()


def test_a_copy_has_its_own_state_and_two_bridges_share_one() -> None:
    bridge, _ = make_pair()
    clone, second = copy.deepcopy(bridge), TransformerBridge(bridge.hf_model)
    bridge.process_weights()
    assert second.weights_state.is_processed
    assert not clone.weights_state.is_processed
    assert clone.cfg.tie_word_embeddings
    assert copy.deepcopy(bridge).weights_state == bridge.weights_state


# -- the tie -----------------------------------------------------------------------------------------------------------


def is_tied(model: Any) -> bool:
    return bool(model.lm_head.weight is model.transformer.word_embeddings.weight)


@pytest.mark.parametrize("flags", SUBSETS, ids=name_of)
def test_the_tie_is_undone_only_where_a_step_needs_it(flags: dict[str, bool]) -> None:
    bridge, native = make_pair()
    bridge.process_weights(**flags)
    needed = flags["fold_ln"] or flags["center_unembed"] or flags["center_writing_weights"]
    assert is_tied(bridge.hf_model) == (not needed)
    assert bridge.cfg.tie_word_embeddings == bridge.hf_model.config.tie_word_embeddings == (not needed)
    tokens = random_tokens()
    bridge.hf_model.tie_weights()  # Hugging Face's own call must not tie again what was untied
    assert largest(log_probabilities(bridge, tokens) - log_probabilities(native, tokens)) < BOUND[torch.float32]


def test_with_nothing_to_change_the_tie_stays() -> None:
    bridge, native = make_pair()
    with torch.no_grad():
        for norm in (native.transformer.ln_f, native.transformer.word_embeddings_layernorm):
            norm.weight.fill_(1)
            norm.bias.zero_()
    bridge = TransformerBridge(native)
    bridge.process_weights(center_unembed=False)
    assert is_tied(native)
    assert "lm_head.bias" not in dict(native.named_parameters())
    assert bridge.weights_state.complete == {"fold_ln", "center_writing_weights", "fold_value_biases"}


def test_a_wrong_tie_would_be_seen() -> None:
    bridge, native = make_pair()
    bridge.process_weights()
    bridge.hf_model.config.tie_word_embeddings = True
    bridge.hf_model.tie_weights()
    tokens = random_tokens()
    assert largest(log_probabilities(bridge, tokens) - log_probabilities(native, tokens)) > 0.1


def test_keeping_the_tie() -> None:
    bridge, native = make_pair(torch.float64)
    tokens = random_tokens()
    before = log_probabilities(bridge, tokens)
    count = sum(parameter.numel() for parameter in bridge.hf_model.parameters())
    bridge.process_weights(keep_tied=True, center_writing_weights=False, center_unembed=False)
    assert is_tied(bridge.hf_model)
    assert sum(parameter.numel() for parameter in bridge.hf_model.parameters()) == count
    assert torch.equal(bridge.ln_final.module.weight, native.transformer.ln_f.weight)
    assert torch.equal(bridge.W_E, native.transformer.word_embeddings.weight)
    assert largest(log_probabilities(bridge, tokens) - before) < 1e-12
    assert bridge.weights_state.final_norm_on_access
    assert "fold_ln" in bridge.weights_state.complete
    folded, _ = make_pair(torch.float64)
    folded.process_weights(center_writing_weights=False, center_unembed=False)
    assert torch.equal(bridge.W_U, folded.W_U)
    assert torch.equal(bridge.b_U, folded.b_U)
    assert torch.equal(bridge.tokens_to_residual_directions(5), folded.tokens_to_residual_directions(5))
    with pytest.warns(PellucidWarning, match="Applied now: center_unembed, center_writing_weights, fold_ln"):
        bridge.process_weights()  # and the tie can still be given up later
    assert not is_tied(bridge.hf_model)
    assert not bridge.weights_state.final_norm_on_access
    assert largest(log_probabilities(bridge, tokens) - before) < 1e-12


# -- what is refused, with nothing changed -----------------------------------------------------------------------------


class Odd(nn.Linear):
    """A linear layer with a forward of its own, for all we know."""


def _non_finite(model: Any) -> None:
    with torch.no_grad():
        model.transformer.h[2].mlp.dense_4h_to_h.weight[3, 4] = float("nan")


def _quantised(model: Any) -> None:
    layer = model.transformer.h[1].mlp.dense_h_to_4h
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


def _offloaded(model: Any) -> None:
    cpu_offload(model)


def _parametrised(model: Any) -> None:
    parametrizations.weight_norm(model.transformer.h[0].self_attention.dense)


def _subclass(model: Any) -> None:
    model.lm_head.__class__ = Odd


def _shared(model: Any) -> None:
    model.transformer.h[1].mlp.dense_4h_to_h.weight = model.transformer.h[0].mlp.dense_4h_to_h.weight


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_non_finite, r"h\.2\.mlp\.dense_4h_to_h\.weight holds values that are not finite"),
        (_quantised, "quantised"),
        (_offloaded, "offloaded"),
        (_parametrised, "parametrised"),
        (_subclass, "lm_head is a Odd"),
        (_shared, "one storage"),
    ],
)
def test_weights_that_cannot_be_processed(spoil: Any, message: str) -> None:
    model = make_bloom()
    spoil(model)
    bridge = TransformerBridge(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if not value.is_meta}
    with pytest.raises(WeightError, match=message):
        bridge.process_weights()
    for name, value in model.named_parameters():
        assert value.is_meta or torch.equal(value.nan_to_num(), before[name].nan_to_num())
    assert not bridge.weights_state.is_processed


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        (
            {"apply_residual_connection_post_layernorm": True},
            {},
            "apply_residual_connection_post_layernorm=True.*fold_ln=False",
        ),
        (
            {"slow_but_exact": True, "pretraining_tp": 2},
            {"fold_ln": False},
            "slow_but_exact=True with pretraining_tp=2",
        ),
        ({}, {"keep_tied": True}, "center_writing_weights and center_unembed would change"),
        ({}, {"keep_tied": True, "center_writing_weights": False}, "center_unembed=False"),
    ],
)
def test_calls_that_are_not_legal(settings: dict[str, Any], flags: dict[str, bool], message: str) -> None:
    bridge, _ = make_pair(**settings)
    before = contents(bridge.hf_model)
    with pytest.raises(WeightError, match=message):
        bridge.process_weights(**flags)
    assert unchanged(bridge.hf_model, before)
    assert not bridge.weights_state.is_processed


def test_folding_where_it_is_refused_would_be_wrong() -> None:
    """Why it is refused: what the same weights, folded all the same, would compute."""
    for settings, steps, least in (
        ({"apply_residual_connection_post_layernorm": True}, {"fold_ln"}, 0.1),
        ({"slow_but_exact": True, "pretraining_tp": 2}, {"fold_value_biases"}, 0.01),
    ):
        bridge, native = make_pair(torch.float64, **settings)
        for block in bridge.blocks:
            old = {key: t()[0].storage.detach().reshape(t()[0].shape) for key, t in block.weight_targets().items()}
            block.set_processed_weights(process_block(old, steps, 4))
        tokens = random_tokens()
        assert largest(log_probabilities(bridge, tokens) - log_probabilities(native, tokens)) > least


def test_post_norm_residuals_take_the_other_steps() -> None:
    bridge, _ = make_pair(torch.float64, apply_residual_connection_post_layernorm=True)
    tokens = random_tokens()
    before = log_probabilities(bridge, tokens)
    bridge.process_weights(fold_ln=False, refactor_factored_attn_matrices=True)
    assert largest(log_probabilities(bridge, tokens) - before) < 1e-12


def test_slow_but_exact_without_slices_is_processed() -> None:
    bridge, _ = make_pair(torch.float64, slow_but_exact=True, pretraining_tp=1)
    tokens = random_tokens()
    before = log_probabilities(bridge, tokens)
    bridge.process_weights()
    assert largest(log_probabilities(bridge, tokens) - before) < 1e-12


def test_adapters_are_refused_with_the_call_that_merges_them() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    wrapped = peft.get_peft_model(make_bloom(torch.float64), settings).eval()
    bridge = TransformerBridge(wrapped)
    with pytest.raises(WeightError, match=r"merge_and_unload\(\)"):
        bridge.process_weights()
    tokens = random_tokens()
    before = log_probabilities(bridge, tokens)
    merged = TransformerBridge(bridge.hf_model.merge_and_unload())
    merged.process_weights()
    assert largest(log_probabilities(merged, tokens) - before) < 1e-12


# -- all or nothing ----------------------------------------------------------------------------------------------------


def _interrupt_after(count: int, function: Any, error: type[BaseException]) -> Any:
    calls = iter(range(10**6))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= count:
            raise error("planted")
        return function(*args, **kwargs)

    return interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_call_leaves_a_correct_model_and_a_repeat_finishes(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    whole, _ = make_pair(torch.float64)
    whole.process_weights(**EVERYTHING)
    bridge, _ = make_pair(torch.float64)
    tokens = random_tokens()
    before = log_probabilities(bridge, tokens)
    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "process_block", _interrupt_after(1, process_block, error))
        with pytest.raises(error):
            bridge.process_weights(**EVERYTHING)
    assert largest(log_probabilities(bridge, tokens) - before) < 1e-12
    state = bridge.weights_state
    assert state.done["blocks.0"]
    assert not state.done["blocks.1"]
    assert state.partial == {
        "fold_ln",
        "center_writing_weights",
        "fold_value_biases",
        "refactor_factored_attn_matrices",
    }
    assert "of 4 units" in str(state)
    with pytest.warns(PellucidWarning, match="Already applied.*center_unembed"):
        bridge.process_weights(**EVERYTHING)
    assert bridge.weights_state.complete == set(STEPS)
    assert unchanged(bridge.hf_model, contents(whole.hf_model))


def test_a_failing_write_is_put_back() -> None:
    targets = [torch.zeros(3), torch.zeros(2), torch.zeros(4)]
    before = [target.clone() for target in targets]
    writes = [(targets[0], torch.ones(3)), (targets[1], torch.ones(2)), (targets[2], torch.ones(3))]
    with pytest.raises(RuntimeError):
        rewriting.write_all(writes)
    assert all(torch.equal(target, old) for target, old in zip(targets, before, strict=True))
    spare: list[Tensor] = [torch.empty(1)]
    for values in (torch.ones(3), torch.full((3,), 2.0)):  # the second call uses the first one's buffers
        kept = [buffer.data_ptr() for buffer in spare]
        rewriting.write_all([(targets[0], values)], spare)
        assert torch.equal(targets[0], values)
    assert [buffer.data_ptr() for buffer in spare] == kept
    assert torch.equal(spare[0], torch.ones(3))


def test_ctrl_c_waits_until_a_part_is_written() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), rewriting.undisturbed():
        signal.raise_signal(signal.SIGINT)
        reached.append("the end")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert reached == ["the end"]


def test_a_table_that_fails_half_way_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellucid.model_bridge.weights.record.CHUNK", 48 * 16)
    fails = _interrupt_after(3, rewriting.rows_for_gain, MemoryError)
    for kept in (False, True):
        bridge, native = make_pair(torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(rewriting, "rows_for_gain", fails)
            with pytest.raises(WeightError, match="left half done"):
                bridge.process_weights(keep_originals=kept)
        assert bridge.weights_state.damaged == "embed"
        with pytest.raises(WeightError, match="half-written"):
            bridge.process_weights()
        if kept:
            bridge.unprocess_weights()
            assert unchanged(bridge.hf_model, contents(native))


def test_tables_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = make_pair(torch.float64)
    whole.process_weights()
    monkeypatch.setattr("pellucid.model_bridge.weights.record.CHUNK", 48 * 10)
    bridge, _ = make_pair(torch.float64)
    bridge.process_weights()
    for name, value in bridge.hf_model.state_dict().items():
        assert largest(value - whole.hf_model.state_dict()[name]) < 1e-15, name


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_processed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    bridge, native = make_pair(dtype)
    wide = TransformerBridge(copy.deepcopy(native).float())
    bridge.process_weights()
    wide.process_weights()
    assert {value.dtype for value in bridge.hf_model.parameters()} == {dtype}
    rounded = wide.hf_model.state_dict()
    for name, value in bridge.hf_model.state_dict().items():
        if "word_embeddings" not in name:  # there the gain is rounded first, so that the rows can allow for it
            assert torch.equal(value, rounded[name].to(dtype)), name
    # The embedding: a row's numbers are rounded once, so what the norm gives is off by eps / 2 of the largest of them;
    # float16 has no finer steps than 2^-24, of which sqrt(eps) = 0.003 leaves 13 bits.
    wanted = wide.W_E_eff
    step = EPS[dtype] / 2 + (2**-25 / bridge.cfg.eps**0.5 if dtype == torch.float16 else 0)
    found = copy.deepcopy(bridge.hf_model.transformer).float()
    rows = found.word_embeddings_layernorm(found.word_embeddings.weight)
    assert largest(rows - wanted) < 4 * step * largest(wanted)
    assert largest(rows.mean(-1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_the_weights_once_moves_log_probabilities_by_a_derived_bound(dtype: torch.dtype) -> None:
    """To first order: every weight is off by ``eps / 2`` of itself, so the sum of ``|d logp / d w| |w| eps / 2`` bounds it."""
    gold, _ = make_pair(torch.float64)
    tokens = random_tokens(1, 6)
    before = log_probabilities(gold, tokens)[0, -1]
    gold.process_weights()
    model = gold.hf_model
    rounded = copy.deepcopy(model).to(dtype).double()
    moved = (log_probabilities(TransformerBridge(rounded), tokens)[0, -1] - before).abs()
    for token in (0, 5, int(before.argmax())):
        model.zero_grad()
        gold(tokens)[0, -1].log_softmax(-1)[token].backward()
        bound = sum(float((w.grad.abs() * w.detach().abs()).sum()) for w in model.parameters()) * EPS[dtype] / 2
        assert moved[token] < bound
        assert bound < 2e4 * EPS[dtype]


def test_float64_stays_float64() -> None:
    """A round trip through float32 would cost seven digits."""
    bridge, _ = make_pair(torch.float64)
    tokens = random_tokens()
    before = log_probabilities(bridge, tokens)
    bridge.process_weights()
    assert largest(log_probabilities(bridge, tokens) - before) < 1e-13
    with torch.no_grad():
        for parameter in bridge.hf_model.parameters():
            parameter.copy_(parameter.float())
    assert largest(log_probabilities(bridge, tokens) - before) > 1e-9


def test_mixed_dtypes_keep_theirs() -> None:
    model = make_bloom(torch.bfloat16)
    model.transformer.ln_f.float()
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().float())
    model.config.tie_word_embeddings = False
    bridge = TransformerBridge(model)
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    bridge.process_weights()
    now = {name: value.dtype for name, value in model.named_parameters()}
    assert {name: now[name] for name in dtypes} == dtypes


# -- and back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [*SUBSETS[::5], EVERYTHING], ids=name_of)
@pytest.mark.parametrize("tied", [True, False])
def test_originals_can_be_kept(flags: dict[str, bool], tied: bool) -> None:
    bridge, native = make_pair(tie_word_embeddings=tied)
    places = {name: value.data_ptr() for name, value in bridge.hf_model.named_parameters()}
    bridge.process_weights(**flags, keep_originals=True)
    bridge.unprocess_weights()
    assert unchanged(bridge.hf_model, contents(native))
    assert {name: value.data_ptr() for name, value in bridge.hf_model.named_parameters()} == places
    assert bridge.cfg.tie_word_embeddings == bridge.hf_model.config.tie_word_embeddings == tied
    assert not bridge.weights_state.is_processed
    bridge.process_weights()


def test_without_originals_the_checkpoint_is_needed(tmp_path: Path) -> None:
    for settings in ({}, {"tie_word_embeddings": False}):
        bridge, native = make_pair(**settings)
        bridge.unprocess_weights()  # nothing was done
        native.save_pretrained(tmp_path, max_shard_size="60KB")
        bridge.process_weights()
        before = contents(bridge.hf_model)
        with pytest.raises(WeightError, match=r"unprocess_weights\(folder\)"):
            bridge.unprocess_weights()
        with pytest.raises(WeightError, match="not a folder with .safetensors"):
            bridge.unprocess_weights(tmp_path / "nowhere")
        with pytest.raises(WeightError, match="keep_originals=True has to be given before"):
            bridge.process_weights(keep_originals=True, refactor_factored_attn_matrices=True)
        assert unchanged(bridge.hf_model, before)
        other = tmp_path / "other"
        make_bloom(n_layer=4, **settings).save_pretrained(other)
        with pytest.raises(WeightError, match=r"h\.3.*does not fit the model"):
            bridge.unprocess_weights(other)
        assert unchanged(bridge.hf_model, before)
        bridge.unprocess_weights(tmp_path)
        assert unchanged(bridge.hf_model, contents(native))
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("flags", [EVERYTHING, dict.fromkeys(STEPS, False) | {"fold_ln": True}], ids=name_of)
def test_a_processed_model_is_saved_so_that_hugging_face_loads_it(
    tmp_path: Path, flags: dict[str, bool], dtype: torch.dtype
) -> None:
    model = make_bloom(dtype)
    with torch.no_grad():
        model.transformer.ln_f.weight[7] = 0  # a gain that cannot be divided by
    bridge = TransformerBridge(model)
    tokens = random_tokens()
    before = log_probabilities(bridge, tokens)
    bridge.process_weights(**flags)
    inside = contents(model)
    bridge.save_pretrained(tmp_path)
    assert unchanged(model, inside)
    loaded = BloomForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert loaded.dtype == dtype
    assert "lm_head.bias" not in dict(loaded.named_parameters())
    again = TransformerBridge(loaded)
    assert largest(log_probabilities(again, tokens) - before) < BOUND[dtype]
    W_U, b_U = bridge.W_U.clone(), bridge.b_U.clone()
    again.process_weights()
    assert largest(log_probabilities(again, tokens) - before) < BOUND[dtype]
    if flags["center_unembed"]:
        # b_U comes back as a sum of d_model numbers of the table's size.
        assert largest(again.W_U - W_U) < 48 * EPS[dtype] * largest(W_U)
        assert largest(again.b_U - b_U) < 48 * 48 * EPS[dtype]


def test_saving_the_bias_as_it_is_would_lose_it(tmp_path: Path) -> None:
    bridge, native = make_pair()
    tokens = random_tokens()
    bridge.process_weights()
    bridge.hf_model.save_pretrained(tmp_path)
    loaded = BloomForCausalLM.from_pretrained(tmp_path).eval()
    assert largest(log_probabilities(loaded, tokens) - log_probabilities(native, tokens)) > 0.1


def test_a_model_without_that_bias_is_saved_as_it_is(tmp_path: Path) -> None:
    bridge, native = make_pair()
    bridge.process_weights(fold_ln=False)
    bridge.save_pretrained(tmp_path)
    loaded = BloomForCausalLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, bridge.hf_model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("asked", [True, {"center_writing_weights": False, "center_unembed": False, "keep_tied": True}])
def test_loading_into_processed_form(tmp_path: Path, asked: Any) -> None:
    native = make_bloom()
    native.save_pretrained(tmp_path, max_shard_size="60KB")
    files = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    assert len(files) > 3
    with pytest.warns(PellucidWarning, match="tokenizer"):
        bridge = TransformerBridge.boot_transformers(tmp_path, process_weights=asked)
    tokens = random_tokens()
    assert bridge.weights_state.is_processed
    assert largest(log_probabilities(bridge, tokens) - log_probabilities(native, tokens)) < BOUND[torch.float32]
    assert {file: file.read_bytes() for file in files} == files  # the weights were mapped, and are private
    live = TransformerBridge.boot_transformers(hf_model=native, process_weights=asked)
    assert torch.equal(live.W_Q, bridge.W_Q)


def test_what_a_configuration_forbids_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bloom(apply_residual_connection_post_layernorm=True).save_pretrained(tmp_path)
    monkeypatch.setattr(BloomForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(WeightError, match="post_layernorm"):
        TransformerBridge.boot_transformers(tmp_path, process_weights=True)


# -- circuits ----------------------------------------------------------------------------------------------------------


def test_circuits() -> None:
    bridge, _ = make_pair(torch.float64)
    assert bridge.QK.shape == bridge.OV.shape == (3, 4, 48, 48)
    assert bridge.QK.mdim == 12
    assert largest(bridge.OV[1, 2].AB - bridge.blocks[1].attn.W_V[2] @ bridge.blocks[1].attn.W_O[2]) == 0
    assert largest(bridge.QK[1, 2].AB - bridge.blocks[1].attn.W_Q[2] @ bridge.blocks[1].attn.W_K[2].T) == 0
    full = bridge.W_E_eff @ bridge.OV[0, 0] @ bridge.W_U
    assert full.shape == (VOCAB, VOCAB)
    assert full.mdim == 12
    values = bridge.OV.S
    bridge.process_weights(**{**dict.fromkeys(STEPS, False), "refactor_factored_attn_matrices": True})
    assert largest(bridge.OV.S - values) < 1e-12
    assert largest(bridge.W_V.norm(dim=2) - values) < 1e-12


# -- set_processed_weights ---------------------------------------------------------------------------------------------


def components(bridge: TransformerBridge) -> Iterator[tuple[str, Any]]:
    yield "embed", bridge.embed
    yield "embed_ln", bridge.embed_ln
    yield "ln_final", bridge.ln_final
    yield "unembed", bridge.unembed
    yield "block", bridge.blocks[1]
    yield from ((name, getattr(bridge.blocks[1], name)) for name in ("ln1", "attn", "ln2", "mlp"))
    yield "attn.o", bridge.blocks[1].attn.o


def given_form(component: Any) -> dict[str, Tensor]:
    """A component's weights under its own keys."""
    targets = {key: target()[0] for key, target in component.weight_targets().items()}
    return {key: target.storage.detach().clone().reshape(target.shape) for key, target in targets.items()}


@pytest.mark.parametrize("n_head", [1, 2, 6, 12])
def test_splitting_and_fusing_is_a_round_trip_to_the_bit(n_head: int) -> None:
    bridge, native = make_pair(n_head=n_head)
    before = contents(bridge.hf_model)
    for _, component in components(bridge):
        component.set_processed_weights(given_form(component))
    assert unchanged(bridge.hf_model, before)
    fused = native.transformer.h[1].self_attention.query_key_value.weight
    parts = given_form(bridge.blocks[1].attn)
    by_head = fused.view(n_head, 3, 48 // n_head, 48)
    for place, part in enumerate("qkv"):
        assert torch.equal(parts[f"{part}.weight"], by_head[:, place].reshape(48, 48))


@pytest.mark.parametrize("n_head", [1, 2, 6, 12])
def test_every_route_uses_what_was_set(n_head: int) -> None:
    bridge, _ = make_pair(n_head=n_head)
    attention, module = bridge.blocks[1].attn, bridge.hf_model.transformer.h[1].self_attention
    place, view = module.query_key_value.weight.data_ptr(), attention.W_K
    new = {key: torch.randn_like(value) for key, value in given_form(attention).items()}
    kept = module.dense.bias.clone()
    attention.set_processed_weights(new | {"o.bias": None})
    assert module.query_key_value.weight.data_ptr() == place
    assert torch.equal(module.dense.bias, kept)
    assert torch.equal(view.transpose(1, 2).reshape(48, 48), new["k.weight"])
    assert torch.equal(attention.b_V.flatten(), new["v.bias"])
    fused = module.query_key_value.weight.view(n_head, 3, -1, 48)
    assert torch.equal(fused[:, 2].reshape(48, 48), new["v.weight"])
    tokens = random_tokens()
    logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(logits, bridge.hf_model(tokens).logits)
    wanted = cache["blocks.1.ln1.hook_out"] @ new["q.weight"].T + new["q.bias"]
    assert torch.allclose(cache["q", 1].flatten(2), wanted, atol=1e-4)
    rebuilt = module.query_key_value(cache["blocks.1.ln1.hook_out"]).view(*tokens.shape, n_head, 3, -1)
    assert torch.equal(cache["q", 1], rebuilt[..., 0, :])


WRONG: list[tuple[str, Any, str]] = [
    ("no_such.weight", torch.zeros(1), "no weight 'no_such.weight'"),
    ("0", torch.zeros(7), "must have shape"),
    ("0", "transposed", "must have shape"),
    ("0", torch.float64, "must have dtype"),
    ("0", float("nan"), "not finite"),
    ("0", float("inf"), "not finite"),
    ("0", 3.0, "must be a tensor; found float"),
]


@pytest.mark.parametrize(("key", "wrong", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_cannot_be_set_is_refused_with_nothing_changed(key: str, wrong: Any, message: str) -> None:
    bridge, _ = make_pair(n_head=6)
    before = contents(bridge.hf_model)
    for name, component in components(bridge):
        good = given_form(component)
        last = list(good)[-1] if wrong != "transposed" else next(iter(good))
        new = {other: torch.randn_like(value) for other, value in good.items() if other != last}
        bad: Any = wrong
        if wrong == "transposed":
            bad = torch.zeros(
                tuple(reversed(good[last].shape)) if good[last].shape[0] != good[last].shape[-1] else (1, 1)
            )
        elif isinstance(wrong, torch.dtype):
            bad = good[last].to(wrong)
        elif isinstance(wrong, float) and wrong != 3.0:
            bad = good[last].clone()
            bad.view(-1)[-1] = wrong
        new[last if key == "0" else key] = bad
        with pytest.raises(WeightError, match=message):
            component.set_processed_weights(new)
        assert unchanged(bridge.hf_model, before), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_numbers_are_told_from_others(dtype: torch.dtype) -> None:
    large = torch.full((7, 100), torch.finfo(dtype).max, dtype=dtype)  # the sum overflows
    assert all_finite(large)
    assert all_finite(torch.empty(0, dtype=dtype))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        spoilt = torch.zeros(7, 100, dtype=dtype)
        spoilt[3, 4] = wrong
        assert not all_finite(spoilt)
        spoilt[5, 5] = -wrong
        assert not all_finite(spoilt)


def test_an_attention_alone_takes_processed_weights() -> None:
    bridge, native = make_pair(torch.float64)
    module = native.transformer.h[0].self_attention
    alone = BloomAttentionBridge("self_attention", bridge.cfg)
    alone.set_original_component(module)
    bridge.process_weights()
    alone.set_processed_weights(given_form(bridge.blocks[0].attn), verbose=False)
    other = bridge.hf_model.transformer.h[0].self_attention
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_verbose_says_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    bridge, _ = make_pair()
    bridge.process_weights(verbose=True, center_unembed=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "unembed: fold_ln"
    assert lines[-1] == "blocks.2: fold_ln, center_writing_weights, fold_value_biases"
