"""What stands in for a module's forward while the module is mounted, and what others left on it.

A stand-in is an object that belongs to its component, never a closure (see :mod:`mounting
<pellucid.model_bridge.hooking.mounting>`, which says when one is put and taken off).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.generalized_components.base import Mounted
from pellucid.run_context import is_quiet


class StandIn(Mounted):
    """What stands in for a module's forward while its component is mounted: it calls the component's forward.

    Args:
        component: the mounted component.
        module: the module whose forward it is.
        slot: the attribute of the module that it is (``"forward"``, ``"_old_forward"`` inside accelerate's own, or
            ``"generate"``).
        previous: the instance forward that was there, ``None`` if it was the class's own.
    """

    def __init__(
        self, component: GeneralizedComponent, module: nn.Module, slot: str, previous: Callable[..., Any] | None
    ) -> None:
        self.component, self.module, self.slot, self.previous = component, module, slot, previous

    @property
    def original(self) -> Callable[..., Any]:
        """The forward that was there before."""
        return self._native(self.module) if self.previous is None else self.previous

    def _native(self, module: nn.Module) -> Callable[..., Any]:
        """The class' own method, of the module or of a copy of it."""
        method: Callable[..., Any] = getattr(type(module), self.component.slot).__get__(module)
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's arguments to the module's output, with hooks firing."""
        if args and args[0] is self.module:
            args = args[1:]  # somebody (accelerate's unwrap_model) made a method of it
        if torch.compiler.is_compiling():
            # What hooks do is not for a graph: torch.compile runs the module as it is, and compiles what is around it.
            return torch.compiler.disable(self._run)(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if is_quiet() or self.component.mounted is not self:  # not mounted by it any more: it only passes on
            return self.original(*args, **kwargs)
        return self.component.forward(*args, **kwargs)

    def was_taken_off(self) -> bool:
        """Whether what was there before is there again (or still, if an interrupt came while mounting)."""
        return vars(self.module).get(self.slot) is self.previous

    def put(self) -> None:
        """Become the module's forward."""
        vars(self.module)[self.slot] = self

    def take_off(self) -> bool:
        """Put back what was there before; false, and nothing is changed, where somebody has put another forward there."""
        own = vars(self.module)
        there = own.get(self.slot)
        if there is self:
            if self.previous is None:
                del own[self.slot]
            else:
                own[self.slot] = self.previous
        return there is self or there is self.previous

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What ``inspect.signature`` asks: Hugging Face's ``generate`` looks for arguments in the forward's signature.

        accelerate's ``unwrap_model`` goes this way too, through what ``prepare`` put on the model.
        """
        return self.original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        root = self.component.root
        if root is None or id(root) in memo:
            clone = memo[id(self)] = StandIn.__new__(StandIn)
            vars(clone).update(copy.deepcopy(vars(self), memo))
            return clone
        # One module is copied, not the model: no bridge knows the copy, so it gets the forward that was there.
        if self.previous is not None:
            return copy.deepcopy(self.previous, memo)
        return self._native(memo[id(self.module)])


HUGGING_FACE_RECORDERS = "transformers.utils.output_capturing"
"""Where Hugging Face writes the hooks that it leaves on a model once ``output_attentions`` was asked for. They write to no
tensor, and do nothing in a run that does not ask."""


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody has put torch hooks on a module, which may write to tensors."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(hook.__module__ != HUGGING_FACE_RECORDERS for hook in hooks)


def is_foreign(previous: Callable[..., Any] | None, forward: Callable[..., Any]) -> bool:
    """Whether a module's own forward (``previous``) or its class' is not Hugging Face's."""
    if isinstance(previous, StandIn):  # another bridge's, or an old one that a user put back and that passes on
        return is_foreign(previous.previous, forward)
    if previous is None:
        return not str(forward.__module__).startswith("transformers.")
    return getattr(previous, "__func__", None) is not forward
