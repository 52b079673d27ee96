"""What a hook is given and gives back: whose tensor it is, whether what came back fits, in which layout it goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import HookValueError
from pellucid.names import HookSpec


class HookedFunction:
    """A hook function with hook points of its own, which are there while it is attached, where it acts.

    Attributes:
        specs: their lines of the hook table, in firing order. A name begins with that of the point it is attached to.
        points: the points by name; the function fires them.
    """

    specs: tuple[HookSpec, ...] = ()
    points: Mapping[str, Any] = {}

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:
        """What goes on in the place of ``tensor``."""
        raise NotImplementedError


def is_delicate(value: Tensor) -> bool:
    """Whether a function must not write to ``value`` itself, for autograd's sake.

    A leaf cannot be written to. A part of a larger tensor (queries of the fused projection) can, but then a backward hook
    on another part is lost or crashes the process: torch rewrites the history of all views of a tensor that one of them
    changed.
    """
    if not value.requires_grad:
        return False
    return value.is_leaf or (value._is_view() and value.untyped_storage().nbytes() != value.nbytes)


def check_returned(result: object, expected: Tensor, who: str, verb: str) -> None:
    """Refuse what cannot take the place of ``expected``.

    Raises:
        HookValueError: no tensor, or one of another shape, dtype or device.
    """
    if not isinstance(result, Tensor):
        raise HookValueError(mismatch(who, f"{verb} a", "Tensor", type(result).__name__))
    for aspect, wanted, found in (
        ("shape", tuple(expected.shape), tuple(result.shape)),
        ("dtype", expected.dtype, result.dtype),
        ("device", expected.device, result.device),
    ):
        if wanted != found:
            raise HookValueError(mismatch(who, f"{verb} a tensor of {aspect}", wanted, found))


def mismatch(who: str, what: str, expected: object, found: object) -> str:
    """What is wrong with what a hook did."""
    return (
        f"The {who} {what} {found}; expected {expected}. Nothing is broadcast or cast on the way back into the model."
    )


def describe_function(function: Callable[..., Any]) -> str:
    """``name (file:line)`` of a user's function, as far as Python knows them."""
    while isinstance(function, partial):
        function = function.func
    code = inspect.unwrap(function).__code__ if inspect.isfunction(inspect.unwrap(function)) else None
    if code is not None:
        return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
    return repr(function)


def add_note(error: BaseException, note: str) -> None:
    """Say where an exception came from without changing its type."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"[pellucid] {note}")
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} [pellucid: {note}]", *error.args[1:])


def laid_out_as(value: Tensor, shown: Tensor) -> Tensor:
    """``shown`` in the memory layout of the tensor it takes the place of."""
    if shown is not value and shown.stride() != value.stride() and not _overlaps(value):
        laid_out = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
        return laid_out.copy_(shown)
    return shown


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements share one place in memory, as after ``expand``."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_differ(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: whether two tensors of one dtype differ in any bit (a NaN equals itself)."""
    integers = _INTEGERS[a.element_size()]
    return a.detach().view(integers) != b.detach().view(integers)
