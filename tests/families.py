"""A tiny random model of each family, all of whose parameters are moved at random.

A fresh model has gains of 1 and biases of 0, which hides most faults. Sizes differ from each other, so that an axis in the
wrong place shows; where heads may share keys, they do.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pellucid.padding import position_ids
from tests.models import Mould

VOCAB = 97

_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOW = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_GEMMA = _LLAMA | {"head_dim": 10}
_FALCON = {key: _LLAMA[key] for key in _LLAMA if key not in ("intermediate_size", "num_key_value_heads")}

CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "llama-biased": ("LlamaConfig", _LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2MoeConfig", _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 24}),
    "mistral": ("MistralConfig", _LLAMA | {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", _LLAMA | {"head_dim": 10}),
    "gpt2": ("GPT2Config", {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}),
    "gpt2-upcast": (
        "GPT2Config",
        {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "reorder_and_upcast_attn": True},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    ),
    "gpt_neox-sequential": (
        "GPTNeoXConfig",
        {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
        | {"use_parallel_residual": False},
    ),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", _GEMMA | {"num_hidden_layers": 4, "sliding_window": 5, "layer_types": _WINDOW}),
    "gemma3": ("Gemma3TextConfig", _GEMMA | {"num_hidden_layers": 4, "sliding_window": 5, "layer_types": _WINDOW}),
    "olmo2": ("Olmo2Config", _LLAMA),
    "phi3": ("Phi3Config", _LLAMA | {"sliding_window": 5}),
    "phi": ("PhiConfig", _LLAMA),
    "phi-normed": ("PhiConfig", _LLAMA | {"qk_layernorm": True}),
    "stablelm": ("StableLmConfig", _LLAMA | {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLmConfig", _LLAMA | {"use_parallel_residual": True, "qk_layernorm": True}),
    "smollm3": ("SmolLM3Config", _LLAMA | {"no_rope_layers": [1, 0, 1]}),
    "gptj": ("GPTJConfig", {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "rotary_dim": 4}),
    "cohere": ("CohereConfig", _LLAMA | {"logit_scale": 0.5}),
    "falcon": ("FalconConfig", _FALCON),
    "falcon-new": ("FalconConfig", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": (
        "FalconConfig",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-sequential": ("FalconConfig", _FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "mpt": (
        "MptConfig",
        {"d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": 64, "attn_config": {"clip_qkv": 1.5}},
    ),
    "opt": (
        "OPTConfig",
        {key: _LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")}
        | {"ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 48}
        | {"activation_function": "gelu"},  # Galactica's: differences of forwards step over the kinks of OPT's own ReLU
    ),
    "granite": (
        "GraniteConfig",
        _LLAMA
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 7.0, "attention_multiplier": 0.4},
    ),
}
"""By a name of ours: the class of the configuration, and its arguments."""

KIN: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", _LLAMA | _EXPERTS | {"head_dim": 10, "norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", _LLAMA | {"num_experts": 5, "num_experts_per_tok": 2}),
}
"""Each has a layout that others of :data:`CONFIGS` have together: among them where ``PELLUCID_FAMILIES=all``."""

ALL = os.environ.get("PELLUCID_FAMILIES") == "all"
if ALL:
    CONFIGS = {**CONFIGS, **KIN}


NO_FLOAT64 = ("gpt2-upcast",)
"""Hugging Face's own code raises on a float64 model of these: its reordered attention takes float32 scores, and no others."""


def has_experts(name: str) -> bool:
    """Whether a family has a mixture of experts in the place of its MLP."""
    return "num_experts_per_tok" in {**CONFIGS, **KIN}[name][1]


def smooth(name: str) -> dict[str, Any]:
    """Settings with which a family's forward is a smooth function, as a comparison of a derivative with steps needs it.

    A choice among experts jumps where two of them are as good, so all are chosen; a clip of queries, keys and values has kinks.
    """
    if has_experts(name):
        return {"num_experts_per_tok": _EXPERTS["num_experts"]}
    return {"attn_config": None} if name == "mpt" else {}


