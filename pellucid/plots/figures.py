"""A Plotly figure that shows in an exported notebook too.

In Jupyter, Plotly leaves only its own data in the notebook: a viewer without Plotly's extension, and every export
(``jupyter nbconvert``, GitHub), shows nothing in its place. Ours leave a drawing beside it, which needs neither a network
nor a program.
"""

from __future__ import annotations

import base64
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plotly.graph_objects import Figure

from pellucid.errors import InputError
from pellucid.plots.drawing import draw


class NotebookFigure(Figure):  # type: ignore[misc]
    """What :func:`~pellucid.plots.heat_map` and :func:`~pellucid.plots.bars` give: a Plotly figure in all else."""

    _ipython_display_ = None
    """Plotly's would go before the bundle, and leave the drawing out."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Plotly's own forms; and a drawing, or a page with Plotly's program where it cannot be drawn."""
        bundle: dict[str, Any] = dict(super()._repr_mimebundle_(include, exclude, **kwargs) or {})
        if "text/html" not in bundle and "image/png" not in bundle:
            try:
                bundle["image/png"] = self._drawn()
            except InputError:  # the user added what is not drawn
                bundle["text/html"] = self.to_html(full_html=False, include_plotlyjs=True, include_mathjax=False)
        return bundle

    def _drawn(self) -> str:
        if find_spec("matplotlib") is None:
            raise InputError("matplotlib is not installed.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figure.png"
            draw(self, path, "png", 2.0)
            return base64.b64encode(path.read_bytes()).decode()
