"""A circuit: some edges of a model, with their scores; chosen, pruned, compared, drawn and written from here.

Every edge of the model keeps its score, so that a circuit can be made larger or smaller without another run. Ranks are by
the size of the mean score, whichever its sign.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import xarray as xr

from pellucid.arguments import check_count, check_kind, check_number
from pellucid.attribution.resampling import RESAMPLES
from pellucid.circuits import files
from pellucid.circuits.circuit_tracer import graph_document
from pellucid.circuits.ends import wiring_of
from pellucid.circuits.scores import EdgeScores, Stability
from pellucid.circuits.wiring import ARROW, Edge, EdgeLike, Wiring
from pellucid.errors import InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.tables import Table

START, END = "embed", "final"


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Some edges of a model, and the scores of all.

    Attributes:
        scores: of every edge of the model.
        chosen: ``[edge]``, numbers of the circuit's edges, ascending.
    """

    scores: EdgeScores
    chosen: np.ndarray

    def __post_init__(self) -> None:
        check_kind("scores", self.scores, EdgeScores, "the scores of a model's edges, as edge_attribution gives them")
        if not len(self.chosen):
            raise InputError(
                "The circuit has no edge: take a larger n, a lower threshold, or edges on a way from embed to final."
            )

    # -- made ----------------------------------------------------------------------------------------------------------

    @classmethod
    def whole(cls, scores: EdgeScores) -> Circuit:
        """All edges that were scored."""
        check_kind("scores", scores, EdgeScores, "the scores of a model's edges, as edge_attribution gives them")
        return cls(scores, np.arange(len(scores.wiring)))

    @classmethod
    def from_edges(cls, bridge: TransformerBridge, edges: Sequence[EdgeLike]) -> Circuit:
        """Edges by name, without scores: a circuit from a paper, say.

        Args:
            bridge: the model.
            edges: ``"L0H1->L2H3.q"`` or ``("L0H1", "L2H3.q")``.

        Raises:
            InputError: an edge that the model has not, or that runs backwards.
            UnsupportedModelError: the model's residual stream is not the sum of what parts add to it.
        """
        wiring = wiring_of(bridge)
        nothing = EdgeScores(wiring, np.zeros((0, len(wiring)), np.float32), np.zeros(0, np.int64))
        return cls.whole(nothing).select(edges)

    def select(self, edges: Sequence[EdgeLike]) -> Circuit:
        """The circuit of these edges, of all that the model has, with the scores of this one.

        Raises:
            InputError: an edge that the model has not, or that runs backwards.
        """
        return replace(self, chosen=np.unique(self.wiring.numbers(edges)))

    def top(self, n: int) -> Circuit:
        """The ``n`` of its edges with the largest size of score.

        Raises:
            InputError: fewer than one or more than there are; no scores.
        """
        check_count("n", n, 1, len(self))
        self._refuse_no_scores("top")
        return replace(self, chosen=np.sort(self.scores.strongest(n, self.chosen)))

    def threshold(self, t: float) -> Circuit:
        """Its edges whose score has at least the size ``t``, in the metric's unit.

        Raises:
            InputError: no edge has; no scores.
        """
        check_number("t", t, at_least=0)
        self._refuse_no_scores("threshold")
        return replace(self, chosen=self.chosen[np.abs(self.scores.mean[self.chosen]) >= t])

    def prune(self) -> Circuit:
        """Without the edges that no way from ``embed`` to ``final`` goes through.

        Raises:
            InputError: no edge is left.
        """
        graph = self.wiring.graph(self.chosen)
        if START not in graph or END not in graph:
            return replace(self, chosen=self.chosen[:0])
        alive = (nx.descendants(graph, START) | {START}) & (nx.ancestors(graph, END) | {END})
        kept = [data["number"] for u, v, data in graph.edges(data=True) if not data["inside"] and {u, v} <= alive]
        return replace(self, chosen=np.array(sorted(kept), dtype=np.int64))

    def random(self, seed: int = 0) -> Circuit:
        """As many edges, drawn at random from all that the model has: none runs backwards."""
        check_count("seed", seed, 0)
        drawn = np.random.default_rng(seed).choice(len(self.wiring), size=len(self), replace=False)
        return replace(self, chosen=np.sort(drawn))

    def _refuse_no_scores(self, what: str) -> None:
        if not len(self.scores.values):
            raise InputError(
                f"{what} ranks edges by score, and this circuit was made from names: take edge_attribution(bridge, pairs), "
                "and .select(edges) of it."
            )

    # -- looked at -----------------------------------------------------------------------------------------------------

    @property
    def wiring(self) -> Wiring:
        """The edges that the model has."""
        return self.scores.wiring

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def edges(self) -> list[Edge]:
        """Sender and receiver of each edge, the strongest first."""
        return self.wiring.names(self._order())

    @property
    def nodes(self) -> list[str]:
        """The parts that its edges come from and the inputs they lead to, in the order of the stream."""
        senders, receivers = (np.unique(end[self.chosen]) for end in self.wiring.ends)
        return [self.wiring.senders[n].name for n in senders] + [self.wiring.receivers[n].name for n in receivers]

    def __contains__(self, edge: object) -> bool:
        return isinstance(edge, str | tuple | list) and bool(np.isin(self.wiring.number(edge), self.chosen))

    def _order(self) -> np.ndarray:
        return self.chosen if not len(self.scores.values) else self.scores.strongest(len(self), self.chosen)

    def jaccard(self, other: Circuit) -> float:
        """Shared edges by all edges of the two.

        Raises:
            InputError: the other is of a model with other edges.
        """
        check_kind("other", other, Circuit, "a circuit")
        if other.wiring != self.wiring:
            raise InputError(f"other is of a model with other edges: {other.wiring} and {self.wiring}.")
        shared = np.intersect1d(self.chosen, other.chosen).size
        return float(shared / (len(self) + len(other) - shared))

    def stability(self, resamples: int = RESAMPLES, seed: int = 0) -> Stability:
        """How much of as many strongest edges is due to the pairs that were drawn; see :meth:`EdgeScores.stability`.

        Args:
            resamples: how often pairs are drawn anew.
            seed: of the drawing.

        Raises:
            InputError: fewer than two pairs, or no scores.
        """
        self._refuse_no_scores("stability")
        return self.scores.stability(len(self), resamples, seed)

    def dataset(self, stability: Stability | None = None) -> xr.Dataset:
        """Its edges, the strongest first, as labelled results.

        Args:
            stability: for the share of resamples in which an edge is in the top.

        Returns:
            Axis ``edge``; ``score`` and its standard ``error`` in the metric's unit, ``in_top`` with ``stability``;
            coordinates ``sender``, ``receiver``, and of both layer and head, -1 where there is none. ``attrs`` have
            what made the scores, and how many layers and heads the model has.
        """
        order = self._order()
        senders, receivers = ([ends[n] for n in end[order]] for ends, end in self._ends())
        columns: dict[str, Any] = {"score": self.scores.mean[order], "error": self.scores.error[order]}
        if stability is not None:
            check_kind("stability", stability, Stability, "what circuit.stability() gives")
            columns["in_top"] = stability.in_top[order]
        coords: dict[str, list[Any]] = {}
        for what, ends in (("sender", senders), ("receiver", receivers)):
            coords[what] = [end.name for end in ends]
            coords[f"{what}_layer"] = [end.layer for end in ends]
            coords[f"{what}_head"] = [end.head for end in ends]
        made = xr.Dataset(
            {name: ("edge", values) for name, values in columns.items()},
            {name: ("edge", values) for name, values in coords.items()},
            dict(self.scores.about) | {"edges": len(self), "of_edges": len(self.wiring)} | self.wiring.sizes(),
        )
        for name in ("score", "error"):
            made[name].attrs["units"] = self.scores.about.get("units", "")
        return made

    def _ends(self) -> list[tuple[list[Any], np.ndarray]]:
        senders, receivers = self.wiring.ends
        return [(list(self.wiring.senders), senders), (list(self.wiring.receivers), receivers)]

    def graph(self, stability: Stability | None = None) -> nx.DiGraph:
        """Its edges, and what lies between them, as a :class:`networkx.DiGraph`.

        Nodes are parts and inputs (``kind``, ``layer``, ``head``, -1 where there is none). An arc from a part to an input is
        an edge of the circuit (``inside=False``, ``score``, ``error``, ``in_top`` with ``stability``), one from an input to
        the part that it feeds is the model's own (``inside=True``).
        """
        if stability is not None:
            check_kind("stability", stability, Stability, "what circuit.stability() gives")
        made = self.wiring.graph(self.chosen)
        for _, _, data in made.edges(data=True):
            number = data.pop("number", None)
            if number is None:
                continue
            data["score"], data["error"] = float(self.scores.mean[number]), float(self.scores.error[number])
            if stability is not None:
                data["in_top"] = float(stability.in_top[number])
        made.graph.update(
            {key: value for key, value in self.scores.about.items() if isinstance(value, str | int | float)}
        )
        return made

    def __repr__(self) -> str:
        about = self.scores.about
        said = f"{about['method']} of {about['metric']}, {about['n_pairs']} pairs" if "method" in about else "no scores"
        return f"Circuit({len(self):,} of {len(self.wiring):,} edges, {len(self.nodes)} nodes; {said})"

    def _table(self) -> Table:
        rows = []
        for edge in self._order():
            (sender, receiver), mean, error = self.wiring.names([edge])[0], self.scores.mean, self.scores.error
            rows.append([f"{sender}{ARROW}{receiver}", f"{mean[edge]:+.4g}", f"{error[edge]:.2g}"])
        return Table(repr(self), ("edge", "score", "error"), rows)

    def __str__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write it whole, the scores of all edges and pairs included, to a ``.safetensors`` file; :meth:`load` reads it.

        Raises:
            InputError: another ending, or a file that is there already.
        """
        return files.save(path, self.scores, self.chosen, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """What :meth:`save` wrote.

        Raises:
            StoreError: it is missing, damaged, or no circuit.
        """
        return cls(*files.load(path))

    def export(
        self, path: str | os.PathLike[str], stability: Stability | None = None, *, overwrite: bool = False
    ) -> Path:
        """Write its edges for other programs, by the file's ending: ``.json`` (names, numbers and what made them),
        ``.graphml`` (Gephi, yEd, networkx), ``.csv``.

        Raises:
            InputError: another ending, or a file that is there already.
        """
        return files.export(path, self.dataset(stability), self.graph(stability), overwrite)

    def circuit_tracer(self, slug: str, prompt_tokens: Sequence[str]) -> dict[str, Any]:
        """The graph in the JSON of circuit-tracer's viewer (schema version 1).

        Its nodes stand at a layer and a position; an edge of ours is over all positions, and every node stands at the last
        one. What it calls a feature is a part here: heads and MLPs are ``cross layer transcoder`` nodes there, whose labels
        (``clerp``) are our names. An input and the part that it feeds are one node.

        Args:
            slug: the graph's name, in file names and links.
            prompt_tokens: of one prompt, as a person should see them.

        Raises:
            InputError: not a name, or not a list of strings.
        """
        return graph_document(self.graph(), self.wiring, str(self.scores.about.get("model", "")), slug, prompt_tokens)
