"""Each bad input of the contract: refused by name before anything runs, with what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, CTRLConfig, CTRLLMHeadModel, DynamicCache

from pellucid import TransformerBridge
from pellucid.attribution import attribution_patching
from pellucid.circuits import edge_attribution
from pellucid.conversion_utils.conversion_steps import RearrangeTensorConversion
from pellucid.corpora import PromptPairs
from pellucid.errors import (
    GradientError,
    HookDisabledError,
    HookNameError,
    HookValueError,
    InputError,
    NoEffectError,
    PellucidError,
    PellucidWarning,
    UnsupportedModelError,
)
from pellucid.experiments.activation_patching import activation_patching
from pellucid.model_bridge.verification.self_check import Checker
from pellucid.names import HookSpec
from pellucid.sweep import Edit, LogitDifference, Sweep, Zero
from tests.models import is_pristine, make_bloom, make_pair, random_tokens


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return make_pair()[0]


def look(tensor: Tensor, hook: Any) -> None:
    """A hook that only looks."""


@pytest.mark.parametrize(
    ("names_filter", "message"),
    [
        (
            "blocks.0.attn.hook_patern",
            "No hook point is called 'blocks.0.attn.hook_patern'. .*blocks.0.attn.hook_pattern",
        ),
        ("blocks.7.hook_resid_pre", "The model has 3 layers, 0 to 2"),
        ("blocks.*.mlp.hook_pots", "The glob 'blocks.*.mlp.hook_pots' matches no hook point"),
        (["hook_embed", "blocks.0.hook_restid_mid"], "'blocks.0.hook_restid_mid'. .*blocks.0.hook_resid_mid"),
        ([], "empty"),
        (["hook_embed", 3], "found 3 of type int"),
        (lambda name: False, "predicate"),
    ],
)
def test_names_that_match_nothing(bridge: TransformerBridge, names_filter: Any, message: str) -> None:
    ran: list[int] = []
    handle = bridge.hf_model.register_forward_pre_hook(lambda m, a: ran.append(1))
    for call in (
        lambda: bridge.run_with_cache(random_tokens(), names_filter=names_filter),
        lambda: bridge.run_with_hooks(random_tokens(), fwd_hooks=[(names_filter, look)]),
        lambda: bridge.run_with_hooks(random_tokens(), bwd_hooks=[(names_filter, look)]),
        lambda: bridge.add_hook(names_filter, look),
        lambda: bridge.estimate_cache(random_tokens(), names_filter),
    ):
        with pytest.raises(HookNameError, match=message):
            call()
    handle.remove()
    assert not ran
    assert is_pristine(bridge.hf_model)
    with pytest.raises(KeyError) as caught:
        bridge.hook_dict["blocks.0.attn.hook_patern"]
    assert len(re.findall(r"blocks\.", str(caught.value))) == 4  # what was asked and the three nearest


@pytest.mark.parametrize(
    ("name", "setter"),
    [
        ("blocks.0.attn.hook_result", "set_use_attn_result"),
        ("blocks.0.hook_q_input", "set_use_split_qkv_input"),
        ("blocks.0.attn.hook_v_input", "set_use_split_qkv_input"),
        ("blocks.0.hook_attn_in", "set_use_attn_in"),
        ("blocks.*.hook_mlp_in", "set_use_hook_mlp_in"),
    ],
)
def test_opt_in_points_that_are_off(name: str, setter: str) -> None:
    bridge, _ = make_pair()
    for call in (
        lambda: bridge.add_hook(name, look),
        lambda: bridge.run_with_cache(random_tokens(), names_filter=name),
        lambda: bridge.hook_dict[name] if "*" not in name else bridge.add_hook(name, look),
    ):
        with pytest.raises(HookDisabledError, match=rf"Call {setter}\(True\)"):
            call()
    assert name not in bridge.hook_dict
    getattr(bridge, setter)(True)
    with bridge.hooks([(name, look)]), pytest.raises(HookDisabledError, match="remove it"):
        getattr(bridge, setter)(False)
    getattr(bridge, setter)(False)
    assert name not in bridge.hook_dict


def test_switches_that_exclude_each_other() -> None:
    bridge, _ = make_pair()
    bridge.set_use_attn_in(True)
    with pytest.raises(ValueError, match=r"set_use_attn_in\(False\)"):
        bridge.set_use_split_qkv_input(True)
    bridge.set_use_attn_in(False)
    bridge.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match=r"set_use_split_qkv_input\(False\)"):
        bridge.set_use_attn_in(True)


def broadcastable(tensor: Tensor, hook: Any) -> Tensor:
    return tensor[:, :1]


@pytest.mark.parametrize(
    ("function", "expected", "found"),
    [
        (broadcastable, r"\(2, 9, 48\)", r"\(2, 1, 48\)"),
        (lambda t, hook: t.sum(), r"\(2, 9, 48\)", r"\(\)"),
        (lambda t, hook: t.double(), "torch.float32", "torch.float64"),
        (lambda t, hook: t.to("meta"), "cpu", "meta"),
        (lambda t, hook: "nonsense", "Tensor", "str"),
        (lambda t, hook: t.unsqueeze_(0) and None, r"\(2, 9, 48\)", r"\(1, 2, 9, 48\)"),
    ],
)
def test_what_a_hook_returns(bridge: TransformerBridge, function: Any, expected: str, found: str) -> None:
    name = "blocks.1.hook_attn_out"

    def wrapped(tensor: Tensor, hook: Any) -> Any:
        if function.__code__.co_consts and "unsqueeze_" in function.__code__.co_names:
            tensor.unsqueeze_(0)
            return None
        return function(tensor, hook)

    with pytest.raises(HookValueError) as caught:
        bridge.run_with_hooks(random_tokens(), fwd_hooks=[(name, wrapped)])
    message = str(caught.value)
    assert re.search(expected, message)
    assert re.search(found, message)
    assert name in message
    assert "test_bad_input.py" in message
    assert "wrapped" in message
    assert is_pristine(bridge.hf_model)


def test_an_exception_in_a_hook_names_it(bridge: TransformerBridge) -> None:
    def divide(tensor: Tensor, hook: Any) -> None:
        raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError) as caught:
        bridge.run_with_hooks(random_tokens(), fwd_hooks=[("blocks.2.mlp.hook_post", divide)])
    said = "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "blocks.2.mlp.hook_post" in said
    assert "divide" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(0, 5, dtype=torch.long), r"no tokens: the batch has shape \(0, 5\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"no tokens: the batch has shape \(2, 0\)"),
        (torch.tensor([[1, 97]]), "Token id 97 is outside the vocabulary: ids go from 0 to 96"),
        (torch.tensor([[-1, 2]]), "Token id -1"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"found shape \(2, 3, 4\)"),
        (torch.zeros(2, 3), "integers; found torch.float32.*start_at_layer"),
        (torch.ones(2, 3, dtype=torch.bool), "integers; found torch.bool"),
        (7, "found int"),
        ("text", "need a tokenizer"),
    ],
    ids=str,
)
def test_tokens(bridge: TransformerBridge, given: Any, message: str) -> None:
    for call in (bridge, bridge.run_with_cache, bridge.run_with_hooks, bridge.generate):
        with pytest.raises(InputError, match=message):
            call(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "has no tokens"),
        (["Everyone", ""], r"Text 1 \(''\) has no tokens"),
        ([], "empty"),
        (["Everyone", 3], "entry 1 is int"),
    ],
)
def test_text(demo: TransformerBridge, given: Any, message: str) -> None:
    for call in (demo, demo.run_with_cache, demo.generate):
        with pytest.raises(InputError, match=message):
            call(given)
    with pytest.raises(InputError, match="padding_side"):
        demo(["a", "b c d e f"], padding_side="middle")
    with pytest.raises(InputError, match="not a single token!"):
        demo.to_single_token("Everyone has the right")
    with pytest.raises(InputError, match="does not occur"):
        demo.get_token_position(" the", "Toda persona")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 8), r"\(2, 9\); found \(2, 8\)"),
        (torch.ones(9), r"found \(9,\)"),
        (torch.full((2, 9), 2), "other values"),
        ([[1] * 9] * 2, "found list"),
    ],
    ids=str,
)
def test_masks(bridge: TransformerBridge, mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bridge(random_tokens(), attention_mask=mask)


def test_a_mask_that_leaves_the_cache_out(bridge: TransformerBridge) -> None:
    past = DynamicCache()
    bridge(random_tokens(2, 4), past_key_values=past)
    with pytest.raises(InputError, match=r"\(2, 6\) \(4 cached positions and 2 new ones\); found \(2, 2\)"):
        bridge(random_tokens(2, 2), past_key_values=past, attention_mask=torch.ones(2, 2))
    assert past.get_seq_length() == 4


def test_keywords_and_choices(bridge: TransformerBridge) -> None:
    tokens = random_tokens()
    for call in (bridge, bridge.run_with_cache, bridge.run_with_hooks):
        with pytest.raises(TypeError, match="return_typ"):
            call(tokens, return_typ="loss")
        with pytest.raises(
            InputError, match="'logits', 'loss', 'both', 'logits_and_cache', None.*Did you mean 'logits'"
        ):
            call(tokens, return_type="logit")
    with pytest.raises(TypeError, match="past_kv_cach"):
        bridge(tokens, past_kv_cach=None)
    with pytest.raises(ValueError, match="max_new_tokenz"):
        bridge.generate(tokens, max_new_tokenz=3, verbose=False)
    with pytest.raises(InputError, match="at least 1"):
        bridge.generate(tokens, max_new_tokens=0)
    with pytest.raises(InputError, match="Invalid dir"):
        bridge.add_hook("hook_embed", look, dir="forward")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="as the function"):
        bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", "not callable")])  # type: ignore[list-item]
    for layer in (4, -4):
        with pytest.raises(InputError, match="0 to 2, or 3 for the end"):
            bridge(tokens, stop_at_layer=layer)
    for positions in (9, -10, [0, 12]):
        with pytest.raises(InputError, match="the run has 9, 0 to 8"):
            bridge.run_with_cache(tokens, pos_slice=positions)


def test_residuals(bridge: TransformerBridge) -> None:
    for residual, message in (
        (random_tokens(), "takes the residual-stream tensor"),
        (torch.zeros(2, 3, 47), r"found shape \(2, 3, 47\)"),
        (torch.zeros(3, 48), r"found shape \(3, 48\)"),
        (torch.zeros(0, 3, 48), r"found shape \(0, 3, 48\)"),
        (torch.zeros(2, 3, 48, dtype=torch.float16), "dtype torch.float32; found torch.float16"),
        ("text", "found str"),
    ):
        with pytest.raises(InputError, match=message):
            bridge(residual, start_at_layer=1)
    with pytest.raises(InputError, match="A loss needs tokens"):
        bridge(torch.zeros(2, 3, 48), start_at_layer=1, return_type="loss")


def test_losses_without_targets(bridge: TransformerBridge) -> None:
    for tokens, mask in ((random_tokens(2, 1), None), (random_tokens(1, 3), torch.tensor([[1, 0, 1]]))):
        with pytest.raises(InputError, match="two real tokens"):
            bridge(tokens, attention_mask=mask, return_type="loss")


def test_gradients_that_cannot_be(bridge: TransformerBridge) -> None:
    tokens = random_tokens()
    with torch.no_grad():
        with pytest.raises(GradientError, match="gradients are off"):
            bridge.run_with_hooks(tokens, bwd_hooks=[("hook_embed", look)])
        with pytest.raises(GradientError, match="gradients"):
            bridge.run_with_cache(tokens, incl_bwd=True)
    with pytest.raises(GradientError, match="token ids"):
        bridge.run_with_hooks(tokens, bwd_hooks=[("embed.hook_in", look)])
    with pytest.raises(InputError, match="loss"):
        bridge.run_with_cache(tokens, incl_bwd=True, loss_per_token=True)
    assert is_pristine(bridge.hf_model)


def test_edits_that_do_nothing_are_told(bridge: TransformerBridge) -> None:
    tokens = random_tokens()
    name = "blocks.1.mlp.hook_post"

    def a_copy(tensor: Tensor, hook: Any) -> None:
        tensor.double().index_fill_(2, torch.tensor([1, 2]), 0)  # an ablation that never happens

    def the_tensor(tensor: Tensor, hook: Any) -> None:
        tensor.index_fill_(2, torch.tensor([1, 2]), 0)

    bridge.run_with_hooks(tokens, fwd_hooks=[(name, the_tensor)], assert_effect=True)
    bridge.run_with_hooks(tokens, fwd_hooks=[(name, a_copy)])
    for function in (a_copy, lambda t, hook: t.clone(), lambda t, hook: t * 1):
        with pytest.raises(NoEffectError, match=rf"{name} ran 1 times"):
            bridge.run_with_hooks(tokens, fwd_hooks=[(name, the_tensor), (name, function)], assert_effect=True)
    assert is_pristine(bridge.hf_model)


def test_models_of_no_family_that_is_known() -> None:
    other = CTRLLMHeadModel(CTRLConfig(n_layer=1, n_embd=8, n_head=2, dff=8, vocab_size=11))
    with pytest.raises(UnsupportedModelError, match=r"(?s)CTRLLMHeadModel has no.*transformer\.word_embeddings"):
        TransformerBridge(other)
    with pytest.raises(UnsupportedModelError, match="Linear has no causal language model inside"):
        TransformerBridge(nn.Linear(2, 2))


def test_configurations_we_do_not_handle() -> None:
    model = make_bloom()
    model.config.rotary_dim = 4
    model.config.n_inner = 100
    with pytest.raises(UnsupportedModelError) as caught:
        TransformerBridge(model)
    assert "n_inner = 100" in str(caught.value)
    model.config.n_inner = None
    with pytest.warns(PellucidWarning, match="rotary_dim"):  # nothing of BLOOM's reads it
        TransformerBridge(model)


def test_published_configurations_are_handled() -> None:
    """What bigscience/bloom-560m's config.json sets beyond a fresh BloomConfig."""
    model = make_bloom()
    for name, value in {
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": True,
        "n_inner": None,
        "offset_alibi": 100,
        "seq_length": 2048,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "unk_token_id": 0,
    }.items():
        setattr(model.config, name, value)
    assert TransformerBridge(model).cfg.n_ctx == 2048


