"""Edits: where an activation is changed, and to what.

An :class:`Edit` names a hook point and a region of its tensor (rows, positions, heads, neurons, keys) and says what goes
there. Resolved against a model and a base run it becomes one :class:`Write` a row: which columns of the sequence it
touches, and how to put the new values into a tensor of that hook, whether it is a whole ``[batch, pos, ...]`` activation
or the few rows of it that a sweep computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pellucid.arguments import check_list, check_number, check_whole
from pellucid.axes import HEADS, Index
from pellucid.dtypes import cast
from pellucid.errors import CacheKeyError, HookValueError, InputError
from pellucid.hook_values import bits_differ
from pellucid.names import HookSpec
from pellucid.tables import BriefFields

Region: TypeAlias = tuple[tuple[int, ...] | None, ...]
"""Indices on each axis of a hook's tensor but the batch; ``None`` is all of an axis."""


class Value(ABC):
    """What an edit puts in its region."""

    relative = False
    """Whether the new value depends on what the run under way has there."""

    @abstractmethod
    def new(self, current: Tensor, write: Write) -> Tensor:
        """The new values.

        Args:
            current: what is there, of the shape of the region.
            write: the row and region asked for.
        """


@dataclass(frozen=True, eq=False, repr=False)
class SetTo(BriefFields, Value):
    """A given value: a number, or a tensor that broadcasts to ``[row, *region]``."""

    value: Tensor | float

    def __post_init__(self) -> None:
        _check_value("SetTo: value", self.value)

    def new(self, current: Tensor, write: Write) -> Tensor:
        """The value, of the region's shape."""
        value = _like(self.value, current, write, "SetTo")
        return _broadcast(value, current, write, "SetTo")


@dataclass(frozen=True, eq=False, repr=False)
class FromRun(BriefFields, Value):
    """What another run has in the same place, or of other rows and positions of it.

    Attributes:
        run: that run's activations by hook name, such as the cache of ``run_with_cache``.
        rows: for each row of the base run, the row of ``run`` to take; by default the same (or its only one).
        positions: columns of ``run`` to take, one for each position of the edit; by default the same.
    """

    run: Mapping[str, Tensor]
    rows: Sequence[int] | None = None
    positions: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.run, Mapping):
            raise InputError(f"FromRun: run is a cache, or a dictionary by hook name; found {type(self.run).__name__}.")
        for argument, given in (("rows", self.rows), ("positions", self.positions)):
            if given is not None:
                for each in check_list(f"FromRun: {argument}", given, "one for each", empty=True):
                    check_whole(f"FromRun: an entry of {argument}", each)

    def new(self, current: Tensor, write: Write) -> Tensor:
        """The other run's values."""
        try:
            source = self.run[write.spec.name]
        except CacheKeyError:
            raise
        except KeyError:
            raise CacheKeyError(f"The run given to FromRun did not keep {write.spec.name}.") from None
        if source.dim() != len(write.spec.axes):
            raise InputError(
                f"{write.spec.name} of the other run must have axes {write.spec.axes}; found shape {tuple(source.shape)}. "
                "Cache it with its batch axis (remove_batch_dim=False)."
            )
        if self.rows is not None and len(self.rows) != write.n_rows:
            raise InputError(
                f"FromRun: rows names {len(self.rows)} rows of the other run; the base run has {write.n_rows}."
            )
        row = (0 if source.shape[0] == 1 else write.row) if self.rows is None else self.rows[write.row]
        if not -source.shape[0] <= row < source.shape[0]:
            raise InputError(f"FromRun: the other run has {source.shape[0]} rows; row {row} was asked for.")
        columns = write.declared if self.positions is None else tuple(self.positions)
        if len(columns) != len(write.declared):
            raise InputError(f"FromRun: {len(write.declared)} positions are edited and {len(columns)} are to be taken.")
        length = source.shape[write.spec.pos_axis]
        outside = [column for column in columns if not -length <= column < length]
        if outside:
            raise InputError(
                f"FromRun: {write.spec.name} of the other run has {length} positions; {outside[0]} was asked for. "
                "The two prompts must have the same number of tokens, or positions= say which to take."
            )
        taken = write.region_of(source[row], torch.tensor([columns[i] for i in write.kept]))
        if taken.shape != current.shape:
            raise InputError(
                f"FromRun: the region of {write.spec.name} has shape {tuple(current.shape)} here and "
                f"{tuple(taken.shape)} in the other run. The two prompts must have the same number of tokens."
            )
        return _like(taken, current, write, "FromRun")


@dataclass(frozen=True)
class Zero(Value):
    """Zeros."""

    def new(self, current: Tensor, write: Write) -> Tensor:
        """Zeros of the region's shape."""
        return torch.zeros_like(current)


@dataclass(frozen=True)
class Scale(Value):
    """What is there, times a factor."""

    factor: float
    relative = True

    def __post_init__(self) -> None:
        check_number("Scale: factor", self.factor)

    def new(self, current: Tensor, write: Write) -> Tensor:
        """The product."""
        return current * self.factor


