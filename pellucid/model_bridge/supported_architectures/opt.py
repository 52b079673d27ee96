"""OPT and what has its layout (Galactica, OPT-IML).

Glossary: the backbone is ``model.decoder``; the MLP has no module of its own, its projections ``fc1`` and ``fc2`` lie in the
block, which gives them rows and positions as one axis (points show both); learnt positions, whose table has two rows more
than positions; the norm before attention is ``self_attn_layer_norm``, that before the MLP ``final_layer_norm``, as the last
norm is called too. Peculiar: Hugging Face scales the queries before their product with the keys, after ``hook_q``. Not
opened: OPT-350M, whose stream itself is normed after each addition and whose embedding is narrower than the stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.model_bridge.family import LAYER_NORM, MLP, Attention, Block, Family, Outside, Settings


def _variant(family: Family, config: Any) -> Family:
    narrower = (
        (None, config.hidden_size),
        "tokens would enter and leave the stream by projections that have no points",
    )
    return replace(family, refused={**family.refused, "word_embed_proj_dim": narrower})


OPT = Family(
    "opt",
    "OPT",
    outside=Outside("model.decoder", "layers", "embed_tokens", "embed_positions", "", "final_layer_norm"),
    block=Block("self_attn_layer_norm", "final_layer_norm"),
    attention=Attention(o="out_proj", rotary=False),
    mlp=MLP(name="", up="fc1", down="fc2", gate=""),
    norm=LAYER_NORM,
    settings=Settings(d_mlp="ffn_dim", n_key_value_heads="", d_head="", eps="", activation="activation_function"),
    refused={
        "do_layer_norm_before": ((None, True), "the stream itself would be normed after each addition (OPT-350M)"),
        "_remove_final_layer_norm": ((None, False), "the unembedding would read the stream without a norm"),
        "layer_norm_elementwise_affine": ((None, True), "norms would have no weights"),
        "layerdrop": ((None, 0, 0.0), "layers would be left out at random in training, and their hooks with them"),
    },
    notes="Learnt positions; fc1 and fc2 lie in the block, without a module around them. Not opened: OPT-350M.",
    variant=_variant,
)
