"""TransformerLens' further words of a bridge: each against Hugging Face's own, or what it is defined as."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria

from pellucid import ActivationCache, SVDInterpreter, TransformerBridge
from pellucid.errors import InputError, UnsupportedModelError, WeightError
from pellucid.hook_points import HookPoint
from tests.families import CONFIGS, NO_FLOAT64, float64_is_kept, has_experts, make_family, of_each_layout
from tests.models import is_pristine, make_bloom, make_pair, random_tokens

PROMPTS = ["Everyone has the right to", "All human beings"]


def look(tensor: Tensor, hook: Any) -> None:
    """A hook that only looks."""


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS])
def test_a_stream_is_one_generation(demo: TransformerBridge, prompts: Any, sampled: bool) -> None:
    options = {"max_new_tokens": 9, "do_sample": sampled, "verbose": False}
    torch.manual_seed(1)
    ids = demo.generate(prompts, return_type="tokens", **options)
    torch.manual_seed(1)
    texts = demo.generate(prompts, **options)
    for at_once in (1, 4, 25):
        torch.manual_seed(1)
        pieces = list(demo.generate_stream(prompts, return_type="tokens", max_tokens_per_yield=at_once, **options))
        assert torch.equal(torch.cat(pieces, 1), ids)
        assert at_once == 25 or all(piece.shape[1] <= at_once for piece in pieces[1:])
    torch.manual_seed(1)
    written = list(demo.generate_stream(prompts, max_tokens_per_yield=1, **options))
    joined = ["".join(row) for row in zip(*written, strict=True)] if isinstance(prompts, list) else "".join(written)
    assert joined == texts


def test_between_two_items_of_a_stream_nothing_runs(demo: TransformerBridge) -> None:
    seen: list[int | None] = []
    with demo.hooks([("blocks.0.hook_resid_pre", lambda t, hook: seen.append(hook.run.step))]):
        stream = demo.generate_stream(
            demo.to_tokens(PROMPTS[0]), max_new_tokens=9, max_tokens_per_yield=1, verbose=False
        )
        for steps in (1, 2, 3):
            next(stream)
            assert seen == list(range(steps))
        stream.close()  # type: ignore[attr-defined]
    assert is_pristine(demo.hf_model)

    def fail(tensor: Tensor, hook: Any) -> None:
        if hook.run.step == 1:
            raise RuntimeError("in a step")

    with demo.hooks([("blocks.0.hook_resid_pre", fail)]):
        stream = demo.generate_stream(demo.to_tokens(PROMPTS[0]), max_tokens_per_yield=1, verbose=False)
        next(stream)
        with pytest.raises(RuntimeError, match="in a step"):
            next(stream)
    assert is_pristine(demo.hf_model)


def test_part_of_a_character_waits(demo: TransformerBridge) -> None:
    word = "Ꮳ"
    ids = demo.to_tokens("a " + word)
    parts = demo.to_str_tokens(ids)
    assert "\N{REPLACEMENT CHARACTER}" in parts[-1]  # the character is several tokens
    force = iter(ids[0, 1:].tolist())

    class Forced:
        """Lets a generation write the very tokens."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(force)]), 0.0)

    from pellucid.model_bridge.running import generation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "FrequencyPenalty", lambda penalty, mask: Forced())
        pieces = list(
            demo.generate_stream(
                demo.to_string(ids[0, :1]),
                max_new_tokens=ids.shape[1] - 1,
                max_tokens_per_yield=1,
                freq_penalty=1.0,
                do_sample=False,
                verbose=False,
            )
        )
    assert "".join(pieces) == "a " + word
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("given", ["text", "padded", "mask"])
def test_a_generation_with_its_cache(demo: TransformerBridge, given: str) -> None:
    tokens, mask = demo.to_tokens(PROMPTS, padding_side="left", return_mask=True)
    prompt: Any = {"text": PROMPTS[0], "padded": PROMPTS, "mask": tokens}[given]
    output, cache, inputs = demo.generate(
        prompt, attention_mask=mask if given == "mask" else None, max_new_tokens=4, do_sample=False, output_logits=True,
        return_cache=True, return_input_tokens=True, names_filter=["hook_unembed", "blocks.*.hook_resid_post"],
        stop_at_eos=False, verbose=False,
    )  # fmt: skip
    assert isinstance(cache, ActivationCache)
    length = inputs.shape[1]
    assert torch.equal(output.sequences[:, :length], inputs)
    whole = torch.ones_like(output.sequences)
    whole[:, :length] = 1 if given == "text" else mask
    _, wanted = demo.run_with_cache(output.sequences, attention_mask=whole)
    assert set(cache) == {"hook_unembed", *(f"blocks.{layer}.hook_resid_post" for layer in range(4))}
    for name in cache:
        assert torch.equal(cache[name], wanted[name]), name
    for step, logits in enumerate(output.logits):  # of another product of matrices: equal up to rounding
        assert torch.allclose(cache["hook_unembed"][:, length - 1 + step], logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="2 sequences of 1 prompts"):
        demo.generate(PROMPTS[0], num_return_sequences=2, return_cache=True, max_new_tokens=1, verbose=False)
    embeds = torch.zeros(1, 2, demo.cfg.d_model)
    with pytest.raises(InputError, match="inputs_embeds has no tokens"):
        demo.generate(inputs_embeds=embeds, return_cache=True)


