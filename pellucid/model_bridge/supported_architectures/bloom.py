"""BLOOM as a table: which component stands for which Hugging Face module, and every hook point with its names and shape.

Peculiar to BLOOM: the embedding has a layer norm of its own, so ``hook_embed`` is *its* output; there is no position
embedding; attention and MLP add the residual themselves, so contributions are read at ``dense`` and ``dense_4h_to_h``.
With ``apply_residual_connection_post_layernorm`` the residual that attention (MLP) adds to is ``ln1.hook_out``
(``ln2.hook_out``), not ``hook_resid_pre`` (``hook_resid_mid``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from torch import nn

from pellucid.model_bridge.architecture_adapter import ArchitectureAdapter
from pellucid.model_bridge.generalized_components import (
    BloomAttentionBridge,
    BloomBlockBridge,
    BloomMLPBridge,
    EmbeddingBridge,
    GeneralizedComponent,
    NormalizationBridge,
    UnembeddingBridge,
)
from pellucid.model_bridge.generalized_components.hf_arguments import cache_name, check_parameters
from pellucid.model_bridge.generalized_components.joint_qkv_attention import split_fused
from pellucid.names import HookSpec

_RESIDUAL = ("batch", "pos", "d_model")
_PER_HEAD = ("batch", "pos", "n_heads", "d_head")
_PER_HEAD_RESIDUAL = ("batch", "pos", "n_heads", "d_model")
_SCORES = ("batch", "n_heads", "pos", "key_pos")
_NEURONS = ("batch", "pos", "d_mlp")
_ONE = ("batch", "pos", "1")

_B = "blocks.{i}"
_ATTN = "blocks.{i}.attn"


def _norm(component: str) -> tuple[HookSpec, HookSpec]:
    """The inside of a norm."""
    return (
        HookSpec(f"{component}.hook_scale", component, "hook_scale", _ONE, "sqrt(variance + eps)", kind="wide"),
        HookSpec(
            f"{component}.hook_normalized",
            component,
            "hook_normalized",
            _RESIDUAL,
            "(x - mean) / scale, before gain and bias",
            kind="wide",
        ),
    )


BEFORE: tuple[HookSpec, ...] = (
    HookSpec("embed.hook_in", "embed", "hook_in", ("batch", "pos"), "token ids; an edit replaces tokens", kind="int"),
    HookSpec(
        "embed.hook_out",
        "embed_ln",
        "hook_in",
        _RESIDUAL,
        "output of word_embeddings, before the embedding norm",
        aliases=("embed_ln.hook_in",),
    ),
    *_norm("embed_ln"),
    HookSpec(
        "hook_embed",
        "embed_ln",
        "hook_out",
        _RESIDUAL,
        "output of word_embeddings_layernorm: what enters the residual stream",
        aliases=("embed_ln.hook_out",),
    ),
)

IN_BLOCK: tuple[HookSpec, ...] = (
    HookSpec(
        f"{_B}.hook_resid_pre",
        _B,
        "hook_in",
        _RESIDUAL,
        "what enters the block; feeds both the attention branch and the stream",
        aliases=(f"{_B}.hook_in", f"{_B}.ln1.hook_in"),
    ),
    *_norm(f"{_B}.ln1"),
    HookSpec(
        f"{_B}.ln1.hook_out",
        f"{_B}.ln1",
        "hook_out",
        _RESIDUAL,
        "output of the first norm, gain and bias applied",
        aliases=(f"{_ATTN}.hook_in",),
    ),
    HookSpec(
        f"{_B}.hook_attn_in",
        _ATTN,
        "hook_attn_in",
        _PER_HEAD_RESIDUAL,
        "the residual before ln1, one copy a head, for queries, keys and values",
        aliases=(f"{_ATTN}.hook_attn_in",),
        flag="use_attn_in",
    ),
    *(
        HookSpec(
            f"{_B}.hook_{part}_input",
            _ATTN,
            f"hook_{part}_input",
            _PER_HEAD_RESIDUAL,
            f"the residual before ln1, one copy a head, for the {word}",
            aliases=(f"{_ATTN}.hook_{part}_input",),
            flag="use_split_qkv_input",
        )
        for part, word in (("q", "queries"), ("k", "keys"), ("v", "values"))
    ),
    *(
        HookSpec(
            f"{_ATTN}.{part}.hook_in",
            _ATTN,
            f"hook_{part}_in",
            _RESIDUAL,
            f"output of the first norm, a copy that feeds the {word} only",
        )
        for part, word in (("q", "queries"), ("k", "keys"), ("v", "values"))
    ),
    *(
        HookSpec(
            f"{_ATTN}.hook_{part}",
            _ATTN,
            f"hook_{part}",
            _PER_HEAD,
            f"{word} of the new positions",
            aliases=(f"{_ATTN}.{part}.hook_out",),
        )
        for part, word in (("q", "queries"), ("k", "keys"), ("v", "values"))
    ),
    HookSpec(
        f"{_ATTN}.hook_attn_scores",
        _ATTN,
        "hook_attn_scores",
        _SCORES,
        "ALiBi added, scaled, masked, before the softmax",
    ),
    HookSpec(f"{_ATTN}.hook_pattern", _ATTN, "hook_pattern", _SCORES, "after the softmax, in the model's dtype"),
    HookSpec(f"{_ATTN}.hook_z", _ATTN, "hook_z", _PER_HEAD, "pattern times values", aliases=(f"{_ATTN}.o.hook_in",)),
    HookSpec(
        f"{_ATTN}.hook_result",
        _ATTN,
        "hook_result",
        _PER_HEAD_RESIDUAL,
        "each head's contribution, without b_O",
        flag="use_attn_result",
    ),
    HookSpec(
        f"{_B}.hook_attn_out",
        _ATTN,
        "hook_attn_out",
        _RESIDUAL,
        "attention's additive contribution: output of dense, before the residual is added",
        aliases=(f"{_ATTN}.o.hook_out",),
    ),
    HookSpec(
        f"{_B}.hook_resid_mid",
        _ATTN,
        "hook_out",
        _RESIDUAL,
        "attention module's output, residual added; feeds both the MLP branch and the stream",
        aliases=(f"{_ATTN}.hook_out", f"{_ATTN}.hook_hidden_states", f"{_B}.ln2.hook_in"),
    ),
    HookSpec(
        f"{_B}.hook_mlp_in",
        f"{_B}.ln2",
        "hook_branch_in",
        _RESIDUAL,
        "the residual before ln2, a copy that feeds the MLP branch only",
        flag="use_hook_mlp_in",
    ),
    *_norm(f"{_B}.ln2"),
    HookSpec(
        f"{_B}.mlp.hook_in",
        f"{_B}.ln2",
        "hook_out",
        _RESIDUAL,
        "what enters the MLP: output of the second norm",
        aliases=(f"{_B}.mlp.in.hook_in", f"{_B}.ln2.hook_out"),
    ),
    HookSpec(
        f"{_B}.mlp.hook_pre", f"{_B}.mlp", "hook_pre", _NEURONS, "before GELU", aliases=(f"{_B}.mlp.in.hook_out",)
    ),
    HookSpec(
        f"{_B}.mlp.hook_post",
        f"{_B}.mlp",
        "hook_post",
        _NEURONS,
        "after GELU: the neurons",
        aliases=(f"{_B}.mlp.out.hook_in",),
    ),
    HookSpec(
        f"{_B}.hook_mlp_out",
        f"{_B}.mlp",
        "hook_mlp_out",
        _RESIDUAL,
        "MLP's additive contribution: output of dense_4h_to_h, before the residual is added",
        aliases=(f"{_B}.mlp.out.hook_out",),
    ),
    HookSpec(
        f"{_B}.hook_resid_post",
        _B,
        "hook_out",
        _RESIDUAL,
        "what leaves the block",
        aliases=(f"{_B}.hook_out", f"{_B}.mlp.hook_out"),
    ),
)

AFTER: tuple[HookSpec, ...] = (
    *_norm("ln_final"),
    HookSpec(
        "ln_final.hook_out",
        "ln_final",
        "hook_out",
        _RESIDUAL,
        "output of ln_f, gain and bias applied",
        aliases=("unembed.hook_in",),
    ),
    HookSpec(
        "hook_unembed",
        "unembed",
        "hook_out",
        ("batch", "pos", "d_vocab"),
        "logits",
        aliases=("unembed.hook_out",),
    ),
)

BLOCK_MODULES: tuple[str, ...] = (
    "input_layernorm",
    "self_attention.query_key_value",
    "self_attention.dense",
    "self_attention.attention_dropout",
    "post_attention_layernorm",
    "mlp.dense_h_to_4h",
    "mlp.gelu_impl",
    "mlp.dense_4h_to_h",
)
"""Hugging Face's modules of one block, by path inside it."""


