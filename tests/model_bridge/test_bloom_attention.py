"""The specified classes on their own: one Hugging Face attention, every constructor argument, processed weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as native_alibi

from pellucid.conversion_utils.conversion_steps import RearrangeTensorConversion
from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.conversion_utils.fused_qkv import FusedUnit, fuse_biases, fuse_weights, fused_index, fused_unit
from pellucid.errors import HookValueError, InputError, NotSetUpError, WeightError
from pellucid.model_bridge.generalized_components import (
    BloomBlockBridge,
    BloomMLPBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    JointQKVAttentionBridge,
    LinearBridge,
    NormalizationBridge,
    UnembeddingBridge,
    build_alibi_slopes,
    build_alibi_tensor,
)
from pellucid.model_bridge.generalized_components.bloom_attention import BloomAttentionBridge
from tests.models import make_bloom

SITES = (
    "hook_in",
    "hook_q",
    "hook_k",
    "hook_v",
    "hook_attn_scores",
    "hook_pattern",
    "hook_z",
    "hook_attn_out",
    "hook_out",
)


def attention_of(n_head: int = 4, dtype: torch.dtype = torch.float32, **settings: Any) -> BloomAttention:
    return make_bloom(dtype, n_head=n_head, **settings).transformer.h[1].self_attention


def bridge_of(attention: nn.Module, n_heads: int = 4, **arguments: Any) -> BloomAttentionBridge:
    bridge = BloomAttentionBridge("self_attention", SimpleNamespace(n_heads=n_heads, d_model=48), **arguments)
    bridge.set_original_component(attention)
    return bridge


def inputs(dtype: torch.dtype = torch.float32, n_heads: int = 4) -> dict[str, Any]:
    hidden, residual = torch.randn(2, 6, 48).to(dtype), torch.randn(2, 6, 48).to(dtype)
    mask = torch.triu(torch.full((6, 6), torch.finfo(dtype).min, dtype=dtype), 1)[None, None].repeat(2, 1, 1, 1)
    ones = torch.ones(2, 6, dtype=torch.long)
    return {
        "hidden_states": hidden,
        "residual": residual,
        "alibi": native_alibi(ones, n_heads, dtype),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("n_heads", [1, 4, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_to_the_original(dtype: torch.dtype, n_heads: int) -> None:
    attention = attention_of(n_heads, dtype)
    bridge = bridge_of(attention, n_heads)
    given = inputs(dtype, n_heads)
    native = attention(**given)
    fired: list[str] = []
    for site in SITES:
        bridge.point(site).add_hook(lambda t, hook: fired.append(hook.name))
    for call in (
        lambda: bridge(**given),
        lambda: bridge(
            given["hidden_states"], given["residual"], alibi=given["alibi"], attention_mask=given["attention_mask"]
        ),
        lambda: bridge(given.pop("hidden_states"), **given, use_cache=True, output_attentions=True, layer_past=None),
    ):
        fired.clear()
        output = call()
        assert isinstance(output, tuple)
        assert torch.equal(output[0], native[0])
        assert torch.equal(output[1], native[1])
        assert fired == list(SITES)


def test_alibi_as_transformer_lens_builds_it_and_a_cache() -> None:
    attention = attention_of()
    bridge = bridge_of(attention)
    given = inputs()
    native = attention(**given)
    ones = torch.ones(2, 6, dtype=torch.long)
    ours = bridge(**given | {"alibi": build_alibi_tensor(ones, 4, torch.float32)})
    assert torch.equal(ours[0], native[0])
    caches = DynamicCache(), DynamicCache()
    for cache, call in zip(caches, (attention, bridge), strict=True):
        call(**given, layer_past=cache)
    step = {name: tensor[:, -1:] for name, tensor in given.items() if name in ("hidden_states", "residual")}
    step |= {"alibi": native_alibi(torch.ones(2, 7, dtype=torch.long), 4, torch.float32), "attention_mask": None}
    outputs = [call(**step, layer_past=cache) for cache, call in zip(caches, (attention, bridge), strict=True)]
    assert torch.equal(outputs[0][0], outputs[1][0])


def test_missing_and_wrong_arguments() -> None:
    bridge = bridge_of(attention_of())
    given = inputs()
    with pytest.raises(InputError, match="residual, alibi"):
        bridge(given["hidden_states"])
    with pytest.raises(ValueError, match="hidden_states"):
        bridge(residual=given["residual"], alibi=given["alibi"])
    with pytest.raises(InputError, match=r"\[8, 1, 6\].*found \(8, 1, 5\)"):
        bridge(**given | {"alibi": given["alibi"][..., :5]})
    for mask in (torch.ones(2, 6), given["attention_mask"][..., :5], given["attention_mask"] == 0):
        with pytest.raises(InputError, match="additive"):
            bridge(**given | {"attention_mask": mask})
    empty = BloomAttentionBridge("self_attention", SimpleNamespace(n_heads=4))
    with pytest.raises(NotSetUpError, match=r"set_original_component\(\) first"):
        empty(**given)
    empty.hook_q_input.add_hook(lambda t, hook: None)
    empty.set_original_component(attention_of())
    with pytest.raises(NotSetUpError, match="Hook it on a block"):
        empty(**given)


def zero(part: Tensor) -> None:
    """Zero a part in place and return nothing, as a hook must that writes in place."""
    part.zero_()


class Flip(BaseTensorConversion):
    """A rule of a user's own: positions from the end."""

    def handle_conversion(self, input_value: Tensor, *full_context: Any) -> Tensor:
        return input_value.flip(1)

    def revert(self, input_value: Tensor, *full_context: Any) -> Tensor:
        return input_value.flip(1)


