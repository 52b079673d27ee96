"""What a hook is given and gives back: whose tensor it is, whether what came back fits, in which layout it goes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import GradientError, HookValueError, NoEffectError
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


def what_goes_on(result: object, shown: Tensor, shape: torch.Size, who: str) -> Tensor:
    """What a function leaves: the tensor it returned, or the one it was shown.

    Args:
        result: what it returned, ``None`` if it only looked or wrote in place.
        shown: the tensor it was shown, which had ``shape`` before.
        shape: see ``shown``.
        who: the function, for an error.

    Raises:
        HookValueError: nothing that can take the place of ``shown``.
    """
    if result is None or result is shown:
        if shown.shape != shape:
            raise HookValueError(mismatch(who, "left its tensor with shape", tuple(shape), tuple(shown.shape)))
        return shown
    check_returned(result, shown, who, "returned")
    returned: Any = result
    # The function may have kept it; a later one may write in place.
    return returned.clone() if returned.data_ptr() != shown.data_ptr() else returned  # type: ignore[no-any-return]


def with_a_gradient(value: Tensor, name: str) -> Tensor:
    """``value``, in autograd's graph: where nothing before it has a gradient (frozen parameters), it begins here.

    Raises:
        GradientError: it cannot have one.
    """
    if not torch.is_grad_enabled():
        raise GradientError(
            f"The backward hook on {name} cannot fire: gradients are off (torch.no_grad or inference_mode). Run the forward "
            "with gradients on."
        )
    if not value.is_floating_point():
        raise GradientError(f"{name} holds integers and has no gradient.")
    # A detached leaf shares the storage, so no number changes.
    return value if value.requires_grad else value.detach().requires_grad_(True)


def no_effect(who: str, calls: int) -> NoEffectError:
    """What is wrong with a function that was to change its tensor and has not, in so many calls."""
    happened = f"ran {calls} times and left the tensor unchanged to the bit" if calls else "never ran"
    return NoEffectError(
        f"assert_effect: the hook {who} {happened}. An edit has to change the tensor it is given in place, or return the "
        "new one; a copy (.float(), indexing with a list) is not the tensor."
    )


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


class AsItWas:
    """A tensor before functions are shown it, to tell those that only look from those that write to it.

    Args:
        tensor: the very tensor that they are shown.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._bits, self._made_by = tensor.detach().clone(), tensor.grad_fn

    def is_still(self, tensor: Tensor) -> bool:
        """Whether nobody wrote to it or cut it off."""
        return tensor.grad_fn is self._made_by and not bool(bits_differ(self._bits, tensor).any())


def with_bits_of(value: Tensor, back: Tensor) -> Tensor:
    """The bits of ``value`` in the graph of ``back``, so that what a conversion showed has its gradient wherever it is kept.

    Args:
        value: what was converted.
        back: what came back of it, unchanged but for what the way there and back rounds.
    """
    if not back.requires_grad:
        return value
    goes_on = back.clone()
    with torch.no_grad():  # the backward pass of a clone knows no numbers
        goes_on.copy_(value)
    return goes_on


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_differ(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: whether two tensors of one dtype differ in any bit (a NaN equals itself)."""
    integers = _INTEGERS[a.element_size()]
    return a.detach().view(integers) != b.detach().view(integers)
