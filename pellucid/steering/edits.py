"""Edits: a change, and where it is made; and steering: edits that act together, over a forward or a generation.

An :class:`Edit` says what it means without a model, so it can be kept in a file and put on another copy. Against a bridge it
becomes hook functions (:mod:`pellucid.steering.edit_hooks`), one for each hook point; what cannot be is refused there and
then, before anything runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pellucid.arguments import check_kind, check_list, check_text
from pellucid.axes import Index
from pellucid.errors import InputError, NoEffectError
from pellucid.experiments.places import find_site
from pellucid.model_bridge.hooking.hooks import HookRequest
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookSpec
from pellucid.steering import files
from pellucid.steering.changes import Change, change_of_json, change_to_json
from pellucid.steering.directions import Direction, Samples, check_width
from pellucid.steering.edit_hooks import EditHook, Effect, mask_of, placed
from pellucid.steering.positions import Positions, check_index, check_positions
from pellucid.steering.positions import from_json as index_from_json
from pellucid.steering.positions import to_json as index_to_json
from pellucid.storage.json_text import Json
from pellucid.sweep.edits import chosen_region
from pellucid.tables import BriefFields

INDICES = ("layers", "positions", "steps", "heads", "neurons")
"""Fields of an edit that choose places."""


@dataclass(frozen=True, eq=False, repr=False)
class Edit(BriefFields):
    """A change of an activation, at some places of it.

    The words are those of :class:`pellucid.sweep.Edit`, with one difference: that one is of a base run, whose columns are
    counted with their padding, this one of any run, whose rows have positions of their own.

    Attributes:
        change: what is done: :class:`Add`, :class:`Scale`, :class:`Clamp`, :class:`Zero`, :class:`Replace`,
            :class:`Resample` or :class:`ProjectOut`.
        at: where: a site (``resid_post``, ``z``, ``mlp_post``, see :mod:`pellucid.experiments.places`), the whole name of a
            hook, or a glob. By default where the change's direction is of.
        layers: of a site: which; by default the direction's, else all. A direction of one layer goes to any.
        positions: see :data:`~pellucid.steering.positions.Positions`; by default every real one.
        steps: of a generation: which, from 0, as in ``hook.run.steps``; by default all, and outside ``generate`` too.
        heads: of per-head activations; of queries, or of keys and values where several queries share one.
        neurons: features on the last axis: neurons of the MLP, dimensions of a head or of the stream.

    Raises:
        InputError: what can be no edit, whichever the model.
    """

    change: Change
    at: str | None = None
    layers: Index = None
    positions: Positions = None
    steps: Index = None
    heads: Index = None
    neurons: Index = None

    def __post_init__(self) -> None:
        check_kind("change", self.change, Change, "a change, such as Add, Scale, Clamp, Zero, Replace or ProjectOut")
        if self.at is not None:
            check_text("at", self.at)
        elif self.change.source is None:
            raise InputError(f"at is missing: {type(self.change).__name__} of no direction does not say where it acts.")
        check_positions(self.positions)
        check_index("steps", self.steps, at_least=0)
        for name in ("layers", "heads", "neurons"):
            check_index(name, vars(self)[name])
        if self.change.of_whole_vectors and (self.heads is not None or self.neurons is not None):
            raise InputError(
                f"{type(self.change).__name__} is of all features of a position together: leave heads and neurons out."
            )

    def __add__(self, other: Edit | Steering) -> Steering:
        return Steering((self,)) + other

    def points(self, bridge: TransformerBridge) -> list[HookSpec]:
        """The hook points that it acts at, in firing order.

        Raises:
            HookNameError: a name, glob or site that the model does not have.
            InputError: layers that the model does not have, or layers beside the name of a hook.
        """
        source, at, layers = self.change.source, self.at, self.layers
        if at is None:
            assert source is not None
            at = source.origin.site
        is_glob = any(mark in at for mark in "*?[")
        if is_glob or at in bridge.hook_index:
            if layers is not None:
                raise InputError(
                    f"at={at!r} names its hook points: leave layers out, or give a site such as 'resid_post'."
                )
            return [spec for spec, _ in bridge.hook_index.select(at, bridge.cfg.flags, argument="at")]
        if layers is None and source is not None:
            layers = source.origin.layers
        return list(find_site(bridge, at, layers).specs.values())

    def hooks(self, bridge: TransformerBridge) -> list[EditHook]:
        """A hook function for each point, all of which note together whether the edit did anything.

        Raises:
            HookNameError: see :meth:`points`.
            InputError: heads or neurons that a point does not have, a direction of another model or of another width, a
                layer that the direction has no vector of.
        """
        source, effect = self.change.source, Effect(self.positions, self.steps)
        if source is not None:
            source.origin.check_model(bridge)
        return [self._hook(bridge, spec, source, effect) for spec in self.points(bridge)]

    def _hook(
        self, bridge: TransformerBridge, spec: HookSpec, source: Direction | Samples | None, effect: Effect
    ) -> EditHook:
        if spec.kind == "int":
            raise InputError(f"{spec.name} holds token ids, which no change of numbers fits: edit hook_embed.")
        sizes = spec.sizes(bridge.cfg.sizes())
        chosen = chosen_region(spec, sizes, {"heads": self.heads, "neurons": self.neurons})
        del chosen[spec.pos_axis - 1]
        axes = [axis for axis in spec.axes[1:] if axis != "pos"]
        features = [sizes[axis] for axis in axes]  # of key positions, 1: a run alone knows how many there are
        layer = spec.layer
        if source is not None:
            of = source.origin
            layer = layer if of.layers is not None and len(of.layers) > 1 else None
            check_width(bridge, of, source.at(layer).shape[-len(of.axes) :], spec)

        def numbers() -> Tensor | None:
            value = self.change.value(layer)
            if source is None and value is not None and value.dim():
                value = placed(value, features, axes, chosen, spec)
            return value

        return EditHook(spec.name, self.change, effect, numbers, numbers(), mask_of(chosen, features), spec.pos_axis)

    def to_json(self, tensors: dict[str, Float[Tensor, "..."]], prefix: str) -> Json:
        """The edit as JSON; its tensors go into ``tensors`` under names that begin with ``prefix``."""
        indices = {name: index_to_json(vars(self)[name]) for name in INDICES}
        return {"change": change_to_json(self.change, tensors, prefix), "at": self.at, **indices}

    @classmethod
    def from_json(cls, found: Any, tensors: Mapping[str, Float[Tensor, "..."]]) -> Edit:
        """The inverse of :meth:`to_json`."""
        indices = {name: index_from_json(found[name]) for name in INDICES}
        return cls(change_of_json(found["change"], tensors), found["at"], **indices)


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Steering(BriefFields):
    """Edits in the order in which they act where they meet.

    ``edit + edit``, ``steering + edit`` and ``steering + steering`` join them.

    Args:
        edits: one edit, or a list of them.

    Raises:
        InputError: no edits.
    """

    edits: tuple[Edit, ...]

    def __init__(self, edits: Edit | Sequence[Edit]) -> None:
        given = (edits,) if isinstance(edits, Edit) else check_list("edits", edits, "edits")
        object.__setattr__(
            self, "edits", tuple(check_kind("an entry of edits", edit, Edit, "an Edit") for edit in given)
        )

    def __add__(self, other: Edit | Steering) -> Steering:
        return Steering((*self.edits, *((other,) if isinstance(other, Edit) else other.edits)))

    def fwd_hooks(self, bridge: TransformerBridge) -> list[HookRequest]:
        """``(name, function)`` pairs for ``run_with_hooks``, ``run_with_cache`` inside ``bridge.hooks``, or ``add_hook``.

        Whether an edit did anything is checked by :meth:`on`, or by ``run_with_hooks(assert_effect=True)``, which asks it of
        each point.

        Raises:
            HookNameError: a hook or site that the model does not have.
            InputError: see :meth:`Edit.hooks`.
        """
        return [(hook.name, hook) for mine in self._hooks(bridge) for hook in mine]

    @contextmanager
    def on(self, bridge: TransformerBridge, assert_effect: bool = True) -> Iterator[TransformerBridge]:
        """Edit every run and generation of the block, in this thread.

        Args:
            bridge: the model; it is what the block is given.
            assert_effect: raise at the end of the block if an edit was applied nowhere (a step that no generation reached,
                a position that no row had), or changed no bit.

        Raises:
            HookNameError: a hook or site that the model does not have.
            InputError: see :meth:`Edit.hooks`.
            NoEffectError: see ``assert_effect``.
        """
        by_edit = self._hooks(bridge)
        with bridge.hooks(fwd_hooks=[(hook.name, hook) for mine in by_edit for hook in mine]):
            yield bridge
        if assert_effect:
            refuse_no_effect(self.edits, [mine[0].effect for mine in by_edit])

    def _hooks(self, bridge: TransformerBridge) -> list[list[EditHook]]:
        check_kind("bridge", bridge, TransformerBridge, "a bridge")
        return [edit.hooks(bridge) for edit in self.edits]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: tensors, and everything else as JSON in its one metadata key.

        Raises:
            InputError: a path that does not end in ``.safetensors``.
            StorageFullError: no space is left.
        """
        tensors: dict[str, Tensor] = {}
        edits = [edit.to_json(tensors, f"{place}.") for place, edit in enumerate(self.edits)]
        files.write(path, "steering", {"edits": edits}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Steering:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: the file is missing, damaged, or of something else.
        """
        tensors, found = files.read(path, "steering")
        with files.damage(path):
            return cls([Edit.from_json(each, tensors) for each in found["edits"]])


def refuse_no_effect(edits: Sequence[Edit], effects: Sequence[Effect]) -> None:
    """Raise if an edit did nothing.

    Raises:
        NoEffectError: naming each.
    """
    idle = [(edit, why) for edit, effect in zip(edits, effects, strict=True) if (why := effect.missing()) is not None]
    if idle:
        lines = [f"{edit} {why}." for edit, why in idle]
        raise NoEffectError("\n".join([*lines, "If that is what you expect, pass assert_effect=False."]))
