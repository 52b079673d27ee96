"""TransformerLens' patching functions and their results."""

from __future__ import annotations

from typing import Any

import torch

from pellucid import patching
from tests.arguments.bench import (
    BRIDGE,
    CACHE,
    MASK,
    METRIC,
    THE_IDS,
    Call,
    Line,
    a_text,
    bound,
    choice,
    made,
    not_run,
    number,
    whole,
)

GIVEN: dict[str, Any] = {"model": BRIDGE, "corrupted_tokens": THE_IDS, "clean_cache": CACHE}
OF_A_SITE = ["get_act_patch_resid_pre"]
"""The others are the same function with another site filled in."""
OF_SITES = [name for name in patching.__all__ if name.endswith("_every")]


def result(name: str, /, **works: Any) -> Call:
    """A method of a result that has values a row."""
    return bound(lambda bench: bench.patched, getattr(patching.PatchingResult, name), **works)


FUNCTIONS = {
    **dict.fromkeys(("generic_activation_patch", *OF_A_SITE), "patching_metric"),
    **dict.fromkeys(OF_SITES, "metric"),
    **dict.fromkeys(("get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"), "patching_metric"),
}
"""Each function's argument for the metric."""

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
        made(patching.get_act_patch_direct_path_all_sources, **GIVEN, corrupted_cache=CACHE, patching_metric=METRIC)
    ),
    "make_df_from_ranges": made(patching.make_df_from_ranges, column_max_ranges=[2, 3], column_names=["layer", "pos"]),
    "bootstrap_ci": result("bootstrap_ci"),
    "permutation_pvalue": result("permutation_pvalue"),
    "normalized": result("normalized", clean_baseline=torch.ones(4)),
}

REFUSED: list[Line] = [
    *(
        line
        for name, metric in FUNCTIONS.items()
        for line in (
            (name, {"corrupted_tokens": 3}, "Input is .*found int"),
            (name, {"corrupted_tokens": torch.tensor([[4000]])}, "Token id 4000"),
            (name, {"clean_cache": 3}, "clean_cache maps hook names"),
            (name, {"clean_cache": {}}, "The clean cache has no"),
            (name, {metric: 3}, "is a Metric or a function of logits"),
            (name, {"attention_mask": MASK}, "attention_mask must have shape"),
            (name, {"logit_positions": [-1]}, "logit_positions would have no effect"),
            *whole(name, "memory_limit", 1),
        )
    ),
    *(line for name in FUNCTIONS if "direct_path" not in name for line in choice(name, "reduce")),
    *((name, {metric: {}}, "patching_metric is an empty mapping") for name, metric in FUNCTIONS.items()),
    *(
        line
        for name in ("generic_activation_patch", *OF_A_SITE)
        for line in (
            (name, {"patch_setter": 3}, "patch_setter is a function"),
            *a_text(name, "activation_name"),
            (name, {"activation_name": "nonsense"}, "No hook point is called"),
            (name, {"index_axis_names": 3}, "index_axis_names is a list"),
            (name, {"index_axis_names": "layer"}, "index_axis_names is a list of strings; found the string"),
            (name, {"index_axis_names": []}, "index_axis_names is a list of strings; found an empty one"),
            (name, {"index_axis_names": ["layer", "row"]}, "index_axis_names: no axis is called 'row'"),
            (name, {"index_axis_names": ["pos"]}, "index_axis_names are different axes, the layer first"),
            (name, {"index_df": 3}, "Give either index_axis_names or index_df"),
            (name, {"index_df": 3, "index_axis_names": None}, "index_df is a pandas data frame"),
            (name, {"return_index_df": True, "baseline": True}, "return_index_df=True goes with a tensor"),
        )
    ),
    *whole("get_act_patch_direct_path", "src_layer", 0),
    *whole("get_act_patch_direct_path", "src_head", 0),
    ("get_act_patch_direct_path", {"src_layer": 9}, "src_layer must be at most 3"),
    ("get_act_patch_direct_path", {"src_head": 9}, "src_head must be at most 7"),
    *(
        line
        for name in ("get_act_patch_direct_path", "get_act_patch_direct_path_all_sources")
        for line in (
            *choice(name, "component"),
            (name, {"corrupted_cache": 3}, "corrupted_cache maps hook names"),
            (name, {"corrupted_cache": {}}, "The corrupted cache has no"),
        )
    ),
    ("make_df_from_ranges", {"column_max_ranges": 3}, "column_max_ranges is a list"),
    ("make_df_from_ranges", {"column_max_ranges": [-1, 2]}, "an entry of column_max_ranges must be at least 0"),
    ("make_df_from_ranges", {"column_names": 3}, "column_names is a list"),
    ("make_df_from_ranges", {"column_names": ["layer"]}, "column_names and column_max_ranges"),
    *number("bootstrap_ci", "confidence", 0.0, 1.5),
    ("bootstrap_ci", {"confidence": 1.0}, "confidence must be below 1"),
    *whole("bootstrap_ci", "n_resamples", 1),
    *whole("bootstrap_ci", "seed"),
    *choice("bootstrap_ci", "statistic"),
    *whole("permutation_pvalue", "n_permutations", 1),
    *whole("permutation_pvalue", "seed"),
    *choice("permutation_pvalue", "alternative"),
    ("normalized", {"clean_baseline": "x"}, "clean_baseline is the metric"),
    ("normalized", {"clean_baseline": torch.ones(3)}, "clean_baseline must have the shape"),
]