def test_padding_after_a_rows_end_is_none_of_the_mask(demo: TransformerBridge) -> None:
    first = demo(PROMPTS)[:, -1].argmax(-1)
    end = int(first[0])
    tokens, cache = demo.generate(
        PROMPTS,
        eos_token_id=end,
        max_new_tokens=4,
        do_sample=False,
        return_type="tokens",
        return_cache=True,
        verbose=False,
    )
    added = (tokens[0] == end).nonzero()[-1, 0] + 1
    if added < tokens.shape[1]:
        assert not cache.attention_mask[0, added:].any()
    assert cache.attention_mask[0, added - 1] == 1


def test_hugging_faces_generation(demo: TransformerBridge) -> None:
    tokens = demo.to_tokens(PROMPTS[0])
    wanted = demo.hf_model.generate(tokens, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(tokens))
    assert torch.equal(demo.hf_generate(tokens, max_new_tokens=3, do_sample=False), wanted)
    found = demo.hf_generate(PROMPTS[0], max_new_tokens=3, do_sample=False, output_scores=True)
    assert torch.equal(found.sequences, wanted)
    assert len(found.scores) == 3
    assert demo.hf_generate(PROMPTS[0], max_new_tokens=3, do_sample=False) == demo.to_string(wanted[0])

    class Seven(StoppingCriteria):
        """One criterion, in no list."""

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 7)

    assert demo.generate(tokens, max_new_tokens=9, stopping_criteria=Seven(), verbose=False).shape[1] == 7


# -- runs --------------------------------------------------------------------------------------------------------------


def token_by_token(run: Any, tokens: Tensor) -> tuple[Tensor, Any]:
    """Logits of all positions and the last cache, by a run that takes a token and a cache."""
    cache, found = None, []
    for step in tokens.split(1, 1):
        logits, cache = run(step, cache)
        found.append(logits)
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("name", of_each_layout())
def test_logits_and_cache_token_by_token(name: str) -> None:
    """To the bit what Hugging Face's steps give; in float64, the logits of the whole prompt."""

    def native(step: Tensor, cache: Any) -> Any:
        return model(step, past_key_values=cache, use_cache=True).to_tuple()[:2]

    def ours(step: Tensor, cache: Any) -> Any:
        return bridge(step, return_type="logits_and_cache", past_kv_cache=cache)

    model, tokens = make_family(name), random_tokens(1, 5)
    bridge = TransformerBridge(model)
    assert torch.equal(token_by_token(ours, tokens)[0], token_by_token(native, tokens)[0])
    if name not in NO_FLOAT64:
        bridge = TransformerBridge(make_family(name, torch.float64))
        # MPT's bias counts from the last key: its scores, float32 in float64 too, are rounded otherwise in each step.
        with float64_is_kept() if name == "mpt" else nullcontext():
            found, cache = token_by_token(ours, tokens)
            assert torch.allclose(found, bridge(tokens), rtol=1e-9, atol=1e-9)
    _, cache = ours(tokens, None)
    with pytest.raises(InputError, match="past_kv_cache is another name of past_key_values"):
        bridge(tokens, past_key_values=cache, past_kv_cache=cache)


