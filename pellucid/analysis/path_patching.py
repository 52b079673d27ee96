"""Path patching under its first address; it lives in :mod:`pellucid.experiments.path_patching`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.experiments.experiment import Metrics
from pellucid.experiments.options import gathered
from pellucid.experiments.path_patching import PathPatching, by_head, path_patching
from pellucid.model_bridge.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge

__all__ = ["by_head", "path_patching", "prepare_path_patching"]


def prepare_path_patching(
    bridge: TransformerBridge,
    original: TextOrTokens,
    new: TextOrTokens,
    metric: Metrics,
    senders: str | Sequence[str],
    receivers: str | Sequence[str],
    **settings: Any,
) -> PathPatching:
    """:class:`PathPatching` by the arguments of :func:`path_patching`: ``plan()``, then ``run()``."""
    return PathPatching(bridge, original, new, metric, senders, receivers, **gathered(settings))
