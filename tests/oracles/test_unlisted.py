"""A decoder of no family that is known opens by its modules' names, with the points that hold on it; else it is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from pellucid import Corpus, TransformerBridge
from pellucid.errors import HookNameError, PellucidWarning, UnsupportedModelError
from pellucid.hook_points import HookPoint
from pellucid.model_bridge.running.loading import read_adapter, read_config
from pellucid.running_stats import MeanVariance
from pellucid.sweep import Edit, LogitDifference, Scale, Sweep
from tests.families import VOCAB, make_family, of_the_turn
from tests.models import is_pristine, random_tokens
from tests.sweep.reference import whole_logits
from tests.tiny_tokenizers import byte_level

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def make(kind: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def two_layers(family: str) -> Any:
    """A model of a known family: all of its points in the first layer and the last."""
    settings: dict[str, Any] = {"n_layer" if family in ("gpt2", "gptj") else "num_hidden_layers": 2}
    if family == "gemma2":
        settings["layer_types"] = None  # its own, of two: a window, and none
    return make_family(family, **settings)


def opened(model: Any) -> tuple[TransformerBridge, str]:
    """A bridge, and what it said when it was made."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bridge = TransformerBridge(model)
    return bridge, "\n".join(str(warning.message) for warning in said)


UNDER_ANOTHER_NAME = ("llama", "olmo2", "gemma2", "gptj", "qwen2_moe", "phi3", "gpt2", "gpt_neox")


@pytest.mark.parametrize("family", of_the_turn(UNDER_ANOTHER_NAME))
def test_what_is_read_off_a_model_is_what_its_family_says(family: str) -> None:
    """A model of a known family under another name: the same points, with the same axes and aliases."""
    wanted = TransformerBridge(two_layers(family))
    model = two_layers(family)
    model.config.model_type = "nobodys"
    if family == "gptj":  # its scores are made in a method: names do not say so
        with pytest.raises(UnsupportedModelError, match="scores and pattern could not be reached"):
            TransformerBridge(model)
        return
    bridge, said = opened(model)
    assert "nobodys (unlisted) is a family that Pellucid does not know" in said
    assert "unlisted" in repr(bridge)
    assert dict(bridge.hook_index) == dict(wanted.hook_index)
    assert bridge.adapter.family.block == wanted.adapter.family.block
    assert bridge.adapter.family.attention == wanted.adapter.family.attention
    assert bridge.adapter.family.norm.gain == wanted.adapter.family.norm.gain
    tokens = random_tokens()
    assert torch.equal(bridge.run_with_cache(tokens)[0], wanted(tokens))
    assert is_pristine(model)
    again, silent = opened(model)  # it has been tried
    assert "unlisted" not in silent
    assert list(again.hook_dict) == list(bridge.hook_dict)


def test_points_that_are_not_what_their_names_say_are_left_out() -> None:
    """A Granite under another name: it multiplies embeddings, and what each branch gives, where no module shows it."""
    model = make("Granite", residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=3.0)
    model.config.model_type = "nobodys"
    bridge, said = opened(model)
    assert "blocks.{i}.hook_attn_out, blocks.{i}.hook_mlp_out, hook_embed." in said
    for name in ("blocks.1.hook_attn_out", "blocks.1.attn.o.hook_out", "hook_embed"):
        with pytest.raises(HookNameError):
            bridge.run_with_cache(random_tokens(), names_filter=name)
    tokens = random_tokens()
    logits, cache = bridge.run_with_cache(tokens)
    assert torch.equal(cache["hook_logits"], logits)
    assert not torch.equal(cache["hook_unembed"], logits)
    report = bridge.verify(layers=[1], progress=False)
    assert report.ok, report.failed
    # A sweep knows neither factor, so it runs whole forwards.
    edits = [Edit(hook, Scale(1.5), positions=4) for hook in ("blocks.0.hook_resid_pre", "blocks.1.attn.hook_z")]
    swept = Sweep(bridge, tokens, LogitDifference(5, 6)).run(edits)
    assert "is not known" in (swept.plan.why_whole or "")
    for edit, found in zip(edits, swept.values["metric"], strict=True):
        wanted = whole_logits(bridge, tokens, edit)[:, -1]
        assert float((wanted[:, 5] - wanted[:, 6] - found).abs().max()) <= 2e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", ["Starcoder2", "Cohere2"])
def test_others_hold(kind: str) -> None:
    bridge, said = opened(make(kind))
    assert "left out" not in said
    report = bridge.verify(layers=[1], progress=False)
    assert report.ok, report.failed


