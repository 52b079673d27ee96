"""Attention patterns: a square for each head, on one scale from 0 to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pellucid.errors import InputError
from pellucid.plots.heat_maps import heat_map
from pellucid.plots.results import labelled
from pellucid.token_text import Tokenizer, token_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from pellucid.activation_cache import ActivationCache


def attention_pattern(
    cache: ActivationCache,
    layer: int,
    *,
    tokenizer: Tokenizer | None = None,
    row: int = 0,
    heads: Sequence[int] | None = None,
    title: str | None = None,
    subtitle: str | None = None,
    print_values: bool | None = None,
) -> Figure:
    """Where each head of a layer looks: queries down, keys along, square cells, colours from 0 to 1.

    Args:
        cache: of ``run_with_cache``, with the layer's ``hook_pattern``, ``[batch, n_heads, pos, key_pos]``; or without
            ``batch``.
        layer: its number.
        tokenizer: the bridge's ``tokenizer``, so that places are labelled with their tokens; without it they are counted.
        row: of the batch.
        heads: which to show; by default all.
        title: by default the layer.
        subtitle: a smaller line below the title.
        print_values: write values into cells; by default where the picture has at most 144 of them.

    Returns:
        a figure with a trace for each head.

    Raises:
        CacheKeyError: the cache has no pattern of this layer.
        InputError: no such row or head; over 300,000 cells.
        MissingExtraError: Plotly is not installed.
    """
    if not hasattr(cache, "has_batch_dim"):  # known without torch
        raise InputError(f"cache is the ActivationCache of a run; found {type(cache).__name__}.")
    pattern: Any = cache["pattern", layer]
    tokens: Any = cache.tokens
    if cache.has_batch_dim:
        if row not in range(len(pattern)):
            raise InputError(f"The cache has the rows 0 to {len(pattern) - 1}; found {row}.")
        pattern, tokens = pattern[row], None if tokens is None else tokens[row]
    shown = range(pattern.shape[0]) if heads is None else heads
    wrong = [head for head in shown if head not in range(pattern.shape[0])]
    if wrong or not shown:
        raise InputError(f"Layer {layer} has the heads 0 to {pattern.shape[0] - 1}; found {wrong or 'none'}.")
    grid = labelled(pattern[list(shown)]).rename(panel="head", row="pos", column="key_pos")
    labels: Mapping[str, Sequence[str]] = {}
    if tokenizer is not None and tokens is not None:
        names = token_labels(tokenizer, tokens.reshape(-1).tolist())
        labels = {dim: names for dim in ("pos", "key_pos") if grid.sizes[dim] == len(names)}
    return heat_map(
        grid.assign_coords(head=list(shown)),
        title=f"Attention patterns, layer {layer}" if title is None else title,
        subtitle=subtitle,
        unit="attention",
        facet="head",
        labels=labels,
        centre=None,
        limits=(0.0, 1.0),
        print_values=print_values,
        square=True,
    )
