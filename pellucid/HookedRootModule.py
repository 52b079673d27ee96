"""Hook points in a module of a user's own: TransformerLens' ``HookedRootModule``.

A subclass makes :class:`~pellucid.hook_points.HookPoint` objects in its ``__init__``, calls them on tensors in ``forward``,
and calls :meth:`HookedRootModule.setup` at the end of ``__init__``. A function that a ``hooks()`` block attaches carries the
block's level, so that the block takes off its own and leaves every other. A bridge is no such module: it has its own runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from pellucid.activation_cache import check_storage
from pellucid.arguments import check_function, check_kind, check_list, check_mapping, check_text
from pellucid.errors import HookNameError, InputError, warn
from pellucid.hook_introspection import HookIntrospectionMixin, chosen
from pellucid.hook_points import Direction, Directions, HookFunction, HookPoint
from pellucid.names import NamesFilter, nearest
from pellucid.slices import Slice, SliceInput

Request: TypeAlias = tuple[str | Callable[[str], bool], HookFunction]
PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")
"""Points whose positions are the third axis from the end; of all others, the second."""


class HookedRootModule(HookIntrospectionMixin, nn.Module):
    """A module whose hook points can be listed, hooked and cached by name.

    Attributes:
        mod_dict: every module below by its dotted name.
        hook_dict: the hook points among them.
        context_level: how many ``hooks()`` blocks are open.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, HookPoint] = {}
        self.is_caching = False
        self.context_level = 0

    def setup(self) -> None:
        """Name every module and find the hook points; to be called when all are made."""
        self.mod_dict = {name: module for name, module in self.named_modules() if name}
        for name, module in self.mod_dict.items():
            module.name = name  # type: ignore[assignment]
        self.hook_dict = {name: module for name, module in self.mod_dict.items() if isinstance(module, HookPoint)}

    def hook_points(self) -> Iterable[HookPoint]:
        """Every hook point."""
        return self.hook_dict.values()

    # -- functions -----------------------------------------------------------------------------------------------------

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Called before a function is attached: a subclass refuses here what it does not allow."""

    def check_and_add_hook(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Attach a function to one point, if :meth:`check_hooks_to_add` lets it.

        Args:
            hook_point: one of the module's.
            hook_point_name: its name.
            hook: see :meth:`HookPoint.add_hook`, as the rest.

        Raises:
            HookNameError: no such point.
            InputError: another point has that name.
        """
        check_kind("hook_point", hook_point, HookPoint, "a HookPoint")
        check_text("hook_point_name", hook_point_name)
        if self.hook_dict.get(hook_point_name) is not hook_point:
            self._named(hook_point_name)
            raise InputError(f"hook_point is not the point {hook_point_name!r} of this module: found {hook_point!r}.")
        self.check_hooks_to_add(hook_point, hook_point_name, hook, dir, is_permanent, prepend)
        hook_point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Attach a function to a point, or to those that a predicate accepts, until hooks are reset.

        Raises:
            HookNameError: no such point.
        """
        for found in self._named(name):
            self.check_and_add_hook(self.hook_dict[found], found, hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: str | Callable[[str], bool], hook: HookFunction, dir: Direction = "fwd") -> None:
        """Attach a function that ``reset_hooks`` keeps unless told otherwise."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def _named(self, name: str | Callable[[str], bool]) -> list[str]:
        if callable(name):
            found = [each for each in self.hook_dict if name(each)]
            if not found:
                raise HookNameError(
                    f"The predicate given as name matches none of the {len(self.hook_dict)} hook points."
                )
            return found
        check_text("name", name)
        if name not in self.hook_dict:
            near = ", ".join(nearest(name, self.hook_dict)) or "none: call setup() when the points are made"
            raise HookNameError(f"No hook point is called {name!r}. Nearest names: {near}.")
        return [name]

    def remove_all_hook_fns(
        self, direction: Directions = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Take functions off, of one context level only if given."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty the ``ctx`` of every point."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Directions = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take functions off, and empty contexts."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level)
        self.is_caching = False

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Request] = (),
        bwd_hooks: Sequence[Request] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Functions for the length of a ``with`` block.

        Args:
            fwd_hooks: ``(name or predicate, function)`` pairs.
            bwd_hooks: the same for gradients.
            reset_hooks_end: ``False`` leaves them on.
            clear_contexts: empty the ``ctx`` of every point at the end.
        """
        wanted: list[tuple[str | Callable[[str], bool], HookFunction, Direction]] = []
        for argument, requests, dir in (("fwd_hooks", fwd_hooks, "fwd"), ("bwd_hooks", bwd_hooks, "bwd")):
            for request in check_list(argument, requests, "(name, function) pairs", empty=True):
                if not isinstance(request, tuple | list) or len(request) != 2:
                    raise InputError(f"{argument} is a list of (name, function) pairs; found {request!r} in it.")
                self._named(request[0])  # all names are known before a function is attached
                check_function(f"the function of {argument}", request[1], "a function of a tensor and its hook point")
                wanted.append((request[0], request[1], "fwd" if dir == "fwd" else "bwd"))
        self.context_level += 1
        try:
            for name, hook, direction in wanted:
                self.add_hook(name, hook, direction, level=self.context_level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[Request] = (),
        bwd_hooks: Sequence[Request] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """``forward`` with functions attached for its length; see :meth:`hooks`.

        Backward functions fire in a later ``backward()``: with ``reset_hooks_end`` they are off by then.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            if bwd_hooks and reset_hooks_end:
                warn("Backward functions are taken off before backward() can run: give reset_hooks_end=False.")
            return self(*model_args, **model_kwargs)

    # -- caches --------------------------------------------------------------------------------------------------------

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput = None,
    ) -> tuple[dict[str, Tensor], list[Request], list[Request]]:
        """``(cache, fwd_hooks, bwd_hooks)``: functions for :meth:`hooks` that keep tensors in ``cache``.

        Args:
            names_filter: which points: a name, a list, a predicate, or all.
            incl_bwd: gradients too, under ``name + "_grad"``.
            device: where to keep them.
            remove_batch_dim: drop a first axis of size 1.
            cache: the dictionary, by default a new one.
            pos_slice: which positions: the third axis from the end of per-head points, the second of others.
        """
        kept: dict[str, Tensor] = {} if cache is None else cache
        check_mapping("cache", kept, "names to tensors")
        check_storage(device, None)
        positions = Slice.unwrap(pos_slice)
        names = chosen("names_filter", names_filter, list(self.hook_dict))
        if not names:
            raise HookNameError("This module has no hook points: call setup() when they are made.")
        self.is_caching = True

        def keep(tensor: Tensor, hook: Any, suffix: str) -> None:
            found = tensor.detach().to(device)
            if remove_batch_dim and found.dim() and found.shape[0] == 1:
                found = found[0]
            axis = -3 if str(hook.name).endswith(PER_HEAD) else -2
            kept[str(hook.name) + suffix] = positions.apply(found, axis) if found.dim() >= -axis else found

        forward: list[Request] = [(name, partial(keep, suffix="")) for name in names]
        backward: list[Request] = [(name, partial(keep, suffix="_grad")) for name in names if incl_bwd]
        return kept, forward, backward

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Attach the functions of :meth:`get_caching_hooks` until hooks are reset; the dictionary they keep tensors in."""
        kept, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for name, hook in forward:
            self.add_hook(name, hook, "fwd")
        for name, hook in backward:
            self.add_hook(name, hook, "bwd")
        return kept

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Slice | SliceInput = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Tensor]]:
        """``(output, cache)`` of one forward; with ``incl_bwd`` also ``backward()`` of its output, a scalar.

        Raises:
            InputError: ``remove_batch_dim`` with several rows.
        """
        first = model_args[0] if model_args else None
        if remove_batch_dim and isinstance(first, Tensor) and first.dim() and first.shape[0] != 1:
            raise InputError(f"remove_batch_dim needs a batch of one row; found batch size {first.shape[0]}.")
        kept, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        with self.hooks(forward, backward, reset_hooks_end, clear_contexts):
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                output.backward()
        return output, kept
