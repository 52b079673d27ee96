"""Pictures of finished results: heat maps, bars, example texts; as Plotly figures, and as files that need no network.

A picture is drawn from labelled arrays (:class:`xarray.DataArray`), and this package imports no torch. Plotly reads text
as markup and merges equal categories, which silently moves data; here every text is escaped and every axis counts
indices, with the labels as the text of its ticks.

Needs the extra: ``pip install 'pellucid[plots]'``.
"""

from __future__ import annotations

import pellucid.plots.extra  # noqa: F401  (first, for its message)
from pellucid.plots.bar_charts import bars
from pellucid.plots.examples import TokenExample, examples_page
from pellucid.plots.heat_maps import heat_map, heat_maps
from pellucid.plots.saving import check_picture_path, save_picture

__all__ = [
    "TokenExample",
    "bars",
    "check_picture_path",
    "examples_page",
    "heat_map",
    "heat_maps",
    "save_picture",
]
