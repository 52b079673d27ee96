"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE.

Glossary: in the place of an MLP a *router* (``mlp.gate``: logits, softmax, the largest few) sends each token through some of
the *experts*, gated MLPs whose weights are all in one tensor, and sums what they give by the router's weights. Peculiar:
Qwen2-MoE has a *shared expert* beside them, which every token goes through, scaled by a gate of its own; OLMoE norms queries
and keys over all heads together. Hugging Face computes routers, and by default experts, in float32 at most. What an expert
computes inside has no points.
"""

from __future__ import annotations

from dataclasses import replace

from pellucid.model_bridge.family import MLP, Attention, Refused, Settings
from pellucid.model_bridge.supported_architectures.llama import LLAMA

EXPERTS = MLP(router="gate", experts="experts")

_SETTINGS = Settings(d_mlp="moe_intermediate_size", num_experts="num_experts", experts_per_token="num_experts_per_tok")
_OTHER_LAYERS = "some layers would have a plain MLP, whose points are others"
_IN_EVERY_LAYER: Refused = {
    "decoder_sparse_step": ((1,), _OTHER_LAYERS),
    "mlp_only_layers": ((None, []), _OTHER_LAYERS),
}

MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    title="Mixtral",
    float64=False,
    mlp=EXPERTS,
    settings=replace(_SETTINGS, d_mlp="intermediate_size", num_experts="num_local_experts"),
    notes="As Mistral, with a mixture of experts for an MLP.",
)
QWEN2_MOE = replace(
    MIXTRAL,
    model_type="qwen2_moe",
    title="Qwen2-MoE",
    mlp=replace(EXPERTS, beside=("shared_expert", "shared_expert_gate")),
    settings=_SETTINGS,
    refused=_IN_EVERY_LAYER,
    notes="As Qwen2, with a mixture of experts and a shared expert for an MLP.",
)
QWEN3_MOE = replace(
    MIXTRAL,
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    attention=Attention(q_norm="q_norm", k_norm="k_norm"),
    settings=_SETTINGS,
    refused=_IN_EVERY_LAYER,
    notes="As Qwen3, with a mixture of experts for an MLP.",
)
OLMOE = replace(
    MIXTRAL,
    model_type="olmoe",
    title="OLMoE",
    attention=Attention(q_norm="q_norm", k_norm="k_norm", head_norm="flat"),
    settings=replace(_SETTINGS, d_mlp="intermediate_size"),
    refused={"clip_qkv": ((None,), "queries, keys and values would be cut off after their projections, in place")},
    notes="As Llama, with a mixture of experts for an MLP; queries and keys are normed over all heads together.",
)
