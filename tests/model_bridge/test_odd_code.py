"""Odd but real code of users: hooks that call models, remove themselves, keep what they return; modules that change."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig

from pellucid import TransformerBridge
from pellucid.conversion_utils.conversion_steps import RearrangeTensorConversion
from pellucid.errors import (
    GradientError,
    HookDisabledError,
    HookNameError,
    HookUnreachableError,
    HookValueError,
    InputError,
)
from tests.model_bridge.test_bloom_attention import attention_of, bridge_of, inputs
from tests.models import is_pristine, make_bloom, make_generator, make_pair, random_tokens

TOKENS = random_tokens()
POINT = "blocks.1.hook_resid_pre"


def look(tensor: Tensor, hook: Any) -> None:
    """A hook that only looks."""


def test_a_hook_that_calls_parts_of_the_model_in_a_run_that_stops() -> None:
    bridge, model = make_pair()
    lenses: list[Tensor] = []

    def lens(tensor: Tensor, hook: Any) -> None:
        net = bridge.hf_model
        lenses.append(net.lm_head(net.transformer.ln_f(tensor)))

    stopped = bridge.run_with_hooks(TOKENS, stop_at_layer=3, fwd_hooks=[("blocks.*.hook_resid_post", lens)])
    assert torch.equal(stopped, bridge(TOKENS, stop_at_layer=3))
    assert len(lenses) == 3
    assert torch.equal(lenses[2], model(TOKENS).logits)


def test_a_hook_that_runs_the_model_does_not_disturb_the_cache() -> None:
    bridge, model = make_pair()
    other, inner = random_tokens(seed=3), []

    def run(tensor: Tensor, hook: Any) -> None:
        if not inner:
            inner.append(None)
            inner.append(bridge.run_with_cache(other)[1])

    with bridge.hooks([("blocks.1.hook_resid_post", run)]):
        _, cache = bridge.run_with_cache(TOKENS)
    _, wanted = bridge.run_with_cache(TOKENS)
    _, wanted_inside = bridge.run_with_cache(other)
    for found, expected in ((cache, wanted), (inner[1], wanted_inside)):
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_run_is_known_at_the_unembedding() -> None:
    model = make_generator()
    model.generation_config.pad_token_id = 3
    bridge = TransformerBridge(model)
    seen: list[Any] = []

    def where(tensor: Tensor, hook: Any) -> None:
        seen.append((hook.run.step, hook.run.columns.tolist(), tuple(hook.run.positions.shape), tensor.shape[1]))

    with bridge.hooks([("hook_unembed", where)]):
        bridge(TOKENS)
        bridge.generate(TOKENS, do_sample=False, max_new_tokens=3, stop_at_eos=False, verbose=False)
    assert seen == [
        (None, list(range(9)), (2, 9), 9),
        (0, [8], (2, 1), 1),  # generate unembeds the last position of the prompt only
        (1, [9], (2, 1), 1),
        (2, [10], (2, 1), 1),
    ]


def test_what_a_hook_returned_stays_the_users() -> None:
    bridge, _ = make_pair()

    def steer(tensor: Tensor, hook: Any) -> None:
        tensor[:, -1] += 3

    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS)
        before = cache["resid_post", 0].clone()
        bridge.run_with_hooks(
            TOKENS,
            fwd_hooks=[("blocks.0.hook_resid_post", lambda t, hook: cache["resid_post", 0]), (POINT, steer)],
        )
        assert torch.equal(cache["resid_post", 0], before)
        tokens = TOKENS.clone()
        _, cache = bridge.run_with_cache(tokens)
        tokens[0, 0] = 5
        assert torch.equal(cache["embed.hook_in"], TOKENS)
        assert torch.equal(cache.tokens, TOKENS)
        residual = bridge(TOKENS, stop_at_layer=1)
        _, cache = bridge.run_with_cache(residual, start_at_layer=1)
        before = cache["resid_pre", 1].clone()
        residual += 1
        assert torch.equal(cache["resid_pre", 1], before)


def test_expanded_inputs_can_be_looked_at() -> None:
    bridge, model = make_pair()
    tokens = random_tokens(1, 5).expand(3, -1)
    assert torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[("embed.hook_in", look)]), model(tokens).logits)
    residual = bridge(random_tokens(1, 5), stop_at_layer=1).expand(3, -1, -1)
    hooked = bridge.run_with_hooks(residual, start_at_layer=1, fwd_hooks=[(POINT, look)])
    assert torch.equal(hooked, bridge(residual, start_at_layer=1))


def test_a_hook_that_removes_itself_leaves_the_users_torch_hooks_once() -> None:
    bridge, _ = make_pair()
    bridge.hf_model.transformer.h[1].register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
    wanted = bridge.hf_model(TOKENS).logits
    for name in (POINT, "embed.hook_in", "blocks.1.ln1.hook_out", "blocks.1.attn.hook_z"):
        handles: list[Any] = []
        handles += bridge.add_hook(name, lambda t, hook, handles=handles: handles[0].remove())
        assert torch.equal(bridge(TOKENS), wanted)
        assert is_pristine(bridge.hf_model)


@pytest.mark.filterwarnings("ignore::pellucid.errors.PellucidWarning")
def test_a_forward_wrapped_while_hooked_goes_on_working() -> None:
    bridge, model = make_pair()
    bridge.add_hook(POINT, look)
    block = bridge.hf_model.transformer.h[1]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    bridge.reset_hooks()
    for _ in range(2):
        assert torch.equal(bridge.hf_model(TOKENS).logits, model(TOKENS).logits)
        doubled = bridge.run_with_hooks(TOKENS, fwd_hooks=[(POINT, lambda t, hook: t * 2)])
        assert not torch.equal(doubled, model(TOKENS).logits)
    offloaded = make_bloom()
    bridge = TransformerBridge(offloaded)
    bridge.add_hook(POINT, look)
    cpu_offload(offloaded, torch.device("cpu"))
    bridge.reset_hooks()
    assert torch.equal(bridge(TOKENS), model(TOKENS).logits)


def test_copies_of_single_modules_are_plain() -> None:
    bridge, model = make_pair()
    fired: list[int] = []
    bridge.add_hook("ln_final.hook_out", lambda t, hook: fired.append(1))
    bridge.hf_model.transformer.ln_f = copy.deepcopy(bridge.hf_model.transformer.ln_f)
    assert torch.equal(bridge(TOKENS), model(TOKENS).logits)
    assert fired == [1]  # on the new module, once
    bridge.reset_hooks()
    assert torch.equal(bridge(TOKENS), model(TOKENS).logits)


def test_modules_to_save_of_an_adapter_while_hooked() -> None:
    model = make_bloom(tie_word_embeddings=False)
    native = copy.deepcopy(model)(TOKENS).logits
    bridge = TransformerBridge(model)
    bridge.add_hook("hook_unembed", lambda t, hook: t * 0)
    get_peft_model(model, LoraConfig(target_modules=["query_key_value"], modules_to_save=["lm_head"]))
    model.eval()
    assert bridge(TOKENS).count_nonzero() == 0
    bridge.reset_hooks()
    assert torch.equal(bridge(TOKENS), native)


def test_the_model_may_be_cast_behind_the_bridge() -> None:
    bridge, _ = make_pair()
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    bridge.hf_model.double()
    assert torch.isfinite(bridge(TOKENS, attention_mask=mask)).all()
    assert bridge.dtype == torch.float64
    bridge.hf_model.half()
    residual = bridge(TOKENS, stop_at_layer=1)
    assert torch.equal(bridge(residual, start_at_layer=1), bridge(TOKENS))
    _, cache = bridge.run_with_cache(TOKENS)
    assert cache.nbytes == sum(bridge.estimate_cache(TOKENS).values())


def test_torch_hooks_on_layers_we_could_read_are_called() -> None:
    bridge, _ = make_pair()
    bridge.set_use_attn_result(True)
    bridge.set_use_split_qkv_input(True)
    attention = bridge.hf_model.transformer.h[0].self_attention
    attention.dense.register_forward_hook(lambda m, a, out: out * 2)
    attention.query_key_value.register_forward_hook(lambda m, a, out: out * 2)
    plain = bridge(TOKENS)
    for name in ("blocks.0.attn.hook_result", "blocks.0.hook_q_input"):
        nudged = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda t, hook: t * (1 + 1e-6))])
        assert (nudged - plain).abs().max() < 1e-3


def test_edits_of_both_kinds_of_input_stay() -> None:
    bridge, _ = make_pair(torch.float64)
    bridge.set_use_split_qkv_input(True)

    def edit_head(tensor: Tensor, hook: Any) -> None:
        tensor[:, :, 0] += torch.arange(48) / 10

    with bridge.hooks([("blocks.1.hook_q_input", edit_head)]):
        _, head = bridge.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_q")
        with bridge.hooks([("blocks.1.attn.q.hook_in", lambda t, hook: t + 0.1)]):
            _, both = bridge.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_q")
    with bridge.hooks([("blocks.1.attn.q.hook_in", lambda t, hook: t + 0.1)]):
        _, own = bridge.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_q")
    _, clean = bridge.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_q")
    expected = head["q", 1] + (own["q", 1] - clean["q", 1])
    assert (both["q", 1] - expected).abs().max() < 1e-12


def test_gradients_on_two_ways_to_one_projection_are_refused() -> None:
    bridge, _ = make_pair()
    bridge.set_use_split_qkv_input(True)
    with pytest.raises(GradientError, match="exclude each other"):
        bridge.run_with_cache(TOKENS, incl_bwd=True)
    names = ["blocks.1.hook_q_input", "blocks.0.ln1.hook_out", "blocks.1.hook_resid_pre"]
    _, cache = bridge.run_with_cache(TOKENS, names_filter=names, incl_bwd=True)
    assert {name + "_grad" for name in names} < set(cache)


def test_threads_on_a_fresh_bridge_lose_no_hook() -> None:
    for _ in range(5):
        bridge, _ = make_pair()
        missed: list[str] = []
        start = threading.Barrier(6)

        def work(bridge: TransformerBridge = bridge, missed: list[str] = missed, start: Any = start) -> None:
            start.wait()
            fired: set[str] = set()
            bridge.run_with_hooks(TOKENS, fwd_hooks=[("*", lambda t, hook: fired.add(hook.name))])
            missed.extend(set(bridge.hook_dict) - fired)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not missed


def test_filters_of_any_kind_on_a_run_that_stops() -> None:
    bridge, _ = make_pair()
    wanted = ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre")
    for names in (list(wanted), set(wanted), wanted, ["blocks.0.hook_resid_pre", "blocks.2.*"]):
        with pytest.raises(HookUnreachableError, match=r"blocks\.2"):
            bridge.run_with_cache(TOKENS, names_filter=names, stop_at_layer=1)  # type: ignore[arg-type]


def test_limits_count_gradients() -> None:
    bridge, _ = make_pair()
    plain, both = (sum(bridge.estimate_cache(TOKENS, incl_bwd=flag).values()) for flag in (False, True))
    with pytest.raises(MemoryError):
        bridge.run_with_cache(TOKENS, incl_bwd=True, max_cache_bytes=plain)
    _, cache = bridge.run_with_cache(TOKENS, incl_bwd=True, max_cache_bytes=both)
    assert cache.nbytes == both


def test_opt_in_points_reached_as_attributes() -> None:
    bridge, _ = make_pair()
    for point in (bridge.blocks[0].attn.hook_result, bridge.blocks[0].hook_mlp_in, bridge.blocks[0].hook_q_input):
        with pytest.raises(HookDisabledError, match="on the bridge first"):
            point.add_hook(look)
    assert is_pristine(bridge.hf_model)


def test_generation_arguments_that_would_be_lost() -> None:
    bridge = TransformerBridge(make_generator())
    with pytest.raises(InputError, match="generation_config would be overridden"):
        bridge.generate(TOKENS, generation_config=GenerationConfig(max_new_tokens=3))
    greedy = bridge.generate(TOKENS, do_sample=False, verbose=False)
    assert torch.equal(bridge.generate(TOKENS, temperature=0.0, verbose=False), greedy)


def test_the_components_of_an_attention_alone() -> None:
    attention, given = attention_of(), inputs()
    bridge = bridge_of(attention)
    other = nn.Linear(48, 48)
    bridge.o.set_original_component(other)
    bridge.set_processed_weights({"o.weight": attention.dense.weight.data, "o.bias": attention.dense.bias.data})
    assert torch.equal(bridge(**given)[0], attention(**given)[0])
    assert torch.equal(bridge.b_O, other.bias)
    with pytest.raises(HookNameError):
        bridge.qkv.hook_out  # noqa: B018


def test_a_token_edit_outside_the_vocabulary() -> None:
    bridge, _ = make_pair()
    with pytest.raises(HookValueError, match="token id 997; ids go from 0 to 96"):
        bridge.run_with_hooks(TOKENS, fwd_hooks=[("embed.hook_in", lambda t, hook: t * 0 + 997)])


def test_a_check_leaves_each_module_in_its_mode() -> None:
    bridge, _ = make_pair()
    bridge.train()
    bridge.hf_model.transformer.h[0].eval()
    bridge.verify(layers=[])
    assert bridge.hf_model.training
    assert not bridge.hf_model.transformer.h[0].training


def test_a_hook_under_another_name_can_do_what_a_point_does() -> None:
    bridge, _ = make_pair()
    bridge.add_hook("blocks.1.hook_in", lambda t, hook: hook.remove_hooks())
    bridge(TOKENS)
    assert is_pristine(bridge.hf_model)


def test_a_reshaped_look_in_half_precision() -> None:
    bridge, model = make_pair(torch.bfloat16)
    bridge.hook_dict["blocks.0.attn.hook_z"].enable_reshape(RearrangeTensorConversion("b p n h -> b n p h"))
    assert torch.equal(bridge.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", look)]), model(TOKENS).logits)