def test_use_cache_says_what_the_run_does(demo: TransformerBridge) -> None:
    tokens = demo.to_tokens(PROMPTS[0])
    native = demo.hf_model(tokens, use_cache=True)
    logits, cache = demo(tokens, return_type="logits_and_cache", use_cache=True)
    assert torch.equal(logits, native.logits)
    step = random_tokens(1, 1)
    wanted = demo.hf_model(step, past_key_values=native.past_key_values, use_cache=True).logits
    assert torch.equal(demo(step, past_key_values=cache, use_cache=True), wanted)
    plain = demo.hf_model(tokens, use_cache=False).logits
    for found in (
        demo(tokens, use_cache=False),
        demo.run_with_hooks(tokens, use_cache=False),
        demo.run_with_cache(tokens, use_cache=False)[0],
    ):
        assert torch.equal(found, plain)


def test_the_residual_that_enters_the_first_block(demo: TransformerBridge) -> None:
    residual, tokens, none, mask = demo.input_to_embed(PROMPTS)
    assert none is None
    wanted, wanted_mask = demo.to_tokens(PROMPTS, return_mask=True)
    assert torch.equal(tokens, wanted)
    assert torch.equal(mask, wanted_mask)
    assert torch.equal(demo(residual, start_at_layer=0, attention_mask=mask), demo(PROMPTS))
    assert torch.equal(demo.loss_fn(demo(PROMPTS), tokens, mask), demo(PROMPTS, return_type="loss"))
    assert demo.to_tokens("a b " * 3000, truncate=True).shape == (1, demo.cfg.n_ctx)


def test_caching_functions() -> None:
    bridge, _ = make_pair()
    tokens = random_tokens(2, 6)
    _, wanted = bridge.run_with_cache(tokens, incl_bwd=True, return_type="loss")
    bridge.zero_grad()
    kept, forward, backward = bridge.get_caching_hooks(incl_bwd=True)
    with bridge.hooks(forward, backward):
        bridge(tokens, return_type="loss").backward()
    assert set(kept) == set(wanted)
    for name, tensor in kept.items():
        assert torch.equal(tensor, wanted[name]), name
    for names in ("blocks.0.hook_in", ["blocks.0.hook_in"], lambda name: name.endswith("blocks.0.hook_in")):
        part, forward, _ = bridge.get_caching_hooks(names, pos_slice=(1, 3))
        bridge.run_with_hooks(tokens, fwd_hooks=forward)
        assert set(part) == {"blocks.0.hook_in", "blocks.0.hook_resid_pre"}
        assert torch.equal(part["blocks.0.hook_in"], wanted["resid_pre", 0][:, 1:3])
    alone, forward, _ = bridge.get_caching_hooks("*.hook_pattern", remove_batch_dim=True, pos_slice=-1)
    bridge.run_with_hooks(tokens[:1], fwd_hooks=forward, remove_batch_dim=True)
    assert torch.equal(
        alone["blocks.1.attn.hook_pattern"], bridge.run_with_cache(tokens[:1])[1]["pattern", 1][0, :, -1:]
    )
    cache = bridge.add_caching_hooks("blocks.1.hook_resid_post")
    bridge.hf_model(tokens)
    assert torch.equal(cache["blocks.1.hook_resid_post"], wanted["resid_post", 1])
    bridge.reset_hooks()
    assert not bridge.live_hooks()
    for call in (bridge.cache_all, lambda kept: bridge.cache_some(kept, "hook_embed")):
        kept = {}
        with pytest.warns(DeprecationWarning, match="run_with_cache"):
            call(kept)
        bridge(tokens)
        assert torch.equal(kept["hook_embed"], wanted["hook_embed"])
        bridge.reset_hooks()


# -- weights and attributes --------------------------------------------------------------------------------------------


NO_PARAMETERS = dict.fromkeys(("falcon-new", "falcon-one-norm"), "they have no view by head")
NO_PARAMETERS |= dict.fromkeys(filter(has_experts, CONFIGS), "is a mixture of experts, and has no W_in of its own")
"""Families without some of TransformerLens' weights, and what they say."""


