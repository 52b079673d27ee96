"""TransformerLens' place for :func:`get_act_name`; the rule is :mod:`pellucid.names`'."""

from __future__ import annotations

from pellucid.names import get_act_name as get_act_name
