"""The axis words, once. Every shape in the documentation, errors, annotations and the hook table is written with these.

``batch`` rows; ``pos`` positions of the tokens of this forward; ``key_pos`` key positions (cached ones included; with a
static cache, its whole capacity); ``n_heads``; ``n_key_value_heads``; ``d_head``; ``d_model``; ``d_mlp``; ``n_experts``;
``d_vocab``; of an autoencoder, ``d_in``, ``d_sae`` and ``d_out``. Results have axes that no activation has, those of
``OF_RESULTS``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

OF_RESULTS: Mapping[str, str] = {
    "row": "prompts, one a row; also the parts of a stack",
    "layer": "layers, all of them or those asked for",
    "head": "heads of a layer, or those asked for; of keys and values where a point has those",
    "neuron": "neurons of a layer, or those asked for",
    "feature": "numbers of an activation at a position, its feature axes flattened",
    "token": "tokens, or ids that were asked for",
    "sender": "what writes to the residual stream, in the order of a circuit's wiring",
    "receiver": "what reads from it",
    "source": "positions that something was moved from",
    "cell": "places that are edited one after the other",
    "metric": "metrics",
    "example": "prompts over which a statistic is taken",
    "document": "documents of a corpus",
    "sample": "activations that were kept, to draw from",
    "n": "directions that something is projected on",
    "features": "as *features: the axes of an activation behind batch and pos, however many",
    "rows": "as *rows: leading axes, however many",
    "axes": "as *axes: all axes, however many",
}
"""Axes of results, and names for several axes together. No hook point has one of these."""

AXES: Mapping[str, str] = {
    "batch": "rows of the batch (prompts, times beams under beam search)",
    "pos": "positions of the tokens given to this forward",
    "key_pos": "key positions, cached ones included",
    "n_heads": "attention heads",
    "n_key_value_heads": "heads of keys and values, where several heads of queries share one",
    "d_head": "features of one head",
    "d_model": "features of the residual stream",
    "d_mlp": "neurons of one MLP",
    "n_experts": "experts that a router chooses from",
    "d_vocab": "entries of the vocabulary",
    "d_in": "features that an autoencoder is given",
    "d_sae": "features of an autoencoder's inside",
    "d_out": "features that an autoencoder decodes to",
    "1": "a single number",
    **OF_RESULTS,
}

HEADS = ("n_heads", "n_key_value_heads")
"""Axes of heads: a point has one of them at most."""

Index: TypeAlias = int | slice | Sequence[int] | None
"""Which places of an axis: one index, a slice, several indices, or ``None`` for all; negative ones count from the end."""

ROWS_AT_ONCE = 512
"""Packed rows of a sweep that go through a block together: enough for quick matrix products, few enough for a processor's
cache."""
