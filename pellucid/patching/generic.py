"""The one function behind all others: sweep an index, patch each cell, score it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, overload

import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.arguments import check_function, check_mapping, check_text, check_texts
from pellucid.errors import InputError
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.places import refuse_mid
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import get_act_name, nearest
from pellucid.patching.cells import Cell, CorruptedRun, PatchSetter, Reduce, cell_of, metrics_of, reduced, run_cells
from pellucid.patching.result import PatchingResult, make_df_from_ranges
from pellucid.sweep import MetricLike

AxisNames: TypeAlias = Literal["layer", "pos", "head_index", "head", "src_pos", "dest_pos"]
"""Axes that an index can be made of by name."""


@overload
def generic_activation_patch(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    patching_metric: MetricLike,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[AxisNames] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: Literal[False] = False,
    *,
    reduce: Literal["scalar", "mean"] = "scalar",
    baseline: Literal[False] = False,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    verbose: bool = True,
) -> Float[Tensor, "*axes"]: ...


@overload
def generic_activation_patch(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    patching_metric: MetricLike,
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[AxisNames] | None = None,
    index_df: pd.DataFrame | None = None,
    *,
    return_index_df: Literal[True],
    reduce: Literal["scalar", "mean"] = "scalar",
    baseline: Literal[False] = False,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    verbose: bool = True,
) -> tuple[Float[Tensor, "*axes"], pd.DataFrame]: ...


@overload
def generic_activation_patch(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    patching_metric: MetricLike | Mapping[str, MetricLike],
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[AxisNames] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    reduce: Reduce = "scalar",
    baseline: bool = False,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    verbose: bool = True,
) -> Float[Tensor, "*axes"] | tuple[Float[Tensor, "*axes"], pd.DataFrame] | PatchingResult: ...


def generic_activation_patch(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    patching_metric: MetricLike | Mapping[str, MetricLike],
    patch_setter: PatchSetter,
    activation_name: str,
    index_axis_names: Sequence[AxisNames] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    reduce: Reduce = "scalar",
    baseline: bool = False,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    verbose: bool = True,
) -> Float[Tensor, "*axes"] | tuple[Float[Tensor, "*axes"], pd.DataFrame] | PatchingResult:
    """Run the corrupted prompt, once for each cell of an index, with part of one activation patched; score each run.

    Activation patching as in Meng et al. (2022, arXiv 2202.05262) and Zhang and Nanda (2024, arXiv 2309.16042): what of
    the clean run, put into the corrupted one, brings the clean answer back. The numbers are those of one forward for each
    cell; only what each patch can change is computed (:mod:`pellucid.sweep`).

    Args:
        model: the bridge, in eval mode.
        corrupted_tokens: ``[batch, pos]`` token ids of the corrupted run; strings are tokenised.
        clean_cache: the clean run's activations: of ``run_with_cache``, or any mapping from hook names.
        patching_metric: a function of logits ``[batch, pos, d_vocab]``, one of our metrics
            (:mod:`pellucid.sweep.metrics`), or several by name. A function gives one number, or ``[batch]`` numbers where
            ``reduce`` says so; its logits are computed where it reads them and cannot be written to.
        patch_setter: ``setter(corrupted_activation, index, clean_activation)``: may change its first argument, a copy, or
            return another tensor; see :mod:`pellucid.patching.setters`.
        activation_name: TransformerLens' short name: ``"resid_pre"``, ``"z"``, ``"pattern"``, ...
        index_axis_names: axes to sweep, the layer first: all combinations of ``layer``, ``pos``, ``head`` (or
            ``head_index``), ``dest_pos``, ``src_pos``. Of keys and values that several queries share, a head is one of
            ``n_key_value_heads``.
        index_df: in place of that, the combinations, a row each, the layer in the first column. The result is then flat.
        return_index_df: return the index too; a :class:`PatchingResult` always has it.
        reduce: ``"scalar"``: a function gives one number. ``"mean"``: ``[batch]`` numbers, averaged. ``"none"``:
            ``[batch]`` numbers, kept. Metrics of ours score rows in any case, averaged unless ``"none"``.
        baseline: also score the corrupted run itself.
        attention_mask: ``[batch, pos]``, 1 at real tokens; inferred for strings.
        logit_positions: the positions that a function may read; reading another is an error. By default it is found out.
        memory_limit: bytes that the sweep may take beside the model; by default half of what is available.
        verbose: show a progress bar on a terminal.

    Returns:
        ``[*axes]`` or ``[row of index_df]``, in the default dtype (float64 for a float64 model), on the model's device;
        with ``return_index_df`` that and the index. A :class:`PatchingResult` where ``reduce="none"``, ``baseline=True`` or
        several metrics were asked for.

    Raises:
        InputError: the model is in training mode; the arguments contradict each other; a metric gives another shape than
            ``reduce`` says, or writes to its logits.
        HookNameError: no activation is called that.
        HookDisabledError: it is opt-in and off.
        HookValueError: a setter gave another shape, dtype or device.
        CacheKeyError: the clean run did not keep it.
        UnsupportedModelError: the residual between attention and MLP, where both run in parallel.
    """
    check_text("activation_name", activation_name)
    check_function("patch_setter", patch_setter, "a function of an activation, an index and the clean activation")
    check_mapping("clean_cache", clean_cache, "hook names to activations, as run_with_cache gives it")
    metrics = metrics_of(patching_metric, reduce)
    has_metric_axis = isinstance(patching_metric, Mapping)
    want_result = has_metric_axis or reduce == "none" or baseline
    if want_result and return_index_df:
        raise InputError(
            "return_index_df=True goes with a tensor. With several metrics, reduce='none' or baseline=True a PatchingResult "
            "is returned, which has index_df: leave return_index_df out."
        )
    options = SweepOptions(attention_mask=attention_mask, logit_positions=logit_positions, memory_limit=memory_limit)
    run = CorruptedRun(model, corrupted_tokens, metrics, options, verbose)
    axis_names, index, shape = index_of(run, activation_name, index_axis_names, index_df)
    cells = cells_of(model, activation_name, index, patch_setter)
    values, base = score_cells(run, cells, clean_cache, reduce)
    values = values.unflatten(1, shape) if shape else values[:, 0]
    if not want_result:
        return (values[0], index) if return_index_df else values[0]
    return PatchingResult(
        values=values if has_metric_axis else values[0],
        axis_names=axis_names,
        index_df=index,
        metric_names=list(metrics),
        reduced=reduce != "none",
        baseline=None if not baseline else base if has_metric_axis else base[0],
        has_metric_axis=has_metric_axis,
    )


def index_of(
    run: CorruptedRun, activation_name: str, index_axis_names: Sequence[str] | None, index_df: pd.DataFrame | None
) -> tuple[list[str], pd.DataFrame, tuple[int, ...]]:
    """Names of the axes, the index, and the shape of the result.

    Raises:
        InputError: both or neither are given; an axis is unknown, comes twice, or the layer is not the first.
    """
    if (index_axis_names is None) == (index_df is None):
        raise InputError(
            f"Give either index_axis_names or index_df; {'neither was' if index_df is None else 'both were'} given. The "
            "get_act_patch functions come with their axes: with an index_df pass index_axis_names=None to them."
        )
    if index_df is not None:
        if not isinstance(index_df, pd.DataFrame):
            raise InputError(f"index_df is a pandas data frame with a row for each cell; found {index_df!r}.")
        return [], index_df, (len(index_df),)
    assert index_axis_names is not None
    names = check_texts("index_axis_names", index_axis_names)
    length = run.sweep().tokens.shape[1]  # of a sweep, which refuses what it cannot do before an index is made
    cfg = run.model.cfg
    heads = heads_of(run.model, activation_name)
    sizes = {
        "layer": cfg.n_layers,
        "pos": length,
        "head_index": heads,
        "head": heads,
        "src_pos": length,
        "dest_pos": length,
    }
    for name in names:
        if name not in sizes:
            raise InputError(
                f"index_axis_names: no axis is called {name!r}. Nearest: {', '.join(nearest(str(name), sizes))}. For other "
                "indices give an index_df."
            )
    if len(set(names)) != len(names) or names[:1] != ["layer"]:
        raise InputError(f"index_axis_names are different axes, the layer first; found {names}.")
    shape = tuple(sizes[name] for name in names)
    return names, make_df_from_ranges(shape, names), shape


def heads_of(model: TransformerBridge, activation_name: str) -> int:
    """How many heads an activation has: those of keys and values where they are fewer, else those of queries."""
    refuse_mid(model, activation_name)
    axes = model.hook_spec(get_act_name(activation_name, 0)).axes
    return model.cfg.n_key_value_heads if "n_key_value_heads" in axes else model.cfg.n_heads


def cells_of(model: TransformerBridge, activation_name: str, index: pd.DataFrame, setter: PatchSetter) -> list[Cell]:
    """A cell for each row of the index."""
    return [cell_of(model, activation_name, row, setter) for row in index.to_numpy().tolist()]


def score_cells(
    run: CorruptedRun, cells: Sequence[Cell], clean_cache: Mapping[str, Shaped[Tensor, "..."]], reduce: str
) -> tuple[Float[Tensor, "metric cell ..."], Float[Tensor, "metric ..."]]:
    """``[metric, cell, batch?]`` and the corrupted run's own ``[metric, batch?]``."""
    values, base = run_cells(run, cells, clean_cache)
    stacks = [
        torch.stack([reduced(found[name], metric, reduce, run.dtype) for name, metric in run.metrics.items()])
        for found in (values, base)
    ]
    return stacks[0], stacks[1]
