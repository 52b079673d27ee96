"""GPT-2 and what has its layout (DistilGPT-2, CodeParrot, Cerebras-GPT).

Glossary: ``Conv1D`` is a linear map whose weight is ``[in, out]``; queries, keys and values are stacked in ``c_attn``;
learnt position embeddings (``wpe``) are added to the token's. Peculiar: positions have to be counted over real tokens, or a
row that is padded on the left is another row; the table of positions ends at ``n_positions``. ``reorder_and_upcast_attn``
puts the softmax into a method, in float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pellucid.model_bridge.family import LAYER_NORM, MLP, Attention, Block, Family, Outside, Settings


def _variant(family: Family, config: Any) -> Family:
    if not config.reorder_and_upcast_attn:
        return family
    method = "_upcast_and_reordered_attn"
    attention = replace(family.attention, softmax_in=method, pattern_at="attn_dropout", wide_scores=True)
    return replace(family, attention=attention, sdpa="none")  # the fused kernel would leave the method out


GPT2 = Family(
    "gpt2",
    "GPT-2",
    outside=Outside("transformer", "h", "wte", "wpe", "", "ln_f"),
    block=Block("ln_1", "ln_2"),
    attention=Attention("attn", qkv="c_attn", layout="stacked", o="c_proj", rotary=False),
    mlp=MLP(up="c_fc", down="c_proj", gate=""),
    norm=LAYER_NORM,
    settings=Settings(
        *("n_layer", "n_head", "n_embd", "n_positions", "n_inner", "", ""),
        eps="layer_norm_epsilon",
        activation="activation_function",
    ),
    refused={"add_cross_attention": ((None, False), "attention to another model's states has no hooks")},
    notes="Learnt positions; weights of linear maps are [in, out]; q, k and v stacked in c_attn.",
    variant=_variant,
)
