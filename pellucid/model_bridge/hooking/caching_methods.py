"""The bridge's words for caching functions that the user attaches, TransformerLens' names.

A run with a cache is ``run_with_cache``. These are for runs that others make: a training loop, a generation, a call of the
Hugging Face model.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.activation_cache import GRADIENT, check_storage
from pellucid.arguments import check_mapping
from pellucid.hook_points import HookFunction, LensHandle, attach_for_good
from pellucid.model_bridge.hooking.cache_plan import PosSlice, kept_positions, take_positions
from pellucid.model_bridge.hooking.hook_methods import HookMethods
from pellucid.names import HookSpec, NamesFilter
from pellucid.slices import Slice


class CachingMethods(HookMethods):
    """Functions that keep what they are shown in a dictionary."""

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
    ) -> tuple[dict[str, Tensor], list[tuple[str, HookFunction]], list[tuple[str, HookFunction]]]:
        """A dictionary, and the functions for :meth:`hooks` or ``run_with_hooks`` that fill it.

        Each entry is a copy, under the canonical name of its point and the name that was asked for.

        Args:
            names_filter: which points, see ``run_with_cache``.
            incl_bwd: gradients too, under ``name + "_grad"``.
            device: where to keep tensors.
            remove_batch_dim: drop the batch axis where it has size 1; a larger batch keeps it.
            cache: the dictionary to fill, by default a new one.
            pos_slice: which positions to keep, see ``run_with_cache``.

        Returns:
            ``(cache, fwd_hooks, bwd_hooks)``; the last is empty without ``incl_bwd``.

        Raises:
            HookNameError: a name that matches nothing.
            HookDisabledError: an opt-in point that is off.
        """
        check_storage(device, None)
        kept: dict[str, Tensor] = {} if cache is None else cache
        check_mapping("cache", kept, "names to tensors")
        Slice.unwrap(pos_slice)  # refused here, and not in the run
        forward: list[tuple[str, HookFunction]] = []
        backward: list[tuple[str, HookFunction]] = []
        for spec, asked in self._hooks.select(names_filter, "fwd", "names_filter"):
            keys = _keys(spec, asked, names_filter)
            keep = partial(_keep, kept, spec, keys, device, remove_batch_dim, pos_slice)
            forward.append((asked, partial(keep, "")))
            if incl_bwd and spec.kind != "int":
                backward.append((asked, partial(keep, GRADIENT)))
        return kept, forward, backward

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Attach the functions of :meth:`get_caching_hooks` until :meth:`reset_hooks`, and give the dictionary.

        Args:
            names_filter: see :meth:`get_caching_hooks`, as for the others.
        """
        kept, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        handles = [LensHandle(self._tree.point(name), function, "fwd", name) for name, function in forward]
        handles += [LensHandle(self._tree.point(name), function, "bwd", name) for name, function in backward]
        attach_for_good(handles, self._tree)
        return kept

    def cache_all(
        self,
        cache: dict[str, Tensor] | None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """TransformerLens' older word for :meth:`add_caching_hooks` on every point, with a ``DeprecationWarning``."""
        _deprecated("cache_all")
        self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache)

    def cache_some(
        self,
        cache: dict[str, Tensor] | None,
        names: NamesFilter,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
    ) -> None:
        """TransformerLens' older word for :meth:`add_caching_hooks`, with a ``DeprecationWarning``."""
        _deprecated("cache_some")
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)


def _deprecated(name: str) -> None:
    warnings.warn(
        f"{name} is TransformerLens' older word: use run_with_cache or add_caching_hooks.",
        DeprecationWarning,
        stacklevel=3,
    )


def _keys(spec: HookSpec, asked: str, names_filter: NamesFilter) -> tuple[str, ...]:
    """The canonical name, and the names that were asked for."""
    if names_filter is None:
        return (spec.name,)
    others = spec.aliases if callable(names_filter) else ()
    matched = [name for name in others if callable(names_filter) and names_filter(name)]
    return tuple(dict.fromkeys((spec.name, asked, *matched)))


def _keep(
    kept: dict[str, Tensor],
    spec: HookSpec,
    keys: tuple[str, ...],
    device: torch.device | str | None,
    remove_batch_dim: bool,
    pos_slice: PosSlice,
    suffix: str,
    tensor: Tensor,
    hook: Any,
) -> None:
    """The function of one point; shown one row without its batch axis, it finds the positions all the same."""
    axis = spec.pos_axis - (tensor.dim() < len(spec.axes))
    found = tensor.detach()
    if pos_slice is not None:
        found = take_positions(found, axis, kept_positions(pos_slice, found.shape[axis]))
    if remove_batch_dim and tensor.dim() == len(spec.axes) and found.shape[0] == 1:
        found = found[0]
    found = found.to(device, copy=True)
    for key in keys:
        kept[key + suffix] = found
