"""OLMo 2: nothing is normed before attention and MLP, what they give is.

Glossary: ``ln1_post`` and ``ln2_post`` norm what is added to the stream; queries and keys are normed over all heads
together (``head_norm="flat"``) before the rotation. Peculiar: attention and MLP read the residual itself, so
``hook_resid_mid`` is the MLP's own input; the gain is applied before rounding.
"""

from __future__ import annotations

from pellucid.model_bridge.family import Attention, Block, Family, NormKind

OLMO2 = Family(
    "olmo2",
    "OLMo 2",
    block=Block("", "", "post_attention_layernorm", "post_feedforward_layernorm"),
    attention=Attention(q_norm="q_norm", k_norm="k_norm", head_norm="flat"),
    norm=NormKind(rounds_first=False),
    notes="Norms only after the branches; queries and keys are normed over all heads together.",
)
