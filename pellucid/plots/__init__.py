"""Pictures of finished results: heat maps, bars, example texts; as Plotly figures, and as files that need no network.

A picture is described once (:class:`~pellucid.plots.picture.Picture`) from labelled arrays, tensors or numpy arrays, and
drawn from there as a Plotly figure, as SVG and as PNG. This package imports no torch, and Plotly and matplotlib only where
they draw.

Figures need the extra: ``pip install 'pellucid[plots]'``.
"""

from __future__ import annotations

from pellucid.plots.agreement import agreement_map
from pellucid.plots.attention import attention_pattern
from pellucid.plots.bar_charts import bars
from pellucid.plots.circuit_diagram import circuit_diagram
from pellucid.plots.circuits import circuit_map, faithfulness_bars
from pellucid.plots.examples import TokenExample, examples_page
from pellucid.plots.heads import head_map
from pellucid.plots.heat_maps import heat_map, heat_maps
from pellucid.plots.lens import lens_table
from pellucid.plots.picture import Picture
from pellucid.plots.saving import check_picture_path, save_picture

__all__ = [
    "Picture",
    "TokenExample",
    "agreement_map",
    "attention_pattern",
    "bars",
    "check_picture_path",
    "circuit_diagram",
    "circuit_map",
    "examples_page",
    "faithfulness_bars",
    "head_map",
    "heat_map",
    "heat_maps",
    "lens_table",
    "save_picture",
]
