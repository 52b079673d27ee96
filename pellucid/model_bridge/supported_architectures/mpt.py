"""MPT.

Glossary: queries, keys and values stacked in ``Wqkv``; the MLP is ``ffn``, which is given the residual and adds it
itself, so that ``mlp.hook_out`` is what ``down_proj`` gives; no linear map and no norm has a bias. Peculiar:
positions enter as ALiBi, whose table is made for the whole ``max_seq_len`` and added to the scores; scores are
float32 at the softmax in half precision too; with ``clip_qkv`` queries, keys and values are clipped after ``hook_q``,
``hook_k`` and ``hook_v``. The softmax is in the forward of attention: sweeps run whole forwards, and there is no
fused kernel.
"""

from __future__ import annotations

from pellucid.model_bridge.family import LAYER_NORM, MLP, Attention, Block, Family, Outside, Settings

MPT = Family(
    "mpt",
    "MPT",
    outside=Outside("transformer", "blocks", "wte", final_norm="norm_f"),
    block=Block("norm_1", "norm_2", gives_tuple=True),
    attention=Attention(
        "attn", qkv="Wqkv", o="out_proj", rotary=False, softmax_in="forward", wide_scores=True, clip="clip_qkv"
    ),
    mlp=MLP("ffn", up="up_proj", gate="", adds_residual=True),
    norm=LAYER_NORM,
    settings=Settings(
        *("n_layers", "n_heads", "d_model", "max_seq_len", "", "", ""), eps="layer_norm_epsilon", activation=""
    ),
    takes_position_ids=False,
    float64=False,
    sdpa="none",
    notes="ALiBi; no biases; the MLP adds the residual itself; float32 scores, so that in float64 Hugging Face's own padded "
    "rows are NaN; hook_q, hook_k, hook_v are before clip_qkv.",
)
