"""A user's torch pre-hooks on the model that runs: they are called before its forward is, and may run the model.

Torch calls them between the bridge's call of the model and the forward in which hooks learn where they are. A model that
one of them runs is in a run of its own, as one that a function on a hook point runs: through all blocks, and not the run
whose activations are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pellucid.run_context import beside_run


class _Apart:
    """Calls a torch pre-hook beside the run that begins.

    Args:
        hook: the user's. An object that an interrupt left in its place goes on calling it.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        return beside_run(self.hook, *args)


@contextmanager
def pre_hooks_apart(*modules: nn.Module) -> Iterator[None]:
    """Call the torch pre-hooks of ``modules`` beside the run that begins in the block."""
    hooked = [module._forward_pre_hooks for module in dict.fromkeys(modules) if module._forward_pre_hooks]
    placed = []
    try:
        for hooks in hooked:
            for key, hook in list(hooks.items()):
                if not isinstance(hook, _Apart):  # else another thread's, or left by an interrupt: it serves
                    apart: Any = _Apart(hook)
                    placed.append((hooks, key, apart))
                    hooks[key] = apart
        yield
    finally:
        for hooks, key, apart in placed:
            if hooks.get(key) is apart:
                hooks[key] = apart.hook
