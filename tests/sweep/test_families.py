"""Sweeps of every family: an edit at each hook point scores what one whole hooked forward scores."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.errors import InputError, UnsupportedModelError
from pellucid.names import HookSpec
from pellucid.sweep import Add, Edit, FromRun, LogitDifference, Scale, SetTo, Sweep, Zero
from tests.families import VOCAB, in_float64, make_family, mask_of, of_each_layout
from tests.models import is_pristine, make_bloom
from tests.sweep.reference import whole_logits

ANSWER, FOIL = 3, 5
LENGTH = 9
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Parts of the metric's size."""

SIDES = {"unpadded": None, "padded left": "left", "padded right": "right"}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def ids(seed: int) -> Tensor:
    return torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def score(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logit difference at each row's last real token, from whole logits."""
    columns = [LENGTH - 1] * 2 if mask is None else [int(row.nonzero().max()) for row in mask]
    return torch.stack([logits[row, column, ANSWER] - logits[row, column, FOIL] for row, column in enumerate(columns)])


def edit_at(spec: HookSpec, sizes: Mapping[str, int], other: Mapping[str, Tensor], choice: random.Random) -> Edit:
    """Some edit of a point: of one, several or all positions, of some heads, features or keys."""
    where: dict[str, Any] = {"positions": choice.choice([3, 4, 5, LENGTH - 1, None, [1, 5]])}
    heads = [axis for axis in spec.axes if axis in ("n_heads", "n_key_value_heads")]
    if heads and choice.random() < 0.7:
        where["heads"] = choice.randrange(sizes[heads[0]])
    if "key_pos" in spec.axes and choice.random() < 0.5:
        where["keys"] = [0, LENGTH - 1]
    if spec.axes[-1] in ("d_model", "d_mlp", "d_head") and choice.random() < 0.3:
        where["neurons"] = slice(1, 7)
    value = choice.choice([FromRun(other), FromRun(other), Zero(), Scale(1.5), SetTo(0.3), Add(0.2)])
    if spec.kind == "int":
        value = FromRun(other)
    elif spec.site == "hook_scale":
        value = choice.choice([FromRun(other), Scale(1.5)])
    elif spec.site == "hook_attn_scores" and isinstance(value, Scale):
        value = Zero()  # half as much again as the lowest number is -inf, and a row of those has no softmax
    return Edit(spec.name, value, **where)


def make_bridge(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> TransformerBridge:
    bridge = TransformerBridge(make_family(name, dtype, attention))
    bridge.set_use_attn_result(True)
    if "blocks.0.hook_mlp_in" in bridge.hook_index:
        bridge.set_use_hook_mlp_in(True)
    if "blocks.0.hook_q_input" in bridge.hook_index:
        bridge.set_use_split_qkv_input(True)
    return bridge


def compare(
    bridge: TransformerBridge, tokens: Tensor, mask: Tensor | None, edits: list[Edit], least: float = 0.5, **sweep: Any
) -> Any:
    """Every edit's score against one whole hooked forward; ``least`` of them move it."""
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL), attention_mask=mask, **sweep).run(edits)
    base = score(bridge(tokens, attention_mask=mask), mask)
    expected = torch.stack([score(whole_logits(bridge, tokens, edit, mask), mask) for edit in edits])
    bound = TOLERANCE[bridge.dtype] * float(expected.abs().max())
    off = (result.values["metric"] - expected).abs().amax(1)
    wrong = [(edit, float(by)) for edit, by in zip(edits, off, strict=True) if not by <= bound]
    assert not wrong, f"{len(wrong)} of {len(edits)} are off by more than {bound:.1e}: {wrong[:5]}"
    assert float((result.base["metric"] - base).abs().max()) <= bound
    assert int(((expected - base).abs().amax(1) > 100 * bound).sum()) > least * len(edits)
    assert is_pristine(bridge.hf_model)
    return result


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", of_each_layout())
def test_an_edit_at_every_point_equals_a_whole_forward(name: str, side: str) -> None:
    bridge, tokens = make_bridge(name), ids(3)
    mask = mask_of(tokens, SIDES[side])
    other = bridge.run_with_cache(ids(4), attention_mask=mask)[1]
    choice = random.Random(f"{name} {side}")
    specs = [bridge.hook_spec(point) for point in bridge.hook_dict]
    if mask is not None:  # with padding every other point: all of them on one side or the other
        specs = specs[list(SIDES).index(side) - 1 :: 2]
    sizes = bridge.cfg.sizes(2, LENGTH, LENGTH)
    edits = [edit_at(spec, sizes, other, choice) for spec in specs]
    result = compare(bridge, tokens, mask, edits, least=0.5 if mask is None else 0.4)
    if bridge.cfg.num_experts:  # see tests/oracles/test_mixtures.py
        assert "router" in result.plan.why_whole
        return
    packs = bridge.adapter.family.attention.softmax_in != "forward"
    assert (result.plan.n_whole == 0) is packs, result.plan.why_whole