@dataclass(frozen=True, eq=False, repr=False)
class Add(BriefFields, Value):
    """What is there, plus a tensor that broadcasts to ``[row, *region]``: a direction, say."""

    direction: Tensor | float
    relative = True

    def __post_init__(self) -> None:
        _check_value("Add: direction", self.direction)

    def new(self, current: Tensor, write: Write) -> Tensor:
        """The sum."""
        direction = _like(self.direction, current, write, "Add")
        return current + _broadcast(direction, current, write, "Add")


@dataclass(frozen=True, eq=False)
class Apply(Value):
    """What a function makes of what is there: ``function(current) -> new``, of the same shape and dtype."""

    function: Callable[[Tensor], Tensor]
    relative = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InputError(f"Apply: function is a function; found {type(self.function).__name__}.")

    def new(self, current: Tensor, write: Write) -> Tensor:
        """The function's answer."""
        return self.function(current)


def _check_value(what: str, value: Any) -> None:
    """A tensor, or numbers. An infinite number is an edit (of a score, say); one that is none is a mistake.

    Raises:
        InputError: something else.
    """
    if isinstance(value, Tensor):
        return
    try:
        found = None if isinstance(value, bool | str | Mapping) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None:
        raise InputError(f"{what} is a number or a tensor; found {value!r} ({type(value).__name__}).")
    if bool(found.isnan().any()):
        raise InputError(f"{what}: the value is NaN.")


def _like(value: Tensor | float, current: Tensor, write: Write, what: str) -> Tensor:
    """``value`` in the dtype and on the device of the activation.

    Raises:
        InputError: a number that the activation's dtype cannot hold.
    """
    given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    if not current.is_floating_point():
        return given.to(current)  # token ids
    given = given if given.is_floating_point() else given.double()
    return cast(given, current.dtype, f"{what}: the value for {write.spec.name}", current.device)


def _broadcast(value: Tensor, current: Tensor, write: Write, what: str) -> Tensor:
    region = list(current.shape)
    region[write.pos_axis] = len(write.declared)
    wanted = (write.n_rows, *region)
    try:
        shape = torch.broadcast_shapes(value.shape, wanted)
    except RuntimeError:
        shape = None
    if shape != wanted:
        raise InputError(
            f"{what}: a value of shape {tuple(value.shape)} does not broadcast to the region of {write.spec.name}, "
            f"[row, *region] = {wanted}."
        )
    whole = value.expand(wanted)[write.row]
    if len(write.kept) == len(write.declared):
        return whole
    return whole.index_select(write.pos_axis, torch.tensor(write.kept, device=whole.device))


@dataclass(frozen=True, eq=False, repr=False)
class Edit(BriefFields):
    """A change of one region of one activation.

    Attributes:
        hook: name of the hook point.
        value: what goes there.
        positions: columns of the (padded) sequence; query positions for scores and patterns.
        heads: of per-head activations: heads of queries, or of keys and values where several queries share one.
        neurons: features on the last axis: neurons of the MLP, dimensions of a head, directions of the residual stream.
        keys: key positions of scores and patterns.
        rows: of the batch.
    """

    hook: str
    value: Value
    positions: Index = None
    heads: Index = None
    neurons: Index = None
    keys: Index = None
    rows: Index = None


@dataclass(frozen=True, eq=False, repr=False)
class Write(BriefFields):
    """An edit of one row, ready to be made.

    Attributes:
        spec: the hook point.
        value: what goes there.
        row: row of the base run.
        n_rows: how many rows the base run has.
        declared: columns of the sequence that the edit names.
        kept: which of them (indices into ``declared``) are written: those where it changes something.
        region: indices on the axes after the batch; that of ``pos`` is left to the columns.
    """

    spec: HookSpec
    value: Value
    row: int
    n_rows: int
    declared: tuple[int, ...]
    kept: tuple[int, ...]
    region: Region

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of the sequence that are written."""
        return tuple(self.declared[i] for i in self.kept)

    @property
    def pos_axis(self) -> int:
        """Index of ``pos`` among the axes after the batch."""
        return self.spec.pos_axis - 1

    def kept_to(self, kept: tuple[int, ...]) -> Write:
        """The same write on fewer of its columns."""
        return self if kept == self.kept else replace(self, kept=kept)

    def _index(self, view: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        chosen = [None if index is None else torch.tensor(index, device=view.device) for index in self.region]
        chosen[self.pos_axis] = places.to(view.device)
        last = max(axis for axis, index in enumerate(chosen) if index is not None)
        grid = []
        for axis in range(last + 1):
            index = chosen[axis]
            if index is None:
                index = torch.arange(view.shape[axis], device=view.device)
            grid.append(index.view([-1 if other == axis else 1 for other in range(last + 1)]))
        return tuple(grid)

    def region_of(self, view: Tensor, places: Tensor) -> Tensor:
        """A copy of the region; ``view`` is without the batch axis, ``places`` its indices on ``pos``."""
        return view[self._index(view, places)]

    def make(self, view: Tensor, places: Tensor) -> None:
        """Put the new values into ``view``, in place; see :meth:`region_of`.

        Raises:
            HookValueError: the value has another shape or dtype than what it replaces.
        """
        index = self._index(view, places)
        current = view[index]
        view[index] = self._checked(current)

    def _checked(self, current: Tensor) -> Tensor:
        new = self.value.new(current, self)
        if not isinstance(new, Tensor) or new.shape != current.shape or new.dtype != current.dtype:
            found = f"{tuple(new.shape)} of {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
            raise HookValueError(
                f"The edit of {self.spec.name} gave {found}; expected {tuple(current.shape)} of {current.dtype}. "
                "Nothing is broadcast or cast."
            )
        return new

    def where_it_changes(self, base: Tensor) -> Write:
        """The same write, kept to the columns where it changes a bit of the base run's activation ``[row, ...]``."""
        current = self.region_of(base[self.row], torch.tensor(self.columns))
        new = self._checked(current.clone())
        differs = bits_differ(new.contiguous(), current.contiguous())
        others = [axis for axis in range(differs.dim()) if axis != self.pos_axis]
        changed = (differs.any(dim=others) if others else differs).tolist()
        kept = tuple(place for place, does in zip(self.kept, changed, strict=True) if does)
        if isinstance(self.value, Apply) and kept:
            kept = self.kept  # a function may look at all it is given
        return replace(self, kept=kept)


