"""Activation patching under its first address; it lives in :mod:`pellucid.experiments.activation_patching`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.experiments.activation_patching import ActivationPatching, activation_patching
from pellucid.experiments.experiment import Metrics
from pellucid.experiments.options import gathered
from pellucid.model_bridge.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge

__all__ = ["activation_patching", "prepare_activation_patching"]


def prepare_activation_patching(
    bridge: TransformerBridge,
    clean: TextOrTokens,
    corrupted: TextOrTokens,
    metric: Metrics,
    site: str = "resid_pre",
    by: str | Sequence[str] | None = None,
    **settings: Any,
) -> ActivationPatching:
    """:class:`ActivationPatching` by the arguments of :func:`activation_patching`: ``plan()``, then ``run()``."""
    return ActivationPatching(bridge, clean, corrupted, metric, site=site, by=by, **gathered(settings))
