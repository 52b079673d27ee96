"""GPT-J and what has its layout (GPT4All-J, Dolly v1).

Glossary: attention and MLP read the output of one norm; blocks give ``(residual, pattern)``; the head has a bias.
Peculiar: scores are made in float32 in half precision too, inside a method of the attention; a part of each head is
rotated, neighbouring features together. The sum is ``attention + mlp + residual``.
"""

from __future__ import annotations

from pellucid.model_bridge.family import LAYER_NORM, MLP, Attention, Block, Family, Outside, Settings

GPTJ = Family(
    "gptj",
    "GPT-J",
    outside=Outside("transformer", "h", "wte", final_norm="ln_f", head_has_bias=True),
    block=Block("ln_1", "", parallel=True, gives_tuple=True),
    attention=Attention(
        "attn", o="out_proj", softmax_in="_attn", pattern_at="attn_dropout", wide_scores=True, heads_first=True
    ),
    mlp=MLP(up="fc_in", down="fc_out", gate=""),
    norm=LAYER_NORM,
    settings=Settings(
        *("n_layer", "n_head", "n_embd", "n_positions", "n_inner", "", ""),
        eps="layer_norm_epsilon",
        activation="activation_function",
    ),
    float64=False,
    sdpa="none",
    notes="Attention and MLP in parallel behind one norm; float32 scores; the head has a bias.",
)
