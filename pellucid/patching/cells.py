"""From patch setters to a sweep: each cell of a patching table is one setter's change, made an edit and scored.

A setter is run on a copy of the corrupted run's own activation, and its answer is compared with it bit for bit: the
smallest box of rows, positions, heads, keys and neurons that holds every change becomes an edit that sets that box.
So whatever a setter does, a sweep computes only what the change can reach, and a setter that changes nothing costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import psutil
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pellucid.arguments import check_choice, check_mapping
from pellucid.errors import CacheKeyError, HookValueError, InputError
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.places import refuse_mid
from pellucid.hook_values import bits_differ
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec, get_act_name
from pellucid.sweep import Edit, EditSet, Metric, MetricLike, SetTo, Sweep, SweepResult
from pellucid.sweep.unedited import Unedited

MetricFn: TypeAlias = Callable[[Tensor], Any]
"""A function of logits ``[batch, pos, d_vocab]``."""

PatchSetter: TypeAlias = Callable[[Tensor, Sequence[int], Tensor], "Tensor | None"]
"""``setter(corrupted_activation, index, clean_activation)``: see :mod:`pellucid.patching.setters`."""

Reduce: TypeAlias = Literal["scalar", "mean", "none"]
"""A metric gives one number a run; one a row, to be averaged; one a row, to be kept."""

REDUCTIONS = ("scalar", "mean", "none")

VALUES, ACTIVATIONS = 8, 4
"""Parts of the memory limit: an eighth for the new values of edits, a quarter for the activations they are made from."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One patch: a setter's change of one activation.

    Attributes:
        hook: canonical name of the activation.
        index: what the setter is given, the layer first.
        setter: the setter.
    """

    hook: str
    index: list[Any]
    setter: PatchSetter


@dataclass(eq=False)
class CorruptedRun:
    """The corrupted run, and how to sweep it.

    Attributes:
        model: the bridge.
        tokens: of the run.
        metrics: by name.
        options: of the sweep.
        verbose: show a progress bar on a terminal.
    """

    model: TransformerBridge
    tokens: TextOrTokens
    metrics: Mapping[str, MetricLike]
    options: SweepOptions
    verbose: bool = True

    _unedited: Unedited | None = field(default=None, init=False)

    @property
    def unedited(self) -> Unedited:
        """The run itself, which all sweeps of it share."""
        if self._unedited is None:  # read here: a warning of it names the first line that is not Pellucid's
            prepared = self.model.check_input(self.tokens, attention_mask=self.options.attention_mask)
            self._unedited = Unedited(self.model, prepared)
        return self._unedited

    def sweep(self, reserved: int = 0) -> Sweep:
        """A sweep of it, with ``reserved`` bytes of the limit kept for the values of edits."""
        return Sweep(
            self.model,
            self.unedited,
            self.metrics,
            logit_positions=self.options.logit_positions,
            memory_limit=self.options.memory_limit,
            reserved=reserved,
        )

    @property
    def progress(self) -> bool | None:
        """For a sweep's bar: shown on a terminal, or not at all."""
        return None if self.verbose else False

    @property
    def dtype(self) -> torch.dtype:
        """Of results: TransformerLens' (the default dtype), but not less than a float64 model's."""
        return torch.promote_types(torch.get_default_dtype(), self.model.dtype)


# -- metrics -----------------------------------------------------------------------------------------------------------


def metrics_of(patching_metric: MetricLike | Mapping[str, MetricLike], reduce: str) -> dict[str, MetricLike]:
    """Metrics by name, those that are plain functions checked for the shape that ``reduce`` asks for.

    Raises:
        InputError: ``reduce`` is not one of its words; there is no metric.
    """
    check_choice("reduce", reduce, REDUCTIONS)
    given = dict(patching_metric) if isinstance(patching_metric, Mapping) else {"metric": patching_metric}
    if not given:
        raise InputError("patching_metric is an empty mapping: give at least one metric.")
    return {
        name: metric if isinstance(metric, Metric) or not callable(metric) else partial(_scored, name, metric, reduce)
        for name, metric in given.items()
    }


def _scored(name: str, metric: MetricFn, reduce: str, logits: Tensor) -> Tensor:
    answer = metric(logits)
    score = answer if isinstance(answer, Tensor) else torch.as_tensor(answer, dtype=torch.float64)
    rows = logits.shape[0]
    if reduce == "scalar" and score.dim():
        raise InputError(
            f"With reduce='scalar' the metric {name!r} must give one number; it gave shape {tuple(score.shape)}. To keep "
            "one number a row use reduce='mean' or reduce='none'."
        )
    if reduce != "scalar" and tuple(score.shape) != (rows,):
        raise InputError(
            f"With reduce={reduce!r} the metric {name!r} must give one number a row, shape {(rows,)}; it gave "
            f"{tuple(score.shape)}."
        )
    return score if score.is_floating_point() else score.double()


