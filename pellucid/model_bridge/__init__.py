"""The bridge: Hugging Face's model stays the engine, untouched; hook points are laid on it where someone looks."""

from pellucid.model_bridge.transformer_bridge import TransformerBridge

__all__ = ["TransformerBridge"]
