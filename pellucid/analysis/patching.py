"""Activation patching: put one run's activation into another run, place by place, and see what the metric does.

*Denoising* edits the corrupted run with the clean run's values: what is enough to bring the answer back. *Noising* edits
the clean run with the corrupted run's: what is needed for it (Heimersheim and Nanda 2024, arXiv 2404.15255). Metrics:
Zhang and Nanda (2024, arXiv 2309.16042), who advise logit difference and corrupting by exchanging tokens. Normalised values
are 0 at the corrupted run's metric and 1 at the clean run's, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
import xarray as xr
from torch import Tensor

from pellucid.analysis.cells import (
    NeuronGroups,
    Prompts,
    Site,
    about_run,
    check_by,
    find_site,
    make_grid,
    read_prompts,
    refuse_different_lengths,
)
from pellucid.analysis.labelled import (
    LabelledSweep,
    Reference,
    Rows,
    about_metrics,
    between,
    check_scores,
    in_float32,
    switched,
)
from pellucid.arguments import check_choice, check_memory_limit
from pellucid.errors import InputError
from pellucid.model_bridge.tokens import PaddingSide, TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import Flag
from pellucid.sweep import FromRun, MetricLike, Sweep
from pellucid.sweep.edits import Index
from pellucid.sweep.engine import ROWS_AT_ONCE

Direction: TypeAlias = Literal["denoising", "noising"]


def activation_patching(
    bridge: TransformerBridge,
    clean: TextOrTokens,
    corrupted: TextOrTokens,
    metric: MetricLike | Mapping[str, MetricLike],
    site: str = "resid_pre",
    by: str | Sequence[str] | None = None,
    *,
    direction: Direction = "denoising",
    normalize: bool = True,
    rows: Rows = "mean",
    layers: Index = None,
    positions: Index = None,
    heads: Index = None,
    neurons: int | NeuronGroups | None = None,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
    progress: bool | None = None,
    on_interrupt: Literal["raise", "return"] = "raise",
) -> xr.DataArray:
    """Patch every place of a site, one after the other, from one run into another.

    Args:
        bridge: the model, in eval mode.
        clean: prompt or prompts on which the model does what is studied: text, texts, or ids ``[row, pos]``.
        corrupted: their counterparts, of as many tokens row by row.
        metric: a metric of :mod:`pellucid.sweep`, such as ``LogitDifference(answer, foil)``; a function of logits
            ``[row, pos, d_vocab]`` that gives a number, or one a row; or several by name.
        site: ``resid_pre``, ``resid_mid``, ``attn_out``, ``mlp_out``, ``z``, ``q``, ``k``, ``v``, ``pattern``,
            ``mlp_post`` or any other hook of a block; see :mod:`pellucid.analysis.cells`.
        by: axes of the result, of ``layer``, ``pos``, ``head``, ``key_pos``, ``neuron``, ``group``. What is not named is
            patched together. By default ``("layer", "head")`` where the site has heads, else ``("layer", "pos")``.
        direction: ``"denoising"`` edits the corrupted run, ``"noising"`` the clean one.
        normalize: 0 for the corrupted run's metric, 1 for the clean run's; else the metric itself.
        rows: ``"mean"``, or ``"each"`` for an axis ``row``.
        layers: which layers; by default all.
        positions: which positions; by default all.
        heads: which heads; by default all.
        neurons: with ``neuron`` in ``by`` how many consecutive neurons a cell has; with ``group`` the groups,
            ``{name: {layer: neurons}}``.
        attention_mask: ``[row, pos]`` of both runs, 1 at real tokens; inferred for texts.
        prepend_bos: put the beginning-of-sequence token before texts.
        padding_side: of shorter texts.
        logit_positions: the positions that a function may read; by default it is found out.
        memory_limit: bytes that all of it may take beside the model; by default half of what is available.
        rows_at_once: packed rows that go through a block together.
        progress: show a bar on standard error; by default on a terminal.
        on_interrupt: at a KeyboardInterrupt raise it, or return what is done, with NaN elsewhere.

    Returns:
        ``[*by]`` (with several metrics ``[metric, *by]``; with ``rows="each"`` a last axis ``row``), coordinates
        ``layer``, ``pos``, ``head``, ..., and ``token``, the edited run's token at each position. A position that is
        padding in some rows is the mean of the others, NaN if in all. ``attrs`` has what it was made from.

    Raises:
        InputError: prompts of different token counts, an axis the site does not have, an index out of range, runs between
            which the metric does not differ, a model in training mode.
        HookNameError: no such site.
    """
    check_choice("on_interrupt", on_interrupt, ("raise", "return"))
    return prepare_activation_patching(
        bridge,
        clean,
        corrupted,
        metric,
        site,
        by,
        direction=direction,
        normalize=normalize,
        rows=rows,
        layers=layers,
        positions=positions,
        heads=heads,
        neurons=neurons,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        padding_side=padding_side,
        logit_positions=logit_positions,
        memory_limit=memory_limit,
        rows_at_once=rows_at_once,
    ).run(progress=progress, on_interrupt=on_interrupt)


def prepare_activation_patching(
    bridge: TransformerBridge,
    clean: TextOrTokens,
    corrupted: TextOrTokens,
    metric: MetricLike | Mapping[str, MetricLike],
    site: str = "resid_pre",
    by: str | Sequence[str] | None = None,
    *,
    direction: Direction = "denoising",
    normalize: bool = True,
    rows: Rows = "mean",
    layers: Index = None,
    positions: Index = None,
    heads: Index = None,
    neurons: int | NeuronGroups | None = None,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    logit_positions: Sequence[int] | None = None,
    memory_limit: int | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> LabelledSweep:
    """The same as :func:`activation_patching`, up to the sweep: ``print(prepared.plan())``, then ``prepared.run()``.

    The source run is computed here, and the metric of both runs if values are to be normalised.
    """
    check_memory_limit(memory_limit)
    check_choice("direction", direction, ("denoising", "noising"))
    check_choice("rows", rows, ("mean", "each"))
    found = find_site(bridge, site, layers)
    words = check_by(found, by if by is not None else default_by(found))
    pair = {
        "clean": read_prompts(bridge, clean, attention_mask, prepend_bos, padding_side),
        "corrupted": read_prompts(bridge, corrupted, attention_mask, prepend_bos, padding_side),
    }
    refuse_different_lengths(pair["clean"], pair["corrupted"], ("clean", "corrupted"))
    base_name, source_name = ("corrupted", "clean") if direction == "denoising" else ("clean", "corrupted")
    base, source = pair[base_name], pair[source_name]
    cache: dict[str, Tensor] = {}
    grid = make_grid(
        bridge, base, found, words, lambda spec: FromRun(cache), positions=positions, heads=heads, neurons=neurons
    )
    tokens, mask = base.input()
    make_sweep = partial(
        Sweep,
        bridge,
        tokens,
        metric,
        attention_mask=mask,
        logit_positions=logit_positions,
        rows_at_once=rows_at_once,
    )
    make_sweep()  # refuses what it cannot do, before the source is run
    cache |= keep(bridge, source, [spec.name for spec in found.specs.values()], found.flags)
    limit = left_of(memory_limit, cache)
    sweep = make_sweep(memory_limit=limit)
    reference = Reference("metric")
    scores: dict[str, list[float]] = {}
    if normalize:
        ends = {
            name: score_of(bridge, prompts, sweep.metrics, logit_positions, rows, rows_at_once, limit)
            for name, prompts in pair.items()
        }
        reference = between(ends["corrupted"], ends["clean"], rows, ("corrupted", "clean"))
        scores = {name: [float(score.double().mean()) for score in end.values()] for name, end in ends.items()}
    about = about_run(
        bridge,
        "activation patching",
        site=found.name,
        hooks=[spec.name for spec in found.specs.values()],
        direction=direction,
        base_run=base_name,
        clean=pair["clean"].text(),
        corrupted=pair["corrupted"].text(),
        differs=differing(pair["clean"], pair["corrupted"]),
        **about_metrics(metric, reference.kind),
        **{f"{name}_metric": values for name, values in scores.items()},
    )
    return LabelledSweep(sweep, grid, reference, about, rows, isinstance(metric, Mapping), found.flags)


def default_by(site: Site) -> tuple[str, ...]:
    """Layer and head where the site has heads, else layer and position."""
    second = "head" if "head" in site.words else "pos"
    return tuple(word for word in ("layer", second) if word in site.words)


def keep(
    bridge: TransformerBridge, prompts: Prompts, names: Sequence[str], flags: Sequence[Flag] = ()
) -> dict[str, Tensor]:
    """Activations of one run, by hook name, ``[row, ...]``."""
    if bridge.hf_model.training:
        raise InputError(
            "The model is in training mode, where dropout makes every run another. Call bridge.eval() first."
        )
    tokens, mask = prompts.input()
    with torch.no_grad(), switched(bridge, flags):
        _, cache = bridge.run_with_cache(
            tokens,
            attention_mask=mask,
            names_filter=list(names),
            return_type=None,
            return_cache_object=False,
        )
    return dict(cache)


def left_of(memory_limit: int | None, kept: Mapping[str, Tensor]) -> int | None:
    """What a memory limit leaves a sweep beside activations that are kept already.

    Raises:
        InputError: nothing.
    """
    if memory_limit is None:
        return None
    taken = sum(tensor.nbytes for tensor in kept.values())
    if memory_limit <= taken:
        raise InputError(
            f"memory_limit={memory_limit:,} bytes is too little: the activations to patch from take {taken:,}. Give more, "
            "or fewer layers at a time."
        )
    return memory_limit - taken


def score_of(
    bridge: TransformerBridge,
    prompts: Prompts,
    metrics: Mapping[str, MetricLike],
    logit_positions: Sequence[int] | None,
    rows: Rows,
    rows_at_once: int,
    memory_limit: int | None,
) -> dict[str, Tensor]:
    """Each metric of an unedited run, in float32 at least."""
    tokens, mask = prompts.input()
    run = Sweep(
        bridge,
        tokens,
        metrics,
        attention_mask=mask,
        logit_positions=logit_positions,
        memory_limit=memory_limit,
        rows_at_once=rows_at_once,
    )
    scores = in_float32(run.run([]).base)
    check_scores(scores, prompts.n_rows, rows)
    return scores


def differing(one: Prompts, other: Prompts) -> list[int]:
    """Columns at which any row has another token."""
    columns: list[int] = (one.tokens != other.tokens).any(0).nonzero().flatten().tolist()
    return columns
