"""Activation patching under its first address; it lives in :mod:`pellucid.experiments.activation_patching`."""

from pellucid.experiments.activation_patching import activation_patching

__all__ = ["activation_patching"]