def test_missing_modules_are_listed() -> None:
    model = make_bloom()
    del model.transformer.h[1].mlp.gelu_impl
    with pytest.raises(UnsupportedModelError, match=r"lacks modules.*transformer\.h\.1\.mlp\.gelu_impl"):
        TransformerBridge(model)


def test_an_adapter_that_would_have_no_effect_is_refused() -> None:
    model = make_bloom(slow_but_exact=True, pretraining_tp=2)
    model.transformer.h[0].mlp.dense_4h_to_h = nn.Sequential(model.transformer.h[0].mlp.dense_4h_to_h)
    with pytest.raises(UnsupportedModelError, match="never calls that layer"):
        TransformerBridge(model)


def test_weights_that_are_not_finite_are_named() -> None:
    model = make_bloom()
    with torch.no_grad():
        model.transformer.h[1].mlp.dense_h_to_4h.weight[0, 0] = float("nan")
    report = TransformerBridge(model).verify(layers=[])
    assert not report.ok
    assert "transformer.h.1.mlp.dense_h_to_4h.weight" in str(report)


def test_what_the_first_look_leaves_on_the_model_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's modules have it too, and all runs after it: only what ran before any hook shows it."""
    bridge, run, spoiled = make_pair()[0], Checker.edited, list[str]()

    def edited(self: Checker, spec: HookSpec, function: Any) -> Tensor:
        if not spoiled:
            spoiled.append(spec.name)
            with torch.no_grad():
                bridge.hf_model.transformer.ln_f.bias.add_(0.1)
        return run(self, spec, function)

    monkeypatch.setattr(Checker, "edited", edited)
    failed = [result.name for result in bridge.verify(layers=[]).failed]
    assert f"{spoiled[0]}: looking" in failed


