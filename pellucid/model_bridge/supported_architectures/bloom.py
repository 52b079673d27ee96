"""BLOOM, BLOOMZ and their fine-tuned and mid-training checkpoints.

Peculiar to BLOOM: the embedding has a layer norm of its own, so ``hook_embed`` is *its* output; there is no position
embedding; attention and MLP add the residual themselves, so contributions are read at ``dense`` and ``dense_4h_to_h``.
With ``apply_residual_connection_post_layernorm`` the residual that attention (MLP) adds to is ``ln1.hook_out``
(``ln2.hook_out``), not ``hook_resid_pre`` (``hook_resid_mid``). Attention and MLP are computed step by step, as
:class:`~pellucid.model_bridge.generalized_components.bloom_attention.BloomAttentionBridge` fixes it.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import nn

from pellucid.config import TransformerBridgeConfig
from pellucid.model_bridge.family import LAYER_NORM, MLP, Attention, Block, Family, Outside, Settings
from pellucid.model_bridge.generalized_components import (
    BlockBridge,
    BloomAttentionBridge,
    BloomBlockBridge,
    BloomMLPBridge,
)
from pellucid.model_bridge.generalized_components.hf_arguments import cache_name, check_parameters
from pellucid.model_bridge.generalized_components.joint_qkv_attention import split_fused
from pellucid.model_bridge.supported_architectures.decoder import DecoderAdapter

BLOOM = Family(
    model_type="bloom",
    title="BLOOM",
    outside=Outside("transformer", "h", "word_embeddings", "", "word_embeddings_layernorm", "ln_f"),
    block=Block(gives_tuple=True, adds_residual=True),
    attention=Attention("self_attention", qkv="query_key_value", layout="grouped", o="dense", rotary=False),
    mlp=MLP(up="dense_h_to_4h", down="dense_4h_to_h", gate="", adds_residual=True),
    norm=LAYER_NORM,
    settings=Settings(
        "n_layer", "n_head", n_ctx="seq_length", n_key_value_heads="", d_head="", eps="layer_norm_epsilon"
    ),
    takes_position_ids=False,
    sdpa="pellucid",
    tokenizer="bigscience/bloom",
    notes="ALiBi; a norm after the embedding; attention and MLP add the residual themselves.",
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


class BloomArchitectureAdapter(DecoderAdapter):
    """BLOOM, whose attention and MLP Pellucid computes step by step.

    Args:
        cfg: the bridge's configuration.
        family: the family.
    """

    processes_in: ClassVar[torch.dtype] = torch.float32  # its processed weights are promised to the bit

    def __init__(self, cfg: TransformerBridgeConfig, family: Family = BLOOM) -> None:
        super().__init__(cfg, family)

    def _block(self, name: str) -> BlockBridge:
        """Norm, attention, norm, MLP."""
        return BloomBlockBridge(
            name,
            self.cfg,
            submodules={
                "ln1": self._norm("input_layernorm"),
                "attn": BloomAttentionBridge("self_attention", self.cfg),
                "ln2": self._norm("post_attention_layernorm"),
                "mlp": BloomMLPBridge("mlp", self.cfg),
            },
        )

    def split_qkv_matrix(self, original_attention_component: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Queries, keys and values as linear transformations that read the fused layer, copying nothing."""
        return cast(
            "tuple[nn.Linear, nn.Linear, nn.Linear]", split_fused(original_attention_component, self.cfg.n_heads)
        )

    def check_arguments(self, model: nn.Module) -> None:
        """See :meth:`pellucid.model_bridge.architecture_adapter.ArchitectureAdapter.check_arguments`."""
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
