"""TransformerLens' path of :class:`~pellucid.activation_cache.ActivationCache`."""

from __future__ import annotations

from pellucid.activation_cache import ActivationCache as ActivationCache