def resolve(edit: Edit, spec: HookSpec, sizes: Mapping[str, int]) -> list[Write]:
    """One write a row for an edit.

    Args:
        edit: the edit.
        spec: its hook point.
        sizes: size of each axis word in the base run.

    Raises:
        InputError: an index that the hook has no axis for, or that is out of range.
    """
    if not isinstance(edit.value, Value):
        raise InputError(
            f"value of the edit of {spec.name} is one of Zero, SetTo, FromRun, Scale, Add, Apply; found "
            f"{type(edit.value).__name__}."
        )
    given = {"positions": edit.positions, "heads": edit.heads, "neurons": edit.neurons, "keys": edit.keys}
    region = chosen_region(spec, sizes, given)
    rows = indices(edit.rows, sizes["batch"], f"rows of the edit of {spec.name}")
    columns = region[spec.pos_axis - 1] or tuple(range(sizes["pos"]))
    region[spec.pos_axis - 1] = None
    places = tuple(range(len(columns)))
    return [Write(spec, edit.value, row, sizes["batch"], columns, places, tuple(region)) for row in rows]


def chosen_region(spec: HookSpec, sizes: Mapping[str, int], given: Mapping[str, Index]) -> list[tuple[int, ...] | None]:
    """Indices on each axis after the batch; ``None`` is all of an axis.

    Args:
        spec: a hook point.
        sizes: size of each axis word of which something is given.
        given: by ``positions``, ``heads``, ``neurons`` or ``keys``, which of them; ``None`` for all.

    Raises:
        InputError: an index that the hook has no axis for, or that is out of range.
    """
    words = _axis_words(spec)
    for name, index in given.items():
        if index is not None and name not in words:
            raise InputError(
                f"{name}= has no meaning at {spec.name}, whose axes are {', '.join(spec.axes)}. "
                f"It takes: {', '.join(words) or 'none'}."
            )
    region: list[tuple[int, ...] | None] = [None] * (len(spec.axes) - 1)
    for name, axis in words.items():
        index = given.get(name)
        if index is not None:
            region[axis - 1] = indices(index, sizes[spec.axes[axis]], f"{name} of the edit of {spec.name}")
    return region


def _axis_words(spec: HookSpec) -> dict[str, int]:
    """Which of an edit's indices a hook takes, and on which axis."""
    words = {"positions": spec.pos_axis}
    for axis, word in enumerate(spec.axes):
        if word in HEADS:
            words["heads"] = axis
    if "key_pos" in spec.axes:
        words["keys"] = spec.axes.index("key_pos")
    elif spec.axes[-1] not in ("pos", "1"):
        words["neurons"] = len(spec.axes) - 1
    return words


def indices(index: Index, size: int, what: str) -> tuple[int, ...]:
    """Indices ``0 <= i < size`` from one index, a slice, several, or ``None`` for all.

    Raises:
        InputError: out of range, named twice, none at all, or not whole numbers.
    """
    if index is None:
        return tuple(range(size))
    if isinstance(index, slice):
        chosen = tuple(range(size)[index])
    else:
        asked: Any = index
        if not isinstance(asked, int | Iterable):
            raise InputError(f"{what} are one index, a slice or several; found {asked!r}.")
        given = [asked] if isinstance(asked, int) else list(asked)
        wrong = [i for i in given if isinstance(i, bool) or not isinstance(i, int)]
        if wrong:
            raise InputError(f"{what} are whole numbers; found {wrong[0]!r}.")
        outside = [i for i in given if not -size <= i < size]
        if outside:
            raise InputError(f"{what}: there are {size}, 0 to {size - 1}; found {outside[0]}.")
        chosen = tuple(i % size for i in given)
    if not chosen:
        raise InputError(f"{what}: {index!r} chooses none of {size}.")
    if len(set(chosen)) != len(chosen):
        raise InputError(f"{what}: {index!r} names one of them twice.")
    return chosen