def test_boot_arguments(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="hub name or a folder"):
        TransformerBridge.boot_transformers()
    with pytest.raises(InputError, match="There is no folder"):
        TransformerBridge.boot_transformers(tmp_path / "nothing")
    with pytest.raises(InputError, match="dtype, revision would have no effect"):
        TransformerBridge.boot_transformers(hf_model=make_bloom(), dtype=torch.float16, revision="main")
    with pytest.raises(InputError, match="attn_implementation"):
        TransformerBridge.boot_transformers(tmp_path, attn_implementation="flash")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="both say where"):
        TransformerBridge.boot_transformers(tmp_path, device="cpu", device_map="auto")
    CTRLConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="model_type='ctrl'.*It opens: bloom"):
        TransformerBridge.boot_transformers(tmp_path)
    BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=11).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="n_inner = 9"):
        TransformerBridge.boot_transformers(tmp_path, hf_config_overrides={"n_inner": 9}, load_weights=False)


def test_every_error_is_ours_and_reads_well() -> None:
    for error in PellucidError.__subclasses__():
        assert str(error("two 'quoted' words\nand a line")) == "two 'quoted' words\nand a line"


def test_spans_slices_and_requests_that_make_no_sense(bridge: TransformerBridge) -> None:
    with pytest.raises(InputError, match="nothing to run"):
        bridge(torch.zeros(2, 3, 48), start_at_layer=2, stop_at_layer=1)
    for positions in (torch.tensor([True] * 8), True, [0.5]):
        with pytest.raises(InputError, match="pos_slice is a (mask of 8; the run has 9|position, a slice)"):
            bridge.run_with_cache(random_tokens(), pos_slice=positions)
    with pytest.raises(InputError, match="steps forward"):
        bridge.run_with_cache(random_tokens(), pos_slice=slice(None, None, -1))
    for requests in (["hook_embed"], ("hook_embed", look)):
        with pytest.raises(InputError, match="pairs"):
            bridge.run_with_hooks(random_tokens(), fwd_hooks=requests)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="integers"):
        bridge(random_tokens(), start_at_layer=1)
    _, cache = bridge.run_with_cache(random_tokens())
    for key in (3, ("q",), ("q", 0, "attn", 1), ("pattern", -9), ("pattern", 3)):
        with pytest.raises(KeyError):
            cache[key]  # type: ignore[index]
        assert key not in cache
    with pytest.raises(InputError, match="two tokens or more"):
        bridge.verify(random_tokens(1, 1))
    assert bridge.verify(random_tokens(1, 2), layers=[0]).ok


