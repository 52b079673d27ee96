"""The components: each knows one kind of Hugging Face module."""

from pellucid.model_bridge.generalized_components.alibi_utils import build_alibi_slopes, build_alibi_tensor
from pellucid.model_bridge.generalized_components.attention import AttentionBridge
from pellucid.model_bridge.generalized_components.backbone import BackboneBridge
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent
from pellucid.model_bridge.generalized_components.block import BlockBridge
from pellucid.model_bridge.generalized_components.bloom_attention import BloomAttentionBridge
from pellucid.model_bridge.generalized_components.bloom_block import BloomBlockBridge
from pellucid.model_bridge.generalized_components.bloom_mlp import BloomMLPBridge
from pellucid.model_bridge.generalized_components.causal_lm import CausalLMBridge, GenerateBridge
from pellucid.model_bridge.generalized_components.embedding import EmbeddingBridge
from pellucid.model_bridge.generalized_components.experts import ExpertsBridge, RouterBridge
from pellucid.model_bridge.generalized_components.hf_attention import HuggingFaceAttentionBridge, PatternDropoutBridge
from pellucid.model_bridge.generalized_components.hf_mlp import HuggingFaceMLPBridge
from pellucid.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from pellucid.model_bridge.generalized_components.linear import (
    FusedHeadsProjectionBridge,
    FusedLinearBridge,
    HeadNormBridge,
    HeadsProjectionBridge,
    LinearBridge,
    OutputProjectionBridge,
)
from pellucid.model_bridge.generalized_components.mlp import MLPBridge
from pellucid.model_bridge.generalized_components.multiplied_block import MultipliedBlockBridge
from pellucid.model_bridge.generalized_components.normalization import NormalizationBridge
from pellucid.model_bridge.generalized_components.pos_embed import PosEmbedBridge
from pellucid.model_bridge.generalized_components.rms_normalization import (
    CentredNormalizationBridge,
    RMSNormalizationBridge,
)
from pellucid.model_bridge.generalized_components.unembedding import UnembeddingBridge

__all__ = [
    "AttentionBridge",
    "BackboneBridge",
    "BlockBridge",
    "BloomAttentionBridge",
    "BloomBlockBridge",
    "BloomMLPBridge",
    "CausalLMBridge",
    "CentredNormalizationBridge",
    "EmbeddingBridge",
    "ExpertsBridge",
    "FusedHeadsProjectionBridge",
    "FusedLinearBridge",
    "GeneralizedComponent",
    "GenerateBridge",
    "HeadNormBridge",
    "HeadsProjectionBridge",
    "HuggingFaceAttentionBridge",
    "HuggingFaceMLPBridge",
    "JointQKVAttentionBridge",
    "LinearBridge",
    "MLPBridge",
    "MultipliedBlockBridge",
    "NormalizationBridge",
    "OutputProjectionBridge",
    "PatternDropoutBridge",
    "PosEmbedBridge",
    "RMSNormalizationBridge",
    "RouterBridge",
    "UnembeddingBridge",
    "build_alibi_slopes",
    "build_alibi_tensor",
]
