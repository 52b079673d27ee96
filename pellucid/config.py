"""The configuration of a bridge, made from a Hugging Face ``BloomConfig`` that is read attribute by attribute.

Every attribute of the Hugging Face configuration is either *handled* (it becomes a field here or the Hugging Face model
itself obeys it), *ignored on purpose* (it cannot change a number), *refused* by name (code of transformers that BLOOM's
runs through reads it, and computes something else with it), or *unread*: no code reads it, so it cannot change a number,
and a warning names it. Fine-tuning frameworks leave many such keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from pellucid.arguments import check_mapping
from pellucid.errors import InputError, UnsupportedModelError, warn
from pellucid.names import Flag

HANDLED = frozenset(
    (
        "vocab_size hidden_size n_layer num_hidden_layers n_head num_attention_heads layer_norm_epsilon use_cache "
        "bos_token_id eos_token_id pad_token_id apply_residual_connection_post_layernorm hidden_dropout attention_dropout "
        "pretraining_tp slow_but_exact tie_word_embeddings dtype torch_dtype model_type seq_length n_inner "
        "attention_softmax_in_fp32 quantization_config"
    ).split()
)
"""Attributes that become a field, that Hugging Face's own model obeys, or that are checked below."""

BOOK_KEEPING = frozenset(
    "architectures name_or_path _name_or_path transformers_version initializer_range return_dict output_hidden_states "
    "output_attentions chunk_size_feed_forward id2label label2id problem_type num_labels "
    "finetuning_task task_specific_params _commit_hash _attn_implementation _attn_implementation_internal "
    "_attn_implementation_autoset _experts_implementation _output_attentions auto_map sep_token_id "
    "decoder_start_token_id attn_implementation experts_implementation use_bfloat16 torchscript prefix "
    "tokenizer_class model_parallel distributed_config gradient_checkpointing".split()
)
"""Hugging Face's book-keeping in the configuration of any model: names, labels, what to return."""

IGNORED = BOOK_KEEPING | frozenset(
    # Megatron's training and kernel switches, kept in BigScience's published configurations.
    "bias_dropout_fusion masked_softmax_fusion offset_alibi skip_bias_add skip_bias_add_qkv unk_token_id n_embed".split()
)
"""Attributes that cannot change a number of a BLOOM forward."""

_OTHER_ATTENTION = "Hugging Face's cache or mask would leave keys out that Pellucid's attention sees"
_OTHER_SIZES = "Hugging Face would read sizes from a configuration inside this one"

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_causal": ((True,), "Hugging Face's mask would let a position see the ones after it"),
    "sliding_window": ((None,), _OTHER_ATTENTION),
    "attention_chunk_size": ((None,), _OTHER_ATTENTION),
    "kv_sharing_modes": ((None,), "layers would share keys and values"),
    "text_config": ((None,), _OTHER_SIZES),
    "text_encoder": ((None,), _OTHER_SIZES),
    "decoder": ((None,), _OTHER_SIZES),
    "generator": ((None,), _OTHER_SIZES),
    "per_layer_config": ((None, {}), "layers would have settings of their own"),
    "fusion_config": ((None, {}), "Hugging Face would put fused modules in the place of BLOOM's"),
    "transformers_weights": ((None,), "the weights would be read from another file than model.safetensors"),
    "tie_last_hidden_states": ((None, False), "Hugging Face's last hidden state would be another tensor"),
    "is_encoder_decoder": ((None, False), "BLOOM is a decoder only"),
}
"""Attributes that BLOOM has no use for, but that transformers reads on the way of a BLOOM: the values that change nothing,
and what any other would do."""

LISTED = HANDLED | IGNORED | REFUSED.keys() | {"layer_types"}
"""Attributes of a BLOOM's configuration that are read or known to change nothing."""

SIZES = ("hidden_size", "n_head", "n_layer", "vocab_size")
"""Attributes that must be whole numbers from 1 on."""


