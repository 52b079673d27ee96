"""Where the gradient is taken between the two runs: at the base run (EAP), or at points of the straight path to it (EAP-IG).

A path leads from the source run's embedding to the base run's; what flows back is averaged over its points (Hanna et al.
2024, arXiv 2403.17806). ``1`` is the base run.
"""

from __future__ import annotations

from pellucid.attribution.estimates import gauss_legendre
from pellucid.circuits.options import Method, Rule


def path_points(method: Method, points: int, rule: Rule) -> list[tuple[float, float]]:
    """Points of the path and their weights, which sum to 1.

    Args:
        method: ``eap`` has the base run alone.
        points: how many, for ``eap-ig``.
        rule: ``gauss-legendre``; ``midpoint`` of equal steps; or their ``right`` ends, the base run among them, so that one
            point is EAP.
    """
    if method == "eap":
        return [(1.0, 1.0)]
    if rule == "gauss-legendre":
        return gauss_legendre(points)
    shift = 0.5 if rule == "midpoint" else 1.0
    return [((step + shift) / points, 1 / points) for step in range(points)]
