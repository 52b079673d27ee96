"""One axis of a picture: a dimension of the result as places 0, 1, 2, ... and what is written at each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray

from pellucid.arguments import check_kind, check_mapping
from pellucid.errors import InputError
from pellucid.plots.text import cut, isolated, visible, width

Labels = Mapping[str, Sequence[str] | str]
"""For a dimension its labels, or the name of a coordinate that holds them."""


@dataclass(frozen=True)
class Axis:
    """A dimension: its name; for each place the text of its tick, and its whole label with what stands before that.

    All of it is plain text, not escaped.
    """

    name: str
    ticks: tuple[str, ...]
    whole: tuple[tuple[str, str], ...]

    @classmethod
    def counted(cls, name: str, size: int) -> Axis:
        """Places that have only their numbers."""
        ticks = tuple(map(str, range(size)))
        return cls(name, ticks, tuple((f"{name} ", tick) for tick in ticks))

    def __len__(self) -> int:
        return len(self.ticks)

    @property
    def widest(self) -> float:
        """Pixels of the widest tick."""
        return max(width(tick) for tick in self.ticks)

    def hover(self, place: int) -> str:
        """Text of a place under the pointer."""
        before, label = self.whole[place]
        return before + isolated(label)

    @property
    def headings(self) -> tuple[str, ...]:
        """Each place as a heading."""
        return tuple(before + label for before, label in self.whole)

    def shown(self, pixels: float, turned: bool) -> range:
        """The places whose labels can be written where there are ``pixels`` a place.

        Args:
            pixels: between two places.
            turned: whether labels run across the axis, so that it is their height that has to fit.
        """
        needed = 13.0 if turned else self.widest + 8.0
        return range(0, len(self), max(1, -(-int(needed) // max(1, int(pixels)))) if pixels < needed else 1)


def axis_of(result: xarray.DataArray, dim: str, labels: Labels | None) -> Axis:
    """The axis of one dimension.

    Labels are, in this order: those given; those of the one coordinate along ``dim`` that holds text; the numbers of
    the dimension's own coordinate; 0, 1, 2, ....

    Args:
        result: the labelled array.
        dim: its dimension.
        labels: for some dimensions, labels or the name of a coordinate.

    Raises:
        InputError: another number of labels than places, no such coordinate, or several that hold text.
    """
    size = result.sizes[dim]
    own = result.coords[dim].values if dim in result.coords else np.arange(size)
    texts = _texts_of(result, dim, labels)
    numbers = (
        None if own.dtype.kind in "UOST" else [f"{value:g}" if own.dtype.kind == "f" else str(value) for value in own]
    )
    if texts is None:
        shown = numbers if numbers is not None else [str(value) for value in own]
        before = [f"{visible(dim)} "] * size
    else:
        shown = texts
        before = (
            [f"{visible(dim)} {number}: " for number in numbers] if numbers is not None else [f"{visible(dim)} "] * size
        )
    whole = zip(before, map(visible, shown), strict=True)
    return Axis(visible(dim), tuple(cut(visible(text)) for text in shown), tuple(whole))


def _texts_of(result: xarray.DataArray, dim: str, labels: Labels | None) -> list[str] | None:
    """Labels of a dimension as they were given, or ``None`` where it has only numbers."""
    given = (labels or {}).get(dim)
    if given is None:
        holding = [
            str(name)
            for name, coord in result.coords.items()
            if coord.dims == (dim,) and (coord.dtype.kind in "UT" or _all_text(coord.values))
        ]
        if len(holding) > 1:
            raise InputError(
                f"Several coordinates hold text along {dim}: {', '.join(holding)}. Say which labels to show, "
                f"labels={{{dim!r}: {holding[0]!r}}}."
            )
        if not holding:
            return None
        given = holding[0]
    if isinstance(given, str):
        if given not in result.coords or result.coords[given].dims != (dim,):
            along = [str(name) for name, coord in result.coords.items() if coord.dims == (dim,)]
            raise InputError(
                f"labels names the coordinate {given!r} for {dim}, and the result has no such coordinate along it; "
                f"it has {', '.join(along) or 'none'}."
            )
        return [str(text) for text in result.coords[given].values]
    texts = [str(text) for text in given]
    if len(texts) != result.sizes[dim]:
        raise InputError(f"{dim} has {result.sizes[dim]} places, and there are {len(texts)} labels for it.")
    return texts


def _all_text(values: np.ndarray) -> bool:
    return values.dtype.kind == "O" and all(isinstance(value, str) for value in values)


def check_words(title: str | None, unit: str | None, subtitle: str | None) -> None:
    """What is written on every picture.

    Raises:
        InputError: no strings.
    """
    for argument, text in {"title": title, "unit": unit, "subtitle": subtitle}.items():
        check_kind(argument, text, (str, type(None)), "a string")


def check_labels(labels: Labels | None, dims: Sequence[str]) -> None:
    """Refuse labels for a dimension that is not there.

    Raises:
        InputError: there are some.
    """
    if labels is None:
        return
    unknown = [
        str(dim) for dim in check_mapping("labels", labels, "axes to labels, or to a coordinate") if dim not in dims
    ]
    if unknown:
        raise InputError(f"There are labels for {', '.join(unknown)}; the result has the axes {', '.join(dims)}.")
