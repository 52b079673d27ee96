"""Granite 3 and 4 (dense): Llama with four multipliers.

Glossary: see Llama. Peculiar: the embedding is multiplied with ``embedding_multiplier`` before the first block, in no
module, so that ``hook_embed`` is what enters block 0 and ``embed.hook_out`` the table's row; what a branch gives is
multiplied with ``residual_multiplier`` before it is added, so that ``hook_attn_out`` and ``hook_mlp_out`` are the
products and ``attn.hook_out`` and ``mlp.hook_out`` what the projections give; logits are the head's output
(``hook_unembed``) divided by ``logits_scaling``. Scores are scaled by ``attention_multiplier``, which Hugging Face's
attention reads itself.
"""

from __future__ import annotations

from dataclasses import replace

from pellucid.model_bridge.family import Block, Outside, Settings
from pellucid.model_bridge.supported_architectures.llama import LLAMA

GRANITE = replace(
    LLAMA,
    model_type="granite",
    title="Granite",
    outside=Outside(embed_multiplier="embedding_multiplier"),
    block=Block(multiplier="residual_multiplier"),
    settings=Settings(logit_divisor="logits_scaling"),
    logits_change=True,
    notes="As Llama; the embedding, what branches add, and the logits are multiplied with numbers of the configuration.",
)