class HuggingFaceConfig(Protocol):
    """What we need of a Hugging Face configuration."""

    model_type: str

    def to_dict(self) -> dict[str, Any]:
        """Every attribute by name."""
        ...


@dataclass
class TransformerBridgeConfig:
    """Sizes and switches of a bridged model, under TransformerLens' names.

    ``d_model`` features, ``n_heads`` heads of ``d_head`` features, ``n_layers`` blocks, ``d_mlp`` neurons a block,
    ``d_vocab`` tokens, ``n_ctx`` the length it was trained on (BLOOM itself has no limit), ``eps`` of the norms;
    ``n_key_value_heads`` heads of keys and values, as many as of queries unless several queries share one;
    ``d_mlp`` is an expert's where each token goes through ``experts_per_token`` of ``num_experts`` experts (0: of none);
    ``default_prepend_bos`` is what ``prepend_bos=None`` means, ``None`` leaves it to the tokenizer.
    The four ``use_*`` flags say which opt-in hook points are on; set them through the bridge's ``set_use_*`` methods.
    ``use_normalization_before_and_after``: a norm follows attention and MLP too. ``seed`` is for who makes random weights to
    say with which; nothing here reads it.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int = 2048
    n_key_value_heads: int = 0
    d_mlp: int | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    eps: float = 1e-5
    architecture: str = "BloomForCausalLM"
    model_name: str = ""
    dtype: torch.dtype = torch.float32
    device: str | None = None
    act_fn: str = "gelu_fast"
    normalization_type: str = "LN"
    positional_embedding_type: str = "alibi"
    default_prepend_bos: bool | None = None
    post_embedding_ln: bool = True
    final_rms: bool = False
    gated_mlp: bool = False
    parallel_attn_mlp: bool = False
    use_normalization_before_and_after: bool = False
    output_logits_soft_cap: float = 0.0
    output_logits_scale: float = 1.0
    output_logits_divisor: float = 1.0
    attn_only: bool = False
    tie_word_embeddings: bool = True
    apply_residual_connection_post_layernorm: bool = False
    pretraining_tp: int = 1
    slow_but_exact: bool = False
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    tokenizer_name: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self.n_key_value_heads = self.n_key_value_heads or self.n_heads
        if self.n_heads % self.n_key_value_heads:
            raise UnsupportedModelError(
                f"n_heads must be a multiple of n_key_value_heads: found {self.n_heads} and {self.n_key_value_heads}."
            )
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model

    @property
    def attn_scale(self) -> float:
        """What queries times keys are divided by, sqrt(d_head)."""
        return math.sqrt(self.d_head)

    @property
    def n_params(self) -> int:
        """Weights of attention and MLP, biases, norms and embeddings not counted, as TransformerLens counts."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_key_value_heads)
        return self.n_layers * (attention + (2 + self.gated_mlp) * self.d_model * (self.d_mlp or 0))

    @property
    def ungroup_grouped_query_attention(self) -> bool:
        """``False``, for tools of TransformerLens': heads of keys and values are never repeated for each head of queries."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Every field by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> TransformerBridgeConfig:
        """The configuration of such a dictionary; of fields that are not here a warning tells, as no number depends on them.

        Raises:
            InputError: no mapping; a size is missing.
        """
        known = {field.name for field in fields(cls)}
        unknown = [
            name for name in check_mapping("config_dict", config_dict, "names of fields to values") if name not in known
        ]
        if unknown:
            warn(f"Fields of a configuration that are not here are left out: {', '.join(unknown)}.")
        missing = [name for name in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab") if name not in config_dict]
        if missing:
            raise InputError(f"config_dict lacks {', '.join(missing)}.")
        return cls(**{name: value for name, value in config_dict.items() if name in known})

    @property
    def d_vocab_out(self) -> int:
        """Width of the logits."""
        return self.d_vocab

    def sizes(self, batch: int = 1, pos: int = 1, key_pos: int = 1) -> dict[str, int]:
        """How long each axis of a hook point is, by the words of :mod:`pellucid.axes`, in a run of these sizes."""
        return {
            "batch": batch,
            "pos": pos,
            "key_pos": key_pos,
            "n_heads": self.n_heads,
            "n_key_value_heads": self.n_key_value_heads,
            "d_head": self.d_head,
            "d_model": self.d_model,
            "d_mlp": self.d_mlp or 4 * self.d_model,
            "n_experts": self.num_experts,
            "d_vocab": self.d_vocab,
            "1": 1,
        }

    @property
    def sums_weight_slices(self) -> bool:
        """Whether Hugging Face computes ``dense`` and ``dense_4h_to_h`` slice by slice, without their biases."""
        return self.slow_but_exact and self.pretraining_tp > 1

    @property
    def flags(self) -> dict[Flag, bool]:
        """The opt-in switches by name."""
        return {
            "use_attn_result": self.use_attn_result,
            "use_split_qkv_input": self.use_split_qkv_input,
            "use_attn_in": self.use_attn_in,
            "use_hook_mlp_in": self.use_hook_mlp_in,
        }


def config_from_huggingface(
    config: HuggingFaceConfig, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TransformerBridgeConfig:
    """Read a Hugging Face BLOOM configuration.

    Args:
        config: the model's configuration.
        dtype: dtype of the model's weights.
        device: where the model's inputs go.

    Raises:
        UnsupportedModelError: attributes that no BLOOM has or that would change numbers, all of them listed.
    """
    attributes = config.to_dict()
    problems = _problems(attributes)
    if problems:
        raise UnsupportedModelError(
            "This BLOOM configuration sets what Pellucid does not handle:\n"
            + "\n".join(f"  {line}" for line in problems)
            + "\nTake what is not used out of the configuration, or give hf_config_overrides another value, such as None."
        )
    d_model, n_heads = int(attributes["hidden_size"]), int(attributes["n_head"])
    if d_model % n_heads:
        raise UnsupportedModelError(
            f"hidden_size must be n_head * d_head: found hidden_size {d_model} and n_head {n_heads}."
        )
    return TransformerBridgeConfig(
        n_layers=int(attributes["n_layer"]),
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_model // n_heads,
        d_vocab=int(attributes["vocab_size"]),
        n_ctx=int(attributes.get("seq_length") or 2048),
        eps=float(attributes["layer_norm_epsilon"]),
        model_name=str(attributes.get("_name_or_path") or ""),
        dtype=dtype,
        device=device,
        tie_word_embeddings=bool(attributes["tie_word_embeddings"]),
        apply_residual_connection_post_layernorm=bool(attributes["apply_residual_connection_post_layernorm"]),
        pretraining_tp=int(attributes["pretraining_tp"]),
        slow_but_exact=bool(attributes["slow_but_exact"]),
    )


def _problems(attributes: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{name} = {attributes[name]!r}: {why}"
        for name, (harmless, why) in REFUSED.items()
        if name in attributes and attributes[name] not in harmless
    ]
    problems += [
        f"{name} = {attributes.get(name)!r}: it must be a whole number, 1 or more"
        for name in SIZES
        if type(attributes.get(name)) is not int or attributes[name] < 1
    ]
    layer_types = attributes.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        problems.append(f"layer_types = {layer_types!r}: {_OTHER_ATTENTION}")
    dtype = attributes.get("dtype")
    if dtype is not None and not _is_floating(dtype):
        problems.append(f"dtype = {dtype!r}: it must be a floating-point dtype, such as 'float32'")
    inner, hidden = attributes.get("n_inner"), attributes.get("hidden_size")
    if isinstance(hidden, int) and inner is not None and inner != 4 * hidden:
        problems.append(f"n_inner = {inner}: BLOOM's MLP has 4 * hidden_size = {4 * hidden} neurons")
    if attributes.get("attention_softmax_in_fp32") is False:
        problems.append("attention_softmax_in_fp32 = False: Hugging Face's BLOOM always uses float32 there")
    return problems


def _is_floating(dtype: Any) -> bool:
    found = vars(torch).get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    return isinstance(found, torch.dtype) and found.is_floating_point
