"""Circuits: which edges between parts of a model carry a behaviour, how sure that is, and whether it is so.

Names are looked up when first used, so that the command line reads the options without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pellucid.circuits.circuit import Circuit as Circuit
    from pellucid.circuits.curve import Faithfulness as Faithfulness
    from pellucid.circuits.curve import cmd as cmd
    from pellucid.circuits.curve import cpr as cpr
    from pellucid.circuits.curve import faithfulness as faithfulness
    from pellucid.circuits.edges import EdgeAttribution as EdgeAttribution
    from pellucid.circuits.edges import edge_attribution as edge_attribution
    from pellucid.circuits.scores import EdgeScores as EdgeScores
    from pellucid.circuits.scores import Stability as Stability
    from pellucid.circuits.wiring import Wiring as Wiring

_HOMES = {
    "Circuit": "circuit",
    "EdgeAttribution": "edges",
    "EdgeScores": "scores",
    "Faithfulness": "curve",
    "Stability": "scores",
    "Wiring": "wiring",
    "cmd": "curve",
    "cpr": "curve",
    "edge_attribution": "edges",
    "faithfulness": "curve",
}
"""Where each public name lives."""

__all__ = [
    "Circuit",
    "EdgeAttribution",
    "EdgeScores",
    "Faithfulness",
    "Stability",
    "Wiring",
    "cmd",
    "cpr",
    "edge_attribution",
    "faithfulness",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"pellucid.circuits.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pellucid.circuits' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
