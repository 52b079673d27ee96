"""Phi 1, 1.5 and 2.

Glossary: attention and MLP read the output of one norm (``ln1`` alone, ``parallel``), so ``ln1.hook_out`` feeds both; the
output projection is called ``dense``, the head has a bias. Peculiar: a part of each head is rotated; with ``qk_layernorm``
one layer norm is shared by all heads of queries, another by those of keys. The sum is ``attention + mlp + residual``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.model_bridge.family import LAYER_NORM, MLP, Attention, Block, Family, Outside, Settings


def _variant(family: Family, config: Any) -> Family:
    if not config.qk_layernorm:
        return family
    normed = replace(family.attention, q_norm="q_layernorm", k_norm="k_layernorm", head_norm="heads first")
    return replace(family, attention=normed)


PHI = Family(
    "phi",
    "Phi",
    outside=Outside(final_norm="final_layernorm", head_has_bias=True),
    block=Block(ln2="", parallel=True),
    attention=Attention(o="dense"),
    mlp=MLP(up="fc1", down="fc2", gate=""),
    norm=LAYER_NORM,
    settings=Settings(eps="layer_norm_eps"),
    notes="Attention and MLP in parallel behind one norm; a part of each head is rotated; the head has a bias.",
    variant=_variant,
)
