"""How the parts of a fused projection lie in it, where names do not say: proved on the model itself, or refused.

One forward shows what the projection gave and what became of its parts: queries, keys and values as the attention function
is given them (rotated queries and keys at the first position, where a rotation turns nothing), and a gated MLP's neurons. A
layout is taken if every number is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.family import Attention, Family, FusedLayout
from pellucid.model_bridge.generalized_components.hf_attention import EAGER, REGISTRY
from pellucid.model_bridge.generalized_components.hf_code import Standing, names_of, rebound
from pellucid.model_bridge.supported_architectures.decoder import PARTS, qkv_layout

LAYOUTS: tuple[FusedLayout, ...] = ("stacked", "grouped")


@contextmanager
def watching_attention(attention: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """What an attention gives its attention function: queries, keys and values ``[batch, heads, pos, d_head]``."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    plain: Any = type(attention).forward
    there = names_of(plain)
    if EAGER not in there or REGISTRY not in there or "forward" in vars(attention):
        yield seen
        return
    eager, functions = there[EAGER], there[REGISTRY]

    def noting(function: Any) -> Any:
        def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((query.detach().clone(), key.detach().clone(), value.detach().clone()))
            return function(module, query, key, value, *args, **kwargs)

        return note

    def chosen(name: str, default: Any) -> Any:
        return noting(functions.get_interface(name, eager))

    names = {EAGER: noting(eager), REGISTRY: Standing(functions, {"get_interface": chosen})}
    vars(attention)["forward"] = rebound(plain, names).__get__(attention)
    try:
        yield seen
    finally:
        del vars(attention)["forward"]


def proved_attention(
    family: Family, cfg: TransformerBridgeConfig, fused: Tensor, attended: list[tuple[Tensor, Tensor, Tensor]]
) -> Attention:
    """The attention with the layout of its fused projection.

    Args:
        family: the family; whether its attention rotates is known.
        cfg: sizes.
        fused: what the projection gave, ``[batch, pos, width]``.
        attended: what the attention function was given.

    Raises:
        UnsupportedModelError: no layout that is known gives those queries, keys and values.
    """
    attention = family.attention
    for layout in LAYOUTS:
        parts = qkv_layout(layout, cfg).parts(fused)
        if len(attended) == 1 and all(
            _same(parts[name].flatten(fused.dim() - 1, -2), given, attention.rotary and name != "hook_v")
            for name, given in zip(PARTS, attended[0], strict=True)
        ):
            return replace(attention, layout=layout)
    raise UnsupportedModelError(
        f"{family.title} is of no family that Pellucid knows, and its {attention.name}.{attention.qkv} gives queries, keys "
        "and values together in no order that it knows: neither one after the other, nor each key/value head's together."
    )


def _same(part: Tensor, given: Tensor, rotated: bool) -> bool:
    """Whether ``[batch, pos, heads, d_head]`` is ``[batch, heads, pos, d_head]``; rotated, at the first position."""
    given = given.transpose(1, 2)
    if part.shape != given.shape:
        return False
    return torch.equal(part[:, :1], given[:, :1]) if rotated else torch.equal(part, given)


def check_gate_first(family: Family, mlp: nn.Module, fused: Tensor, neurons: Tensor) -> None:
    """See that the gate is the first half of a fused projection.

    Args:
        family: the family.
        mlp: the MLP.
        fused: what the projection gave, ``[batch, pos, 2 * d_mlp]``.
        neurons: what the last projection was given, ``[batch, pos, d_mlp]``.

    Raises:
        UnsupportedModelError: the neurons are not the activated first half times the second.
    """
    gate, up = fused.chunk(2, dim=-1)
    activations = [each for each in mlp.children() if not list(each.parameters())]
    if not any(torch.equal(activation(gate) * up, neurons) for activation in activations):
        raise UnsupportedModelError(
            f"{family.title} is of no family that Pellucid knows, and its {family.mlp.name}.{family.mlp.gate_up} gives gate "
            "and up in no order that it knows: the neurons are not its activated first half times the second."
        )