def test_positions_of_a_reshaped_point() -> None:
    bridge, _ = make_pair()
    bridge.hook_dict["blocks.0.attn.hook_z"].enable_reshape(RearrangeTensorConversion("b p n h -> n b p h"))
    _, cache = bridge.run_with_cache(random_tokens())
    assert cache["z", 0].shape == (4, 2, 9, 12)
    with pytest.raises(InputError, match="another shape"):
        bridge.run_with_cache(random_tokens(), pos_slice=-1)


@pytest.mark.parametrize(
    "tool",
    [
        lambda bridge, tokens: Sweep(bridge, tokens, LogitDifference(5, 6)).run(
            [Edit("blocks.0.attn.hook_z", Zero(), heads=[1])]
        ),
        lambda bridge, tokens: activation_patching(bridge, tokens[:1], tokens[1:], LogitDifference(5, 6), site="z"),
        lambda bridge, tokens: attribution_patching(
            bridge, PromptPairs(tokens[:1].tolist(), tokens[1:].tolist(), [5], [6]), site="z"
        ),
        lambda bridge, tokens: edge_attribution(
            bridge, PromptPairs(tokens[:1].tolist(), tokens[1:].tolist(), [5], [6])
        ),
    ],
    ids=["sweep", "patching", "attribution", "edges"],
)
def test_who_needs_the_axes_of_a_reshaped_point_refuses_it(tool: Callable[..., Any]) -> None:
    """They would look for positions and heads on the wrong axes."""
    bridge, _ = make_pair()
    point = bridge.get_hook_point("blocks.0.attn.hook_z")
    point.enable_reshape(RearrangeTensorConversion("b p n h -> n b p h"))
    tokens = random_tokens(2, 4)
    with pytest.raises(InputError, match=r"cannot tell the axes of blocks\.0\.attn\.hook_z, which is shown in another"):
        tool(bridge, tokens)
    point.enable_reshape(None)
    tool(bridge, tokens)


def test_float64_and_checkpointing() -> None:
    bridge = TransformerBridge(make_bloom(torch.float64))
    bridge.hf_model.gradient_checkpointing_enable()
    bridge.train()
    with pytest.raises(GradientError, match="checkpointing"):
        bridge(random_tokens(), return_type="loss")