@pytest.mark.parametrize("name", sorted({"falcon-new", "qwen2_moe", *of_each_layout()}))
def test_parameters_by_name(name: str) -> None:
    bridge = TransformerBridge(make_family(name))
    if name in NO_PARAMETERS:
        for call in (bridge.tl_parameters, bridge.get_params, bridge.tl_named_parameters):
            with pytest.raises(WeightError, match=NO_PARAMETERS[name]):
                call()
        return
    cfg, found = bridge.cfg, bridge.tl_parameters()
    assert found.keys() == dict(bridge.tl_named_parameters()).keys() == bridge.get_params().keys()
    assert torch.equal(found["blocks.1.attn.W_K"], bridge.W_K[1])
    assert ("blocks.0.mlp.W_gate" in found) == cfg.gated_mlp
    assert torch.equal(found["unembed.W_U"], bridge.W_U)
    own = {parameter.data_ptr(): name for name, parameter in bridge.named_parameters()}
    for norm in ("ln1", "ln_final"):
        component = bridge.ln_final if norm == "ln_final" else bridge.blocks[1].submodules.get(norm)
        if component is not None:
            key = norm if norm == "ln_final" else f"blocks.1.{norm}"
            assert found[f"{key}.w"].data_ptr() in own
            assert component.weight is component.module.weight  # passed through
            assert hasattr(component, "b") == (f"{key}.b" in found)
    counted = {"q", "k", "v", "o", "in", "out", "gate", "qkv", "gate_up"}
    matrices = sum(
        sum(p.numel() for p in child.module.parameters() if p.dim() == 2)
        for block in bridge.blocks
        for part in ("attn", "mlp")
        for key, child in block.submodules[part].submodules.items()
        if key in counted and child.root is not None
    )
    assert cfg.n_params == matrices or not matrices
    assert bridge.n_params_total == sum(parameter.numel() for parameter in set(bridge.hf_model.parameters()))
    assert bridge.layer_types() == ["attn+mlp"] * cfg.n_layers
    assert type(cfg).from_dict(cfg.to_dict()) == cfg
    assert isinstance(bridge.hook_embed, HookPoint)
    assert bridge.hook_unembed is bridge.hook_dict["hook_unembed"]


def test_biases_and_composition() -> None:
    bridge = TransformerBridge(make_bloom(torch.float64))
    wanted = bridge.b_O[:2].sum(0) + bridge.b_out[:2].sum(0)
    assert torch.allclose(bridge.accumulated_bias(2), wanted)
    assert torch.allclose(bridge.accumulated_bias(2, mlp_input=True), wanted + bridge.b_O[2])
    assert torch.allclose(bridge.accumulated_bias(2, include_mlp_biases=False), bridge.b_O[:2].sum(0))
    assert not bridge.accumulated_bias(0).any()
    norm = torch.linalg.matrix_norm
    write, product = bridge.OV[0, 1].AB, bridge.OV[0, 1].AB @ bridge.QK[2, 3].AB.T
    for mode, read in (("Q", bridge.QK[2, 3].AB), ("K", bridge.QK[2, 3].AB.T), ("V", bridge.OV[2, 3].AB)):
        scores = bridge.all_composition_scores(mode)
        assert torch.allclose(scores[0, 1, 2, 3], norm(write @ read) / norm(write) / norm(read), rtol=1e-9)
        assert not scores[2, :, 1].any()
        assert type(scores * 2) is torch.Tensor
    assert product.shape == (48, 48)
    assert scores.head_labels == bridge.all_head_labels == bridge.attn_head_labels
    assert scores.head_labels[5] == "L1H1"
    assert scores.layer_indices == [0, 1, 2]
    assert torch.equal(scores.scores, scores + 0)
    without = TransformerBridge(make_bloom(slow_but_exact=True, pretraining_tp=2))  # Hugging Face leaves them out there
    assert not without.accumulated_bias(3).any()
    granite = make_family("granite", attention_bias=True, mlp_bias=True)
    blocks, factor = granite.model.layers[:2], granite.config.residual_multiplier
    added = sum(block.self_attn.o_proj.bias + block.mlp.down_proj.bias for block in blocks) * factor
    assert torch.allclose(TransformerBridge(granite).accumulated_bias(2), added)
    after = make_bloom(apply_residual_connection_post_layernorm=True)
    with pytest.raises(UnsupportedModelError, match="apply_residual_connection_post_layernorm"):
        TransformerBridge(after).accumulated_bias(1)
    with pytest.raises(UnsupportedModelError, match="norms what its branches add"):
        TransformerBridge(make_family("gemma2")).accumulated_bias(1)


