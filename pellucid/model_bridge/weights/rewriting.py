"""Weight processing on a live model: what is legal is decided first, then one part after another is changed for good.

The model is taken in *units*: the unembedding with the final norm, the embedding with its norm, and each block. The new
weights of a unit are computed beside it, checked, and written into the storage that is there, so that views, optimisers
and other references stay valid and no second model is ever in memory. Each unit's change alone keeps the function: a
call that is interrupted between two units leaves a correct model, and a repeat does the rest. Within a unit Ctrl-C
waits, and if writing fails the unit is put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pellucid.errors import WeightError
from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.weights.all_or_nothing import undisturbed, write_all
from pellucid.model_bridge.weights.form import form_of, norm_of, shift_of, working_dtype_of
from pellucid.model_bridge.weights.legality import Request, refuse_illegal
from pellucid.model_bridge.weights.record import (
    Unit,
    WeightsRecord,
    chunks,
    concerns,
    is_tied,
    record_of,
    steps_still_valid,
    units_of,
)
from pellucid.model_bridge.weights.unembedding_table import TableChange, bias_of, head_of, untie, weight_path
from pellucid.progress import progress_bar
from pellucid.weight_processing import (
    STEPS,
    Step,
    centred_rows,
    embedding_gain,
    mean_square,
    process_block,
    rows_for_gain,
)

LARGE = 3 * 10**8
"""Parameters from which on a progress bar is shown, on a terminal."""


# -- doing it ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a call did: steps that it applied, and asked ones that were there already."""

    applied: frozenset[Step]
    already: frozenset[Step]


def process(tree: ComponentTree, request: Request, verbose: bool = False, progress: bool | None = None) -> Outcome:
    """Process a model's weights in place, unit by unit.

    Args:
        tree: the model's components.
        request: which steps and how.
        verbose: print a line a unit.
        progress: show a bar; by default for large models on a terminal.

    Raises:
        WeightError: the call is not legal for this model; nothing was changed.
    """
    refuse_illegal(tree, request)
    record = record_of(tree)
    already: set[Step] = set()
    applied: set[Step] = set()
    todo: dict[Unit, frozenset[Step]] = {}
    for unit in units_of(tree.cfg):
        has = steps_still_valid(tree, unit)
        asked = request.steps & concerns(unit)
        if unit == "unembed" and record.on_access and not request.keep_tied and "fold_ln" in asked:
            has -= {"fold_ln"}
        already |= asked & has
        if asked - has:
            applied |= asked - has
            todo[unit] = asked | has  # steps keep each other's invariants only when they run together
    # A parameter made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        processor = Processor(tree, request, record)
        for unit in _watched(list(todo), tree, progress):
            processor.process(unit, todo[unit])
            if verbose:
                print(f"{unit}: {', '.join(step for step in STEPS if step in todo[unit])}")  # noqa: T201 (asked for)
    return Outcome(frozenset(applied), frozenset(already - applied))


def _watched(units: list[Unit], tree: ComponentTree, progress: bool | None) -> Any:
    if progress is None and sum(parameter.numel() for parameter in tree.root.parameters()) < LARGE:
        progress = False
    return progress_bar(units, total=len(units), desc="process weights", unit="unit", show=progress)


