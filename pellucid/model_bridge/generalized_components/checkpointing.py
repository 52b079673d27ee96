"""Gradient checkpointing, which runs blocks again during the backward pass: with the hooks that they had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context, ContextVar, copy_context
from functools import partial
from typing import Any

from torch import nn

from pellucid.errors import GradientError
from pellucid.hook_points import LensHandle
from pellucid.model_bridge.generalized_components.split_inputs import PRE_NORM
from pellucid.run_context import Scope, open_scopes

_TO_RUN_AGAIN: ContextVar[tuple[LensHandle, ...] | None] = ContextVar("pellucid_to_run_again", default=None)
"""In a hooked forward under gradient checkpointing: functions that have to be attached when its blocks are run again."""


def with_hooks_in_recomputation(backbone: nn.Module, expected: Sequence[LensHandle], call: Callable[[], Any]) -> Any:
    """Run a forward under gradient checkpointing, whose blocks are run again during ``backward()``.

    Autograd does that in whichever thread it likes (on a GPU always in one of its own), where no block of hooks is open, so
    each block takes its context with it.
    """
    _TO_RUN_AGAIN.set(tuple(expected))  # in the context of this forward alone
    wrapped = {}
    try:
        for module in backbone.modules():
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if checkpoint is not None and not isinstance(
                checkpoint, _Recomputation
            ):  # else another's, or left: it serves
                wrapped[module] = vars(module)["_gradient_checkpointing_func"] = _Recomputation(checkpoint)
        return call()
    finally:
        for module, wrapper in wrapped.items():
            if vars(module).get("_gradient_checkpointing_func") is wrapper:
                vars(module)["_gradient_checkpointing_func"] = wrapper.checkpoint


class _Recomputation:
    """A checkpointing function that runs a block the second time with the hooks of the first.

    Args:
        checkpoint: the model's own; in a forward that is not hooked (an interrupt left this object) nothing else happens.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        handles = _TO_RUN_AGAIN.get()
        if handles is None:
            return self.checkpoint(function, *args, **kwargs)
        closed = frozenset(
            scope for scope in open_scopes() if scope.closed
        )  # of a block that ended before this forward
        return self.checkpoint(partial(self._run, copy_context(), closed, handles, function), *args, **kwargs)

    @staticmethod
    def _run(
        context: Context,
        closed: frozenset[Scope],
        handles: tuple[LensHandle, ...],
        function: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        ended = any(scope.closed and scope not in closed for scope in context.run(open_scopes))
        if ended or not all(handle.is_attached() for handle in handles):
            raise GradientError(
                "Gradient checkpointing runs the forward again during backward(), and hooks of this run are gone by then: "
                "its gradients would not be those of the hooked model. Use `with bridge.hooks(...):` around forward and "
                "backward, or switch gradient checkpointing off."
            )
        return context.copy().run(_on_own_residual, function, *args, **kwargs)


def _on_own_residual(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block on what it is given now: a reentrant checkpoint cuts its input off the graph that it came from.

    The per-head inputs of attention are copies of that input, not of the one of the first time, behind which the whole
    graph of the blocks before is.
    """
    known = PRE_NORM.get()
    if known is not None and args:
        PRE_NORM.set((args[0], known[1]))
    return function(*args, **kwargs)
