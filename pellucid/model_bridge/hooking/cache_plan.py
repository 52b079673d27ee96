"""What a cache will hold, decided before the run: which points, which positions, how many bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pellucid.activation_cache import GRADIENT, check_storage
from pellucid.arguments import check_count, check_whole
from pellucid.config import TransformerBridgeConfig
from pellucid.dtypes import cast
from pellucid.errors import CacheTooLargeError, InputError
from pellucid.hook_points import HookPoint
from pellucid.names import HookSpec
from pellucid.run_context import Scope, current_run
from pellucid.slices import Slice, SliceInput

PosSlice: TypeAlias = "Slice | SliceInput"
"""Positions to keep: one (its axis stays), a range ``(start, stop[, step])``, a list or mask, or all."""


EMBEDDING = "embed"
"""The component that sees the positions of the input only, not those that a wrapper of the model puts before them."""


@dataclass(frozen=True)
class RunSize:
    """Sizes of a run: rows, positions, keys (cached ones included), and positions that the token embedding does not see."""

    batch: int
    pos: int
    key_pos: int
    virtual: int = 0


def kept_positions(pos_slice: PosSlice, length: int) -> Tensor | slice:
    """The positions of ``[0, length)`` that ``pos_slice`` keeps, as something that indexes an axis.

    Raises:
        InputError: a position outside the run.
    """
    try:
        wanted = Slice.unwrap(pos_slice)
    except InputError as error:
        raise InputError(f"pos_slice is a position, a slice or several positions. {error}") from None
    return wanted.positions(length)


def refuse_unseen(positions: Tensor, virtual: int, name: str) -> None:
    """Refuse positions that a point never sees.

    Raises:
        InputError: one of the first ``virtual`` positions.
    """
    if bool((positions < virtual).any()):
        raise InputError(
            f"{name} has the tokens only, and pos_slice asks for position {int(positions.min())}, one of the {virtual} "
            f"virtual positions that the model's wrapper puts before them. Leave {name} out (names_filter), or take "
            f"positions from {virtual} on."
        )


def kept_count(positions: Tensor | slice, length: int) -> int:
    """How many positions are kept."""
    return len(range(*positions.indices(length))) if isinstance(positions, slice) else int(positions.numel())


def take_positions(tensor: Tensor, axis: int, positions: Tensor | slice) -> Tensor:
    """``tensor`` at ``positions`` of ``axis``."""
    if isinstance(positions, Tensor):
        return tensor.index_select(axis, positions.to(tensor.device))
    return tensor[(slice(None),) * axis + (positions,)]


class CacheEstimate(dict[str, int]):
    """Bytes that a cache would take, by the name of the entry; printed, a total and the largest points."""

    @property
    def total(self) -> int:
        """Bytes of all entries."""
        return sum(self.values())

    def largest(self, count: int = 5) -> list[tuple[str, int]]:
        """The entries that take most, as ``(name, bytes)``, largest first."""
        check_count("count", count)
        return sorted(self.items(), key=lambda entry: entry[1], reverse=True)[:count]

    def __repr__(self) -> str:
        lines = [f"{readable_bytes(self.total)} in {len(self)} entries"]
        lines += [f"  {readable_bytes(size):>10}  {name}" for name, size in self.largest()]
        left = len(self) - len(lines) + 1
        return "\n".join(lines + ([f"  and {left} more"] if left else []))


def readable_bytes(count: int) -> str:
    """A number of bytes with three digits and a unit: ``"1.44 MiB"``."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"


def cache_bytes(
    specs: Sequence[HookSpec],
    cfg: TransformerBridgeConfig,
    size: RunSize,
    pos_slice: PosSlice = None,
    dtype: torch.dtype | None = None,
    incl_bwd: bool = False,
) -> CacheEstimate:
    """Bytes that each point, and its gradient if asked for, will take in a cache, by the name of the entry.

    Raises:
        InputError: a position outside the run; a dtype that is not floating point.
    """
    check_storage(None, dtype)
    pos = kept_count(kept_positions(pos_slice, size.pos), size.pos)
    lengths = cfg.sizes(size.batch, pos, size.key_pos)
    dtypes = {
        "model": dtype or cfg.dtype,
        "wide": dtype or torch.promote_types(cfg.dtype, torch.float32),
        "int": torch.int64,
    }
    plan = CacheEstimate()
    for spec in specs:
        count = math.prod(spec.sizes(lengths)[axis] for axis in spec.axes)
        if spec.component == EMBEDDING and pos_slice is None:
            count = count // size.pos * (size.pos - size.virtual)
        plan[spec.name] = count * dtypes[spec.kind].itemsize
        if incl_bwd and spec.kind != "int":
            plan[spec.name + GRADIENT] = plan[spec.name]
    return plan