@pytest.mark.parametrize("family", ["gemma", "gptj"])
def test_singular_vectors_of_what_neurons_read_have_the_gain_of_their_norm(family: str) -> None:
    """Gemma's gain is 1 + weight; in GPT-J's parallel block the MLP reads the one norm there is."""
    model = make_family(family, torch.float64)
    if family == "gemma":
        block = model.model.layers[1]
        read = block.mlp.up_proj.weight * (1 + block.post_attention_layernorm.weight)
    else:
        block = model.transformer.h[1]
        read = block.mlp.fc_in.weight * block.ln_1.weight
    wanted = model.lm_head.weight @ torch.linalg.svd(read, full_matrices=False).Vh[:3].T
    found = SVDInterpreter(TransformerBridge(model)).get_singular_vectors("w_in", 1, 3)[:, 0]
    assert torch.allclose(found.abs(), wanted.abs(), rtol=1e-9, atol=1e-12)  # a vector's sign is arbitrary


def test_attributes() -> None:
    bridge, model = make_pair()
    assert bridge.original_model is bridge.hf_model
    assert not bridge.compatibility_mode
    bridge.enable_compatibility_mode(no_processing=True)
    assert bridge.compatibility_mode
    assert copy.deepcopy(bridge).compatibility_mode
    names = bridge.mod_dict
    assert names["blocks.1.attn"] is bridge.blocks[1].attn
    assert names["blocks.1.hook_in"] is names["blocks.1.hook_resid_pre"] is bridge.blocks[1].hook_resid_pre
    assert bridge.config is bridge.hf_model.config
    levels = []
    with bridge.hooks([("hook_embed", lambda t, hook: levels.append(bridge.context_level))]):
        assert bridge.context_level == 1
        bridge(random_tokens())
    assert bridge.context_level == 0
    assert levels == [1]
    assert "attn.hook_q" in bridge.block_hooks(1)
    assert bridge.block_submodules(0) == ["ln1", "attn", "ln2", "mlp"]
    layers, stacked = bridge.stack_params_for("attn", "attn.W_Q", lambda w: w[0])
    assert layers == bridge.composition_layer_indices() == bridge.QK_for_attn_layers()[0] == [0, 1, 2]
    assert torch.equal(stacked, bridge.W_Q[:, 0])
    assert bridge.cfg.seed is None
    for name, words in (
        ("boot_native", "a name of TransformerLens'.*TransformerBridge.model"),
        ("nonsense", "nor has the"),
    ):
        with pytest.raises(AttributeError, match=words):
            getattr(bridge, name)
    with pytest.warns(UserWarning, match="left out: nonsense"):
        type(bridge.cfg).from_dict({**bridge.cfg.to_dict(), "nonsense": 1})


def test_a_shallow_copy_has_a_tokenizer_of_its_own(demo: TransformerBridge) -> None:
    other = copy.copy(demo)
    other.tokenizer = None
    assert demo.tokenizer is not None
    assert other.hf_model is demo.hf_model
    other.set_attn_implementation("sdpa")
    assert demo.attn_implementation == "eager"
    assert copy.copy(other).attn_implementation == "sdpa"
    tokens = demo.to_tokens(PROMPTS[0])
    assert torch.equal(copy.copy(demo)(tokens), demo(tokens))
    with pytest.raises(InputError, match="Strings need a tokenizer"):
        other(PROMPTS[0])


def test_functions_on_a_component() -> None:
    bridge, _ = make_pair()
    attention = bridge.blocks[1].attn
    attention.add_hook(look)
    attention.add_hook(look, "input")
    assert {handle.point for handle in bridge.live_hooks()} == {attention.hook_out, attention.hook_in}
    attention.remove_hooks("input")
    assert len(bridge.live_hooks()) == 1
    attention.remove_hooks()
    assert not bridge.live_hooks()
    with pytest.raises(InputError, match="Hook name 'invalid' not supported"):
        attention.add_hook(look, "invalid")


def test_a_live_model_has_the_tokenizer_of_its_name(demo: TransformerBridge) -> None:
    from pellucid.demo import MODEL_FOLDER

    bridge = TransformerBridge.boot_transformers(str(MODEL_FOLDER), hf_model=demo.hf_model)
    assert bridge.to_tokens("Everyone").tolist() == demo.to_tokens("Everyone").tolist()
    assert bridge.cfg.tokenizer_name == str(MODEL_FOLDER)
