"""Which edges a decoder has: from each part that adds to the residual stream to each input that reads it later.

Names are those of :mod:`pellucid.experiments.paths`: senders ``embed``, ``L2H5``, ``L2.mlp_out``; receivers ``L3H1.q``,
``L3H1.k``, ``L3H1.v`` (keys and values by their own heads), ``L3.mlp_in``, ``final``. A layer's heads are senders one by
one, so ``L2.attn_out``, their sum, is none here. Both lists follow the stream: a receiver is reached by the first so many
senders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import networkx as nx
import numpy as np

from pellucid.arguments import check_list
from pellucid.errors import InputError
from pellucid.experiments.paths import Receiver, Sender, receivers_of, senders_of
from pellucid.names import nearest

Edge: TypeAlias = tuple[str, str]
"""A sender and a receiver, by name."""

EdgeLike: TypeAlias = "str | Sequence[str]"
"""An edge as people write it: ``"L0H1->L2H3.q"`` or ``("L0H1", "L2H3.q")``."""

ARROW = "->"


@dataclass(frozen=True)
class Wiring:
    """The edges of a decoder.

    Attributes:
        n_layers: blocks.
        n_heads: heads of queries.
        n_key_value_heads: heads of keys and values.
        parallel: attention and MLP of a block read the same place.
    """

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    parallel: bool = False

    @cached_property
    def senders(self) -> list[Sender]:
        """In the order of the stream."""
        found = senders_of(self.n_layers, self.n_heads, self.parallel).values()
        return [sender for sender in found if sender.kind != "attn_out"]

    @cached_property
    def receivers(self) -> list[Receiver]:
        """In the order of the stream."""
        found = receivers_of(self.n_layers, self.n_heads, self.n_key_value_heads, self.parallel)
        return list(found.values())

    @cached_property
    def reached(self) -> np.ndarray:
        """``[receiver]``: how many senders come before, the first ones."""
        places = np.array([sender.place for sender in self.senders])
        return np.searchsorted(places, [receiver.place for receiver in self.receivers], side="right")

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """``[edge]`` each: numbers of sender and receiver; edges are counted receiver after receiver."""
        receivers = np.repeat(np.arange(len(self.receivers)), self.reached)
        senders = np.concatenate([np.arange(count) for count in self.reached])
        return senders, receivers

    def __len__(self) -> int:
        return int(self.reached.sum())

    @cached_property
    def starts(self) -> np.ndarray:
        """``[receiver]``: the number of its first edge."""
        return np.concatenate([[0], np.cumsum(self.reached)[:-1]])

    def edges_of(self, receiver: int) -> slice:
        """The edges into a receiver, their senders in order."""
        start = int(self.starts[receiver])
        return slice(start, start + int(self.reached[receiver]))

    @cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        senders = {sender.name: number for number, sender in enumerate(self.senders)}
        return senders, {receiver.name: number for number, receiver in enumerate(self.receivers)}

    def receiver_number(self, name: str) -> int:
        """Where a receiver is in the list."""
        return self._numbers[1][name]

    def names(self, edges: Iterable[int]) -> list[Edge]:
        """Sender and receiver of each edge."""
        senders, receivers = self.ends
        return [(self.senders[senders[edge]].name, self.receivers[receivers[edge]].name) for edge in edges]

    def number(self, edge: EdgeLike) -> int:
        """The number of an edge.

        Raises:
            InputError: no such edge: an end that the model has not, or a sender that comes after the receiver.
        """
        sender, receiver = _ends_of(edge)
        senders, receivers = self._numbers
        for what, name, known in (("sender", sender, senders), ("receiver", receiver, receivers)):
            if name not in known:
                raise InputError(
                    f"The edge {sender}{ARROW}{receiver} is none of this model: it has no {what} {name!r}. Nearest: "
                    f"{', '.join(nearest(name, known))}."
                )
        from_, to = senders[sender], receivers[receiver]
        if from_ >= self.reached[to]:
            raise InputError(
                f"The edge {sender}{ARROW}{receiver} runs backwards: {receiver} reads the stream before {sender} adds to "
                "it. An edge leads from a part to an input that comes after."
            )
        return int(self.starts[to]) + from_

    def numbers(self, edges: Sequence[EdgeLike]) -> np.ndarray:
        """The number of each edge; see :meth:`number`."""
        return np.array([self.number(edge) for edge in check_list("edges", edges, "edges such as 'L0H1->L2H3.q'")])

    def inside(self) -> Iterator[Edge]:
        """Which part each input feeds: ``("L3H1.q", "L3H1")``; a head of keys feeds all heads of its group."""
        group = self.n_heads // self.n_key_value_heads
        for receiver in self.receivers:
            if receiver.kind == "mlp_in":
                yield receiver.name, f"L{receiver.layer}.mlp_out"
            elif receiver.kind == "q":
                yield receiver.name, f"L{receiver.layer}H{receiver.head}"
            elif receiver.kind in ("k", "v"):
                for head in range(receiver.head * group, (receiver.head + 1) * group):
                    yield receiver.name, f"L{receiver.layer}H{head}"

    def graph(self, edges: np.ndarray) -> nx.DiGraph:
        """Edges ``[edge]`` and what lies between them as a graph.

        Its nodes are senders and receivers that an edge touches, its arcs the edges (``inside=False``) and, from each input
        to the part that it feeds, ``inside=True``. Nodes say ``kind``, ``layer`` and ``head``, -1 where there is none.
        """
        made = nx.DiGraph()
        senders, receivers = self.ends
        for end in [*(self.senders[n] for n in np.unique(senders[edges])), *self._receiving(receivers[edges])]:
            made.add_node(end.name, kind=end.kind, layer=end.layer, head=end.head)
        made.add_edges_from(
            (*names, {"number": int(edge), "inside": False})
            for edge, names in zip(edges, self.names(edges), strict=True)
        )
        made.add_edges_from(
            (input, part, {"inside": True}) for input, part in self.inside() if input in made and part in made
        )
        return made

    def _receiving(self, numbers: np.ndarray) -> list[Receiver]:
        return [self.receivers[number] for number in np.unique(numbers)]

    def sizes(self) -> dict[str, int]:
        """How many layers and heads."""
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_key_value_heads": self.n_key_value_heads,
        }

    def about(self) -> dict[str, Any]:
        """Its fields, for a file."""
        return {**self.sizes(), "parallel": self.parallel}


def _ends_of(edge: EdgeLike) -> tuple[str, str]:
    ends: list[str] = []
    if isinstance(edge, str):
        ends = [end.strip() for end in edge.split(ARROW)]
    elif isinstance(edge, tuple | list):
        ends = list(edge)
    if len(ends) != 2 or not all(isinstance(end, str) and end for end in ends):
        raise InputError(f"An edge is written 'L0H1{ARROW}L2H3.q', or as such a pair of names; found {edge!r}.")
    return ends[0], ends[1]
