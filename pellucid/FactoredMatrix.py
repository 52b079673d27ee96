"""TransformerLens' path of :class:`~pellucid.factored_matrix.FactoredMatrix`."""

from __future__ import annotations

from pellucid.factored_matrix import FactoredMatrix as FactoredMatrix
