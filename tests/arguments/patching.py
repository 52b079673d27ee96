"""TransformerLens' patching functions and their results."""

from __future__ import annotations

from typing import Any

import torch

from pellucid import patching
from tests.arguments.bench import (
    BRIDGE, CACHE, IDS, MASK, METRIC, NAN, TEXT, THE_IDS, Call, Line, Of, bound, choice, made, not_run, number, whole,
)  # fmt: skip

GIVEN: dict[str, Any] = {"model": BRIDGE, "corrupted_tokens": THE_IDS, "clean_cache": CACHE}
OF_A_SITE = [
    name for name in patching.__all__ if name.startswith("get_act_patch") and not name.endswith(("every", "sources", "path"))
]
OF_SITES = [name for name in patching.__all__ if name.endswith("_every")]


def result(name: str, /, **works: Any) -> Call:
    """A method of a result that has values a row."""
    return bound(lambda bench: bench.patched, getattr(patching.PatchingResult, name), **works)


CALLS: dict[str, Call] = {
    "generic_activation_patch": not_run(
        made(
            patching.generic_activation_patch,
            **GIVEN,
            patching_metric=METRIC,
            patch_setter=patching.layer_pos_patch_setter,
            activation_name="resid_pre",
            index_axis_names=["layer", "pos"],
        )
    ),
    **{name: not_run(made(getattr(patching, name), **GIVEN, patching_metric=METRIC)) for name in OF_A_SITE},
    **{name: not_run(made(getattr(patching, name), **GIVEN, metric=METRIC)) for name in OF_SITES},
    "get_act_patch_direct_path": not_run(
        made(
            patching.get_act_patch_direct_path,
            **GIVEN,
            corrupted_cache=CACHE,
            patching_metric=METRIC,
            src_layer=0,
            src_head=0,
        )
    ),
    "get_act_patch_direct_path_all_sources": not_run(
        made(
            patching.get_act_patch_direct_path_all_sources, **GIVEN, corrupted_cache=CACHE, patching_metric=METRIC
        )
    ),
    "make_df_from_ranges": made(
        patching.make_df_from_ranges, column_max_ranges=[2, 3], column_names=["layer", "pos"]
    ),
    "bootstrap_ci": result("bootstrap_ci"),
    "permutation_pvalue": result("permutation_pvalue"),
    "normalized": result("normalized", clean_baseline=torch.ones(4)),
}

REFUSED: list[Line] = []
