"""TransformerLens' older path of :class:`~pellucid.model_bridge.transformer_bridge.TransformerBridge`."""

from __future__ import annotations

from pellucid.model_bridge.transformer_bridge import TransformerBridge

__all__ = ["TransformerBridge"]
