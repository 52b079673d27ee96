"""Pellucid: read and change every activation of a Hugging Face language model, with the numbers staying the model's own.

Names are looked up when first used, so that ``import pellucid`` loads neither torch nor transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pellucid.peer_names import PACKAGE, absent
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
    "HookedRootModule": "pellucid.HookedRootModule",
    "SVDInterpreter": "pellucid.SVDInterpreter",
    "TransformerBridge": "pellucid.model_bridge.transformer_bridge",
    "TransformerBridgeConfig": "pellucid.config",
    "get_act_name": "pellucid.names",
}
"""Where each public name lives."""

_MODULES = frozenset({"conversion_utils", "evals", "head_detector", "hook_points", "patching", "tools", "utilities"})
"""Modules that TransformerLens' users find on the package without importing them."""

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
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"pellucid.{name}")
    told = absent(PACKAGE, name)
    raise AttributeError(told or f"module 'pellucid' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """This package: of a class and a module of one name, the class is what stands on it.

    Importing ``pellucid.ActivationCache`` would set that attribute to the module, and ``from pellucid import
    ActivationCache`` would then give the module, or the class, by which came first.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
