"""Phi-3 and Phi-4 (text).

Glossary: queries, keys and values stacked in ``qkv_proj``, of unequal widths where heads share keys; gate and up stacked in
``gate_up_proj``. Peculiar: LongRoPE changes its table of rotations with the length of the input; a sliding window holds for
all layers.
"""

from __future__ import annotations

from pellucid.model_bridge.family import MLP, Attention, Family

PHI3 = Family(
    "phi3",
    "Phi-3",
    attention=Attention(qkv="qkv_proj", layout="stacked"),
    mlp=MLP(gate="", gate_up="gate_up_proj"),
    notes="q, k and v in one projection, gate and up in another.",
)
