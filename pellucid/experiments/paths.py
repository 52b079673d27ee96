"""The ends of a path: which part of a model sends, and which input of another part receives.

======================  =============================================================================================
sender                  what it adds to the residual stream
======================  =============================================================================================
``embed``               ``hook_embed``
``L2H5``                head 5 of layer 2: ``z`` of that head through its slice of ``W_O`` (not where a norm follows)
``L2.attn_out``         all heads of layer 2, and ``b_O``, normed where a norm follows
``L2.mlp_out``          the MLP of layer 2
======================  =============================================================================================

======================  =============================================================================================
receiver                what it reads from the residual stream
======================  =============================================================================================
``L3H1.q`` ``.k`` ``.v``  the residual before ``ln1``, as it goes into the queries (keys, values) of head 1 of layer 3
``L3.mlp_in``           the residual before ``ln2``, as it goes into the MLP of layer 3
``final``               the residual that leaves the last layer
======================  =============================================================================================

Globs choose several: ``L*H*`` is every head, ``L3H*.v`` the values of layer 3's heads. Where several heads of queries share
keys and values, the heads of ``.k`` and ``.v`` are those of keys and values. Along the stream the order is attention, MLP,
next layer; where a block runs both in parallel, its MLP reads what its attention reads. A path leads forward only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pellucid.arguments import check_texts
from pellucid.errors import InputError
from pellucid.names import nearest

SenderKind: TypeAlias = Literal["embed", "head", "attn_out", "mlp_out"]
ReceiverKind: TypeAlias = Literal["q", "k", "v", "mlp_in", "final"]

NOWHERE = -1
"""Layer or head of an end that has none."""

PARTS: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")


@dataclass(frozen=True)
class Stream:
    """The places of a model's residual stream: between any two that follow each other, something is added to it.

    Attributes:
        n_layers: blocks of the model.
        parallel: attention and MLP of a block read the same place, and are added together.
    """

    n_layers: int
    parallel: bool = False

    @property
    def _of_block(self) -> int:
        return 1 if self.parallel else 2

    def entering(self, layer: int) -> int:
        """What enters a block, and its attention; what leaves the last one for ``n_layers``."""
        return self._of_block * layer

    def before_mlp(self, layer: int) -> int:
        """What enters a block's MLP."""
        return self.entering(layer) + self._of_block - 1

    def after_attention(self, layer: int) -> int:
        """The first place that has what a block's attention adds."""
        return self.entering(layer) + 1

    @property
    def last(self) -> int:
        """What leaves the last block."""
        return self.entering(self.n_layers)

    def mlp_at(self, place: int) -> int | None:
        """The layer whose MLP reads a place, if one does."""
        layer = place // self._of_block
        return layer if place < self.last and place == self.before_mlp(layer) else None

    def hook(self, place: int) -> str:
        """The hook point that holds the stream at a place."""
        if place == self.last:
            return f"blocks.{self.n_layers - 1}.hook_resid_post"
        layer = place // self._of_block
        return f"blocks.{layer}.hook_resid_{'pre' if place == self.entering(layer) else 'mid'}"


@dataclass(frozen=True)
class Sender:
    """A part that adds to the residual stream.

    Attributes:
        name: see :mod:`pellucid.experiments.paths`.
        kind: which part.
        layer: its layer.
        head: its head.
        place: the first place of the :class:`Stream` that has what it adds.
    """

    name: str
    kind: SenderKind
    layer: int
    head: int
    place: int

    @property
    def hook(self) -> str:
        """The hook point that holds what it adds (of all heads, for a head)."""
        if self.kind == "embed":
            return "hook_embed"
        sites = {"head": "attn.hook_result", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
        return f"blocks.{self.layer}.{sites[self.kind]}"


@dataclass(frozen=True)
class Receiver:
    """An input that reads from the residual stream.

    Attributes:
        name: see :mod:`pellucid.experiments.paths`.
        kind: which input.
        layer: its layer.
        head: its head.
        place: the place of the stream that it reads, as in :class:`Sender`.
    """

    name: str
    kind: ReceiverKind
    layer: int
    head: int
    place: int

    def comes_after(self, sender: Sender) -> bool:
        """Whether what the sender adds is there yet."""
        return sender.place <= self.place


def senders_of(n_layers: int, n_heads: int, parallel: bool = False) -> dict[str, Sender]:
    """All senders of a model, by name, in the order of the stream; ``parallel`` as in :class:`Stream`."""
    made = [Sender("embed", "embed", NOWHERE, NOWHERE, 0)]
    stream = Stream(n_layers, parallel)
    for layer in range(n_layers):
        after_attention = stream.after_attention(layer)
        made += [Sender(f"L{layer}H{head}", "head", layer, head, after_attention) for head in range(n_heads)]
        made.append(Sender(f"L{layer}.attn_out", "attn_out", layer, NOWHERE, after_attention))
        made.append(Sender(f"L{layer}.mlp_out", "mlp_out", layer, NOWHERE, stream.entering(layer + 1)))
    return {sender.name: sender for sender in made}


def receivers_of(
    n_layers: int, n_heads: int, n_key_value_heads: int | None = None, parallel: bool = False
) -> dict[str, Receiver]:
    """All receivers of a model, by name, in the order of the stream.

    Args:
        n_layers: blocks of the model.
        n_heads: heads of queries.
        n_key_value_heads: heads of keys and values; by default as many.
        parallel: as in :class:`Stream`.
    """
    made, stream = [], Stream(n_layers, parallel)
    counts = {"q": n_heads, "k": n_key_value_heads or n_heads, "v": n_key_value_heads or n_heads}
    for layer in range(n_layers):
        place = stream.entering(layer)
        for part in PARTS:
            made += [Receiver(f"L{layer}H{head}.{part}", part, layer, head, place) for head in range(counts[part])]
        made.append(Receiver(f"L{layer}.mlp_in", "mlp_in", layer, NOWHERE, stream.before_mlp(layer)))
    made.append(Receiver("final", "final", NOWHERE, NOWHERE, stream.last))
    return {receiver.name: receiver for receiver in made}


def chosen_names(asked: str | Sequence[str], known: Mapping[str, object], what: str, example: str) -> list[str]:
    """Names that a name, a glob or several of them mean, each once, in the order asked for.

    Raises:
        InputError: one that means nothing; the nearest ones are listed.
    """
    found: dict[str, None] = {}
    for name in check_texts(f"{what}s", [asked] if isinstance(asked, str) else asked):
        matching = [name] if name in known else fnmatch.filter(known, name)
        if not matching:
            raise InputError(
                f"No {what} is called {name!r}. Nearest: {', '.join(nearest(str(name), known))}. A {what} is named like "
                f"{example}; * stands for anything."
            )
        found.update(dict.fromkeys(matching))
    return list(found)
