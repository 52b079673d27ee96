"""Pellucid: read and change every activation of a Hugging Face language model, with the numbers staying the model's own.

Names are looked up when first used, so that ``import pellucid`` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pellucid.version import __version__ as __version__

if TYPE_CHECKING:
    from pellucid.activation_cache import ActivationCache as ActivationCache
    from pellucid.config import TransformerBridgeConfig as TransformerBridgeConfig
    from pellucid.corpora.corpus import Corpus as Corpus
    from pellucid.factored_matrix import FactoredMatrix as FactoredMatrix
    from pellucid.hook_points import HookPoint as HookPoint
    from pellucid.model_bridge.corpus.collected import Collected as Collected
    from pellucid.model_bridge.transformer_bridge import TransformerBridge as TransformerBridge
    from pellucid.model_bridge.verification.check_report import CheckReport as CheckReport
    from pellucid.names import get_act_name as get_act_name

_HOMES = {
    "ActivationCache": "pellucid.activation_cache",
    "CheckReport": "pellucid.model_bridge.verification.self_check",
    "Collected": "pellucid.model_bridge.corpus.collected",
    "Corpus": "pellucid.corpora.corpus",
    "FactoredMatrix": "pellucid.factored_matrix",
    "HookPoint": "pellucid.hook_points",
    "TransformerBridge": "pellucid.model_bridge.transformer_bridge",
    "TransformerBridgeConfig": "pellucid.config",
    "get_act_name": "pellucid.names",
}
"""Where each public name lives."""

__all__ = [
    "ActivationCache",
    "CheckReport",
    "Collected",
    "Corpus",
    "FactoredMatrix",
    "HookPoint",
    "TransformerBridge",
    "TransformerBridgeConfig",
    "get_act_name",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pellucid' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
