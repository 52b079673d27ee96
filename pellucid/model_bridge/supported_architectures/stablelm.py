"""StableLM 2 and StableLM-3B.

Glossary: Llama's blocks with layer norms. Peculiar: a quarter of each head is rotated; with ``use_parallel_residual``
attention and MLP read the output of one norm, and the sum is ``(residual + attention) + mlp``; with ``qk_layernorm`` each
head of queries and keys has a norm of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.model_bridge.family import LAYER_NORM, Block, Family, Settings


def _variant(family: Family, config: Any) -> Family:
    if config.use_parallel_residual:
        family = replace(family, block=Block(ln2="", parallel=True, residual_first=True))
    if config.qk_layernorm:
        normed = replace(family.attention, q_norm="q_layernorm", k_norm="k_layernorm", head_norm="heads first")
        family = replace(family, attention=normed)
    return family


STABLELM = Family(
    "stablelm",
    "StableLM",
    norm=LAYER_NORM,
    settings=Settings(eps="layer_norm_eps"),
    notes="As Llama, with layer norms; a quarter of each head is rotated; parallel blocks share one norm.",
    variant=_variant,
)
