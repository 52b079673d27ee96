"""The ends of a path: which part of a model sends, and which input of another part receives.

======================  =============================================================================================
sender                  what it adds to the residual stream
======================  =============================================================================================
``embed``               ``hook_embed``
``L2H5``                head 5 of layer 2: ``z`` of that head through its slice of ``W_O``
``L2.attn_out``         all heads of layer 2, and ``b_O``
``L2.mlp_out``          the MLP of layer 2
======================  =============================================================================================

======================  =============================================================================================
receiver                what it reads from the residual stream
======================  =============================================================================================
``L3H1.q`` ``.k`` ``.v``  the residual before ``ln1``, as it goes into the queries (keys, values) of head 1 of layer 3
``L3.mlp_in``           the residual before ``ln2``, as it goes into the MLP of layer 3
``final``               the residual that leaves the last layer
======================  =============================================================================================

Globs choose several: ``L*H*`` is every head, ``L3H*.v`` the values of layer 3's heads. Along the stream the order is
attention, MLP, next layer; a path leads forward only.
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
class Sender:
    """A part that adds to the residual stream.

    Attributes:
        name: see :mod:`pellucid.experiments.paths`.
        kind: which part.
        layer: its layer.
        head: its head.
        place: the first place of the stream that has what it adds: ``2 * layer`` is what enters a layer, one more is what
            enters its MLP.
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

    def hears(self, sender: Sender) -> bool:
        """Whether what the sender adds is there yet."""
        return sender.place <= self.place


def senders_of(n_layers: int, n_heads: int) -> dict[str, Sender]:
    """All senders of a model, by name, in the order of the stream."""
    made = [Sender("embed", "embed", NOWHERE, NOWHERE, 0)]
    for layer in range(n_layers):
        after_attention = 2 * layer + 1
        made += [Sender(f"L{layer}H{head}", "head", layer, head, after_attention) for head in range(n_heads)]
        made.append(Sender(f"L{layer}.attn_out", "attn_out", layer, NOWHERE, after_attention))
        made.append(Sender(f"L{layer}.mlp_out", "mlp_out", layer, NOWHERE, after_attention + 1))
    return {sender.name: sender for sender in made}


def receivers_of(n_layers: int, n_heads: int) -> dict[str, Receiver]:
    """All receivers of a model, by name, in the order of the stream."""
    made = []
    for layer in range(n_layers):
        for part in PARTS:
            made += [Receiver(f"L{layer}H{head}.{part}", part, layer, head, 2 * layer) for head in range(n_heads)]
        made.append(Receiver(f"L{layer}.mlp_in", "mlp_in", layer, NOWHERE, 2 * layer + 1))
    made.append(Receiver("final", "final", NOWHERE, NOWHERE, 2 * n_layers))
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
