"""The caching functions of one run: which points they stand on, and what they keep of what they are shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pellucid.hook_points import LensHandle
from pellucid.model_bridge.hooking.cache_plan import (
    EMBEDDING,
    ActivationRecorder,
    PosSlice,
    cache_bytes,
    kept_positions,
    refuse_large,
    refuse_unseen,
)
from pellucid.model_bridge.hooking.hooks import Hooks, refuse_reshaped
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.running.runner import Prepared, Runner
from pellucid.names import HookSpec, NamesFilter, is_part


@dataclass(frozen=True)
class CacheRequest:
    """What ``run_with_cache`` was asked to keep, and how; see there for the fields."""

    names_filter: NamesFilter = None
    pos_slice: PosSlice = None
    incl_bwd: bool = False
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    max_cache_bytes: int | None = None


def cached_specs(runner: Runner, hooks: Hooks, prepared: Prepared, names_filter: NamesFilter) -> list[HookSpec]:
    """The points that a run can keep of those that a filter means.

    Raises:
        HookNameError: a name that matches nothing.
        HookUnreachableError: a named point that the run does not pass.
    """
    chosen = runner.tree.index.select(names_filter, runner.cfg.flags)
    span = runner.span(prepared)
    if span is not None and names_filter is None:
        chosen = [pair for pair in chosen if is_part(pair[0], *span, runner.cfg.n_layers)]
    elif span is not None:
        chosen = hooks.reachable(chosen, names_filter, span)
    return [spec for spec, _ in chosen]


def caching_functions(
    runner: Runner, hooks: Hooks, prepared: Prepared, asked: CacheRequest
) -> tuple[ActivationRecorder, list[LensHandle]]:
    """What keeps the activations of one run, and the functions that hand them to it, not yet attached.

    Raises:
        InputError: positions outside the run, or of a point that is shown in another shape.
        CacheTooLargeError: it would take more than ``max_cache_bytes``.
    """
    specs, run = cached_specs(runner, hooks, prepared, asked.names_filter), runner.positions_of(prepared)
    points = [runner.tree.point_of(spec) for spec in specs]
    if asked.max_cache_bytes is not None:
        size = runner.size(prepared)
        plan = cache_bytes(specs, runner.cfg, size, asked.pos_slice, asked.dtype, asked.incl_bwd)
        refuse_large(plan, asked.max_cache_bytes)
    positions = kept_positions(asked.pos_slice, run.length)
    shifts = {spec.name: run.virtual for spec in specs if run.virtual and spec.component == EMBEDDING}
    if asked.pos_slice is not None:
        if shifts:
            positions = torch.arange(run.length)[positions]
            refuse_unseen(positions, run.virtual, next(iter(shifts)))
        refuse_reshaped(points, "pos_slice")
    recorder = ActivationRecorder(
        {spec.name: spec for spec in specs},
        positions,
        asked.device,
        asked.dtype,
        copies=_others_may_write(runner.tree),
        owned=_owned_by_caller(prepared),
        shifts=shifts,
    )
    handles = [LensHandle(point, recorder, "fwd", point.name, reads_only=True) for point in points]
    if asked.incl_bwd:
        handles += [
            LensHandle(point, recorder.keep_gradient, "bwd", point.name, reads_only=True)
            for spec, point in zip(specs, points, strict=True)
            if spec.kind != "int"
        ]
    return recorder, handles


def _others_may_write(tree: ComponentTree) -> bool:
    """Whether anything but our caching could change a tensor in place after it was kept."""
    if any(not handle.reads_only for handle in tree.handles()):
        return True
    return tree.has_torch_hooks()


def _owned_by_caller(prepared: Prepared) -> frozenset[str]:
    """Points whose tensor the caller has given or will be given back (the logits are shared, and said to be)."""
    start, stop = prepared.start, prepared.stop
    owned = {"embed.hook_in"}
    if start is not None:
        owned.add(f"blocks.{start}.hook_resid_pre")
    if stop is not None:
        owned.add(f"blocks.{stop - 1}.hook_resid_post" if stop else "hook_embed")
    return frozenset(owned)