class Processor:
    """Applies steps to the units of one model.

    Args:
        tree: its components.
        request: what the call asked for.
        record: what was done before, kept up to date.
    """

    def __init__(self, tree: ComponentTree, request: Request, record: WeightsRecord) -> None:
        self.tree, self.request, self.record = tree, request, record
        self._spare: list[Tensor] = []  # a block's old values while it is written
        if request.keep_originals and record.originals is None:
            record.originals, record.was_tied = {}, is_tied(tree)

    def process(self, unit: Unit, steps: frozenset[Step]) -> None:
        """Apply ``steps`` to ``unit``, all or nothing; the record says so in the very section that writes."""
        if unit == "unembed":
            self._unembed(steps)
        elif unit == "embed":
            self._embed(steps)
        else:
            self._block(unit, steps)

    def _is_done(self, unit: Unit, steps: frozenset[Step]) -> None:
        self.record.done[unit] = steps

    def _block(self, unit: Unit, steps: frozenset[Step]) -> None:
        block = self.tree.components[unit]
        targets = block.weight_targets()
        form = form_of(self.tree, block)
        needed = {key for step in steps for key in form.keys(step)}
        places = {key: targets[key]()[0] for key in targets if key in needed}
        old = {key: self._wide(place.storage.detach().reshape(place.shape)) for key, place in places.items()}
        new = process_block(old, steps, self.tree.cfg.n_heads, form)
        rounded = {key: new.pop(key).to(places[key].storage.dtype) for key in list(new)}
        writes = block.plan_writes(rounded)
        self._remember(unit)
        write_all([(write.target, write.value) for write in writes], self._spare, partial(self._is_done, unit, steps))

    def _wide(self, weight: Tensor) -> Tensor:
        return weight.to(working_dtype_of(self.tree, weight.dtype))

    # -- the two tables ------------------------------------------------------------------------------------------------

    def _unembed(self, steps: frozenset[Step]) -> None:
        head, norm = head_of(self.tree), self.tree.components["ln_final"]
        tied = is_tied(self.tree)
        if tied and self.request.keep_tied:
            self._is_done("unembed", steps)
            self.record.on_access = True
            return
        fold, centre = "fold_ln" in steps, "center_unembed" in steps
        change = TableChange.of(self.tree, fold, centre)
        if tied and not change.needed:
            self._is_done("unembed", steps)
            return
        self._remember("unembed", "ln_final")
        old = head.weight.detach()
        if old.dtype == torch.float16:
            change.refuse_overflow(old)
        if tied:
            new = torch.empty_like(old)
            bias = change.write(old, new, bias_of(head))
            with undisturbed(), self._at_risk("unembed"):
                untie(self.tree, new)
                self._finish_unembed(head, norm, bias, steps)
            return
        with undisturbed(), self._at_risk("unembed"):
            bias = change.write(old, old, bias_of(head))
            self._finish_unembed(head, norm, bias, steps)

    def _finish_unembed(
        self, head: nn.Linear, norm: GeneralizedComponent, bias: Tensor | None, steps: frozenset[Step]
    ) -> None:
        if bias is not None and bias_of(head) is not None:
            head.bias.copy_(bias)
        elif bias is not None:
            head.register_parameter("bias", nn.Parameter(bias, requires_grad=head.weight.requires_grad))
        if "fold_ln" in steps:
            norm.module.weight.fill_(norm_of(norm).unit_weight)
            if (shift := shift_of(norm)) is not None:
                shift.zero_()
        self._is_done("unembed", steps)
        self.record.on_access = False

    def _embed(self, steps: frozenset[Step]) -> None:
        if "embed_ln" in self.tree.components:
            self._embed_behind_norm(steps)
            return
        tables = [cast(Tensor, self.tree.components[name].module.weight).detach() for name in self._embeddings()]
        if is_tied(self.tree):
            self._remember("unembed")
            untie(self.tree, tables[0].clone())
        self._remember(*self._embeddings())
        with undisturbed(), self._at_risk("embed"):
            for rows in (rows for table in tables for rows in chunks(table)):
                wide = self._wide(rows)
                rows.copy_(wide - wide.mean(-1, keepdim=True))
            self._is_done("embed", steps)

    def _embeddings(self) -> list[str]:
        """What writes to the stream before the blocks."""
        return [name for name in ("embed", "pos_embed") if name in self.tree.components]

    def _embed_behind_norm(self, steps: frozenset[Step]) -> None:
        table = cast(Tensor, self.tree.components["embed"].module.weight).detach()
        norm = cast(nn.LayerNorm, self.tree.components["embed_ln"].module)
        gain, shift = norm.weight.detach(), norm.bias.detach()
        if bool((gain == gain[0]).all()) and not bool(shift.any()):
            self._is_done("embed", steps)  # a normalised vector times one number has mean zero already
            return
        if is_tied(self.tree):
            self._remember("unembed")
            untie(self.tree, table.clone())
        self._remember("embed", "embed_ln")
        eps = float(norm.eps)
        power = max(float(mean_square(centred_rows(rows, gain, shift, eps)).max()) for rows in chunks(table))
        scale = embedding_gain(power, gain.dtype)
        with undisturbed(), self._at_risk("embed"):
            for rows in chunks(table):
                rows.copy_(rows_for_gain(centred_rows(rows, gain, shift, eps), scale, eps))
            gain.fill_(scale)
            shift.zero_()
            self._is_done("embed", steps)

    # -- originals -----------------------------------------------------------------------------------------------------

    def _remember(self, *components: str) -> None:
        """Keep copies of their parameters before the first change, if that was asked for."""
        originals = self.record.originals
        if originals is None:
            return
        tied = weight_path(self.tree, "unembed") if self.record.was_tied else ""
        for component in (self.tree.components[name] for name in components):
            for name, parameter in component.module.named_parameters():
                path = f"{component.path}.{name}"
                if path not in originals and path != tied:
                    originals[path] = parameter.detach().to("cpu", copy=True)

    @contextmanager
    def _at_risk(self, unit: Unit) -> Iterator[None]:
        """While a table is rewritten in place, chunk by chunk: there is no room for a second one to go back to."""
        try:
            yield
        except BaseException as error:
            self.record.damaged = unit
            way = "unprocess_weights() restores it." if self.record.originals is not None else "Load the model again."
            raise WeightError(f"{unit} could not be rewritten ({error!r}) and is left half done. {way}") from error
