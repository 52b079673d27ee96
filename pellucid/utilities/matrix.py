"""Functions of factored matrices, under TransformerLens' names; :mod:`pellucid.factored_matrix` does the work."""

from __future__ import annotations

from torch import Tensor

from pellucid.factored_matrix import FactoredMatrix
from pellucid.factored_matrix import composition_scores as composition_scores


def get_matrix_corner(matrix: FactoredMatrix, n: int = 3) -> Tensor:
    """The first ``n`` entries along every axis of the product, for looking at."""
    return matrix.get_corner(n)
