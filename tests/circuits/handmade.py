"""A model in which four edges act and no other: its weights are set so.

A Llama of three layers whose attention is uniform (no queries, no keys), all of whose maps are zero but those of the circuit::

    embed -> L0H1.v    L0H1 -> L1.mlp_in    L1.mlp_out -> L2H3.v    L2H3 -> final

Each hands on a signal from one feature of the stream to the next one; the unembedding reads the last. The signal is absent in
the clean prompt, so that to first order it changes no norm's scale.
"""

from __future__ import annotations

import torch

from pellucid import TransformerBridge
from pellucid.corpora.pairs import PromptPairs
from tests.families import make_family

EDGES = [("embed", "L0H1.v"), ("L0H1", "L1.mlp_in"), ("L1.mlp_out", "L2H3.v"), ("L2H3", "final")]
PLAIN, SIGNAL, ANSWER, FOIL = 3, 7, 5, 9
ALWAYS, SENT, HEARD, THOUGHT, SAID = 0, 10, 11, 12, 13
"""Features of the stream: one that every token has, and the signal at each step."""


def handmade(dtype: torch.dtype = torch.float64, strength: float = 1e-4) -> TransformerBridge:
    """The model; ``strength`` of the signal beside what every token has."""
    model = make_family("llama", dtype, num_key_value_heads=6)
    width = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, ALWAYS] = 1
        model.model.embed_tokens.weight[SIGNAL, SENT] = strength
        layers = model.model.layers
        for layer, head, reads, writes in ((0, 1, SENT, HEARD), (2, 3, THOUGHT, SAID)):
            layers[layer].self_attn.v_proj.weight[head * width, reads] = 1
            layers[layer].self_attn.o_proj.weight[writes, head * width] = 1
        mlp = layers[1].mlp
        mlp.gate_proj.weight[0, ALWAYS] = 1
        mlp.up_proj.weight[0, HEARD] = 1
        mlp.down_proj.weight[THOUGHT, 0] = 1
        model.lm_head.weight[ANSWER, SAID] = -1
        model.lm_head.weight[FOIL, SAID] = 1
    return TransformerBridge(model)


def pairs() -> PromptPairs:
    """Three pairs of two lengths: in the corrupted prompt the signal is there."""
    clean = [[PLAIN] * 5, [PLAIN] * 5, [PLAIN] * 4]
    corrupted = [
        [PLAIN, SIGNAL, PLAIN, PLAIN, PLAIN],
        [PLAIN, PLAIN, SIGNAL, PLAIN, PLAIN],
        [PLAIN, SIGNAL, PLAIN, PLAIN],
    ]
    return PromptPairs(clean, corrupted, [ANSWER] * 3, [FOIL] * 3, name="signal")
