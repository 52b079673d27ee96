"""Which unit an output feature of a linear layer is, for lists that name Hugging Face's modules: a table made of a family.

Published lists of expert units name a layer of Hugging Face's model (``transformer.h.3.mlp.dense_h_to_4h``,
``model.layers.3.mlp.gate_proj``) and a feature of its output. Here that is a hook of a block, and an index there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pellucid.arguments import check_kind
from pellucid.config import TransformerBridgeConfig
from pellucid.model_bridge.family import Family
from pellucid.model_bridge.generalized_components.fused_layouts import Grouped, Stacked

PARTS = ("q", "k", "v")


def linears_of(family: Family) -> dict[str, tuple[str, ...]]:
    """By path in a block, the places that a linear layer's output features are units of; a fused one has several."""
    attention, mlp = family.attention, family.mlp
    queries = tuple(f"attn.hook_{part}" for part in PARTS)
    separate = dict(zip((attention.q, attention.k, attention.v), ((place,) for place in queries), strict=True))
    found = {attention.qkv: queries} if attention.qkv else separate
    # What a norm or a factor after the branch makes of it is another tensor than the linear layer's output.
    found |= {attention.o: ("attn.hook_out" if family.block.changes_attn else "hook_attn_out",)}
    inner: dict[str, tuple[str, ...]] = {}
    if mlp.router:  # experts are no linear layers, and what they compute inside has no points
        return {f"{attention.name}.{name}": places for name, places in found.items()}
    if mlp.gate_up:
        inner = {mlp.gate_up: ("mlp.hook_pre", "mlp.hook_pre_linear")}
    elif mlp.gate:
        inner = {mlp.gate: ("mlp.hook_pre",), mlp.up: ("mlp.hook_pre_linear",)}
    else:
        inner = {mlp.up: ("mlp.hook_pre",)}
    inner |= {mlp.down: ("mlp.hook_out" if family.block.changes_mlp else "hook_mlp_out",)}
    return {f"{attention.name}.{name}": places for name, places in found.items()} | {
        mlp.inside(name): places for name, places in inner.items()
    }


def published_places(family: Family) -> tuple[str, ...]:
    """Where the units of arXiv 2404.02431 are: the outputs of all linear layers of a block.

    Args:
        family: a model's family, ``bridge.adapter.family``.

    Raises:
        InputError: it is none.
    """
    check_kind("family", family, Family, "a model's family, bridge.adapter.family")
    return tuple(place for places in linears_of(family).values() for place in places)


def find_linear(family: Family, name: str) -> tuple[int, str] | None:
    """Layer and path in its block of a module's name, with or without what stands before the list of blocks."""
    paths = "|".join(map(re.escape, linears_of(family)))
    found = re.search(rf"(?:^|\.){re.escape(family.outside.blocks)}\.(\d+)\.({paths})(?::0)?$", name)
    return None if found is None else (int(found[1]), found[2])


def unit_places(family: Family, cfg: TransformerBridgeConfig, module: str) -> list[tuple[str, int]]:
    """For each output feature of a linear layer of a block, its place and its index there.

    Args:
        family: the family, as the model has it.
        cfg: sizes of the model.
        module: path in a block, of :func:`linears_of`.
    """
    places = linears_of(family)[module]
    q, kv, d_mlp = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head, cfg.d_mlp or 4 * cfg.d_model
    widths = {
        "attn.hook_q": q,
        "attn.hook_k": kv,
        "attn.hook_v": kv,
        "mlp.hook_pre": d_mlp,
        "mlp.hook_pre_linear": d_mlp,
    }
    features = torch.arange(sum(widths.get(place, cfg.d_model) for place in places))
    if len(places) == 1:
        return [(places[0], index) for index in features.tolist()]
    layout: Grouped | Stacked = Stacked(places, tuple(widths[place] for place in places))
    if places[0] == "attn.hook_q" and family.attention.layout == "grouped":
        layout = Grouped((places[0], places[1], places[2]), cfg.n_key_value_heads, cfg.d_head)
    return _in_order(layout.parts(features), len(features))


def _in_order(parts: Mapping[str, Tensor], width: int) -> list[tuple[str, int]]:
    found = [("", 0)] * width
    for place, features in parts.items():
        for index, feature in enumerate(features.flatten().tolist()):
            found[feature] = (place, index)
    return found
