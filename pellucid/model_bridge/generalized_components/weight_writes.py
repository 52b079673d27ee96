"""Writes of weights in place: all are checked before any is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pellucid.errors import WeightError


class WeightTarget(NamedTuple):
    """A storage that a weight is written to, possibly viewed by head, and the shape in which the weight is given."""

    storage: Tensor
    shape: tuple[int, ...]


WeightTargets: TypeAlias = Callable[[], list[WeightTarget]]
"""Gives the storages that one weight is written to."""


@dataclass(frozen=True)
class WeightWrite:
    """One checked write: ``value`` goes into the storage of ``target``."""

    key: str
    target: Tensor
    value: Tensor


def check_write(key: str, target: Tensor, value: Tensor, shape: tuple[int, ...] | None = None) -> WeightWrite:
    """Check that ``value`` can take the place of ``target``.

    Args:
        key: what to call it in an error.
        target: the storage, possibly viewed by head.
        value: what is to be written.
        shape: what ``value`` must have, if the storage is viewed in another.

    Raises:
        WeightError: wrong type, shape or dtype, or not finite.
    """
    if not isinstance(value, Tensor):
        raise WeightError(f"{key} must be a tensor; found {type(value).__name__}.")
    shape = tuple(target.shape) if shape is None else shape
    if tuple(value.shape) != shape:
        raise WeightError(f"{key} must have shape {shape}; found {tuple(value.shape)}.")
    if value.dtype != target.dtype:
        raise WeightError(f"{key} must have dtype {target.dtype}; found {value.dtype}. Cast it where it was made.")
    if not all_finite(value):
        raise WeightError(f"{key} holds values that are not finite.")
    if target.is_inference():
        raise WeightError(f"{key} was made in inference mode and cannot be written. Load the model outside of it.")
    return WeightWrite(key, target, value.reshape(target.shape))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither infinities nor NaN: one pass, nothing allocated."""
    values = tensor.detach()
    # A finite sum has finite terms, and is the quickest to have; finite terms whose sum overflows are looked at again.
    if tensor.numel() == 0 or bool(torch.isfinite(values.sum())):
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))


def commit_writes(writes: list[WeightWrite], verbose: bool) -> None:
    """Write what was checked, in place, so that views, optimisers and other references stay valid."""
    # A value may be a view of what another write changes (swapping q and k), so all are read before any is written.
    values = [write.value.detach().clone() for write in writes]
    with torch.no_grad():
        for write, value in zip(writes, values, strict=True):
            write.target.copy_(value)
            if verbose:
                print(f"{write.key} {tuple(write.target.shape)} written")  # noqa: T201 (asked for)