def reduced(scores: Shaped[Tensor, "..."], metric: MetricLike, reduce: str, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """``[cell, batch]`` or ``[cell]`` to what ``reduce`` asks for. A metric of ours scores rows whatever is asked."""
    scores = scores.to(dtype)
    by_row = isinstance(metric, Metric) or reduce == "mean"
    return scores.mean(dim=-1) if by_row and reduce != "none" else scores


# -- cells -------------------------------------------------------------------------------------------------------------


def cell_of(model: TransformerBridge, activation_name: str, index: list[Any], setter: PatchSetter) -> Cell:
    """The cell of one row of an index data frame.

    Raises:
        InputError: the row does not begin with a layer.
        HookNameError: no hook point is called that.
        UnsupportedModelError: the residual between attention and MLP, where both run in parallel.
    """
    if not index or isinstance(index[0], bool) or not isinstance(index[0], int):
        raise InputError(
            f"The first column of an index is the layer, a whole number; found {index[0] if index else 'no column'!r}."
        )
    refuse_mid(model, activation_name)
    return Cell(model.hook_spec(get_act_name(activation_name, index[0])).name, index, setter)


def run_cells(
    run: CorruptedRun, cells: Sequence[Cell], clean_cache: Mapping[str, Shaped[Tensor, "..."]]
) -> tuple[dict[str, Shaped[Tensor, "cell ..."]], dict[str, Shaped[Tensor, "..."]]]:
    """Score every cell.

    Returns:
        By metric ``[cell, *score]``, and the unpatched run's own score.
    """
    clean = {name: clean_activation(clean_cache, name) for name in dict.fromkeys(cell.hook for cell in cells)}
    sizes = run.model.estimate_cache(run.tokens, names_filter=list(clean)) if clean else {}
    given = run.options.memory_limit
    limit = given if given is not None else int(psutil.virtual_memory().available) // 2
    share = min(limit // VALUES, len(cells) * max(sizes.values(), default=0))
    results = [
        result
        for group in _groups(cells, sizes, limit // ACTIVATIONS)
        for result in _run_group(run, group, clean, share)
    ]
    values = {name: torch.cat([result.values[name] for result in results]) for name in run.metrics}
    return values, dict(results[0].base)


def _run_group(run: CorruptedRun, cells: Sequence[Cell], clean: Mapping[str, Tensor], share: int) -> list[SweepResult]:
    """Score some cells, a part of them whenever their new values fill ``share`` bytes."""
    sweep = run.sweep(reserved=share)
    base = sweep.base_activations(list(dict.fromkeys(cell.hook for cell in cells)))
    results: list[SweepResult] = []
    edits: list[EditSet] = []
    taken = 0
    for cell in cells:
        edit = edit_of(run.model.hook_spec(cell.hook), base[cell.hook], cell, clean[cell.hook])
        edits.append([] if edit is None else edit)
        taken += 0 if edit is None else _nbytes(edit)
        if taken > share:
            results.append(sweep.run(edits, progress=run.progress))
            edits, taken = [], 0
    if edits or not results:
        results.append(sweep.run(edits, progress=run.progress))
    return results


def _groups(cells: Sequence[Cell], sizes: Mapping[str, int], limit: int) -> Iterator[list[Cell]]:
    """Consecutive cells whose activations together take at most ``limit`` bytes; at least one activation a group."""
    group: list[Cell] = []
    names: set[str] = set()
    for cell in cells:
        if names and cell.hook not in names and sum(sizes[name] for name in names) + sizes[cell.hook] > limit:
            yield group
            group, names = [], set()
        group.append(cell)
        names.add(cell.hook)
    yield group


def clean_activation(
    clean_cache: Mapping[str, Shaped[Tensor, "..."]], name: str, which: str = "clean"
) -> Shaped[Tensor, "..."]:
    """An activation of the clean run (or of the one that ``which`` says).

    Raises:
        CacheKeyError: it was not kept.
    """
    check_mapping(f"{which}_cache", clean_cache, "hook names to activations, as run_with_cache gives it")
    try:
        return clean_cache[name]
    except CacheKeyError:
        raise
    except KeyError:
        raise CacheKeyError(
            f"The {which} cache has no {name}. Keep it: run_with_cache(tokens, names_filter=...), or no filter."
        ) from None


def edit_of(spec: HookSpec, base: Shaped[Tensor, "..."], cell: Cell, clean: Shaped[Tensor, "..."]) -> Edit | None:
    """What a setter changes of the corrupted run's activation, ``None`` for nothing."""
    copy = base.clone()
    with torch.no_grad():
        answer = cell.setter(copy, cell.index, clean)
    new = copy if answer is None else answer
    if not isinstance(new, Tensor) or new.shape != base.shape or new.dtype != base.dtype or new.device != base.device:
        found = f"{tuple(new.shape)} of {new.dtype} on {new.device}" if isinstance(new, Tensor) else repr(type(new))
        raise HookValueError(
            f"The patch setter gave {found} for {spec.name}, index {cell.index}; expected {tuple(base.shape)} of "
            f"{base.dtype} on {base.device}. Nothing is broadcast or cast."
        )
    differs = bits_differ(new.contiguous(), base.contiguous())
    box = [_changed(differs, axis) for axis in range(differs.dim())]
    if not box[0]:
        return None
    where: dict[str, list[int]] = {}
    value = new.detach()
    for axis, word in enumerate(_index_words(spec)):
        # Of features or keys a few are worth an index, most are not: the others are set to what they are.
        most = axis == differs.dim() - 1 and axis != spec.pos_axis and 2 * len(box[axis]) > differs.shape[axis]
        if word is None or most:
            continue
        where[word] = box[axis]
        if axis > 0:  # a value has every row, whichever are edited
            value = value.index_select(axis, torch.tensor(box[axis], device=value.device))
    return Edit(spec.name, SetTo(value), **where)


def _changed(differs: Tensor, axis: int) -> list[int]:
    others = [other for other in range(differs.dim()) if other != axis]
    return (differs.any(dim=others) if others else differs).nonzero().flatten().tolist()


def _index_words(spec: HookSpec) -> list[str | None]:
    """Which argument of an edit picks on each axis of a hook."""
    words: dict[str, str | None] = {
        "batch": "rows",
        "pos": "positions",
        "n_heads": "heads",
        "n_key_value_heads": "heads",
        "key_pos": "keys",
        "1": None,
    }
    return [words.get(axis, "neurons") for axis in spec.axes]


def _nbytes(edit: Edit) -> int:
    assert isinstance(edit.value, SetTo)
    assert isinstance(edit.value.value, Tensor)
    return edit.value.value.nbytes
