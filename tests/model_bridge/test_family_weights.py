"""Weights of every family by TransformerLens' names, against Hugging Face's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pellucid import TransformerBridge
from pellucid.errors import WeightError
from pellucid.model_bridge.generalized_components.weights import why_not_by_row
from tests.families import CONFIGS, make_family

F64 = torch.float64
ROUNDING = 1e-12
"""Of sums of 192 products of numbers up to about 10, in float64: 192 * 2.2e-16 * 10, and some."""


def numbers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def layers_of(model: Any) -> nn.ModuleList:
    """Hugging Face's blocks: the one list of modules that is as long as the model is deep."""
    return next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )


def children(block: nn.Module) -> dict[str, Any]:
    """Hugging Face's linear maps and activation of a block, by their last name."""
    return {name.rpartition(".")[2] if "c_proj" not in name else name: module for name, module in block.named_modules()}


def queries_keys_values(cfg: Any, block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[batch, pos, heads, d_head]`` as Hugging Face's attentions take them apart."""
    parts, n, kv, d = children(block), cfg.n_heads, cfg.n_key_value_heads, cfg.d_head
    if "q_proj" in parts:
        q, k, v = (parts[f"{name}_proj"](x) for name in "qkv")
    elif "c_attn" in parts:  # GPT-2
        q, k, v = parts["c_attn"](x).split(n * d, dim=2)
    elif "qkv_proj" in parts:  # Phi-3
        qkv = parts["qkv_proj"](x)
        q, k, v = qkv[..., : n * d], qkv[..., n * d : n * d + kv * d], qkv[..., n * d + kv * d :]
    else:  # NeoX
        return parts["query_key_value"](x).view(*x.shape[:2], n, 3 * d).chunk(3, dim=-1)
    return q.unflatten(-1, (n, d)), k.unflatten(-1, (kv, d)), v.unflatten(-1, (kv, d))


def output_projection(block: nn.Module) -> Any:
    parts = children(block)
    return next(parts[name] for name in ("o_proj", "attn.c_proj", "dense") if name in parts)


def check_views(bridge: TransformerBridge, model: Any) -> None:
    """Every view of every layer gives what Hugging Face's modules give."""
    cfg = bridge.cfg
    x, z, y = numbers(2, 5, cfg.d_model), numbers(2, 5, cfg.n_heads, cfg.d_head), numbers(2, 5, cfg.d_mlp)
    for block, native in zip(bridge.blocks, layers_of(model), strict=True):
        attn, mlp, parts = block.attn, block.mlp, children(native)
        for wanted, weight, bias in zip(
            queries_keys_values(cfg, native, x),
            (attn.W_Q, attn.W_K, attn.W_V),
            (attn.b_Q, attn.b_K, attn.b_V),
            strict=True,
        ):
            torch.testing.assert_close(torch.einsum("bpm,nmh->bpnh", x, weight) + bias, wanted, rtol=0, atol=ROUNDING)
        found = torch.einsum("bpnh,nhm->bpm", z, attn.W_O) + attn.b_O
        torch.testing.assert_close(found, output_projection(native)(z.flatten(-2)), rtol=0, atol=ROUNDING)
        into, out = x @ mlp.W_in + mlp.b_in, y @ mlp.W_out + mlp.b_out
        if cfg.gated_mlp:
            gate = x @ mlp.W_gate + mlp.b_gate
            if "gate_up_proj" in parts:
                wanted_gate, wanted_in = parts["gate_up_proj"](x).chunk(2, dim=-1)
            else:
                wanted_gate, wanted_in = parts["gate_proj"](x), parts["up_proj"](x)
            torch.testing.assert_close(gate, wanted_gate, rtol=0, atol=ROUNDING)
            wanted_out = parts["down_proj"](y)
        else:
            up, down = ("c_fc", "mlp.c_proj") if "c_fc" in parts else ("dense_h_to_4h", "dense_4h_to_h")
            wanted_in, wanted_out = parts[up](x), parts[down](y)
        torch.testing.assert_close(into, wanted_in, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(out, wanted_out, rtol=0, atol=ROUNDING)
    wanted = model.get_output_embeddings()(x)
    torch.testing.assert_close(x @ bridge.W_U + bridge.b_U, wanted, rtol=0, atol=ROUNDING)
    ids = torch.arange(cfg.d_vocab)
    assert torch.equal(bridge.W_E_eff, model.get_input_embeddings()(ids))


VIEWS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
MLP_VIEWS = ("W_in", "W_out", "b_in", "b_out")


@pytest.mark.parametrize("name", CONFIGS)
def test_views_are_the_modules_own_weights(name: str) -> None:
    bridge = TransformerBridge(make_family(name, F64))
    with torch.no_grad():
        check_views(bridge, bridge.hf_model)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_to_a_view_is_in_the_model(name: str) -> None:
    model = make_family(name, F64)
    bridge, before = TransformerBridge(model), copy.deepcopy(model.state_dict())
    block = bridge.blocks[1]
    gate = ("W_gate", "b_gate") if bridge.cfg.gated_mlp else ()
    with torch.no_grad():
        for part, names in ((block.attn, VIEWS), (block.mlp, (*MLP_VIEWS, *gate))):
            for view in names:
                getattr(part, view).mul_(2)
        check_views(bridge, model)
    for key, value in model.state_dict().items():  # each number of the layer's linear maps, and each once
        doubled = ".1." in key and "norm" not in key and "ln_" not in key
        assert torch.equal(value, (2 if doubled else 1) * before[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_stacked_weights_and_circuits(name: str) -> None:
    bridge = TransformerBridge(make_family(name, F64))
    cfg = bridge.cfg
    n, kv, d, m = cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.d_model
    shapes = {"W_Q": (n, m, d), "W_K": (kv, m, d), "W_V": (kv, m, d), "W_O": (n, d, m), "b_Q": (n, d), "b_K": (kv, d)}
    shapes |= {"b_V": (kv, d), "b_O": (m,), "W_in": (m, cfg.d_mlp), "W_out": (cfg.d_mlp, m), "b_in": (cfg.d_mlp,)}
    for view, shape in (shapes | {"b_out": (m,)}).items():
        stacked = getattr(bridge, view)
        assert stacked.shape == (cfg.n_layers, *shape), view
        of = "mlp" if view.endswith(("in", "out")) else "attn"
        assert torch.equal(stacked[1], getattr(getattr(bridge.blocks[1], of), view)), view
    for head in (0, 2, 5):
        served = head // (n // kv)
        attn = bridge.blocks[1].attn
        qk, ov = attn.W_Q[head] @ attn.W_K[served].T, attn.W_V[served] @ attn.W_O[head]
        torch.testing.assert_close(bridge.QK[1, head].AB, qk, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(bridge.OV[1, head].AB, ov, rtol=0, atol=ROUNDING)
    if cfg.gated_mlp:
        assert bridge.W_gate.shape == (cfg.n_layers, m, cfg.d_mlp)
        assert torch.equal(bridge.b_gate[2], bridge.blocks[2].mlp.b_gate)
    else:
        for missing in (lambda: bridge.W_gate, lambda: bridge.b_gate, lambda: bridge.blocks[0].mlp.W_gate):
            with pytest.raises(WeightError, match="no gated MLP"):
                missing()


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_set_part_by_part(name: str) -> None:
    model = make_family(name, F64)
    bridge = TransformerBridge(model)
    block = bridge.blocks[2]
    targets = {key: find()[0] for key, find in block.weight_targets().items()}
    assert not any("dropout" in key or "qkv" in key or "gate_up" in key for key in targets)
    old = {key: target.storage.detach().reshape(target.shape).clone() for key, target in targets.items()}
    assert old["attn.q.weight"].shape == (bridge.cfg.n_heads * bridge.cfg.d_head, bridge.cfg.d_model)
    assert old["mlp.out.weight"].shape == (bridge.cfg.d_model, bridge.cfg.d_mlp)
    before = copy.deepcopy(layers_of(model)[2].state_dict())
    block.set_processed_weights({key: -3 * value for key, value in old.items()})
    for key, value in layers_of(model)[2].state_dict().items():  # each number of the block, and each once
        assert torch.equal(value, -3 * before[key]), key
    keys = old["attn.k.weight"].unflatten(0, (bridge.cfg.n_key_value_heads, -1)).transpose(1, 2)
    assert torch.equal(block.attn.W_K, -3 * keys)
    with pytest.raises(WeightError, match="has no weight 'attn.w.weight'"):
        block.set_processed_weights({"attn.w.weight": old["attn.q.weight"]})


def test_positions_and_embedding() -> None:
    gpt2 = TransformerBridge(make_family("gpt2", F64))
    assert gpt2.W_pos is gpt2.hf_model.transformer.wpe.weight
    assert torch.equal(gpt2.W_E_eff, gpt2.W_E)
    llama = TransformerBridge(make_family("llama", F64))
    with pytest.raises(WeightError, match="no table of position embeddings, W_pos: its positions are rotary"):
        _ = llama.W_pos
    gemma = TransformerBridge(make_family("gemma", F64))
    factor = float(torch.tensor(48**0.5))  # Hugging Face keeps it in float32
    torch.testing.assert_close(gemma.W_E_eff, gemma.W_E * factor, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_module_is_known_to_compute_row_by_row(name: str) -> None:
    assert why_not_by_row(make_family(name)) is None
