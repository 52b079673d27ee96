"""One file an architecture: its table of components and hooks."""

from pellucid.model_bridge.supported_architectures.bloom import BloomArchitectureAdapter

__all__ = ["BloomArchitectureAdapter"]
