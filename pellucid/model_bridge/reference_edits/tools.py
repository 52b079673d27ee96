"""How the oracle of edits changes a tensor of a bare model: with torch's own hooks and function modes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pellucid.errors import NoReferenceError

Edit = Callable[[Tensor], Tensor]
"""The tensor at a hook point to what goes on in its place. Must not write in place."""


def no_reference(name: str, where: str) -> NoReferenceError:
    """The error for a point that the oracle does not know.

    Args:
        name: the point as the table has it, ``{i}`` for the layer.
        where: the function that would have to make the edit, with the name of its file.
    """
    return NoReferenceError(
        f"The hook table has {name}, and the oracle of edits does not say what an edit there is in Hugging Face's modules, "
        f"so that nothing can be held against it. Write it in pellucid/model_bridge/reference_edits/{where}; if Hugging "
        "Face does not compute the tensor, its site is in REBUILT of __init__.py too. CONTRIBUTING.md, Adding a hook point, "
        "says how."
    )


class Intercept(TorchFunctionMode):
    """Edits the ``number``-th call of a torch function: its first argument, or its result."""

    def __init__(self, function: Callable[..., Any], number: int, edit: Edit, on_input: bool) -> None:
        super().__init__()
        self._function, self._number, self._edit, self.on_input = function, number, edit, on_input
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not self._function:
            return func(*args, **kwargs)
        mine = self.seen == self._number
        self.seen += 1
        if mine and self.on_input:
            return func(self._edit(args[0]), *args[1:], **kwargs)
        output = func(*args, **kwargs)
        return self._edit(output) if mine else output


def on_output(module: nn.Module, edit: Edit) -> Any:
    """Edit what a module gives."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return module.register_forward_hook(hook)


def on_input(module: nn.Module, edit: Edit) -> Any:
    """Edit the first argument of a module."""
    return module.register_forward_pre_hook(lambda _module, args: (edit(args[0]), *args[1:]))


def recompute(module: nn.Module, again: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Replace a module's output by ``again(input, output)``, which may call the module."""
    busy = False

    def hook(_module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal busy
        if busy:
            return None
        busy = True
        try:
            return again(args[0], output)
        finally:
            busy = False

    return module.register_forward_hook(hook)


def by_head(edit: Edit, n_heads: int) -> Edit:
    """``edit`` of ``[..., n_heads, d_head]``, for a tensor whose heads lie side by side on the last axis."""
    return lambda flat: edit(flat.unflatten(-1, (n_heads, -1))).flatten(-2)


class Remover:
    """A handle that undoes something by a call."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self.remove = undo
