"""BLOOM's fused projection, the one place that knows its layout.

``query_key_value`` has ``3 * d_model`` output features, interleaved per head: ``[n_heads, 3, d_head]``, where the middle
axis is query, key, value. It is *not* three stacked blocks. Everything here is a view where a view can do it, so that
reading costs nothing and writing reaches the model's own storage.

Axis letters: ``n`` n_heads, ``h`` d_head, ``m`` d_model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pellucid.errors import InputError

Part = Literal["q", "k", "v"]
PARTS: tuple[Part, Part, Part] = ("q", "k", "v")
"""Queries, keys and values, in the order of BLOOM's layout."""


def split_activation(fused: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[batch, pos, n_heads, d_head]`` as views of ``fused`` ``[batch, pos, 3 * d_model]``."""
    batch, pos, width = fused.shape
    by_head = fused.view(batch, pos, n_heads, 3, width // (3 * n_heads))
    return by_head[..., 0, :], by_head[..., 1, :], by_head[..., 2, :]


def part_of_activation(fused: Tensor, part: Part, n_heads: int) -> Tensor:
    """One of queries, keys or values ``[batch, pos, n_heads, d_head]``, a view of ``fused``."""
    return split_activation(fused, n_heads)[PARTS.index(part)]


def part_of_weight(weight: Tensor, part: Part, n_heads: int) -> Tensor:
    """``[n_heads, d_head, d_model]``, a view of the fused weight ``[3 * d_model, d_model]``."""
    width, d_model = weight.shape
    return weight.view(n_heads, 3, width // (3 * n_heads), d_model)[:, PARTS.index(part)]


def part_of_bias(bias: Tensor, part: Part, n_heads: int) -> Tensor:
    """``[n_heads, d_head]``, a view of the fused bias ``[3 * d_model]``."""
    return bias.view(n_heads, 3, -1)[:, PARTS.index(part)]


def fuse_weights(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """The fused weight ``[3 * d_model, d_model]`` from three ``[n_heads * d_head, d_model]``; inverse of splitting."""
    by_head = [weight.reshape(n_heads, -1, weight.shape[-1]) for weight in (q, k, v)]
    return torch.stack(by_head, dim=1).reshape(-1, q.shape[-1])


def fuse_biases(q: Tensor, k: Tensor, v: Tensor, n_heads: int) -> Tensor:
    """The fused bias ``[3 * d_model]`` from three ``[n_heads * d_head]``."""
    return torch.stack([bias.reshape(n_heads, -1) for bias in (q, k, v)], dim=1).reshape(-1)


class FusedUnit(NamedTuple):
    """Which query, key or value feature an output feature of ``query_key_value`` is."""

    part: Part
    head: int
    dim: int


def fused_unit(index: int, n_heads: int, d_head: int) -> FusedUnit:
    """What output feature ``index`` of ``query_key_value`` is.

    Studies of single units in BLOOM report such flat indices (Kojima et al. 2024, arXiv 2404.02431).

    Raises:
        InputError: the index is outside ``[0, 3 * n_heads * d_head)``.
    """
    width = 3 * n_heads * d_head
    if not 0 <= index < width:
        raise InputError(f"query_key_value has output features 0 to {width - 1}; asked for {index}.")
    head, rest = divmod(index, 3 * d_head)
    part, dim = divmod(rest, d_head)
    return FusedUnit(PARTS[part], head, dim)


def fused_index(unit: FusedUnit, n_heads: int, d_head: int) -> int:
    """The output feature of ``query_key_value`` that ``unit`` is; inverse of :func:`fused_unit`.

    Raises:
        InputError: the head or the dimension does not exist.
    """
    if not (0 <= unit.head < n_heads and 0 <= unit.dim < d_head):
        raise InputError(f"There are {n_heads} heads of {d_head} features; asked for {unit}.")
    return (unit.head * 3 + PARTS.index(unit.part)) * d_head + unit.dim
