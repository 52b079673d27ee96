"""Ablation under its first address; it lives in :mod:`pellucid.experiments.ablation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.experiments.ablation import Ablation, ablation
from pellucid.experiments.experiment import Metrics
from pellucid.experiments.options import gathered
from pellucid.model_bridge.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge

__all__ = ["ablation", "prepare_ablation"]


def prepare_ablation(
    bridge: TransformerBridge,
    input: TextOrTokens,
    metric: Metrics,
    site: str = "z",
    by: str | Sequence[str] | None = None,
    **settings: Any,
) -> Ablation:
    """:class:`Ablation` by the arguments of :func:`ablation`: ``plan()``, then ``run()``."""
    return Ablation(bridge, input, metric, site=site, by=by, **gathered(settings))
