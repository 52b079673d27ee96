"""Ablation under its first address; it lives in :mod:`pellucid.experiments.ablation`."""

from pellucid.experiments.ablation import ablation

__all__ = ["ablation"]
