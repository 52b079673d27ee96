"""The one rule of slices: which entries of an axis (positions, neurons, rows) a short word of the user's takes.

One entry is an integer; ``(start, stop[, step])`` is a *range*, as in TransformerLens; a list, an array or a tensor of
integers is those entries in that order, of booleans a mask; a Python ``slice`` is itself; ``None`` takes all.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_count, check_kind, check_whole
from pellucid.errors import InputError

SliceInput: TypeAlias = "int | slice | tuple[int | None, ...] | Sequence[int] | np.ndarray | Tensor | None"
"""What ``Slice`` is made from."""


class Slice:
    """Which entries of an axis to take; TransformerLens' class of that name.

    Args:
        input_slice: an integer takes one entry and drops the axis; ``(stop,)``, ``(start, stop)`` or ``(start, stop, step)``
            is a range; a list, array or tensor of integers takes those entries; of booleans, where it is true; ``None`` all.

    Attributes:
        slice: what indexes the axis: an integer, a Python slice or a NumPy array ``[entries]``.
        mode: ``"int"``, ``"slice"``, ``"array"`` or ``"identity"``.

    Raises:
        InputError: none of these.
    """

    def __init__(self, input_slice: SliceInput = None) -> None:
        self.slice: int | slice | np.ndarray
        one = _one(input_slice)
        if one is not None:
            self.slice, self.mode = one, "int"
        elif input_slice is None:
            self.slice, self.mode = slice(None), "identity"
        elif isinstance(input_slice, tuple | slice):
            self.slice, self.mode = _range(input_slice), "slice"
        else:
            self.slice, self.mode = _entries(input_slice), "array"

    @classmethod
    def unwrap(cls, slice_input: Slice | SliceInput) -> Slice:
        """A ``Slice`` as it is; anything else made into one, an integer into one that keeps the axis.

        Raises:
            InputError: nothing that takes entries.
        """
        if isinstance(slice_input, Slice):
            return slice_input
        one = _one(slice_input)
        return cls(slice_input if one is None else [one])

    @classmethod
    def of(cls, slice_input: Slice | SliceInput) -> Slice:
        """A ``Slice`` as it is; anything else made into one: an integer drops the axis.

        Raises:
            InputError: nothing that takes entries.
        """
        return slice_input if isinstance(slice_input, Slice) else cls(slice_input)

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """``tensor`` at these entries of axis ``dim``, which an integer drops.

        Raises:
            InputError: not a tensor; no such axis; an entry outside it.
        """
        check_kind("tensor", tensor, Tensor, "a tensor")
        if not -tensor.dim() <= check_whole("dim", dim) < tensor.dim():
            raise InputError(f"dim={dim} is no axis of a tensor {list(tensor.shape)}.")
        axis = dim % tensor.dim()
        if self.mode == "identity":
            return tensor
        if isinstance(self.slice, slice):
            return tensor[(slice(None),) * axis + (self.slice,)]
        inside = torch.from_numpy(self._inside(tensor.shape[axis], f"axis {dim}")).to(tensor.device)
        return tensor.select(axis, int(inside[0])) if self.mode == "int" else tensor.index_select(axis, inside)

    def indices(self, max_ctx: int | None = None) -> np.ndarray:
        """``[entries]`` int64: what it takes of an axis of ``max_ctx`` entries.

        Raises:
            InputError: ``max_ctx`` is needed and not given, or no length; an entry outside it.
        """
        if max_ctx is None:
            if isinstance(self.slice, int):
                return np.array([self.slice], dtype=np.int64)
            raise InputError("max_ctx, the length of the axis, is needed unless the slice is one integer.")
        check_count("max_ctx", max_ctx, 0)
        if isinstance(self.slice, slice):
            return np.arange(max_ctx, dtype=np.int64)[self.slice]
        return self._inside(max_ctx, "the axis")

    def positions(self, length: int, argument: str = "pos_slice") -> slice | Tensor:
        """Which of the ``length`` positions of a run it takes, at least one, as something that indexes an axis and keeps it.

        Args:
            length: of the axis.
            argument: its name in errors.

        Raises:
            InputError: ``length`` is none; a position outside the run; none at all.
        """
        check_count("length", length, 0)
        if isinstance(self.slice, slice):
            if not len(range(*self.slice.indices(length))):
                raise InputError(
                    f"{argument}={self.slice} keeps none of the run's {length} positions, 0 to {length - 1}."
                )
            return self.slice
        inside = torch.from_numpy(self._inside(length, "the run", argument))
        if not inside.numel():
            raise InputError(f"{argument} is empty: it keeps no position.")
        return inside

    def _inside(self, length: int, axis: str, argument: str = "slice") -> np.ndarray:
        """Indices of one or several entries, counted from the front; a mask has the length of the axis."""
        given = np.atleast_1d(np.asarray(self.slice))
        if given.dtype == np.bool_:
            if len(given) != length:
                raise InputError(f"{argument} is a mask of {len(given)}; {axis} has {length}.")
            return given.nonzero()[0].astype(np.int64)
        if ((given < -length) | (given >= length)).any():
            raise InputError(f"{argument} asks for {given.tolist()}; {axis} has {length}, 0 to {length - 1}.")
        return given % length if length else given

    def __repr__(self) -> str:
        return f"Slice({self.slice!r})"


def _one(given: Any) -> int | None:
    """An integer of any library's, of no dimension, as ``int``; ``None`` if it is something else. A boolean is none."""
    if isinstance(given, bool):
        return None
    if isinstance(given, Integral):
        return int(given)
    if isinstance(given, Tensor | np.ndarray) and given.ndim == 0:
        value = given.item()
        return value if type(value) is int else None
    return None


def _range(given: tuple[Any, ...] | slice) -> slice:
    """A forward range."""
    parts = (given.start, given.stop, given.step) if isinstance(given, slice) else given
    bounds = [part if part is None else _one(part) for part in parts]
    if not 1 <= len(parts) <= 3 or any(
        bound is None and part is not None for bound, part in zip(bounds, parts, strict=True)
    ):
        raise InputError(
            f"A tuple is a range, (stop,), (start, stop) or (start, stop, step); found {given!r}. Give a list for entries."
        )
    if len(bounds) == 3 and bounds[2] is not None and bounds[2] < 1:
        raise InputError(f"A range steps forward; found {given!r}. A list of entries keeps any order.")
    return slice(*bounds)


def _entries(given: Any) -> np.ndarray:
    """Integers or booleans in one dimension."""
    if not isinstance(given, list | range | np.ndarray | Tensor):
        raise InputError(
            f"A slice is an integer, a range (start, stop), or a list or mask of entries; found {given!r}."
        )
    try:
        array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    except (TypeError, ValueError, NotImplementedError):  # the last of a tensor without data
        raise InputError(f"A slice's entries are integers or booleans; found {given!r}.") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise InputError(
            f"A slice's entries are integers or booleans in one list; found {array.dtype} {list(array.shape)}."
        )
    if (
        isinstance(given, list)
        and array.dtype != np.bool_
        and any(isinstance(entry, bool | np.bool_) for entry in given)
    ):
        raise InputError(f"A slice's entries are all integers or all booleans (a mask); found {given!r}.")
    if array.size and array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise InputError(f"A slice's entries fit into int64; found {array.max()}.")  # it would wrap to a negative one
    return array if array.dtype == np.bool_ else array.astype(np.int64)
