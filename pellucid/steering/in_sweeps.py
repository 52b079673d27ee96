"""Steering as edits of a sweep: many of them on one run, computed together (:mod:`pellucid.sweep`).

A sweep's edit names columns of a base run with their padding; steering's names positions of a row, whichever run it is in.
Of a given input the one is the other: an edit for each row, at the columns that its positions are.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Shaped
from torch import Tensor

from pellucid.arguments import check_kind
from pellucid.errors import InputError
from pellucid.experiments.options import SweepOptions
from pellucid.experiments.places import read_prompts
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.run_context import RunContext
from pellucid.steering.changes import Resample
from pellucid.steering.edit_hooks import EditHook
from pellucid.steering.edits import Edit, Steering
from pellucid.steering.positions import selected
from pellucid.sweep import Apply
from pellucid.sweep import Edit as SweepEdit


def sweep_edits(
    steering: Steering,
    bridge: TransformerBridge,
    input: TextOrTokens,
    attention_mask: Shaped[Tensor, "row pos"] | None = None,
    prepend_bos: bool | None = None,
) -> list[SweepEdit]:
    """Steering as one entry of a sweep over ``input``: ``Sweep(bridge, input, metric).run([sweep_edits(...), ...])``.

    Args:
        steering: the edits; together they are one run.
        bridge: the model.
        input: that of the sweep, as for ``attention_mask`` and ``prepend_bos``.
        attention_mask: ``[row, pos]``, 1 at real tokens; found out for texts.
        prepend_bos: see ``bridge.to_tokens``.

    Raises:
        InputError: an edit that a single forward does not have (generation steps, generated positions), whose positions no
            row has, or that draws samples; see :meth:`Edit.hooks`.
        HookNameError: a hook or site that the model does not have.
    """
    check_kind("steering", steering, Steering, "a Steering")
    prompts = read_prompts(bridge, input, SweepOptions(attention_mask=attention_mask, prepend_bos=prepend_bos))
    run = RunContext(prompts.tokens, 0, prompts.tokens, prompts.attention_mask, None)
    return [made for edit in steering.edits for made in _of_edit(edit, bridge, run)]


def _of_edit(edit: Edit, bridge: TransformerBridge, run: RunContext) -> list[SweepEdit]:
    if isinstance(edit.change, Resample):
        raise InputError("Resample draws by row and position of a run: in a sweep, take pellucid.sweep.FromRun.")
    rows = selected(run, edit.positions, edit.steps)
    if not bool(rows.any()):
        raise InputError(f"{edit} acts nowhere in the {rows.shape[1]} columns of this input, which is no generation.")
    return [
        SweepEdit(
            hook.name,
            Apply(_arithmetic(hook, run)),
            positions=chosen.nonzero().flatten().tolist(),
            heads=edit.heads,
            neurons=edit.neurons,
            rows=row,
        )
        for hook in edit.hooks(bridge)
        for row, chosen in enumerate(rows)
        if bool(chosen.any())
    ]


def _arithmetic(hook: EditHook, run: RunContext) -> Callable[[Tensor], Tensor]:
    """The change of a region ``[pos, *region]`` of one row."""

    def new(current: Tensor) -> Tensor:
        value = hook.of_region(current)
        return hook.change.new(current[None], value, run)[0]

    return new
