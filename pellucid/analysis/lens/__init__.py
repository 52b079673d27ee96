"""Lenses: what the model would say after each layer. The logit lens, the tuned lens and the Jacobian lens, read alike."""

from __future__ import annotations

from pathlib import Path

from pellucid.analysis.lens.files import Check, read_lens
from pellucid.analysis.lens.jacobian import JacobianLens
from pellucid.analysis.lens.lens import Lens, LogitLens, point_of
from pellucid.analysis.lens.published import load_published, save_published
from pellucid.analysis.lens.tuned import TunedLens
from pellucid.errors import InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge

__all__ = [
    "JacobianLens",
    "Lens",
    "LogitLens",
    "TunedLens",
    "load_lens",
    "load_published",
    "point_of",
    "save_published",
]


def load_lens(path: str | Path, bridge: TransformerBridge, *, check: Check = "weights") -> Lens:
    """A lens that was saved, whichever kind it is.

    Args:
        path: the file.
        bridge: the model that it was fitted on.
        check: what of the model has to be as it was: all ``"weights"``; the final norm and the head (``"unembedding"``),
            which is quicker; or ``"sizes"`` alone, for weights that are the same in another dtype.

    Raises:
        InputError: not such a file, a damaged one, or a lens of another model.
        WeightError: a Jacobian lens on processed weights.
    """
    file = read_lens(path, bridge, check, None)
    for kind in (TunedLens, JacobianLens):
        if file.kind == kind.kind:
            return kind.from_file(file, bridge)
    raise InputError(f"{path} holds a {file.kind} lens, which this version does not know.")
