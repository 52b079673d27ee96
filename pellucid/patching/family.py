"""Functions for one activation each, and for several at once: :func:`generic_activation_patch` with its site filled in.

Like TransformerLens' they are partial functions, so every argument of the generic one can still be given by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.errors import UnsupportedModelError
from pellucid.experiments.options import SweepOptions
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.patching.cells import Cell, CorruptedRun, PatchSetter, Reduce, metrics_of
from pellucid.patching.generic import cells_of, generic_activation_patch, index_of, score_cells
from pellucid.patching.result import PatchingResult, make_df_from_ranges
from pellucid.patching.setters import (
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from pellucid.sweep import MetricLike

RENAMED = {"head_index": "head", "dest_pos": "pos"}
"""What axes of a pattern's sweep are called beside those of the other sites."""


@dataclass(frozen=True)
class _Site:
    """What one function patches."""

    what: str
    activation_name: str
    setter: PatchSetter
    axes: tuple[str, ...]

    def function(self) -> partial[Tensor]:
        """:func:`generic_activation_patch` for this site."""
        made = partial(
            generic_activation_patch,
            patch_setter=self.setter,
            activation_name=self.activation_name,
            index_axis_names=self.axes,
        )
        made.__doc__ = (
            f"Patch {self.what}; the result is ``[{', '.join(self.axes)}]``.\n\n"
            "Takes ``(model, corrupted_tokens, clean_cache, patching_metric)`` and the keywords of\n"
            ":func:`generic_activation_patch`, whose documentation has the rest.\n"
        )
        return made


_LAYER_POS = ("layer", "pos")
_LAYER_HEAD = ("layer", "head")
_LAYER_POS_HEAD = ("layer", "pos", "head")


def _stream(what: str, activation_name: str) -> _Site:
    return _Site(f"{what}, one position at a time", activation_name, layer_pos_patch_setter, _LAYER_POS)


def _head_by_pos(what: str, activation_name: str) -> _Site:
    what = f"each head's {what}, one position at a time"
    return _Site(what, activation_name, layer_pos_head_vector_patch_setter, _LAYER_POS_HEAD)


def _head_all_pos(what: str, activation_name: str) -> _Site:
    return _Site(f"each head's {what} at all positions", activation_name, layer_head_vector_patch_setter, _LAYER_HEAD)


_RESID_PRE = _stream("the residual stream entering each block", "resid_pre")
_ATTN_OUT = _stream("what each attention adds to the residual stream", "attn_out")
_MLP_OUT = _stream("what each MLP adds to the residual stream", "mlp_out")
_BY_POS = {
    "out": _head_by_pos("output ``z``", "z"),
    "q": _head_by_pos("queries", "q"),
    "k": _head_by_pos("keys", "k"),
    "v": _head_by_pos("values", "v"),
    "pattern": _Site(
        "each head's attention pattern, one query position at a time",
        "pattern",
        layer_head_pos_pattern_patch_setter,
        ("layer", "head_index", "dest_pos"),
    ),
}
_ALL_POS = {
    "out": _head_all_pos("output ``z``", "z"),
    "q": _head_all_pos("queries", "q"),
    "k": _head_all_pos("keys", "k"),
    "v": _head_all_pos("values", "v"),
    "pattern": _Site(
        "each head's whole attention pattern", "pattern", layer_head_pattern_patch_setter, ("layer", "head_index")
    ),
}

get_act_patch_resid_pre = _RESID_PRE.function()
get_act_patch_resid_mid = _stream("the residual stream between attention and MLP", "resid_mid").function()
get_act_patch_attn_out = _ATTN_OUT.function()
get_act_patch_mlp_out = _MLP_OUT.function()

get_act_patch_attn_head_out_by_pos = _BY_POS["out"].function()
get_act_patch_attn_head_q_by_pos = _BY_POS["q"].function()
get_act_patch_attn_head_k_by_pos = _BY_POS["k"].function()
get_act_patch_attn_head_v_by_pos = _BY_POS["v"].function()
get_act_patch_attn_head_pattern_by_pos = _BY_POS["pattern"].function()
get_act_patch_attn_head_pattern_dest_src_pos = _Site(
    "each entry of each head's attention pattern",
    "pattern",
    layer_head_dest_src_pos_pattern_patch_setter,
    ("layer", "head_index", "dest_pos", "src_pos"),
).function()

get_act_patch_attn_head_out_all_pos = _ALL_POS["out"].function()
get_act_patch_attn_head_q_all_pos = _ALL_POS["q"].function()
get_act_patch_attn_head_k_all_pos = _ALL_POS["k"].function()
get_act_patch_attn_head_v_all_pos = _ALL_POS["v"].function()
get_act_patch_attn_head_pattern_all_pos = _ALL_POS["pattern"].function()


def get_act_patch_attn_head_all_pos_every(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    metric: MetricLike | Mapping[str, MetricLike],
    *,
    reduce: Reduce = "scalar",
    baseline: bool = False,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    verbose: bool = True,
) -> Float[Tensor, "patch_type layer head"] | PatchingResult:
    """Patch each head's output, queries, keys, values and pattern, each at all positions.

    Args:
        model: the bridge, in eval mode.
        corrupted_tokens: ``[batch, pos]``.
        clean_cache: the clean run's activations.
        metric: see ``patching_metric`` of :func:`generic_activation_patch`, which has the other arguments too.
        reduce: what the metric gives.
        baseline: also score the corrupted run itself.
        attention_mask: ``[batch, pos]``.
        logit_positions: the positions that a function may read.
        memory_limit: in bytes.
        verbose: show a progress bar.

    Returns:
        ``[patch_type, layer, head]``, five types in that order; a :class:`PatchingResult` with a ``patch_type`` axis where
        ``reduce="none"``, ``baseline=True`` or several metrics were asked for.

    Raises:
        as :func:`generic_activation_patch`; UnsupportedModelError where several heads of queries share keys and values.
    """
    options = SweepOptions(attention_mask=attention_mask, logit_positions=logit_positions, memory_limit=memory_limit)
    run = CorruptedRun(model, corrupted_tokens, metrics_of(metric, reduce), options, verbose)
    return _every(run, _ALL_POS, _LAYER_HEAD, clean_cache, reduce, baseline, isinstance(metric, Mapping))


