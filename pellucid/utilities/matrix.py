"""Functions of factored matrices, under TransformerLens' names; :mod:`pellucid.factored_matrix` does the work."""

from __future__ import annotations

from torch import Tensor

from pellucid.arguments import check_count, check_kind
from pellucid.factored_matrix import FactoredMatrix
from pellucid.factored_matrix import composition_scores as composition_scores


def get_matrix_corner(matrix: FactoredMatrix, n: int = 3) -> Tensor:
    """The first ``n`` entries along every axis of the product, for looking at."""
    check_kind("matrix", matrix, FactoredMatrix, "a FactoredMatrix")
    return matrix.get_corner(check_count("n", n, 0))
