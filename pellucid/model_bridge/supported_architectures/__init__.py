"""The families that are known: one file each, made into components by :mod:`decoder`."""

from pellucid.model_bridge.supported_architectures.bloom import BloomArchitectureAdapter
from pellucid.model_bridge.supported_architectures.decoder import DecoderAdapter, as_installed
from pellucid.model_bridge.supported_architectures.registry import (
    ARCHITECTURES,
    Architecture,
    architecture_by_names,
    architecture_of,
    architecture_of_model,
    may_change_numbers,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "BloomArchitectureAdapter",
    "DecoderAdapter",
    "architecture_by_names",
    "architecture_of",
    "architecture_of_model",
    "as_installed",
    "may_change_numbers",
]
