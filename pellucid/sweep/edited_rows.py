"""What each edit makes necessary: from which layer on, and at which columns.

An edit is one *edited row* for each row of the base run that it changes. It enters the model at its first *stage* (the
embedding, a layer, or the final norm), at the columns that it changes there. Attention is causal, so from then on it
differs from the base run only at columns from its first one on, and in the last layer only the columns that the metric
reads are wanted. An edited row whose columns cannot reach what is read is the base run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pellucid.names import BEFORE_BLOCKS, HookSpec
from pellucid.sweep.edits import Apply, Write

EMBEDDING = -1
"""The stage before the first layer."""


def fires_by_group(spec: HookSpec) -> bool:
    """Whether a hook fires once for each group of packed rows: scores, pattern ``[edited row, n_heads, pos, key_pos]``."""
    return "key_pos" in spec.axes


def stage_of(spec: HookSpec, n_layers: int) -> int:
    """Where in the model a hook fires: a layer, :data:`EMBEDDING`, or ``n_layers`` for what follows the last."""
    if spec.layer is not None:
        return spec.layer
    return EMBEDDING if spec.component in BEFORE_BLOCKS else n_layers


@dataclass(eq=False)
class EditedRow:
    """One row of one edit, as far as it differs from the base run.

    Attributes:
        edit: which edit.
        row: which row of the base run.
        stage: where it enters.
        writes: what it changes, by stage.
        columns: columns at which it enters, ascending.
        first: the first column that it changes anywhere.
    """

    edit: int
    row: int
    stage: int
    writes: Mapping[int, list[Write]]
    columns: tuple[int, ...]
    first: int


def make_edited_row(
    edit: int,
    writes: Sequence[Write],
    sites: Mapping[str, Tensor],
    n_layers: int,
    length: int,
    read: frozenset[int],
) -> EditedRow | None:
    """One row of an edit, ``None`` if it is the base run's.

    Args:
        edit: which edit.
        writes: all its writes in one row.
        sites: the base run's activations.
        n_layers: layers of the model.
        length: columns of the sequence.
        read: columns that the metric reads in this row.
    """
    kept = [write.where_it_changes(sites[write.spec.name]) for write in writes]
    if not any(write.kept for write in kept):
        return None  # nothing ever changes, so nothing later does
    by_stage: dict[int, list[Write]] = {}
    first_stage = min(stage_of(write.spec, n_layers) for write in kept if write.kept)
    for write, changed in zip(writes, kept, strict=True):
        stage = stage_of(write.spec, n_layers)
        # Where it enters it still is the base run's, and a write that changes nothing there is left out; several
        # writes in that stage may meet, and later it is another, so there they stay as they were declared.
        alone = stage == first_stage and sum(stage_of(w.spec, n_layers) == stage for w in writes) == 1
        chosen = changed if alone else write
        if stage >= first_stage and chosen.kept:
            by_stage.setdefault(stage, []).append(chosen)
    first = min(column for chosen in by_stage.values() for write in chosen for column in write.columns)
    entering = by_stage[first_stage]
    spreads = first_stage < n_layers and any(write.spec.reach == "later" for write in entering)
    touched = {column for write in entering for column in write.columns}
    if first_stage == n_layers - 1 and len(by_stage) > 1 and not spreads and not read & touched:
        # What is written in the last layer stays in columns that nobody reads; left are the edits after it.
        later = [write for write in writes if stage_of(write.spec, n_layers) == n_layers]
        return make_edited_row(edit, later, sites, n_layers, length, read)
    columns = tuple(range(min(touched), length)) if spreads else tuple(sorted(touched))
    # With no attention left to go through, an edit stays in its column.
    stays = len(by_stage) == 1 and (first_stage == n_layers or (first_stage == n_layers - 1 and not spreads))
    if not (read & touched if stays else any(column >= first for column in read)):
        return None
    return EditedRow(edit, writes[0].row, first_stage, by_stage, columns, first)


def needs_whole(writes: Sequence[Write]) -> bool:
    """Whether an edit can only be made on whole activations: a function that looks at several positions at once."""
    return any(isinstance(write.value, Apply) and len(write.declared) > 1 for write in writes)
