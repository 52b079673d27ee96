"""What a picture is drawn from: labelled arrays, or tensors and numpy arrays, whose axes are then only counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xarray

from pellucid.errors import InputError
from pellucid.plots.axis import Axis, Labels, axis_of
from pellucid.token_text import SEVERAL

if TYPE_CHECKING:
    from torch import Tensor

Numbers: TypeAlias = "xarray.DataArray | np.ndarray | Tensor"

DIMS = ("panel", "row", "column")
"""Names of the axes of a tensor or a numpy array, the last ones first given."""

MOST_PANELS = 128
_MOST_NAMED = 8


def labelled_all(result: Numbers | Mapping[str, Numbers]) -> tuple[dict[str, xarray.DataArray], xarray.DataArray]:
    """One result (under an empty name) or several as labelled arrays, and the first of them.

    Raises:
        InputError: there are none, or one is nothing to draw (:func:`labelled`).
    """
    given = result if isinstance(result, Mapping) else {"": result}
    check_panels(len(given), "the mapping of results")
    results = {name: labelled(one, repr(name) if name else "the result") for name, one in given.items()}
    return results, next(iter(results.values()))


def labelled(result: Any, what: str = "the result") -> xarray.DataArray:
    """``result`` as a labelled array; the axes of a tensor or numpy array are ``row`` and ``column``, after ``panel``.

    Args:
        result: real numbers, in any dtype and on any device.
        what: what an error calls it.

    Raises:
        InputError: something else, more than three axes without names, complex numbers, nothing.
    """
    if hasattr(result, "detach"):  # a tensor, known without torch; numpy has no bfloat16
        result = result.detach().cpu()
        result = (result.float() if str(result.dtype) == "torch.bfloat16" else result).numpy()
    if isinstance(result, np.ndarray) and result.ndim <= len(DIMS):
        result = xarray.DataArray(result, dims=DIMS[len(DIMS) - result.ndim :])
    if not isinstance(result, xarray.DataArray):
        raise InputError(
            "A picture is drawn from an xarray.DataArray, or a tensor or numpy array of up to three axes; "
            f"{what} is of type {type(result).__name__}{list(getattr(result, 'shape', ())) or ''}."
        )
    if result.dtype.kind not in "fiub":
        raise InputError(f"A picture is drawn from real numbers; {what} holds {result.dtype}.")
    if not result.size:
        raise InputError(f"There is nothing to draw: {what} has the sizes {dict(result.sizes)}.")
    return result


def words(result: xarray.DataArray, title: str | None, unit: str | None) -> tuple[str, str]:
    """The title and the unit that were given, or what the result says of itself in its name and ``attrs``."""
    attrs = result.attrs
    name = "" if result.name is None else str(result.name)
    if title is None:
        said = [str(attrs[key]) for key in ("analysis", "hook", "site", "direction", "model") if key in attrs]
        title = ": ".join(filter(None, (", ".join(said), name))) or " × ".join(map(str, result.dims))
    if unit is None:
        units = "0 corrupted, 1 clean" if attrs.get("value") == "normalized" else attrs.get("units")
        unit = f"{name} ({units})" if units and isinstance(units, str) else name
    return title, unit


def shared_axes(results: Mapping[str, xarray.DataArray], dims: Sequence[str], labels: Labels | None) -> list[Axis]:
    """The axes ``dims``, which all results have to have alike.

    Raises:
        InputError: results with other axes or labels; labels that do not fit (:func:`axis_of`).
    """
    first = next(iter(results.values()))
    axes = [axis_of(first, dim, labels) for dim in dims]
    for name, other in results.items():
        if dict(other.sizes) != dict(first.sizes):
            raise InputError(
                f"Results share their axes: {name!r} has {dict(other.sizes)}, the first one {dict(first.sizes)}."
            )
        if [axis_of(other, dim, labels) for dim in dims] != axes:
            raise InputError(f"Results share their labels: those of {name!r} are not those of the first one.")
    return axes


def label_notes(first: xarray.DataArray, axes: Sequence[Axis], labels: Labels | None) -> list[str]:
    """What the labels of positions leave open: whose tokens they are where two runs differ, and which have none.

    Args:
        first: the result; its ``attrs`` may name the run whose tokens they are (``base_run``), and the positions at which
            the prompts differ (``differs``).
        axes: of the picture.
        labels: as they were given; whose tokens those are is not known here.
    """
    notes, texts = list[str](), {label for axis in axes for _, label in axis.whole}
    differs, base = first.attrs.get("differs"), first.attrs.get("base_run")
    shown = (
        bool(differs) and "pos" in first.coords and "token" in first.coords and any(axis.name == "pos" for axis in axes)
    )
    if shown and base and "pos" not in (labels or {}):
        here = sorted(set(np.asarray(differs).ravel().tolist()) & set(first.coords["pos"].values.ravel().tolist()))
        if here:
            at = ", ".join(map(str, here)) if len(here) <= _MOST_NAMED else f"{len(here)} positions"
            notes.append(f"Tokens are those of the {base} run; the other run has others at pos {at}.")
    if SEVERAL in texts:
        notes.append(f"{SEVERAL}: several prompts, not all with the same token there.")
    return notes


def finite_of(grids: Sequence[np.ndarray]) -> np.ndarray:
    """The finite numbers of all grids in a row, as float64.

    Raises:
        InputError: there are none.
    """
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids]).astype(np.float64)
    if not finite.size:
        total = sum(grid.size for grid in grids)
        raise InputError(f"There is nothing to draw: none of the {total:,} numbers is finite.")
    return finite


def facets(result: xarray.DataArray, facet: str, labels: Labels | None) -> Axis:
    """The axis of ``result`` that gets a panel for each of its places.

    Raises:
        InputError: it has no such axis, or that has too many places.
    """
    if facet not in result.dims:
        found = ", ".join(map(str, result.dims)) or "none"
        raise InputError(f"facet: there is no axis {facet} to make panels of; the result has {found}.")
    check_panels(result.sizes[facet], f"the axis {facet}")
    return axis_of(result, facet, labels)


def check_panels(panels: int, what: str) -> None:
    """Refuse a picture without panels, or with more than can be looked at.

    Raises:
        InputError: so it is.
    """
    if not panels:
        raise InputError(f"There is nothing to draw: {what} is empty.")
    if panels > MOST_PANELS:
        raise InputError(
            f"{what} would make {panels} panels; draw at most {MOST_PANELS}: take a part of the result first."
        )