def refuse_large(plan: dict[str, int], limit: int | None) -> None:
    """Refuse a cache over ``limit`` bytes before anything is allocated.

    Raises:
        CacheTooLargeError: with the estimate and the largest entries.
    """
    if limit is not None:
        check_whole("max_cache_bytes", limit)
    total = sum(plan.values())
    if limit is not None and total > limit:
        largest = sorted(plan, key=plan.__getitem__, reverse=True)[:3]
        raise CacheTooLargeError(
            f"The cache would take {total:,} bytes, over max_cache_bytes={limit:,}. Largest: "
            + ", ".join(f"{name} {plan[name]:,}" for name in largest)
            + ". Keep fewer points (names_filter), fewer positions (pos_slice) or a smaller dtype."
        )


class ActivationRecorder:
    """The caching function of one run: keeps what each point shows it, under the point's name.

    Args:
        specs: of the points it will be attached to, by name.
        positions: which positions to keep.
        device: where to keep them, by default where they are.
        dtype: as what to keep floating-point ones, by default as they are.
        copies: whether anything else may write to the tensors, so that they have to be copied.
        owned: points whose tensor the caller has too, before or after the run.
        shifts: by point, how many of the run's first positions it does not see.

    Attributes:
        kept: the tensors by name.
        scope: the session it belongs to, whose own run is the one to keep: not one that a hook makes inside it.

    Raises:
        InputError: no device; a dtype that is not floating point; when a tensor is kept, a value that ``dtype`` cannot hold.
    """

    def __init__(
        self,
        specs: Mapping[str, HookSpec],
        positions: Tensor | slice,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        copies: bool,
        owned: Collection[str] = (),
        shifts: Mapping[str, int] | None = None,
    ) -> None:
        check_storage(device, dtype)
        self._shifts = shifts or {}
        self.kept: dict[str, Tensor] = {}
        self.scope: Scope | None = None
        self._owned = owned
        self._specs = specs
        self._positions = positions
        self._as_is = isinstance(positions, slice) and positions == slice(None) and device is None and dtype is None
        self._device, self._dtype, self._copies = device, dtype, copies

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        """Keep one tensor; called by a hook point."""
        run, scope = current_run(), self.scope
        # Left on after its run (reset_hooks_end=False) it keeps what later runs show it.
        if run is not None and scope is not None and not scope.everywhere and not run.is_part_of(scope.run):
            return  # a hook of the user's runs the model inside this run
        self.keep(tensor, str(hook.name), "")

    def keep_gradient(self, tensor: Tensor, hook: HookPoint) -> None:
        """Keep one gradient; called by a hook point."""
        self.keep(tensor, str(hook.name), GRADIENT)

    def keep(self, tensor: Tensor, name: str, suffix: str) -> None:
        """Keep ``tensor`` under ``name + suffix``."""
        kept = tensor.detach()
        if not self._as_is:
            positions, shift = self._positions, self._shifts.get(name, 0)
            if shift and isinstance(positions, Tensor):
                positions = positions - shift
            kept = take_positions(kept, self._specs[name].pos_axis, positions)
            kept = cast(kept, self._dtype, name + suffix, self._device)
        if self._copies:
            if kept.data_ptr() == tensor.data_ptr():
                kept = kept.clone(memory_format=torch.contiguous_format)
        elif kept.untyped_storage().nbytes() != kept.nbytes or name in self._owned:
            # Part of a larger tensor, which it would keep alive; or one that the caller may write to.
            kept = kept.clone(memory_format=torch.contiguous_format)
        self.kept[name + suffix] = kept
