"""A user's torch pre-hooks on the model that runs: they are called before its forward is, and may run the model.

Torch calls them between the bridge's call of the model and the forward in which hooks learn where they are. A model that
one of them runs is in a run of its own, as one that a function on a hook point runs: through all blocks, and not the run
whose activations are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def called_with_pre_hooks_apart(model: nn.Module, arguments: Mapping[str, Any], *inside: nn.Module) -> Any:
    """Call ``model``, its torch pre-hooks and those of modules ``inside`` it beside the run that begins.

    Returns:
        the model's output.
    """
    hooked: list[dict[int, Any]] = [
        module._forward_pre_hooks for module in (model, *inside) if module._forward_pre_hooks
    ]
    if not hooked:
        return model(**arguments)
    placed: list[tuple[dict[int, Any], int, _Apart]] = []
    try:
        for hooks in hooked:
            for key, hook in list(hooks.items()):
                if not isinstance(hook, _Apart):  # else another thread's, left by an interrupt, or a module named twice
                    placed.append((hooks, key, _Apart(hook)))
                    hooks[key] = placed[-1][2]
        return model(**arguments)
    finally:
        for hooks, key, apart in placed:
            if hooks.get(key) is apart:
                hooks[key] = apart.hook
