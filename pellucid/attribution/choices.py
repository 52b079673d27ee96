"""The methods of attribution, and what people call them."""

from __future__ import annotations

from collections.abc import Mapping

from pellucid.experiments.options import Method

METHODS: tuple[Method, ...] = ("atp", "atp*", "relp", "ig")
TITLES: Mapping[Method, str] = {"atp": "AtP", "atp*": "AtP*", "relp": "RelP", "ig": "integrated gradients"}
