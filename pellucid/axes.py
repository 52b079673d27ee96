"""The axis words, once. Every shape in the documentation, in errors and in the hook table is written with these.

``batch`` rows; ``pos`` positions of the tokens of this forward; ``key_pos`` key positions (cached ones included; with a
static cache, its whole capacity); ``n_heads``; ``n_key_value_heads``; ``d_head``; ``d_model``; ``d_mlp``; ``n_experts``;
``d_vocab``; of an autoencoder, ``d_in``, ``d_sae`` and ``d_out``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

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
}

HEADS = ("n_heads", "n_key_value_heads")
"""Axes of heads: a point has one of them at most."""

Index: TypeAlias = int | slice | Sequence[int] | None
"""Which places of an axis: one index, a slice, several indices, or ``None`` for all; negative ones count from the end."""

ROWS_AT_ONCE = 512
"""Packed rows of a sweep that go through a block together: enough for quick matrix products, few enough for a processor's
cache."""
