"""Gemma 1, 2 and 3 (text).

Glossary: the gain of a norm is 1 + weight, applied before rounding; the embedding is scaled by ``sqrt(d_model)`` in its
module, so ``hook_embed`` is scaled. Peculiar: Gemma 2 and 3 norm what attention and MLP give before it is added
(``ln1_post``, ``ln2_post``); Gemma 2 caps its scores before the mask and its logits after the head, so that
``hook_unembed`` and ``hook_logits`` differ; Gemma 3 norms queries and keys with their heads first, and has two tables of
rotations. Their norms compute in float32 whatever the model's dtype is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.model_bridge.family import Attention, Block, Family, NormKind, Settings


def _variant(family: Family, config: Any) -> Family:
    return replace(family, logits_change=config.to_dict().get("final_logit_softcapping") is not None)


_FOUR_NORMS = Block(
    ln1_post="post_attention_layernorm", ln2="pre_feedforward_layernorm", ln2_post="post_feedforward_layernorm"
)

GEMMA = Family(
    "gemma",
    "Gemma",
    norm=NormKind("rms", "1 + weight", rounds_first=False),
    float64=False,
    notes="The gain of a norm is 1 + weight; the embedding is scaled in its module.",
)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    title="Gemma 2",
    block=_FOUR_NORMS,
    settings=Settings(activation="hidden_activation", final_cap="final_logit_softcapping"),
    logits_change=True,
    sdpa="none",
    notes="Norms before and after each branch; scores and logits are capped; every other layer has a sliding window.",
    variant=_variant,
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    title="Gemma 3",
    sdpa="hugging face",
    attention=Attention(q_norm="q_norm", k_norm="k_norm", head_norm="heads first"),
    notes="As Gemma 2; queries and keys are normed by head; local and global layers rotate by other tables.",
)