@pytest.mark.parametrize("name", in_float64(of_each_layout()))
def test_a_float64_model(name: str) -> None:
    bridge, tokens = make_bridge(name, torch.float64), ids(3)
    if not bridge.adapter.family.float64:
        pytest.skip("Hugging Face goes through float32")
    mask = mask_of(tokens, "left")
    other = bridge.run_with_cache(ids(4), attention_mask=mask)[1]
    choice, sizes = random.Random(name), bridge.cfg.sizes(2, LENGTH, LENGTH)
    edits = [edit_at(bridge.hook_spec(point), sizes, other, choice) for point in list(bridge.hook_dict)[::3]]
    compare(bridge, tokens, mask, edits, least=0.4)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3"])
def test_a_fused_kernel(name: str, side: str) -> None:
    """Hugging Face gives it no mask where nothing is padding, which means causal; packed rows stand at other columns."""
    bridge, tokens = make_bridge(name, attention="sdpa"), ids(3)
    mask = mask_of(tokens, SIDES[side])
    other = bridge.run_with_cache(ids(4), attention_mask=mask)[1]
    choice, sizes = random.Random(f"{name} {side}"), bridge.cfg.sizes(2, LENGTH, LENGTH)
    specs = list(map(bridge.hook_spec, bridge.hook_dict))
    specs = [spec for place, spec in enumerate(specs) if place % 3 == 0 or spec.site == "hook_pattern"]
    scores = sum("key_pos" in spec.axes for spec in specs)
    result = compare(bridge, tokens, mask, [edit_at(spec, sizes, other, choice) for spec in specs], least=0.3)
    # Padding before the first token holds other numbers where a layer is looked at: such edits are whole forwards.
    assert result.plan.n_whole <= (scores if side == "padded left" else 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_window_longer_than_the_prompt(attention: str) -> None:
    bridge, tokens = TransformerBridge(make_family("mistral", attention=attention, sliding_window=32)), ids(3)
    edits = [
        Edit(f"blocks.{layer}.hook_resid_pre", Scale(1.5), positions=p, neurons=0) for layer in range(3) for p in (0, 4)
    ]
    compare(bridge, tokens, None, edits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("virtual", [0, 3], ids=["lora", "prompt tuning"])
def test_an_adapter_acts(name: str, virtual: int) -> None:
    inside = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[name]
    adapter: Any = LoraConfig(target_modules=inside, r=4, init_lora_weights=False)
    if virtual:
        adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        bridge = TransformerBridge(get_peft_model(make_family(name), adapter).eval())
    tokens = ids(3)
    mask = mask_of(tokens, "left")
    hooks = [f"blocks.{layer}.{hook}" for layer in (0, 2) for hook in ("hook_resid_pre", "attn.hook_v", "hook_mlp_out")]
    edits = [Edit(hook, Scale(1.5), positions=virtual + 4) for hook in hooks]
    result = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL), attention_mask=mask).run(edits)
    expected = torch.stack([score(whole_logits(bridge, tokens, edit, mask)[:, virtual:], mask) for edit in edits])
    assert result.plan.n_whole == 0
    assert float((result.values["metric"] - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    assert float((expected - result.base["metric"]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["bloom", "llama", "gpt_neox", "gemma3", "olmo2"])
def test_reach_is_what_an_edit_changes(name: str) -> None:
    bridge = TransformerBridge(make_bloom()) if name == "bloom" else make_bridge(name)
    if name == "bloom":
        bridge.set_use_split_qkv_input(True)
    tokens, column = ids(3), 4

    def residual(*hooks: Any) -> Tensor:
        with bridge.hooks(fwd_hooks=list(hooks)):
            return bridge.run_with_cache(tokens, names_filter="blocks.1.hook_resid_post", stop_at_layer=2)[1][
                "blocks.1.hook_resid_post"
            ]

    def change(spec: HookSpec) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            here = tensor.select(spec.pos_axis, column)
            here += torch.arange(here.numel()).view(here.shape).cos()  # a norm would undo a shift or a factor

        return spec.name, hook

    usual = residual()
    reaching = set()
    for spec in map(bridge.hook_spec, bridge.hook_dict):
        if spec.layer == 1:
            later = bool((residual(change(spec)) - usual)[:, column + 1 :].abs().max() > 1e-5)
            assert spec.reach == ("later" if later else "own"), spec.name
            reaching |= {spec.site} if later else set()
    assert {"hook_k", "hook_v", "hook_in"} <= reaching


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "granite"])
def test_a_cache_of_the_base_run_is_taken(name: str) -> None:
    bridge, tokens = make_bridge(name), ids(3)
    mask = mask_of(tokens, "left")
    edits = [Edit(f"blocks.{layer}.hook_resid_pre", Scale(1.5), positions=4) for layer in range(3)]
    edits += [Edit("embed.hook_out", Scale(1.5), positions=5), Edit("blocks.1.attn.hook_v", SetTo(0.5), heads=1)]
    names = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL), attention_mask=mask).needed_names(edits)
    _, cache = bridge.run_with_cache(tokens, attention_mask=mask, names_filter=names)
    compare(bridge, tokens, mask, edits, base_cache=cache)