FORWARD_ARGUMENTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    (
        "",
        (
            *("input_ids", "attention_mask", "inputs_embeds", "use_cache", "logits_to_keep"),
            *("output_attentions", "output_hidden_states", "return_dict"),
        ),
        False,
    ),
    ("transformer", ("input_ids", "attention_mask", "inputs_embeds", "use_cache", "return_dict"), False),
    ("transformer.h.0", ("hidden_states", "alibi", "attention_mask", "layer_past"), False),
    (
        "transformer.h.0.self_attention",
        ("hidden_states", "residual", "alibi", "attention_mask", "layer_past", "use_cache", "output_attentions"),
        True,
    ),
    ("transformer.h.0.mlp", ("hidden_states", "residual"), True),
)
"""Arguments that Pellucid names, by module, and whether it computes in that module's place; the cache is named apart."""


class BloomArchitectureAdapter(ArchitectureAdapter):
    """BLOOM, BLOOMZ and their fine-tuned and mid-training checkpoints."""

    hooks_before = BEFORE
    hooks_in_block = IN_BLOCK
    hooks_after = AFTER
    last_block_aliases = MappingProxyType({"ln_final.hook_in": "blocks.{i}.hook_resid_post"})
    backbone_path = "transformer"
    blocks_path = "transformer.h"

    def make_outer(self) -> dict[str, GeneralizedComponent]:
        """Embedding, its norm, the last norm, the unembedding."""
        return {
            "embed": EmbeddingBridge("transformer.word_embeddings", self.cfg),
            "embed_ln": NormalizationBridge("transformer.word_embeddings_layernorm", self.cfg, role="embedding"),
            "ln_final": NormalizationBridge("transformer.ln_f", self.cfg, role="final"),
            "unembed": UnembeddingBridge("lm_head", self.cfg),
        }

    def make_block(self, layer: int | None) -> GeneralizedComponent:
        """Norm, attention, norm, MLP."""
        block = BloomBlockBridge(
            self.blocks_path if layer is None else f"{self.blocks_path}.{layer}",
            self.cfg,
            submodules={
                "ln1": NormalizationBridge("input_layernorm", self.cfg),
                "attn": BloomAttentionBridge("self_attention", self.cfg),
                "ln2": NormalizationBridge("post_attention_layernorm", self.cfg),
                "mlp": BloomMLPBridge("mlp", self.cfg),
            },
        )
        block.layer_index = layer
        return block

    def link_outer(self, outer: Mapping[str, GeneralizedComponent], blocks: list[GeneralizedComponent]) -> None:
        """The embedding's output is its norm's input; the last norm's output is the unembedding's input."""
        outer["embed"].link("hook_out", outer["embed_ln"], "hook_in")
        outer["unembed"].link("hook_in", outer["ln_final"], "hook_out")
        outer["ln_final"].link("hook_in", blocks[-1], "hook_out")

    def split_qkv_matrix(self, original_attention_component: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Queries, keys and values as linear transformations that read the fused layer, copying nothing."""
        return cast(
            "tuple[nn.Linear, nn.Linear, nn.Linear]", split_fused(original_attention_component, self.cfg.n_heads)
        )

    def check_arguments(self, model: nn.Module) -> None:
        """See :meth:`ArchitectureAdapter.check_arguments`."""
        for path, needed, only in FORWARD_ARGUMENTS:
            kind = type(model.get_submodule(path))
            if kind.__module__.startswith("transformers."):  # a module of the user's own is called as it is
                check_parameters(kind, needed, only)
        cache_name(type(model.get_submodule(self.backbone_path)))
        self.cache_name = cache_name(type(model))

    def missing_modules(self, model: nn.Module) -> list[str]:
        """Which of BLOOM's modules ``model`` has not."""
        present = {name for name, _ in model.named_modules(remove_duplicate=False)}
        expected = [str(component.name) for component in self.make_outer().values()]
        expected += [
            f"{self.blocks_path}.{layer}.{name}" for layer in range(self.cfg.n_layers) for name in BLOCK_MODULES
        ]
        return [path for path in expected if path not in present]
