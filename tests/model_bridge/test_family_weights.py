"""Weights of every family by TransformerLens' names, against Hugging Face's own modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from pellucid import TransformerBridge
from pellucid.errors import PellucidWarning, WeightError
from pellucid.model_bridge.generalized_components import FusedLinearBridge
from pellucid.model_bridge.generalized_components.fused_layouts import Grouped
from pellucid.model_bridge.generalized_components.weights import why_not_by_row
from pellucid.weight_processing import STEPS, Step
from tests.families import CONFIGS, in_float64, make_family, of_each_layout
from tests.models import random_tokens

F64 = torch.float64
FOLD, WRITERS, HEAD, VALUES, REFACTOR = STEPS
ILLEGAL: dict[str, dict[Step, str]] = {
    "llama": {WRITERS: "subtract no mean", REFACTOR: "rotated"},
    "llama-biased": {WRITERS: "subtract no mean", REFACTOR: "rotated"},
    "mistral": {WRITERS: "subtract no mean", REFACTOR: "rotated"},
    "qwen2": {WRITERS: "subtract no mean", VALUES: "self_attn.o_proj has no bias", REFACTOR: "rotated"},
    "qwen3": {WRITERS: "subtract no mean", REFACTOR: "rotated"},
    "gpt2": {},
    "gpt2-upcast": {},
    "gpt_neox": {REFACTOR: "rotated"},
    "gpt_neox-sequential": {REFACTOR: "rotated"},
    "gemma": {WRITERS: "subtract no mean", REFACTOR: "rotated"},
    "gemma2": {WRITERS: "subtract no mean", HEAD: "capped at 30", REFACTOR: "rotated"},
    "gemma3": {WRITERS: "subtract no mean", REFACTOR: "rotated"},
    "olmo2": {WRITERS: "subtract no mean", REFACTOR: "rotated"},
    "phi3": {WRITERS: "subtract no mean", REFACTOR: "rotated"},
}
"""What a family's layout forbids, written from its definition."""

NAMES = tuple(ILLEGAL)
"""Families whose layout is written down here; the tests that need none of it run over all of :data:`CONFIGS`."""

NEVER = dict.fromkeys(
    ("falcon", "falcon-new", "falcon-one-norm", "falcon-sequential"), "is a FalconLinear with its own way to its weight"
)
"""Families that are not processed at all, and why."""

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


@pytest.mark.parametrize("name", of_each_layout(NAMES))
def test_views_are_the_modules_own_weights(name: str) -> None:
    bridge = TransformerBridge(make_family(name, F64))
    with torch.no_grad():
        check_views(bridge, bridge.hf_model)


@pytest.mark.parametrize("name", of_each_layout(NAMES))
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


