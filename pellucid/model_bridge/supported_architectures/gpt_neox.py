"""GPT-NeoX and Pythia.

Glossary: attention and MLP read the same residual (``parallel``), each through a norm of its own; queries, keys and values
of one head after another in ``query_key_value``, as in BLOOM; a part of each head is rotated. Peculiar: with
``use_parallel_residual=False`` the block is a sequential one. The sum is ``mlp + attention + residual``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.model_bridge.family import LAYER_NORM, MLP, Attention, Block, Family, Outside, Settings


def _variant(family: Family, config: Any) -> Family:
    return family if config.use_parallel_residual else replace(family, block=replace(family.block, parallel=False))


GPT_NEOX = Family(
    "gpt_neox",
    "GPT-NeoX (Pythia)",
    outside=Outside("gpt_neox", "layers", "embed_in", final_norm="final_layer_norm", head_in_files="embed_out"),
    block=Block(parallel=True),
    attention=Attention("attention", qkv="query_key_value", layout="grouped", o="dense"),
    mlp=MLP(up="dense_h_to_4h", down="dense_4h_to_h", gate=""),
    norm=LAYER_NORM,
    settings=Settings(n_key_value_heads="", d_head="", eps="layer_norm_eps"),
    notes="Attention and MLP in parallel, each with its norm; a part of each head is rotated.",
    variant=_variant,
)