def test_qkv_conversion_rule() -> None:
    attention, given = attention_of(), inputs()
    bridge = bridge_of(attention, qkv_conversion_rule=RearrangeTensorConversion("b p (n h) -> n b p h", n=4))
    native = attention(**given)[0]
    plain = bridge_of(attention)
    seen: dict[str, Tensor] = {}
    for part in "qkv":
        bridge.point(f"hook_{part}").add_hook(lambda t, hook: seen.__setitem__(hook.name, t.clone()))
        plain.point(f"hook_{part}").add_hook(lambda t, hook: seen.__setitem__("plain " + hook.name, t.clone()))
    assert torch.equal(bridge(**given)[0], native)
    plain(**given)
    for part in "qkv":
        assert torch.equal(seen[f"hook_{part}"], seen[f"plain hook_{part}"].permute(2, 0, 1, 3))
    plain.hook_v.add_hook(lambda t, hook: zero(t[:, :, 2]))
    wanted = plain(**given)[0]
    for edit in (lambda t, hook: zero(t[2]), lambda t, hook: torch.cat([t[:2], t[2:3] * 0, t[3:]])):
        handle = bridge.v.hook_out.add_hook(edit)
        assert torch.equal(bridge(**given)[0], wanted)
        handle.remove()


def test_attn_and_pattern_conversion_rules() -> None:
    attention, given = attention_of(), inputs()
    native = attention(**given)
    flipped = bridge_of(attention, attn_conversion_rule=Flip())
    seen: dict[str, Tensor] = {}
    for site in ("hook_in", "hook_out"):
        flipped.point(site).add_hook(lambda t, hook: seen.__setitem__(hook.name, t.clone()))
    assert torch.equal(flipped(**given)[0], native[0])
    assert torch.equal(seen["hook_in"], given["hidden_states"].flip(1))
    assert torch.equal(seen["hook_out"], native[0].flip(1))
    flipped.hook_out.add_hook(lambda t, hook: zero(t[:, 0]))
    assert flipped(**given)[0][:, -1].count_nonzero() == 0

    by_head = bridge_of(attention, pattern_conversion_rule=RearrangeTensorConversion("b n q k -> n b q k"))
    shapes: list[tuple[int, ...]] = []
    by_head.hook_pattern.add_hook(lambda t, hook: shapes.append(tuple(t.shape)))
    assert torch.equal(by_head(**given)[1], native[1])
    assert shapes == [(4, 2, 6, 6)]
    by_head.hook_pattern.add_hook(lambda t, hook: zero(t[1]))
    assert by_head(**given)[1][:, 1].count_nonzero() == 0


def test_a_rule_without_a_way_back_is_refused() -> None:
    class OneWay(BaseTensorConversion):
        def handle_conversion(self, input_value: Tensor, *full_context: Any) -> Tensor:
            return input_value

    class Wrong(OneWay):
        def revert(self, input_value: Tensor, *full_context: Any) -> Tensor:
            return input_value[:1]

    given = inputs()
    bridge = bridge_of(attention_of(), pattern_conversion_rule=OneWay())
    bridge.hook_pattern.add_hook(lambda t, hook: None)
    with pytest.raises(NotImplementedError, match="write revert"):
        bridge(**given)
    bridge = bridge_of(attention_of(), pattern_conversion_rule=Wrong())
    bridge.hook_pattern.add_hook(lambda t, hook: None)
    with pytest.raises(HookValueError, match="revert gave"):
        bridge(**given)


