"""An edit at one hook point, as an ordinary hook function, and what came of it.

Which positions it acts at is worked out once a forward, for all points of an edit. It gives back the activation with the new
numbers there and its own bits everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pellucid.axes import Index
from pellucid.dtypes import cast, widened
from pellucid.errors import InputError
from pellucid.hook_points import HookPoint
from pellucid.hook_values import bits_differ
from pellucid.model_bridge.weights.hashing import tensor_hash
from pellucid.names import HookSpec
from pellucid.run_context import RunContext
from pellucid.steering.changes import Change
from pellucid.steering.positions import Positions, selected, to_json
from pellucid.tables import BriefFields

Chosen = Sequence["tuple[int, ...] | None"]
"""Indices on each axis of the features of a position; ``None`` is all of an axis."""


class Effect:
    """What one edit did in the runs of a block.

    Args:
        positions: those of the edit.
        steps: those of the edit.

    Attributes:
        forwards: how many times one of its points fired.
        applied: whether it acted at any position.
        changed: whether it changed any bit.
    """

    def __init__(self, positions: Positions, steps: Index) -> None:
        self._positions, self._steps = positions, steps
        self.forwards, self.applied, self.changed = 0, False, False
        self._columns, self._last_step = 0, -1
        self._known: tuple[RunContext, Tensor | None] | None = None

    def selected(self, run: RunContext) -> Bool[Tensor, "batch pos"] | None:
        """``[batch, pos]`` bool, worked out once a forward; ``None`` where there is no position to act at."""
        known = self._known
        if known is not None and known[0] is run:
            return known[1]
        where = selected(run, self._positions, self._steps)
        # On a GPU the question waits for the answer: there it is asked until it was yes once.
        acts = (self.applied and where.device.type != "cpu") or bool(where.any())
        self.applied = self.applied or acts
        self._known = run, where if acts else None
        self._columns = max(self._columns, run.past_length + run.length)
        if run.step is not None:
            self._last_step = max(self._last_step, run.step)
        return self._known[1]

    def missing(self) -> str | None:
        """Why the edit did nothing; ``None`` if it did something."""
        if self.changed:
            return None
        if not self.forwards:
            return "never ran: nothing was run in the block, or every run stopped before its layer"
        if self.applied:
            return "ran, and left every number as it was, to the bit"
        if self._steps is not None and self._last_step < 0:
            return f"acts at the generation steps {to_json(self._steps)}, and no generation ran in the block"
        found = f"no row had such a position: there were {self._columns} columns, padding among them"
        if self._last_step >= 0:
            found += f", and the generation reached the steps 0 to {self._last_step}"
        return f"ran, and was applied nowhere: {found}"

    def job_identity(self) -> dict[str, Any]:
        """Where the edit acts, as JSON."""
        return {"positions": to_json(self._positions), "steps": to_json(self._steps)}


@dataclass(eq=False, repr=False)
class EditHook(BriefFields):
    """An edit at one hook point, as a hook function.

    Attributes:
        name: of the point.
        change: what is done.
        effect: where it acts, and what it did, shared by the points of an edit.
        numbers: gives ``value`` anew: one that needs gradients is made in each forward, in which it may be another.
        value: the change's numbers, ``[*features]`` (``[sample, *features]``) float64.
        mask: ``[*features]`` bool: the features that are edited; ``None`` for all.
        pos_axis: of the activation.
    """

    name: str
    change: Change
    effect: Effect
    numbers: Callable[[], Float[Tensor, "..."] | None] = field(repr=False)
    value: Float[Tensor, "..."] | None
    mask: Bool[Tensor, "*features"] | None
    pos_axis: int = 1
    _ready: tuple[Tensor | None, Tensor | None] | None = field(default=None, repr=False)
    _ready_for: tuple[torch.dtype, torch.device] | None = field(default=None, repr=False)

    def __call__(self, activation: Float[Tensor, "*axes"], hook: HookPoint) -> Float[Tensor, "*axes"] | None:
        """The activation with the new numbers at the edit's places; ``None`` where there are none in this forward."""
        run, effect = hook.run, self.effect
        where = effect.selected(run)
        effect.forwards += 1
        if where is None:
            return None
        value, mask = self._prepared(activation)
        places = where.to(activation.device)
        shape = [1] * activation.dim()
        shape[0], shape[self.pos_axis] = places.shape
        places = places.view(shape)
        if mask is not None:
            places = places & mask
        edited = torch.where(places, self.change.new(activation, value, run), activation)
        if not effect.changed:
            effect.changed = bool(bits_differ(edited.contiguous(), activation.contiguous()).any())
        return edited

    def of_region(self, current: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        """The change's numbers for a region that was cut out: ``[*region]``, in the dtype that it wants."""
        value = self._prepared(current)[0]
        if value is None or self.mask is None or value.dim() < self.mask.dim():
            return value
        # The region is a grid, so its features are those of a box: the mask's own indices on each axis.
        axes = range(self.mask.dim())
        for axis in axes:
            others = [other for other in axes if other != axis]
            met = self.mask.any(dim=others) if others else self.mask
            value = value.index_select(axis, met.nonzero().flatten().to(value.device))
        return value

    def _prepared(self, activation: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Value and mask as this activation wants them: dtype, device, axes."""
        dtype, device = activation.dtype, activation.device
        if self._ready_for == (dtype, device):
            assert self._ready is not None
            return self._ready
        value, mask = self.value, self.mask
        is_trained = value is not None and value.requires_grad
        if is_trained:
            value = self.numbers()
        if value is not None:
            wanted = widened(activation[:0]).dtype if self.change.is_wide else dtype
            value = cast(value, wanted, f"The vector for {self.name}", device)
        if mask is not None:
            mask = mask.to(device)
            # The position's axis lies between those of the features in scores and patterns.
            mask = mask.unsqueeze(self.pos_axis - 1)
        if not is_trained:
            self._ready, self._ready_for = (value, mask), (dtype, device)
        return value, mask

    def job_identity(self) -> dict[str, Any]:
        """All that its numbers depend on, as JSON, without what it notes (see `function_hash`)."""
        numbers = {name: value for name, value in vars(self.change).items() if isinstance(value, int | float)}
        return {
            "change": self.change.kind,
            "numbers": numbers,
            "value": None if self.value is None else tensor_hash(self.value.detach()),
            "mask": None if self.mask is None else tensor_hash(self.mask),
            **self.effect.job_identity(),
        }


def mask_of(chosen: Chosen, sizes: Sequence[int]) -> Bool[Tensor, "*features"] | None:
    """``[*features]`` bool: what is chosen of features of these sizes; ``None`` for all."""
    if all(index is None for index in chosen):
        return None
    mask = torch.zeros(tuple(sizes), dtype=torch.bool)
    mask[_grid(chosen, sizes)] = True
    return mask


def placed(
    value: Float[Tensor, "..."], features: Sequence[int], axes: Sequence[str], chosen: Chosen, spec: HookSpec
) -> Float[Tensor, "*features"]:
    """A tensor that broadcasts to the features that are edited, laid where they are: ``[*features]``."""
    if "key_pos" in axes:
        raise InputError(
            f"{spec.name} is over pairs of positions: it takes a number, Zero, Scale or Clamp, not a tensor."
        )
    wanted = tuple(size if index is None else len(index) for size, index in zip(features, chosen, strict=True))
    try:
        shape: tuple[int, ...] | None = tuple(torch.broadcast_shapes(value.shape, wanted))
    except RuntimeError:
        shape = None
    if shape != wanted:
        raise InputError(
            f"A vector of shape {tuple(value.shape)} does not broadcast to what is edited at {spec.name}, "
            f"[{', '.join(axes)}] = {wanted}."
        )
    whole = value.new_zeros(tuple(features))
    whole[_grid(chosen, features)] = value.expand(wanted)
    return whole


def _grid(chosen: Chosen, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    places = [torch.tensor(range(size) if index is None else index) for index, size in zip(chosen, sizes, strict=True)]
    return tuple(torch.meshgrid(*places, indexing="ij"))