@cache
def _built(name: str, settings: tuple[tuple[str, Any], ...], attention: str) -> Mould:
    kind, arguments = {**CONFIGS, **KIN}[name]
    config = vars(transformers)[kind] if kind in vars(transformers) else getattr(transformers, kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config(**{"vocab_size": VOCAB, **arguments, **dict(settings)}), attn_implementation=attention
        ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Mould(model)


def make_family(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager", **settings: Any) -> Any:
    """A model of a family; the same arguments give the same weights.

    It is not cast with ``.to(dtype)`` alone: that rounds tables of rotations, which ``from_pretrained`` leaves in float32.
    """
    model = _built(name, tuple(sorted(settings.items())), attention).copy()
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # the grouped product, where there are experts, takes no float64
    tables = {key: buffer.clone() for key, buffer in model.named_buffers() if buffer.is_floating_point()}
    model.to(dtype)
    if dtype is not torch.float64:
        for key, buffer in tables.items():
            owner, _, last = key.rpartition(".")
            model.get_submodule(owner)._buffers[last] = buffer
    return model


def mask_of(tokens: Tensor, side: str | None) -> Tensor | None:
    """A mask that pads the first row by three positions, the second by one."""
    if side is None:
        return None
    mask = torch.ones_like(tokens)
    for row, count in ((0, 3), (1, 1)):
        mask[row, slice(0, count) if side == "left" else slice(tokens.shape[1] - count, None)] = 0
    return mask


CORE = ("llama", "gpt2", "gemma2")
"""Families that are always tested in full; the others in full where ``PELLUCID_FAMILIES=all`` (``scripts/check families``)."""

N_TURNS = 4
TURN = os.environ.get("PELLUCID_TURN")
"""``scripts/check`` takes the number of the day; pytest alone has no turns."""


def of_the_turn(names: Iterable[str]) -> list[str]:
    """The core, and those of the others whose turn it is; all of them where there are no turns."""
    others = [name for name in names if name not in CORE]
    turn = others if TURN is None or ALL else others[int(TURN) % N_TURNS :: N_TURNS]
    return [name for name in names if name in CORE or name in turn]


LAYOUTS = of_the_turn(
    ("llama-biased", "qwen3", "gemma3", "olmo2", "phi3", "stablelm-parallel", "gptj", "opt", "gpt_neox")
)
"""With the core, one configuration of each layout: what is tested of every layout, where not of every family."""


def in_full(name: str) -> bool:
    """Whether a family is tested in full here."""
    return ALL or name in CORE


def of_each_layout(names: Iterable[str] = CONFIGS) -> list[str]:
    """Those of ``names`` that stand for a layout; all of them where ``PELLUCID_FAMILIES=all``."""
    return [name for name in names if ALL or name in (*CORE, *LAYOUTS)]


def native_arguments(model: Any, mask: Tensor | None, length: int) -> dict[str, Tensor]:
    """A mask as Hugging Face's forward is given it: with the ids of its own ``generate``, where the model takes some."""
    if mask is None:
        return {}
    given = {"attention_mask": mask}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        given["position_ids"] = position_ids(mask)[:, -length:]
    return given


@contextmanager
def float64_is_kept() -> Iterator[None]:
    """Hugging Face's ``.float()`` leaves a float64 tensor as it is, for the length of a block.

    A float64 model of some families is rounded to float32 on the way (Gemma's norms, MPT's scores). What is equal but for
    that is then equal as other families are.
    """
    narrow = torch.Tensor.float

    def kept(self: Tensor) -> Tensor:
        asks = str(sys._getframe(1).f_globals["__name__"])  # ours, where it narrows, is still seen to
        return self if self.dtype is torch.float64 and asks.startswith("transformers.") else narrow(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", kept)
        yield


def in_float64(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that there is a float64 model of."""
    return [name for name in names if name not in NO_FLOAT64]


@contextmanager
def opted_in(bridge: Any, *flags: str) -> Iterator[None]:
    """Opt-in points on for the length of a block: those of ``flags``, or all that do not exclude each other."""
    if not flags:
        flags = tuple({spec.flag for spec in bridge.hook_index.values() if spec.flag} - {"use_attn_in"})
    for flag in flags:
        setattr(bridge.cfg, flag, True)
    try:
        yield
    finally:
        for flag in flags:
            setattr(bridge.cfg, flag, False)