def own_linears(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Copies of the three parts, made by hand."""
    weight = attention.query_key_value.weight.view(4, 3, 12, 48)
    bias = attention.query_key_value.bias.view(4, 3, 12)
    linears = []
    for index in range(3):
        linear = nn.Linear(48, 48)
        with torch.no_grad():
            linear.weight.copy_(weight[:, index].reshape(48, 48))
            linear.bias.copy_(bias[:, index].reshape(48))
        linears.append(linear)
    return linears[0], linears[1], linears[2]


def test_custom_split_computes() -> None:
    attention, given = attention_of(), inputs()
    calls: list[nn.Module] = []

    def split(original: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        calls.append(original)
        return own_linears(original)

    bridge = bridge_of(attention, split_qkv_matrix=split)
    assert calls == [attention]
    native = attention(**given)[0]
    # Three products of 48 terms against one fused product: a few ulps.
    assert (bridge(**given)[0] - native).abs().max() < 1e-4
    with torch.no_grad():
        attention.query_key_value.weight.zero_()
    assert (bridge(**given)[0] - native).abs().max() < 1e-4
    with torch.no_grad():
        bridge.q.original_component.weight.zero_()
    assert (bridge(**given)[0] - native).abs().max() > 1e-2


def test_the_adapters_split_copies_nothing() -> None:
    from pellucid import TransformerBridge

    model = make_bloom()
    adapter = TransformerBridge(model).adapter
    attention, given = attention_of(), inputs()
    bridge = bridge_of(attention, split_qkv_matrix=adapter.split_qkv_matrix)
    assert torch.equal(bridge(**given)[0], attention(**given)[0])
    q, k, v = adapter.split_qkv_matrix(attention)
    for ours, copied in zip((q, k, v), own_linears(attention), strict=True):
        assert isinstance(ours, nn.Linear)
        assert (ours.in_features, ours.out_features) == (48, 48)
        assert list(ours.parameters()) == []
        assert torch.equal(ours.weight, copied.weight)
        assert torch.equal(ours.bias, copied.bias)
        assert torch.allclose(ours(given["hidden_states"]), copied(given["hidden_states"]), atol=1e-5)


def test_the_adapters_split_of_anything_with_a_fused_projection() -> None:
    from pellucid.config import TransformerBridgeConfig
    from pellucid.model_bridge.supported_architectures.bloom import BloomArchitectureAdapter

    cfg = TransformerBridgeConfig(
        d_model=12, d_head=4, n_layers=2, n_ctx=128, n_heads=3, d_vocab=100, architecture="BloomForCausalLM"
    )
    adapter = BloomArchitectureAdapter(cfg)
    holder = SimpleNamespace(query_key_value=nn.Linear(12, 36))
    with torch.no_grad():
        for part in range(3):
            holder.query_key_value.weight.view(3, 3, 4, 12)[:, part] = part + 1.0
            holder.query_key_value.bias.view(3, 3, 4)[:, part] = part + 1.0
    for part, linear in enumerate(adapter.split_qkv_matrix(holder)):
        assert isinstance(linear, nn.Linear)
        assert (linear.weight == part + 1.0).all()
        assert (linear.bias == part + 1.0).all()
        assert linear(torch.randn(2, 5, 12)).shape == (2, 5, 12)
    mapping = adapter.component_mapping
    assert mapping["blocks"].name == "transformer.h"
    assert mapping["blocks"].submodules["attn"].submodules["qkv"].name == "query_key_value"
    assert mapping["blocks"].submodules["mlp"].submodules["out"].name == "dense_4h_to_h"


def split_weights(attention: nn.Module) -> dict[str, Tensor | None]:
    q, k, v = own_linears(attention)
    named = {
        f"{part}.{name}": getattr(linear, name).data
        for part, linear in zip("qkv", (q, k, v), strict=True)
        for name in ("weight", "bias")
    }
    return named | {"o.weight": attention.dense.weight.data.clone(), "o.bias": attention.dense.bias.data.clone()}


def checksum(attention: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in attention.named_parameters()}


def test_processed_weights_reach_every_route() -> None:
    source, target, given = attention_of(), attention_of(), inputs()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(0.5)
    bridge = bridge_of(target)
    pointers = {name: parameter.data_ptr() for name, parameter in target.named_parameters()}
    bridge.set_processed_weights(split_weights(source))
    assert {name: parameter.data_ptr() for name, parameter in target.named_parameters()} == pointers
    for name, parameter in source.named_parameters():
        assert torch.equal(target.get_parameter(name), parameter), name
    assert torch.equal(target(**given)[0], source(**given)[0])
    assert torch.equal(bridge(**given)[0], source(**given)[0])
    weights = split_weights(source)
    fused = fuse_weights(weights["q.weight"], weights["k.weight"], weights["v.weight"], 4)
    assert torch.equal(fused, source.query_key_value.weight)
    assert torch.equal(
        fuse_biases(weights["q.bias"], weights["k.bias"], weights["v.bias"], 4), source.query_key_value.bias
    )


def test_none_leaves_a_weight_and_a_part_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    attention = attention_of()
    before = checksum(attention)
    bridge = bridge_of(attention)
    nothing: dict[str, Tensor | None] = dict.fromkeys(split_weights(attention))
    bridge.set_processed_weights(nothing)
    assert all(torch.equal(before[name], parameter) for name, parameter in attention.named_parameters())
    bridge.set_processed_weights({"k.weight": torch.zeros(48, 48), "k.bias": None}, verbose=True)
    assert "k.weight" in capsys.readouterr().out
    assert bridge.W_K.count_nonzero() == 0
    assert torch.equal(attention.query_key_value.bias, before["query_key_value.bias"])
    by_head = attention.query_key_value.weight.view(4, 3, 12, 48)
    assert torch.equal(by_head[:, [0, 2]], before["query_key_value.weight"].view(4, 3, 12, 48)[:, [0, 2]])


def test_swapped_views_are_read_before_they_are_written() -> None:
    attention = attention_of()
    bridge = bridge_of(attention)
    q, k = bridge.W_Q.clone(), bridge.W_K.clone()
    flat = {name: weight.transpose(1, 2).reshape(48, 48) for name, weight in (("q", bridge.W_K), ("k", bridge.W_Q))}
    bridge.set_processed_weights({f"{name}.weight": weight for name, weight in flat.items()})
    assert torch.equal(bridge.W_Q, k)
    assert torch.equal(bridge.W_K, q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qq.weight": torch.zeros(48, 48)}, "no weight 'qq.weight'.*q.weight"),
        ({"q.weight": torch.zeros(48, 47)}, r"must have shape \(48, 48\); found \(48, 47\)"),
        ({"q.weight": torch.zeros(4, 48, 12)}, r"must have shape \(48, 48\)"),
        ({"v.bias": torch.zeros(4, 12)}, r"must have shape \(48,\)"),
        ({"o.weight": torch.zeros(48, 48, dtype=torch.float64)}, "must have dtype torch.float32"),
        ({"o.bias": torch.full((48,), float("nan"))}, "not finite"),
        ({"k.weight": torch.full((48, 48), float("inf"))}, "not finite"),
        ({"k.bias": [0.0] * 48}, "must be a tensor"),
    ],
)
def test_wrong_weights_change_nothing(change: dict[str, Any], message: str) -> None:
    attention = attention_of()
    bridge = bridge_of(attention)
    before = checksum(attention)
    weights = {
        name: torch.zeros_like(weight) for name, weight in split_weights(attention).items() if weight is not None
    }
    with pytest.raises(WeightError, match=message):
        bridge.set_processed_weights(weights | change)
    assert all(torch.equal(before[name], parameter) for name, parameter in attention.named_parameters())


def test_processed_weights_with_a_custom_split() -> None:
    attention, given = attention_of(), inputs()
    bridge = bridge_of(attention, split_qkv_matrix=own_linears)
    weights = split_weights(attention)
    assert weights["v.weight"] is not None
    bridge.set_processed_weights({"v.weight": weights["v.weight"] * 2})
    assert (bridge(**given)[0] - attention(**given)[0]).abs().max() < 1e-4


def test_other_components_alone() -> None:
    model = make_bloom()
    block = model.transformer.h[0]
    x, residual = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    mlp = BloomMLPBridge("mlp")
    mlp.set_original_component(block.mlp)
    seen: list[str] = []
    for point in (
        mlp.hook_in,
        mlp.submodules["in"].hook_out,
        mlp.hook_post,
        mlp.submodules["out"].hook_out,
        mlp.hook_out,
    ):
        point.add_hook(lambda t, hook: seen.append(hook.name))
    assert torch.equal(mlp(x, residual), block.mlp(x, residual))
    assert seen == ["hook_in", "hook_pre", "hook_post", "hook_mlp_out", "hook_out"]
    with pytest.raises(InputError, match="residual was not given"):
        mlp(x)
    mlp.set_processed_weights({"in.weight": torch.zeros(192, 48), "out.bias": torch.ones(48)})
    assert torch.equal(block.mlp.dense_4h_to_h.bias, torch.ones(48))
    for bridge, module, given in (
        (NormalizationBridge("ln"), block.input_layernorm, x),
        (LinearBridge("dense"), block.self_attention.dense, x),
        (EmbeddingBridge("e"), model.transformer.word_embeddings, torch.tensor([[1, 2]])),
        (UnembeddingBridge("u"), model.lm_head, x),
    ):
        bridge.set_original_component(module)
        assert torch.equal(bridge(given), module(given))
        double = bridge.hook_out.add_hook(lambda t, hook: t * 2)
        assert torch.equal(bridge(given), module(given) * 2)
        double.remove()
    with pytest.raises(WeightError, match="no weight 'bias'"):
        EmbeddingBridge("e").set_processed_weights({"bias": torch.zeros(3)})


def test_inheritance() -> None:
    assert issubclass(BloomAttentionBridge, JointQKVAttentionBridge)
    assert issubclass(JointQKVAttentionBridge, GeneralizedComponent)
    assert issubclass(BloomBlockBridge, GeneralizedComponent)


def test_a_joint_attention_without_alibi() -> None:
    """The generic class runs plain attention: BLOOM's with no bias and no residual."""
    attention, given = attention_of(), inputs()
    plain = JointQKVAttentionBridge("self_attention", SimpleNamespace(n_heads=4))
    plain.set_original_component(attention)
    output, pattern = plain(given["hidden_states"], given["attention_mask"])
    native = attention(**given | {"alibi": torch.zeros_like(given["alibi"]), "residual": torch.zeros(2, 6, 48)})
    assert torch.allclose(output, native[0], atol=1e-5)
    assert torch.allclose(pattern, native[1], atol=1e-6)


def test_a_copy_of_a_component_is_its_own() -> None:
    bridge = bridge_of(attention_of())
    bridge.hook_z.add_hook(lambda t, hook: t * 0)
    given = inputs()
    clone = copy.deepcopy(bridge)
    with torch.no_grad():
        clone.W_V.zero_()
    assert bridge.W_V.count_nonzero() > 0
    assert torch.equal(clone(**given)[0], bridge(**given)[0])
    clone.hook_z.remove_hooks()
    assert not torch.equal(clone(**given)[0], bridge(**given)[0])


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 8, 12, 16, 32, 112])
def test_alibi_is_hugging_faces(n_heads: int) -> None:
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, :7], mask[1, 20:], mask[2, 5:9] = 0, 0, 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = build_alibi_tensor(mask, n_heads, dtype)
        assert ours.shape == (3, n_heads, 1, 40)
        assert torch.equal(ours.flatten(0, 1), native_alibi(mask, n_heads, dtype))
    assert build_alibi_slopes(n_heads, torch.device("cpu")).shape == (n_heads,)
    assert torch.equal(
        build_alibi_tensor(mask.bool(), n_heads, torch.float32), build_alibi_tensor(mask, n_heads, torch.float32)
    )


def test_bad_alibi_arguments() -> None:
    with pytest.raises(InputError, match="at least 1"):
        build_alibi_slopes(0)
    with pytest.raises(InputError, match="batch, key_pos"):
        build_alibi_tensor(torch.ones(3), 4, torch.float32)


def test_units_of_the_fused_projection() -> None:
    fused = torch.arange(3 * 48)
    by_head = fused.view(4, 3, 12)
    for index in range(144):
        unit = fused_unit(index, 4, 12)
        assert by_head[unit.head, "qkv".index(unit.part), unit.dim] == index
        assert fused_index(unit, 4, 12) == index
    with pytest.raises(InputError, match="0 to 143"):
        fused_unit(144, 4, 12)
    with pytest.raises(InputError, match="4 heads"):
        fused_index(FusedUnit("q", 4, 0), 4, 12)