def test_heads_are_those_of_the_point() -> None:
    bridge, tokens = make_bridge("llama"), ids(3)
    sweep = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL))
    sweep.run([Edit("blocks.0.attn.hook_q", Zero(), heads=5), Edit("blocks.0.attn.hook_k", Zero(), heads=1)])
    with pytest.raises(InputError, match="heads of the edit of blocks.0.attn.hook_k: there are 2, 0 to 1; found 5"):
        sweep.run([Edit("blocks.0.attn.hook_k", Zero(), heads=5)])


def test_what_hugging_face_leaves_on_a_model_is_not_the_users() -> None:
    bridge, tokens = make_bridge("llama"), ids(3)
    bridge.hf_model(tokens, output_attentions=True)
    assert any(module._forward_hooks for module in bridge.hf_model.modules())
    edit = Edit("blocks.1.attn.hook_z", Zero(), positions=4)
    sweep = Sweep(bridge, tokens, LogitDifference(ANSWER, FOIL))
    assert sweep.plan([edit]).n_whole == 0
    handle = bridge.hf_model.model.layers[0].register_forward_hook(lambda *given: None)
    assert sweep.plan([edit]).why_whole == "torch hooks are on the model"
    handle.remove()


def test_another_attention_function_is_refused() -> None:
    model = make_family("llama")
    functions = transformers.AttentionInterface
    functions.register("mine", functions()["sdpa"])
    try:
        model.config._attn_implementation = "mine"
        sweep = Sweep(TransformerBridge(model), ids(3), LogitDifference(ANSWER, FOIL))
        with pytest.raises(UnsupportedModelError, match="The model's attention is 'mine'"):
            sweep.run([Edit("blocks.1.hook_resid_pre", Zero(), positions=4)])
    finally:
        del functions._global_mapping["mine"]


def test_what_a_block_is_handed_and_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("llama")
    layer = type(model.model.layers[0])
    usual = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, *args, per_layer=None, **more: usual(self, *args, **more))
    called = type(model.model).__call__
    monkeypatch.setattr(
        type(model.model), "__call__", lambda self, *a, **k: called(self, *a, per_layer=torch.ones(2), **k)
    )
    sweep = Sweep(TransformerBridge(model), ids(3), LogitDifference(ANSWER, FOIL))
    with pytest.raises(UnsupportedModelError, match="Llama of the installed transformers hands its blocks 'per_layer'"):
        sweep.run([Edit("blocks.1.hook_resid_pre", Zero(), positions=4)])
