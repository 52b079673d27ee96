"""A circuit drawn: parts at their layer and head, the stream running upwards, each edge a line as wide as its score.

Columns are heads and the MLP, rows layers; in a layer the MLP stands over the heads, whose outputs it reads where blocks are
not parallel. ``embed`` and ``final`` are bars over all columns, left and reached straight. A line ends at the foot of a
head: on the left at its queries, in the middle at its keys, on the right at its values. Keys and values that several heads
of queries share are a thin bar below these heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xarray

from pellucid.arguments import check_count, check_kind
from pellucid.errors import InputError
from pellucid.plots.axis import Axis, check_words
from pellucid.plots.extra import need
from pellucid.plots.picture import Link, Node, Panel, Picture
from pellucid.plots.text import paragraphs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDEST, THINNEST, UNSCORED = 7.0, 0.6, 1.5
"""Pixels of the line of the largest score, of the smallest, and of edges without scores."""

HEAD_FOOT, MLP_FOOT, HALF_HEIGHT, HALF_WIDTH = 0.34, -0.06, 0.13, 0.3
"""Of nodes, in rows (below the middle of the layer's) and columns."""

SHARED = 0.1
"""Rows from the foot of heads to that of the bar of the keys and values that they share."""

INPUTS = {"q": -0.18, "k": 0.0, "v": 0.18}
"""Where a line ends at a head, in columns beside its middle."""

BULGE = 0.6
"""Columns by which a long line within one column is drawn aside, so that it passes the nodes between its ends."""


def circuit_diagram(
    edges: xarray.Dataset, *, most: int = 150, title: str | None = None, subtitle: str | None = None
) -> Figure:
    """A circuit as nodes and lines, layers upwards; the width of a line is the size of its score, its colour the sign.

    Args:
        edges: what ``circuit.dataset()`` gives.
        most: draw so many edges, those of the largest scores; a line below the title says how many are left out.
        title: by default the method, the metric and how many edges.
        subtitle: a smaller line below the title.

    Returns:
        a figure with a trace for each edge and each node.

    Raises:
        InputError: no edges of a circuit, or no number of edges.
        MissingExtraError: Plotly is not installed.
    """
    check_kind("edges", edges, xarray.Dataset, "what circuit.dataset() gives")
    check_count("most", most)
    check_words(title, None, subtitle)
    if "score" not in edges or "receiver_head" not in edges.coords or "n_heads" not in edges.attrs:
        raise InputError(
            f"edges is what circuit.dataset() gives; found a data set of {', '.join(map(str, edges)) or 'nothing'}."
        )
    about, scores = edges.attrs, np.nan_to_num(edges.score.values.astype(np.float64))
    shown = edges.isel(edge=np.argsort(-np.abs(scores), kind="stable")[:most])
    grid = _Grid(int(about["n_layers"]), int(about["n_heads"]), int(about["n_key_value_heads"]))
    nodes: dict[str, Node] = {}
    links = []
    largest, unit = float(np.abs(scores).max(initial=0.0)), str(about.get("units") or "")
    ends = [shown[f"{end}{what}"].values.tolist() for end in ("sender", "receiver") for what in ("", "_layer", "_head")]
    for sender, from_layer, from_head, receiver, to_layer, to_head, score in zip(
        *ends, shown.score.values.tolist(), strict=True
    ):
        nodes[_part_of(sender)] = grid.part(sender, from_layer, from_head)
        nodes |= grid.reading(receiver, to_layer, to_head)
        width = max(THINNEST, WIDEST * abs(score) / largest) if largest else UNSCORED
        said = (f"{sender} → {receiver}", f"{score:.6g} {unit}".rstrip()) if largest else (f"{sender} → {receiver}",)
        points = grid.line((sender, from_layer, from_head), (receiver, to_layer, to_head))
        links.append(Link(points, width, int(score < 0), said))
    if title is None:
        title = f"{about.get('method', 'circuit')} of {about.get('metric', 'a metric')}: {edges.sizes['edge']} edges"
    notes = paragraphs(subtitle)
    if largest:
        notes.append(f"Width of a line: size of the score, the widest {largest:.4g} {unit}".rstrip() + ".")
    left_out = edges.sizes["edge"] - len(links)
    if left_out:
        notes.append(f"Left out: the {left_out:,} edges of the smallest scores.")
    series = ("score over 0", "score below 0") if largest else ("",)
    panel = Panel("", np.zeros((0, 0)), nodes=tuple(nodes.values()), links=tuple(links[::-1]))  # the largest on top
    need("plotly")
    from pellucid.plots.figures import figure_of

    return figure_of(Picture(title, tuple(notes), grid.columns, grid.rows, (panel,), series))


@dataclass(frozen=True)
class _Grid:
    """Where parts and inputs of a model stand, in places of the axes (along, down)."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int

    @property
    def columns(self) -> Axis:
        """Heads, and the MLP."""
        ticks = (*map(str, range(self.n_heads)), "MLP")
        return Axis("head", ticks, tuple(("", tick) for tick in ticks))

    @property
    def rows(self) -> Axis:
        """The end, layers from the last to the first, the embedding."""
        ticks = ("final", *map(str, reversed(range(self.n_layers))), "embed")
        return Axis("layer", ticks, tuple(("", tick) for tick in ticks))

    def part(self, name: str, layer: int, head: int) -> Node:
        """The node of a head or an MLP, or the bar of an end."""
        if name in ("embed", "final"):
            row = self._row(name, layer)
            return Node(-0.45, self.n_heads + 0.45, row - HALF_HEIGHT, row + HALF_HEIGHT, (name,))
        across, foot = (self.n_heads, MLP_FOOT) if "mlp" in name else (head, HEAD_FOOT)
        bottom = self._row(name, layer) + foot
        return Node(across - HALF_WIDTH, across + HALF_WIDTH, bottom - 2 * HALF_HEIGHT, bottom, (_part_of(name),))

    def reading(self, receiver: str, layer: int, head: int) -> dict[str, Node]:
        """The nodes that an input belongs to, by name: of shared keys and values their bar, and the heads above."""
        group = self._group(receiver)
        if group == 1:
            return {_part_of(receiver): self.part(receiver, layer, head)}
        heads = range(head * group, (head + 1) * group)
        found = {f"L{layer}H{each}": self.part(f"L{layer}H{each}", layer, each) for each in heads}
        bottom, said = self._row(receiver, layer) + HEAD_FOOT + SHARED, f"keys and values of {_part_of(receiver)}"
        found[said] = Node(heads[0] - 0.4, heads[-1] + 0.4, bottom - SHARED / 2, bottom, (said,))
        return found

    def line(self, sender: tuple[str, int, int], receiver: tuple[str, int, int]) -> np.ndarray:
        """``[point, 2]``: from the top of a part to the foot of an input, leaving and reaching it upwards."""
        start, end = self._middle(*sender), self._middle(*receiver)
        if start is None:
            start = -0.45 if end is None else end
        if end is None:
            end = start
        top = self.part(*sender).top
        foot = self.part(*receiver).bottom + (SHARED if self._group(receiver[0]) > 1 else 0.0)
        rise = top - foot
        reach = max(0.45 * rise, min(0.25, rise))
        aside = BULGE * (1 - np.exp(-rise / 10)) * (abs(end - start) < 0.5 and rise > 1 and start >= 0)
        if sender[0] == "embed":
            aside = -aside
        t = np.linspace(0, 1, 2 if start == end and not aside else 25)[:, None]
        corners = np.array([[start, top], [start + aside, top - reach], [end + aside, foot + reach], [end, foot]])
        weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
        return np.asarray(weights @ corners)

    def _group(self, receiver: str) -> int:
        """Heads of queries that an input feeds."""
        return self.n_heads // self.n_key_value_heads if receiver[-2:] in (".k", ".v") else 1

    def _row(self, name: str, layer: int) -> int:
        return {"final": 0, "embed": self.n_layers + 1}.get(name, self.n_layers - layer)

    def _middle(self, name: str, layer: int, head: int) -> float | None:
        """The column where a line leaves or ends; ``None`` of a bar, where it is that of its other end."""
        if name in ("embed", "final"):
            return None
        if "mlp" in name:
            return float(self.n_heads)
        group = self._group(name)
        return (head + 0.5) * group - 0.5 + INPUTS.get(name.rpartition(".")[2], 0.0)


def _part_of(name: str) -> str:
    """The part that a sender or an input of one part belongs to: ``L2.mlp`` of ``L2.mlp_in``, ``L1H3`` of ``L1H3.q``."""
    first, _, kind = name.partition(".")
    return f"{first}.mlp" if kind.startswith("mlp") else first
