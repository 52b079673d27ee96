"""A user's torch hooks on the model that runs: they are called before and after its forward, and may run the model.

Torch calls them between what begins a run (a call of the bridge, a step of ``generate``) and the forward in which hooks
learn where they are. A model that one of them runs is in a run of its own, as one that a function on a hook point runs:
through all blocks, no step of a generation, and not the run whose activations are asked for. A streamer of ``generate``,
which is called before the first forward too, is kept apart in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakSet

from torch import nn

from pellucid.run_context import beside_run

T = TypeVar("T")


class _Call:
    """A call for whose length hooks are kept apart; known by itself. One that an interrupt ended is forgotten."""


class _Apart:
    """Calls a torch hook beside the run that begins, for one call or for several in as many threads.

    Args:
        hook: the user's. An object that an interrupt left in its place goes on calling it, and the next call takes it off.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.calls: WeakSet[_Call] = WeakSet()

    def __call__(self, *args: Any) -> Any:
        return beside_run(self.hook, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_given, (self.hook,)  # a copy of the model has the user's hook


def _as_given(hook: Any) -> Any:
    return hook


_LOCK = RLock()


def called_with_hooks_apart(call: Callable[[], T], *modules: nn.Module) -> T:
    """``call()``, the torch hooks of ``modules``, before their forward and after it, beside the run that it begins."""
    hooked: list[dict[int, Any]] = [
        hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks) if hooks
    ]
    if not hooked:
        return call()
    here = _Call()
    try:
        with _LOCK:
            for hooks in hooked:
                for key, hook in list(hooks.items()):
                    if not isinstance(hook, _Apart):
                        hook = hooks[key] = _Apart(hook)
                    hook.calls.add(here)
        return call()
    finally:
        with _LOCK:
            for hooks in hooked:
                for key, hook in list(hooks.items()):
                    if isinstance(hook, _Apart):
                        hook.calls.discard(here)
                        if not hook.calls:
                            hooks[key] = hook.hook


class StreamerApart:
    """A streamer of Hugging Face's ``generate``, called beside the generation."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Any) -> None:
        """The prompt, then each step's ids."""
        beside_run(self._streamer.put, value)

    def end(self) -> None:
        """There is no further step."""
        beside_run(self._streamer.end)
