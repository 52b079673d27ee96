"""Falcon: 7B, 40B and 180B, 11B, and the layout of RW without its ALiBi.

Glossary: queries, keys and values in ``query_key_value``, each key/value head's queries first, then its key and its value.
Three layouts: ``multi_query`` (7B), one head of keys and values, attention and MLP in parallel behind one norm;
``new_decoder_architecture``, several such heads, and two norms (40B, 180B: ``ln_attn`` and ``ln_mlp``, which run before
attention) or one (11B); neither, with ``parallel_attn`` off, one block after the other. Peculiar: the softmax is in the
forward of attention, without a dropout after it; the new architecture repeats keys and values for each head of queries
before it rotates them, of which ``hook_rot_k`` shows one each; the block adds attention's output into the MLP's own tensor.
Not opened: ALiBi, which Hugging Face adds twice under eager attention. Sweeps run whole forwards.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.model_bridge.family import LAYER_NORM, MLP, Attention, Block, Family, Outside, Settings


def _variant(family: Family, config: Any) -> Family:
    if config.new_decoder_architecture:
        family = replace(family, settings=replace(family.settings, n_key_value_heads="num_kv_heads"))
        if config.num_ln_in_parallel_attn in (None, 2):
            two = Block("ln_attn", "ln_mlp", parallel=True, norms_first=True, gives_tuple=True)
            return replace(family, block=two)
        return family
    if not config.multi_query:
        family = replace(family, settings=replace(family.settings, n_key_value_heads=""))
    if not config.parallel_attn:
        return replace(family, block=Block(gives_tuple=True))
    return family


FALCON = Family(
    "falcon",
    "Falcon",
    outside=Outside("transformer", "h", "word_embeddings", final_norm="ln_f"),
    block=Block(ln2="", parallel=True, gives_tuple=True),
    attention=Attention(
        "self_attention",
        qkv="query_key_value",
        layout="grouped",
        o="dense",
        softmax_in="forward",
        pattern_at="softmax",
    ),
    mlp=MLP(up="dense_h_to_4h", down="dense_4h_to_h", gate=""),
    norm=LAYER_NORM,
    settings=Settings(
        d_mlp="ffn_hidden_size", n_key_value_heads=1, d_head="", eps="layer_norm_epsilon", activation="activation"
    ),
    refused={"alibi": ((None, False), "Hugging Face's eager attention adds ALiBi twice, in its mask and beside it")},
    notes="Parallel behind one norm (7B), behind two (40B), or sequential; scores and pattern under eager only; no ALiBi.",
    variant=_variant,
)