def get_act_patch_attn_head_by_pos_every(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    metric: MetricLike | Mapping[str, MetricLike],
    *,
    reduce: Reduce = "scalar",
    baseline: bool = False,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    verbose: bool = True,
) -> Float[Tensor, "patch_type layer pos head"] | PatchingResult:
    """Patch each head's output, queries, keys, values and pattern, one position (of the query) at a time.

    The arguments are those of :func:`get_act_patch_attn_head_all_pos_every`.

    Returns:
        ``[patch_type, layer, pos, head]``, five types in that order; a :class:`PatchingResult` with a ``patch_type`` axis
        where ``reduce="none"``, ``baseline=True`` or several metrics were asked for.

    Raises:
        as :func:`generic_activation_patch`; UnsupportedModelError where several heads of queries share keys and values.
    """
    options = SweepOptions(attention_mask=attention_mask, logit_positions=logit_positions, memory_limit=memory_limit)
    run = CorruptedRun(model, corrupted_tokens, metrics_of(metric, reduce), options, verbose)
    return _every(run, _BY_POS, _LAYER_POS_HEAD, clean_cache, reduce, baseline, isinstance(metric, Mapping))


def get_act_patch_block_every(
    model: TransformerBridge,
    corrupted_tokens: TextOrTokens,
    clean_cache: Mapping[str, Shaped[Tensor, "..."]],
    metric: MetricLike | Mapping[str, MetricLike],
    *,
    reduce: Reduce = "scalar",
    baseline: bool = False,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    verbose: bool = True,
) -> Float[Tensor, "patch_type layer pos"] | PatchingResult:
    """Patch the residual stream entering each block, each attention's and each MLP's contribution, by position.

    The arguments are those of :func:`get_act_patch_attn_head_all_pos_every`.

    Returns:
        ``[patch_type, layer, pos]``, three types in that order; a :class:`PatchingResult` with a ``patch_type`` axis where
        ``reduce="none"``, ``baseline=True`` or several metrics were asked for.

    Raises:
        as :func:`generic_activation_patch`.
    """
    sites = {"resid_pre": _RESID_PRE, "attn_out": _ATTN_OUT, "mlp_out": _MLP_OUT}
    options = SweepOptions(attention_mask=attention_mask, logit_positions=logit_positions, memory_limit=memory_limit)
    run = CorruptedRun(model, corrupted_tokens, metrics_of(metric, reduce), options, verbose)
    return _every(run, sites, _LAYER_POS, clean_cache, reduce, baseline, isinstance(metric, Mapping))


def _every(
    run: CorruptedRun,
    sites: Mapping[str, _Site],
    axes: tuple[str, ...],
    clean_cache: Mapping[str, Tensor],
    reduce: Reduce,
    baseline: bool,
    has_metric_axis: bool,
) -> Tensor | PatchingResult:
    """All sites in one sweep of one base run, stacked with their axes in the order of ``axes``.

    Raises:
        UnsupportedModelError: they have different numbers of heads.
    """
    cfg, title = run.model.cfg, run.model.adapter.family.title
    if "head" in axes and cfg.n_key_value_heads != cfg.n_heads:
        raise UnsupportedModelError(
            f"This {title} has {cfg.n_heads} heads of queries and {cfg.n_key_value_heads} of keys and values, which do not "
            "go into one table. Call the functions of one activation each: get_act_patch_attn_head_k_all_pos, ..._v_..., "
            "..._q_..., ..._out_..., ..._pattern_...."
        )
    cells: list[Cell] = []
    shapes: list[tuple[int, ...]] = []
    for site in sites.values():
        _, index, shape = index_of(run, site.activation_name, site.axes, None)
        cells += cells_of(run.model, site.activation_name, index, site.setter)
        shapes.append(shape)
    flat, base = score_cells(run, cells, clean_cache, reduce)
    parts = []
    sizes = [torch.Size(shape).numel() for shape in shapes]
    for site, shape, part in zip(sites.values(), shapes, flat.split(sizes, dim=1), strict=True):
        names = [RENAMED.get(name, name) for name in site.axes]
        order = [1 + names.index(name) for name in axes]
        part = part.unflatten(1, shape)
        parts.append(part.permute(0, *order, *range(1 + len(axes), part.dim())))
    values = torch.stack(parts, dim=1)
    if not (has_metric_axis or baseline or reduce == "none"):
        return values[0]
    return PatchingResult(
        values=values if has_metric_axis else values[0],
        axis_names=["patch_type", *axes],
        index_df=make_df_from_ranges(values.shape[1 : 2 + len(axes)], ["patch_type", *axes]),
        metric_names=list(run.metrics),
        reduced=reduce != "none",
        baseline=None if not baseline else base if has_metric_axis else base[0],
        has_metric_axis=has_metric_axis,
        patch_type_names=list(sites),
    )
