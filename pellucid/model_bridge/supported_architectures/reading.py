"""From a Hugging Face configuration to ours, by what a family says of it.

Hugging Face's own code runs and obeys every attribute that it reads, so a configuration is refused only for what our names,
sizes or points do not fit. Attributes that its class does not know are read by nobody; a warning names them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch

from pellucid.config import BOOK_KEEPING, HuggingFaceConfig, TransformerBridgeConfig
from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.family import Family

_OTHER_SIZES = "Hugging Face would read sizes from a configuration inside this one"

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((None, True), "Hugging Face's mask would let a position see the ones after it"),
    "use_bidirectional_attention": ((None, False), "Hugging Face's mask would let a position see the ones after it"),
    "is_encoder_decoder": ((None, False), "the model is a decoder only"),
    "text_config": ((None,), _OTHER_SIZES),
    "text_encoder": ((None,), _OTHER_SIZES),
    "decoder": ((None,), _OTHER_SIZES),
    "generator": ((None,), _OTHER_SIZES),
    "per_layer_config": ((None, {}), "layers would have settings of their own"),
    "kv_sharing_modes": ((None,), "layers would share keys and values"),
    "fusion_config": ((None, {}), "Hugging Face would put fused modules in the place of the family's"),
    "transformers_weights": ((None,), "the weights would be read from another file than model.safetensors"),
}
"""Attributes that any decoder's configuration may have: the values that are handled, and what any other would do."""

OBEYED = frozenset(
    (
        *("quantization_config", "layer_types", "sliding_window", "attention_chunk_size", "output_cross_attentions"),
        "max_position_embeddings",  # by generate
    )
)
"""Attributes that code of Hugging Face's which every decoder runs through reads, and obeys."""

PUBLISHED: Mapping[str, tuple[Any, ...]] = {
    "n_ctx": (),  # GPT-2
    "unk_token_id": (),  # what converters of GGUF files write: the tokenizer's
    "is_llama_config": (),  # SmolLM2
    "rope_interleaved": (False,),
    "use_mrope": (False,),  # Qwen2
    "hidden_activation": (None,),  # Gemma
    "hidden_act": ("gelu_pytorch_tanh",),  # Gemma 2
    "attention_bias": (False,),  # Phi-3
}
"""Attributes of well-known checkpoints that nothing reads any more, with their values there; ``()``: whatever it is."""

_OF_CONFIG = re.compile(r"""config\.(\w+)|getattr\((?:self\.)?config, ["'](\w+)["']""")
_OF_KEYS = re.compile(r"""self\.(\w+)|["'](\w+)["']""")


def attributes_read(module: str) -> frozenset[str]:
    """Attributes of a configuration that a file of models reads: ``config.x`` and ``getattr(config, "x")`` in its text."""
    return _named_in(module, _OF_CONFIG)


def keys_read(module: str) -> frozenset[str]:
    """Keys of a ``config.json`` that a file of configurations reads, by what its text names."""
    return _named_in(module, _OF_KEYS)


def _named_in(module: str, pattern: re.Pattern[str]) -> frozenset[str]:
    try:
        text = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return frozenset()
    return frozenset(name for found in pattern.findall(text) for name in found if name)


def listed_of(family: Family) -> frozenset[str]:
    """Attributes that any model's configuration may have, and those that this family refuses."""
    return BOOK_KEEPING | OBEYED | REFUSED.keys() | family.refused.keys()


def read_settings(
    family: Family, config: HuggingFaceConfig, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TransformerBridgeConfig:
    """Sizes and switches of a model of ``family``.

    Args:
        family: the family.
        config: the model's configuration.
        dtype: dtype of the model's weights.
        device: where the model's inputs go.

    Raises:
        UnsupportedModelError: attributes that are missing, or have values that we do not handle, all of them listed.
    """
    family = family.of(config)
    attributes, where = config.to_dict(), family.settings
    problems = [
        f"{name} = {attributes[name]!r}: {why}"
        for name, (harmless, why) in {**REFUSED, **family.refused}.items()
        if name in attributes and attributes[name] not in harmless
    ]
    found = _named(config, (where.n_layers, where.n_heads, where.d_model, "vocab_size"))
    problems += [
        f"{name} = {value!r}: it must be a whole number, 1 or more"
        for name, value in found.items()
        if type(value) is not int or value < 1
    ]
    if problems:
        raise UnsupportedModelError(
            f"This {family.title} configuration sets what Pellucid does not handle:\n"
            + "\n".join(f"  {line}" for line in problems)
            + "\nTake what is not used out of the configuration, or give hf_config_overrides another value, such as None."
        )
    more = _named(
        config,
        (
            *(where.n_ctx, where.d_mlp, str(where.n_key_value_heads), where.d_head, where.eps, where.activation),
            *(where.num_experts, where.experts_per_token),
            *(where.final_cap, where.logit_scale, where.logit_divisor, "tie_word_embeddings", "_name_or_path"),
        ),
    )
    n_heads, d_model, shared = found[where.n_heads], found[where.d_model], where.n_key_value_heads
    return TransformerBridgeConfig(
        n_layers=found[where.n_layers],
        n_heads=n_heads,
        d_model=d_model,
        d_head=more[where.d_head] or d_model // n_heads,
        d_vocab=found["vocab_size"],
        n_ctx=more[where.n_ctx] or 2048,
        n_key_value_heads=shared if isinstance(shared, int) else more[shared] or n_heads,
        d_mlp=more[where.d_mlp] or 4 * d_model,
        num_experts=more[where.num_experts] or 0,
        experts_per_token=more[where.experts_per_token] or 0,
        eps=more[where.eps] or 1e-5,
        architecture=str((attributes.get("architectures") or [family.model_type])[0]),
        model_name=str(more["_name_or_path"] or ""),
        dtype=dtype,
        device=device,
        act_fn=str(more[where.activation] or "gelu"),  # where no attribute says it, Hugging Face's MLP has a GELU
        normalization_type="LN" if family.norm.centres else "RMS",
        positional_embedding_type=family.positions,
        post_embedding_ln=bool(family.outside.embed_norm),
        final_rms=not family.norm.centres,
        gated_mlp=family.mlp.is_gated,
        parallel_attn_mlp=family.block.parallel,
        use_normalization_before_and_after=bool(family.block.ln1 and family.block.ln1_post),
        tie_word_embeddings=bool(more["tie_word_embeddings"]),
        output_logits_soft_cap=more[where.final_cap] or 0.0,
        output_logits_scale=more[where.logit_scale] or 1.0,
        output_logits_divisor=more[where.logit_divisor] or 1.0,
    )


def _named(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Attributes by name, ``None`` for those that are not there; Hugging Face's own other names of one count."""
    return {name: getattr(config, name, None) if name else None for name in names}
