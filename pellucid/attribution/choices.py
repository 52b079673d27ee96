"""What attribution patching is told beside its pairs and its metric: see its options. Knows neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pellucid.experiments.options import Direction, option

Method: TypeAlias = Literal["atp", "atp*", "relp", "ig"]
METHODS: tuple[Method, ...] = ("atp", "atp*", "relp", "ig")
TITLES: Mapping[str, str] = {"atp": "AtP", "atp*": "AtP*", "relp": "RelP", "ig": "integrated gradients"}

By: TypeAlias = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class AttributionChoices:
    """What attribution patching is told beside its pairs and its metric."""

    site: str | Sequence[str] = option(
        "z",
        "resid_pre, resid_mid, attn_out, mlp_out, z, q, k, v, pattern, mlp_post, embed, ...; or several.",
        command=True,
    )
    by: By | Mapping[str, By | None] | None = option(
        None,
        "Axes of the result, layer among them, of pos, head, key_pos, neuron; by site where the sites differ. By default "
        "layer and head where the site has heads, else layer and pos.",
        command=True,
    )
    method: Method | Sequence[Method] = option(
        "relp",
        "atp: source less base times the gradient at the base run; atp*: with the softmax's own change for queries and keys, "
        "and against cancelling paths; relp: the gradient by RelP's rules; ig: the gradient averaged over the way; or "
        "several, for an axis method.",
        command=True,
    )
    direction: Direction = option(
        "denoising", "denoising estimates clean values in the corrupted run, noising the other way round.", command=True
    )
    normalize: bool = option(
        True, "In units of the clean run's metric less the corrupted run's; else in the metric's.", command=True
    )
    n_points: int = option(20, "Points of integrated gradients (Gauss and Legendre's).", command=True)
    check: int = option(
        20,
        "This many cells of the largest effects, and as many others at random, are really patched; 0 for none.",
        command=True,
    )
    top_n: int = option(20, "The cells of the largest effects whose stability is told.")
    resamples: int = option(100, "How often pairs are drawn anew for standard errors and stability.")
    seed: int = option(0, "Of what is drawn at random.")
    batch_size: int = option(16, "Most pairs that run together.", command=True)
