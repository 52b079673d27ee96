"""A circuit: its edges as cells, parts along and inputs down in the order of the stream; and what it keeps, as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray

from pellucid.arguments import check_kind
from pellucid.errors import InputError
from pellucid.plots.bar_charts import bars
from pellucid.plots.heat_maps import heat_map

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_KINDS = ("q", "k", "v", "mlp_in")


def circuit_map(edges: xarray.Dataset, *, title: str | None = None, subtitle: str | None = None) -> Figure:
    """The score of each edge of a circuit, from the part along to the input down; grey where there is no edge.

    Args:
        edges: what ``circuit.dataset()`` gives: of a circuit small enough to look at.
        title: by default the method, the metric and how many edges.
        subtitle: a smaller line below the title.

    Returns:
        a figure with one trace.

    Raises:
        InputError: no edges of a circuit, no scores, or too many cells (:func:`heat_map`).
        MissingExtraError: Plotly is not installed.
    """
    check_kind("edges", edges, xarray.Dataset, "what circuit.dataset() gives")
    if "score" not in edges or not {"sender", "receiver"} <= set(edges.coords):
        raise InputError(
            f"edges is what circuit.dataset() gives; found a data set of {', '.join(map(str, edges)) or 'nothing'}."
        )
    senders, receivers = (_in_order(edges[end].values.tolist()) for end in ("sender", "receiver"))
    grid = np.full((len(receivers), len(senders)), np.nan)
    for sender, receiver, score in zip(
        edges.sender.values.tolist(), edges.receiver.values.tolist(), edges.score.values.tolist(), strict=True
    ):
        grid[receivers.index(receiver), senders.index(sender)] = score
    about = edges.attrs
    if title is None:
        title = f"{about.get('method', 'circuit')} of {about.get('metric', 'a metric')}: {edges.sizes['edge']} edges"
    shown = xarray.DataArray(grid, {"to": receivers, "from": senders}, ("to", "from"))
    unit = f"change when the edge is patched ({about.get('units') or 'score'})"
    return heat_map(shown, title=title, unit=unit, subtitle=subtitle, print_values=False)


def faithfulness_bars(curve: xarray.Dataset, *, title: str | None = None, subtitle: str | None = None) -> Figure:
    """The share of the metric's gap that a circuit of each size keeps, with its interval, beside random circuits.

    Args:
        curve: what ``faithfulness`` gives.
        title: by default with CPR and CMD.
        subtitle: a smaller line below the title; by default what the lines are.

    Returns:
        a figure with a trace for each series.

    Raises:
        InputError: no faithfulness curve.
        MissingExtraError: Plotly is not installed.
    """
    check_kind("curve", curve, xarray.Dataset, "what faithfulness gives")
    if not {"faithfulness", "low", "high", "random_faithfulness"} <= set(curve):
        raise InputError(
            f"curve is what faithfulness gives; found a data set of {', '.join(map(str, curve)) or 'nothing'}."
        )
    series = {"strongest edges": curve["faithfulness"]}
    if curve.sizes["random"]:
        series["random edges"] = curve["random_faithfulness"].mean("random")
    if title is None:
        title = f"Faithfulness: CPR {curve.attrs['cpr']:.2f}, CMD {curve.attrs['cmd']:.2f}"
    labels = {"size": [f"{size:,}" for size in curve["size"].values.tolist()]}
    plain = {name: one.reset_coords(drop=True) for name, one in series.items()}
    interval = None
    if np.isfinite(curve["low"].values).any():  # one pair has none
        interval = (curve["low"].reset_coords(drop=True), curve["high"].reset_coords(drop=True))
        subtitle = "Lines: 95 % interval over resampled pairs." if subtitle is None else subtitle
    unit = "share of the metric's gap that is kept"
    return bars(plain, title=title, unit=unit, subtitle=subtitle, labels=labels, interval=interval)


def _in_order(names: list[str]) -> list[str]:
    """Each name once, along the stream: embed, L0H0, ..., L0.mlp_out, ..., final."""

    def place(name: str) -> tuple[int, int, int]:
        if name in ("embed", "final"):
            return (-1 if name == "embed" else 10**9, 0, 0)
        layer, _, head = name.partition(".")[0][1:].partition("H")
        kind = name.rpartition(".")[2] if "." in name else ""
        return (int(layer), int(head) if head else 10**6, _KINDS.index(kind) if kind in _KINDS else 0)

    return sorted(set(names), key=place)