@pytest.mark.parametrize("name", of_each_layout(NAMES))
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
    for head in range(n):
        served = head // (n // kv)
        attn = bridge.blocks[1].attn
        qk, ov = attn.W_Q[head] @ attn.W_K[served].T, attn.W_V[served] @ attn.W_O[head]
        torch.testing.assert_close(bridge.QK[1, head].AB, qk, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(bridge.OV[1, head].AB, ov, rtol=0, atol=ROUNDING)
    if cfg.gated_mlp:
        assert bridge.W_gate.shape == (cfg.n_layers, m, cfg.d_mlp)
        assert torch.equal(bridge.b_gate[2], bridge.blocks[2].mlp.b_gate)
    else:
        assert bridge.W_gate is bridge.b_gate is bridge.blocks[0].mlp.W_gate is bridge.blocks[0].mlp.b_gate is None


@pytest.mark.parametrize("name", of_each_layout(NAMES))
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


def test_readers_of_a_centred_norm_are_centred() -> None:
    """Cohere's norm subtracts the mean and is no nn.LayerNorm: what reads it is freed of its mean, and computes the same."""
    bridge, tokens = TransformerBridge(make_family("cohere", F64)), random_tokens()
    with torch.no_grad():
        before = bridge(tokens).log_softmax(-1)
        assert float(bridge.blocks[1].attn.W_Q.mean(1).abs().max()) > 1e-3
        bridge.process_weights()
        assert float((bridge(tokens).log_softmax(-1) - before).abs().max()) <= ROUNDING
        for weight in (bridge.blocks[1].attn.W_Q.mean(1), bridge.blocks[1].mlp.W_gate.mean(0), bridge.W_U.mean(0)):
            assert float(weight.abs().max()) <= 1e-15


def test_positions_and_embedding() -> None:
    gpt2 = TransformerBridge(make_family("gpt2", F64))
    assert gpt2.W_pos is gpt2.hf_model.transformer.wpe.weight
    assert torch.equal(gpt2.W_E_eff, gpt2.W_E)
    llama = TransformerBridge(make_family("llama", F64))
    granite = TransformerBridge(make_family("granite", F64))
    assert torch.equal(granite.W_E_eff, granite.W_E * granite.hf_model.config.embedding_multiplier)
    opt = TransformerBridge(make_family("opt"))
    assert torch.equal(opt.W_pos, opt.hf_model.model.decoder.embed_positions.weight[2:])
    for bridge, how in ((llama, "rotary"), (TransformerBridge(make_family("mpt")), "alibi")):
        assert bridge.cfg.positional_embedding_type == how
        with pytest.raises(WeightError, match=f"no table of position embeddings, W_pos: its positions are {how}"):
            _ = bridge.W_pos
    gemma = TransformerBridge(make_family("gemma", F64))
    factor = float(torch.tensor(48**0.5))  # Hugging Face keeps it in float32
    torch.testing.assert_close(gemma.W_E_eff, gemma.W_E * factor, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", of_each_layout())
def test_every_module_is_known_to_compute_row_by_row(name: str) -> None:
    assert why_not_by_row(make_family(name)) is None


# -- processing --------------------------------------------------------------------------------------------------------

IN_FLOAT64 = in_float64(NAMES)

BARE = {"gemma": 1e-6, "gemma2": 1e-6, "gemma3": 1e-6, "gpt_neox": 3e-7, "gpt_neox-sequential": 3e-7}
BARE |= {"llama-biased": 5e-7}
"""Hugging Face's own float64 model goes through float32 in a norm (Gemma) or, where value biases move, in the softmax: the
weights of a pattern sum to 1 within 2^-24 a term, and 9 of them times a bias of about 0.3 through 3 layers."""


def log_probabilities(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    output = model(tokens, **kwargs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits.detach().double().log_softmax(-1)


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


def legal_steps(name: str) -> list[Step]:
    return [step for step in STEPS if step not in ILLEGAL[name]]


def processed(bridge: TransformerBridge, name: str, **options: Any) -> bool:
    """Process what can be; a family of :data:`NEVER` refuses it by name, and nothing has changed."""
    if name not in NEVER:
        bridge.process_weights(**options)
        return True
    before = bridge.weights_hash()
    with pytest.raises(WeightError, match=NEVER[name]):
        bridge.process_weights(**options)
    assert bridge.weights_hash() == before
    assert not bridge.weights_state.is_processed
    return False


def padded(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    return mask


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", of_each_layout(IN_FLOAT64))
def test_log_probabilities_stay_step_by_step_and_all_at_once(name: str, tied: bool) -> None:
    """In float64 throughout, and in Hugging Face's own model, which goes through float32 here and there."""
    tokens = random_tokens(vocab=97)
    mask, exact = padded(tokens), 1e-6 if name.startswith("gemma") else 1e-14
    model = make_family(name, F64, tie_word_embeddings=tied)
    before = log_probabilities(TransformerBridge(model), tokens, attention_mask=mask)[mask.bool()]
    native = log_probabilities(model, tokens)
    for steps in (*([step] for step in legal_steps(name)), legal_steps(name)):
        bridge = TransformerBridge(copy.deepcopy(model))
        state = bridge.process_weights(**{step: step in steps for step in STEPS})
        assert state.complete == set(steps)
        after = log_probabilities(bridge, tokens, attention_mask=mask)[mask.bool()]
        assert largest(after - before) < exact, steps
        assert largest(log_probabilities(bridge.hf_model, tokens) - native) < BARE.get(name, 1e-14), steps


@pytest.mark.parametrize("name", of_each_layout(NAMES))
def test_steps_that_a_family_does_not_allow(name: str) -> None:
    """Asked for: refused with the reason, nothing changed. Not named: left out, and said."""
    bridge = TransformerBridge(make_family(name))
    before = bridge.weights_hash()
    assert dict.fromkeys(bridge.weights_state.left_out, True) == dict.fromkeys(ILLEGAL[name], True)
    for step, reason in ILLEGAL[name].items():
        with pytest.raises(
            WeightError, match=f"{step} would change what this model computes: .*{reason}.*\n.*{step}=False"
        ):
            bridge.process_weights(**{step: True})
        with pytest.raises(WeightError, match=reason):
            bridge.enable_compatibility_mode(**{step: True})
        assert bridge.weights_hash() == before
        assert not bridge.weights_state.is_processed
    state = bridge.process_weights()
    assert state.complete == set(legal_steps(name)) - {REFACTOR}
    for step, reason in ILLEGAL[name].items():
        assert f"{step:<32}not for this model: " in str(state)
        assert reason in state.left_out[step]


@pytest.mark.parametrize("name", sorted({"falcon", *of_each_layout()}))
def test_processed_as_it_comes(name: str) -> None:
    """Whatever a family allows: log-probabilities stay, or the call is refused and nothing has changed."""
    bridge = TransformerBridge(make_family(name))
    tokens = random_tokens(vocab=97)
    before = log_probabilities(bridge, tokens)
    processed(bridge, name)
    assert largest(log_probabilities(bridge, tokens) - before) < 1e-5


def test_an_illegal_step_would_be_wrong() -> None:
    """Why they are refused: what the same weights, changed all the same, would compute."""
    tokens = random_tokens(vocab=97)
    with torch.no_grad():
        llama = make_family("llama", F64)
        before = log_probabilities(llama, tokens)
        for layer in llama.model.layers:
            layer.mlp.down_proj.weight -= layer.mlp.down_proj.weight.mean(0)
        assert largest(log_probabilities(llama, tokens) - before) > 0.1
        gemma = make_family("gemma2", F64, tie_word_embeddings=False)
        before = log_probabilities(gemma, tokens)
        gemma.lm_head.weight -= gemma.lm_head.weight.mean(0)
        assert largest(log_probabilities(gemma, tokens) - before) > 1e-4  # 1e-6 is what a legal step moves


@pytest.mark.parametrize("name", of_each_layout(IN_FLOAT64))
def test_invariants(name: str) -> None:
    bridge = TransformerBridge(make_family(name, F64))
    model, names = bridge.hf_model, dict(bridge.hf_model.named_parameters())
    post = ("post_attention_layernorm", "post_feedforward_layernorm") if name in ("gemma2", "gemma3", "olmo2") else ()
    unread = (*post, "q_norm", "k_norm")
    kept = {path: value.clone() for path, value in names.items() if any(word in path for word in unread)}
    bridge.process_weights()
    unit = 0 if name.startswith("gemma") else 1
    for path, value in model.named_parameters():
        if path in kept:
            assert torch.equal(value, kept[path]), path
        elif path.endswith("weight") and ("norm" in path or "ln_" in path):
            assert bool((value == unit).all()), path
        elif path.endswith("bias") and ("norm" in path or "ln_" in path):
            assert not value.any(), path
    layer_norms = name.startswith("gpt")
    for block in bridge.blocks:
        if layer_norms:
            for writer in (block.attn.W_O, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
                assert largest(writer.mean(-1)) < 1e-15
            for reader in (block.attn.W_Q, block.attn.W_K, block.attn.W_V, block.mlp.W_in[None]):
                assert largest(reader.mean(1)) < 1e-15
        assert VALUES in ILLEGAL[name] or not block.attn.b_V.any()
    if layer_norms:
        assert largest(bridge.W_E.mean(-1)) < 1e-15
        assert name != "gpt2" or largest(bridge.W_pos.mean(-1)) < 1e-15
    if HEAD not in ILLEGAL[name]:
        assert largest(bridge.W_U.mean(-1)) < 1e-14


def test_the_circuits_of_gpt2_are_in_their_singular_basis() -> None:
    bridge = TransformerBridge(make_family("gpt2", F64))
    before = bridge.OV[1, 2].AB
    assert bridge.process_weights(refactor_factored_attn_matrices=True, **dict.fromkeys(STEPS[:4], False)).complete == {
        REFACTOR
    }
    torch.testing.assert_close(bridge.OV[1, 2].AB, before, rtol=0, atol=1e-12)
    for right in bridge.blocks[1].attn.W_O:
        torch.testing.assert_close(right @ right.T, torch.eye(8, dtype=F64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", of_each_layout(NAMES))
def test_processed_in_float64_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    """The weights are those of the same numbers in float64, rounded."""
    model = make_family(name, dtype)
    wide = TransformerBridge(copy.deepcopy(model).double())
    bridge = TransformerBridge(model)
    bridge.process_weights()
    wide.process_weights()
    for (path, value), (_, exact) in zip(
        bridge.hf_model.named_parameters(), wide.hf_model.named_parameters(), strict=True
    ):
        assert value.dtype is dtype
        torch.testing.assert_close(value, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-9, msg=path)


@pytest.mark.parametrize("name", of_each_layout())
def test_a_model_is_saved_so_that_hugging_face_loads_it(name: str, tmp_path: Path) -> None:
    """As it is and, where it can be, processed: the reloaded model has the same log-probabilities, and that form again."""
    dtype = F64 if name in IN_FLOAT64 else torch.float32
    bridge = TransformerBridge(make_family(name, dtype))
    tokens = random_tokens(vocab=97)
    native = log_probabilities(bridge.hf_model, tokens)
    # Tables of rotations are made anew in float32 by the loader, and a float64 softmax or norm goes through float32.
    bound = 2e-6 if dtype is F64 else 2e-5
    for stage in ("plain", "processed"):
        folder = tmp_path / stage
        bridge.save_pretrained(folder)
        reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        assert largest(log_probabilities(reloaded, tokens) - native) < bound
        again = TransformerBridge(reloaded)
        if stage == "plain":
            assert again.weights_hash() == bridge.weights_hash() or dtype is F64
            if not processed(bridge, name):
                return
        else:
            again.process_weights()
            for view in ("W_U", "b_U", "W_Q", "b_O", *(() if bridge.cfg.num_experts else ("W_in",))):
                torch.testing.assert_close(getattr(again, view), getattr(bridge, view), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", of_each_layout())
def test_hash_state_and_back(name: str, tmp_path: Path) -> None:
    tied = CONFIGS[name][1].get("tie_word_embeddings", name.startswith(("gemma", "gpt2")))
    bridge = TransformerBridge(make_family(name, tie_word_embeddings=tied))
    before, state = bridge.weights_hash(), copy.deepcopy(bridge.state_dict())
    bridge.save_pretrained(tmp_path)
    if not processed(bridge, name, keep_originals=True):
        with torch.no_grad():
            bridge.ln_final.module.weight.mul_(2)
        assert bridge.weights_hash() != before
        bridge.load_state_dict(state)
        assert bridge.weights_hash() == before
        return
    assert bridge.weights_hash() != before
    bridge.unprocess_weights()
    assert bridge.weights_hash() == before
    assert bridge.cfg.tie_word_embeddings == tied
    bridge.process_weights()
    bridge.unprocess_weights(tmp_path)
    assert bridge.weights_hash() == before
    bridge.process_weights(center_writing_weights=False, center_unembed=False, keep_tied=True)
    norm, folds = bridge.ln_final.module.weight.clone(), "fold_ln" in bridge.weights_state.done["unembed"]
    bridge.load_state_dict(state)
    assert bridge.weights_hash() == before
    assert not bridge.weights_state.is_processed
    assert (tied or not folds) == torch.equal(norm, bridge.ln_final.module.weight)


@pytest.mark.parametrize("name", of_each_layout(IN_FLOAT64))
def test_keeping_the_tie(name: str) -> None:
    bridge = TransformerBridge(make_family(name, F64, tie_word_embeddings=True))
    tokens = random_tokens(vocab=97)
    before = log_probabilities(bridge, tokens)
    _, cache = bridge.run_with_cache(tokens, names_filter=["ln_final.hook_normalized", "hook_unembed"])
    bridge.process_weights(center_writing_weights=False, center_unembed=False, keep_tied=True)
    assert bridge.hf_model.get_output_embeddings().weight is bridge.hf_model.get_input_embeddings().weight
    found = cache["ln_final.hook_normalized"] @ bridge.W_U + bridge.b_U
    bound = 1e-5 if name.startswith("gemma") else 1e-12
    torch.testing.assert_close(found, cache["hook_unembed"], rtol=0, atol=bound)
    assert largest(log_probabilities(bridge, tokens) - before) < bound


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_weights_that_are_no_plain_numbers(name: str) -> None:
    bridge = TransformerBridge(make_family(name))
    linear = output_projection(layers_of(bridge.hf_model)[1])
    prune.l1_unstructured(linear, "weight", amount=0.5)
    before = bridge.weights_hash()
    for call in (lambda: bridge.W_O, bridge.process_weights):
        with pytest.raises(WeightError, match=r"layers\.1|h\.1"):
            call()
    assert bridge.weights_hash() == before
    assert bridge.W_Q.shape[0] == bridge.cfg.n_layers


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma2"])
def test_weights_that_are_not_in_memory(name: str) -> None:
    model = make_family(name)
    cpu_offload(model)
    bridge = TransformerBridge(model)
    for call in (
        lambda: bridge.W_Q,
        lambda: bridge.b_O,
        lambda: bridge.W_in,
        lambda: bridge.W_E_eff,
        bridge.process_weights,
    ):
        with pytest.raises(WeightError, match="is offloaded: its numbers are not in memory"):
            call()
    with pytest.raises(WeightError, match="is not in memory"):
        bridge.weights_hash()
    assert not bridge.weights_state.is_processed


@pytest.mark.parametrize(("name", "adapts"), [("llama", "q_proj"), ("gpt2", "c_attn"), ("phi3", "qkv_proj")])
def test_adapters_are_refused_and_views_are_of_what_is_under_them(name: str, adapts: str) -> None:
    model = make_family(name)
    before = TransformerBridge(copy.deepcopy(model)).W_K
    fan = name == "gpt2"
    bridge = TransformerBridge(get_peft_model(model, LoraConfig(r=2, target_modules=[adapts], fan_in_fan_out=fan)))
    assert torch.equal(bridge.W_K, before)
    hashed = bridge.weights_hash()
    with pytest.raises(WeightError, match=f"An adapter is mounted on .*{adapts}.*merge_and_unload"):
        bridge.process_weights()
    assert bridge.weights_hash() == hashed


def test_queries_in_groups_have_no_view_by_head() -> None:
    """Several queries beside their key and value, as Falcon has them: refused by name, not copied."""
    fused = FusedLinearBridge("fused", layout=Grouped(("hook_q", "hook_k", "hook_v"), 2, 4))
    fused.set_original_component(nn.Linear(6, 2 * (3 + 2) * 4))
    for read in (fused.weights_of_parts, fused.biases_of_parts, fused.weight_targets()["k.weight"]):
        with pytest.raises(WeightError, match="have no view by head"):
            read()


def test_a_norms_bias_with_nowhere_to_go() -> None:
    """NeoX may have no biases in attention: folding would give it some, which loading drops."""
    bridge = TransformerBridge(make_family("gpt_neox", F64, attention_bias=False))
    tokens = random_tokens(vocab=97)
    before, hashed = log_probabilities(bridge, tokens), bridge.weights_hash()
    with pytest.raises(
        WeightError, match="fold_ln would change .*layernorm has a bias and .*query_key_value.* has none"
    ):
        bridge.process_weights(fold_ln=True)
    assert bridge.weights_hash() == hashed
    state = bridge.process_weights()
    assert set(state.left_out) == {FOLD, REFACTOR}
    assert state.complete == {WRITERS, HEAD, VALUES}
    assert largest(log_probabilities(bridge, tokens) - before) < 1e-14
    assert largest(bridge.blocks[0].attn.W_O.mean(-1)) < 1e-15


def test_what_a_family_forbids_is_refused_before_loading(tmp_path: Path) -> None:
    make_family("llama").save_pretrained(tmp_path)
    with pytest.warns(PellucidWarning, match="no tokenizer"):
        opened = TransformerBridge.boot_transformers(tmp_path, process_weights=True)
    assert opened.weights_state.complete == {FOLD, HEAD, VALUES}
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(WeightError, match="center_writing_weights would change .*subtract no mean"):
        TransformerBridge.boot_transformers(tmp_path, process_weights={WRITERS: True})


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "olmo2", "phi3"])
def test_the_record_is_held_against_the_weights(name: str) -> None:
    """Weights put there past the bridge are noticed, and processed again."""
    bridge = TransformerBridge(make_family(name, tie_word_embeddings=False))
    state = {key: value.clone() for key, value in bridge.state_dict().items()}
    bridge.process_weights()
    once = bridge.weights_hash()
    with pytest.warns(PellucidWarning, match="Already applied.*Applied now: nothing"):
        bridge.process_weights()
    assert bridge.weights_hash() == once
    bridge.hf_model.load_state_dict(state, strict=False)
    done = bridge.weights_state.done
    assert not done["unembed"]
    assert name == "olmo2" or not done["blocks.1"]  # nothing is folded into OLMo 2's blocks
    assert name != "gpt2" or not done["embed"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_bridge_checks_itself_after_processing(name: str) -> None:
    bridge = TransformerBridge(make_family(name))
    bridge.process_weights()
    report = bridge.verify(layers=[1])
    assert report.ok, report