def test_a_point_that_is_dead_is_left_out() -> None:
    """An attention of somebody's own that makes its pattern without a softmax of Hugging Face's kind."""
    model = two_layers("llama")
    model.config.model_type = "nobodys"
    attention: Any = model.model.layers[1].self_attn
    inner = type(attention).forward

    class Uncached(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            return inner(self, *args, past_key_values=None, **kwargs)

    attention.__class__ = Uncached
    bridge, said = opened(model)
    assert "blocks.{i}.attn.hook_rot_k" in said
    assert "blocks.1.attn.hook_rot_k" not in bridge.hook_dict
    tokens = random_tokens()

    def edit(tensor: Tensor, hook: HookPoint) -> Tensor:
        return tensor * 2

    edited = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_q", edit)])
    assert not torch.equal(edited, bridge(tokens))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("Glm4Moe", r"the modules of mlp of a block are not those of one\. There: .*experts.*Looked for one of:\n  "),
        ("Olmo", r"its norms \(OlmoLayerNorm\) compute in no way that it knows"),
    ],
)
def test_what_fits_none_is_refused(kind: str, said: str) -> None:
    more = {"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 0} if kind == "Glm4Moe" else {}
    model = make(kind, **more)
    model.config.model_type = "nobodys"
    with pytest.raises(UnsupportedModelError, match=r"(?s)" + said):
        TransformerBridge(model)
    assert is_pristine(model)


def test_a_module_with_weights_that_nobody_knows_is_refused() -> None:
    """What it adds to the stream, and where, no name says."""
    model = make_family("llama")
    model.config.model_type = "nobodys"
    model.model.layers[0].side = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"(?s)the modules of a block are not those of one\. There: .*side"):
        TransformerBridge(model)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("self_attn.qkv_proj", "gives queries, keys and values together in no order that it knows"),
        ("mlp.gate_up_proj", "gives gate and up in no order that it knows"),
    ],
)
def test_a_fused_layout_that_is_not_proved_is_refused(path: str, said: str) -> None:
    """An attention that takes values first, and an MLP that activates the second half."""
    model = make_family("phi3")
    model.config.model_type = "nobodys"
    block: Any = model.model.layers[0]
    if path.startswith("mlp"):
        mlp = block.mlp
        mlp.forward = lambda x: mlp.down_proj(
            (lambda up, gate: up * mlp.activation_fn(gate))(*mlp.gate_up_proj(x).chunk(2, dim=-1))
        )
    else:
        block.self_attn.__class__ = OtherOrder
    with pytest.raises(UnsupportedModelError, match=said):
        TransformerBridge(model)


class OtherOrder(Phi3Attention):
    """Phi-3's attention with keys and values exchanged."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = self.qkv_proj.forward

        def exchanged(x: Tensor) -> Tensor:
            q, k, v = plain(x).split((48, 16, 16), dim=-1)
            return torch.cat((q, v, k), dim=-1)

        self.qkv_proj.forward = exchanged
        return super().forward(hidden_states, *args, **kwargs)


# -- by name -----------------------------------------------------------------------------------------------------------


def test_a_folder_opens_by_name(tmp_path: Path) -> None:
    make("Starcoder2").save_pretrained(tmp_path)
    with pytest.warns(PellucidWarning, match=r"starcoder2 \(unlisted\) is a family that Pellucid does not know"):
        bridge = TransformerBridge.boot_transformers(tmp_path, tokenizer=byte_level())
    assert "unlisted" in repr(bridge)
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = random_tokens()
    assert torch.equal(bridge(tokens), native(tokens, use_cache=False).logits)
    corpus = Corpus.from_tokens({"x": [tokens[0]]}, context=9)
    statistics = {"blocks.1.mlp.hook_post": [MeanVariance()]}
    bridge.collect(corpus, statistics, checkpoint=tmp_path / "job", progress=False)  # its identity is asked for


def test_its_hook_names_are_known_before_its_weights_are_there(tmp_path: Path) -> None:
    """Commands refuse a wrong name first."""
    make("Starcoder2").save_pretrained(tmp_path)
    adapter, config = read_adapter(str(tmp_path)), read_config(str(tmp_path))
    with pytest.warns(PellucidWarning, match="unlisted"):
        bridge = TransformerBridge.boot_transformers(tmp_path, tokenizer=byte_level())
    assert set(bridge.hook_dict) <= set(adapter.hook_index())
    assert config.n_layers == bridge.cfg.n_layers


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "Mamba",
            r"model_type='mamba', a family that Pellucid does not know. It opens: .*There: .*Looked for one of:\n",
        ),
        ("T5", r"model_type='t5', a family that Pellucid does not know. It opens: bloom"),  # no causal language model
    ],
)
def test_a_folder_that_fits_none_is_refused_before_weights_are_read(kind: str, said: str, tmp_path: Path) -> None:
    getattr(transformers, f"{kind}Config")(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"(?s)" + said):
        TransformerBridge.boot_transformers(tmp_path)
