"""What an edit does to the numbers at its place: add, scale, clamp, zero, replace, resample, project out.

A change is a small frozen object; where it is made is said by an :class:`~pellucid.steering.Edit`. Each is one line of
arithmetic in the activation's dtype, so that a torch hook that does the same line on Hugging Face's module gives the same
bits. The rule of dtypes: ``strength`` times a vector is computed in float64 and rounded once to the activation's dtype. A
number that this dtype cannot hold is an error. Only :class:`ProjectOut` computes in float32 at least, as a sum over all
features in half precision would lose its digits, and rounds its result once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pellucid.arguments import check_count, check_kind, check_number
from pellucid.dtypes import widened
from pellucid.errors import InputError
from pellucid.run_context import RunContext
from pellucid.steering.directions import Direction, Samples, refuse_not_finite, vector_of_json, vector_to_json
from pellucid.storage.json_text import Json
from pellucid.tables import BriefFields

Vector: TypeAlias = Direction | Float[Tensor, "..."] | float
"""A direction, a tensor that broadcasts to the features that are edited, or a number for each of them."""


class Change(ABC):
    """What is done to an activation.

    Attributes:
        kind: its name in files.
        of_whole_vectors: it is of all features together; some heads or neurons alone make no sense.
        is_wide: its vector is kept in float32 at least.
    """

    kind: ClassVar[str]
    of_whole_vectors: ClassVar[bool] = False
    is_wide: ClassVar[bool] = False

    @property
    def source(self) -> Direction | Samples | None:
        """What it takes its numbers from, if that was measured of a model."""
        return None

    def value(self, layer: int | None) -> Float[Tensor, "..."] | None:
        """Its numbers at a layer, before they are rounded: float64, or ``None`` for none."""
        return None

    @abstractmethod
    def new(
        self, current: Float[Tensor, "*axes"], value: Float[Tensor, "..."] | None, run: RunContext
    ) -> Float[Tensor, "*axes"]:
        """The new values.

        Args:
            current: the activation, ``[batch, pos, *features]``.
            value: :meth:`value`, in the activation's dtype.
            run: the forward.
        """


@dataclass(frozen=True, eq=False, repr=False)
class Add(BriefFields, Change):
    """What is there, plus a vector.

    Attributes:
        vector: a :class:`Direction`, a tensor that broadcasts to the features edited, or a number.
        strength: times the vector.
    """

    vector: Vector
    strength: float = 1.0
    kind: ClassVar[str] = "add"

    def __post_init__(self) -> None:
        _check_vector("Add: vector", self.vector)
        check_number("Add: strength", self.strength)

    @property
    def source(self) -> Direction | None:
        """The direction."""
        return self.vector if isinstance(self.vector, Direction) else None

    def value(self, layer: int | None) -> Float[Tensor, "..."]:
        """Strength times vector."""
        return _numbers(self.vector, layer) * self.strength

    def new(
        self, current: Float[Tensor, "*axes"], value: Float[Tensor, "..."] | None, run: RunContext
    ) -> Float[Tensor, "*axes"]:
        """The sum."""
        assert value is not None
        return current + value


@dataclass(frozen=True)
class Scale(Change):
    """What is there, times a factor."""

    factor: float
    kind: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        check_number("Scale: factor", self.factor)

    def new(
        self, current: Float[Tensor, "*axes"], value: Float[Tensor, "..."] | None, run: RunContext
    ) -> Float[Tensor, "*axes"]:
        """The product."""
        return current * self.factor


@dataclass(frozen=True)
class Clamp(Change):
    """What is there, no lower than ``low`` and no higher than ``high``, number by number.

    Attributes:
        low: ``None`` for no lower bound.
        high: ``None`` for no upper bound.
    """

    low: float | None = None
    high: float | None = None
    kind: ClassVar[str] = "clamp"

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            if bound is not None:
                check_number(f"Clamp: {name}", bound)
        if self.low is None and self.high is None:
            raise InputError("Clamp: give low, high, or both; without either nothing is changed.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise InputError(f"Clamp: low is {self.low}, above high, {self.high}.")

    def new(
        self, current: Float[Tensor, "*axes"], value: Float[Tensor, "..."] | None, run: RunContext
    ) -> Float[Tensor, "*axes"]:
        """The numbers within the bounds."""
        return current.clamp(self.low, self.high)


@dataclass(frozen=True)
class Zero(Change):
    """Zeros."""

    kind: ClassVar[str] = "zero"

    def new(
        self, current: Float[Tensor, "*axes"], value: Float[Tensor, "..."] | None, run: RunContext
    ) -> Float[Tensor, "*axes"]:
        """Zeros."""
        return torch.zeros_like(current)


@dataclass(frozen=True, eq=False, repr=False)
class Replace(BriefFields, Change):
    """A given vector, whatever was there: of :func:`~pellucid.steering.mean_activation`, it is a mean ablation.

    Attributes:
        vector: see :class:`Add`.
    """

    vector: Vector
    kind: ClassVar[str] = "replace"

    def __post_init__(self) -> None:
        _check_vector("Replace: vector", self.vector)

    @property
    def source(self) -> Direction | None:
        """The direction."""
        return self.vector if isinstance(self.vector, Direction) else None

    def value(self, layer: int | None) -> Float[Tensor, "..."]:
        """The vector."""
        return _numbers(self.vector, layer)

    def new(
        self, current: Float[Tensor, "*axes"], value: Float[Tensor, "..."] | None, run: RunContext
    ) -> Float[Tensor, "*axes"]:
        """The vector, at every position."""
        assert value is not None
        return value.expand_as(current)


@dataclass(frozen=True, eq=False, repr=False)
class Resample(BriefFields, Change):
    """At each position one of the kept activations, drawn by chance: what is there says nothing any more, and looks usual.

    Which one depends on the seed, the row's prompt and the position alone. So all layers take the same sample, a run with a
    key/value cache takes what one without takes, and beams of a prompt take the same.

    Attributes:
        samples: what to draw from.
        seed: of the draws.
    """

    samples: Samples
    seed: int = 0
    kind: ClassVar[str] = "resample"

    def __post_init__(self) -> None:
        check_kind("Resample: samples", self.samples, Samples, "a Samples, as sample_activations makes it")
        check_count("Resample: seed", self.seed, at_least=0, at_most=2**31)

    @property
    def source(self) -> Samples:
        """The samples."""
        return self.samples

    def value(self, layer: int | None) -> Float[Tensor, " sample *features"]:
        """``[sample, *features]``."""
        return self.samples.at(layer).double()

    def new(
        self,
        current: Float[Tensor, "batch pos *features"],
        value: Float[Tensor, " sample *features"] | None,
        run: RunContext,
    ) -> Float[Tensor, "batch pos *features"]:
        """One of the samples at each position."""
        assert value is not None
        return value[_drawn(self.seed, run.rows, run.positions, value.shape[0])]


@dataclass(frozen=True, eq=False, repr=False)
class ProjectOut(BriefFields, Change):
    """What is there without its part along a vector: the direction is ablated.

    With ``u`` the vector at length 1 and all features taken as one vector, ``x - strength * (x . u) u``.

    Attributes:
        vector: a direction, or a tensor of the point's features.
        strength: 1 takes the part away, 2 turns it round, 0.5 leaves half.
    """

    vector: Direction | Float[Tensor, "*features"]
    strength: float = 1.0
    kind: ClassVar[str] = "project-out"
    of_whole_vectors: ClassVar[bool] = True
    is_wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kind("ProjectOut: vector", self.vector, (Direction, Tensor), "a Direction or a tensor")
        _check_vector("ProjectOut: vector", self.vector)
        check_number("ProjectOut: strength", self.strength)
        vectors = self.vector.vectors if isinstance(self.vector, Direction) else self.vector[None]
        if bool((vectors.detach().flatten(1).norm(dim=1) == 0).any()):
            raise InputError("ProjectOut: vector is zero: it points nowhere.")

    @property
    def source(self) -> Direction | None:
        """The direction."""
        return self.vector if isinstance(self.vector, Direction) else None

    def value(self, layer: int | None) -> Float[Tensor, "*features"]:
        """The vector at length 1."""
        vector = _numbers(self.vector, layer)
        unit: Tensor = vector / vector.norm()
        return unit

    def new(
        self, current: Float[Tensor, "batch pos *features"], value: Float[Tensor, "*features"] | None, run: RunContext
    ) -> Float[Tensor, "batch pos *features"]:
        """What is left."""
        assert value is not None
        wide = widened(current)
        part = (wide * value).flatten(2).sum(-1).view(*wide.shape[:2], *[1] * value.dim())
        return (wide - self.strength * part * value).to(current.dtype)


CHANGES: dict[str, type[Change]] = {
    change.kind: change for change in (Add, Scale, Clamp, Zero, Replace, Resample, ProjectOut)
}
"""Every change by its name in files."""


def change_to_json(change: Change, tensors: dict[str, Float[Tensor, "..."]], prefix: str) -> dict[str, Json]:
    """A change as JSON; its tensors go into ``tensors`` under names that begin with ``prefix``."""
    found: dict[str, Json] = {"kind": change.kind}
    for name, value in vars(change).items():
        is_vector = isinstance(value, Direction | Samples | Tensor)
        found[name] = vector_to_json(value, tensors, prefix + name) if is_vector else value
    return found


def change_of_json(found: Mapping[str, Any], tensors: Mapping[str, Float[Tensor, "..."]]) -> Change:
    """The inverse of :func:`change_to_json`."""
    fields = {name: value for name, value in found.items() if name != "kind"}
    return CHANGES[found["kind"]](
        **{name: vector_of_json(value, tensors) if isinstance(value, dict) else value for name, value in fields.items()}
    )


def _check_vector(what: str, vector: Any) -> None:
    if isinstance(vector, Direction):
        return
    if isinstance(vector, Tensor):
        if not vector.is_floating_point():
            raise InputError(f"{what} is a floating-point tensor; found {vector.dtype}.")
        refuse_not_finite(what, vector)
        return
    if isinstance(vector, str | bytes | bool) or not isinstance(vector, int | float):
        raise InputError(f"{what} is a Direction, a tensor or a number; found {vector!r} ({type(vector).__name__}).")
    check_number(what, vector)


def _numbers(vector: Vector, layer: int | None) -> Tensor:
    given = vector.at(layer) if isinstance(vector, Direction) else vector
    return given.double() if isinstance(given, Tensor) else torch.tensor(float(given), dtype=torch.float64)


_MIX = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))
"""Shifts and factors of SplitMix64's last step (Steele, Lea and Flood 2014), as signed numbers."""


def _drawn(seed: int, rows: Tensor, positions: Tensor, count: int) -> Tensor:
    """``[batch, pos]``: a number below ``count``, by chance, of seed, row and position alone."""
    mixed = seed * 0x2545F491 + rows[:, None] * 0x1F123BB5 + positions
    for shift, factor in _MIX:
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    drawn: Tensor = mixed % count
    return drawn
