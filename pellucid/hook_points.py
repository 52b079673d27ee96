"""Hook points: where a user's functions meet a tensor of the model.

A :class:`HookPoint` stands on one tensor. With no function attached it gives the tensor back untouched. With functions
attached it calls each as ``fn(tensor, hook=point)``; a function may change the tensor in place, return another one, or
only look. Three rules make an edit an edit:

* what is returned has the shape, dtype and device of what was given, or the run stops there, naming the function;
* returning ``t + d`` and ``t.add_(d)`` go on as the same bits, so a returned tensor takes the memory layout of the
  original (matrix products may round differently on another layout);
* a function gets a copy where autograd has saved the tensor, where it is a leaf, and where the caller owns it.

Functions belong to a *scope* (a ``with bridge.hooks(...)`` block, one ``run_with_hooks``) or to the bridge for good.
Scopes are kept in a context variable: they act in the thread or task that opened them and nowhere else, they may be
closed in any order, and closing one leaves every other as it was.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.errors import GradientError, HookValueError, InputError, NoEffectError
from pellucid.names import layer_of
from pellucid.run_context import (
    WHOLE,
    RunContext,
    Scope,
    acts,
    current_fast_attention,
    current_run,
    current_span,
    open_scopes,
    outside_run,
)

HookFunction: TypeAlias = Callable[..., Any]
"""``fn(tensor, hook=point) -> Tensor | None``."""

Direction = Literal["fwd", "bwd"]
Directions = Literal["fwd", "bwd", "both"]


@dataclass(eq=False, slots=True)
class LensHandle:
    """One function attached to one point.

    Attributes:
        point: where it is attached.
        user_hook: the function.
        direction: ``"fwd"`` or ``"bwd"``.
        name: the name under which the user asked for the point.
        is_permanent: kept by ``reset_hooks`` unless told otherwise.
        scope: the block or run it belongs to, ``None`` if it stays until removed.
        reads_only: a caching function of ours, which never writes.
        must_change: ``assert_effect``: note whether the tensor was changed.
    """

    point: HookPoint
    user_hook: HookFunction
    direction: Direction
    name: str | None
    is_permanent: bool = False
    scope: Scope | None = None
    reads_only: bool = False
    must_change: bool = False
    calls: int = field(default=0, init=False)
    changed: bool = field(default=False, init=False)

    @property
    def context_level(self) -> int | None:
        """Depth of the ``hooks()`` block it belongs to, ``None`` outside one."""
        return None if self.scope is None else self.scope.level

    def remove(self) -> None:
        """Detach the function. Removing it twice is harmless."""
        self.point.detach(self)

    def check_effect(self) -> None:
        """Raise if the function never ran or never changed its tensor.

        Raises:
            NoEffectError: see above.
        """
        if self.must_change and not self.changed:
            happened = f"ran {self.calls} times and left the tensor unchanged to the bit" if self.calls else "never ran"
            raise NoEffectError(
                f"assert_effect: the hook {describe_function(self.user_hook)} on {self.name} {happened}. An edit has to "
                "change the tensor it is given in place, or return the new one; a copy (.float(), indexing with a list) "
                "is not the tensor."
            )


class NamedHook:
    """A point as one function sees it: under the name that function was registered with."""

    def __init__(self, point: HookPoint, name: str) -> None:
        self._point = point
        self.name = name

    @property
    def ctx(self) -> dict[Any, Any]:
        """A dictionary that lives on the point, shared by its functions, emptied by ``clear_contexts``."""
        return self._point.ctx

    @property
    def run(self) -> RunContext:
        """Positions, real-token mask, rows and generation step of this forward."""
        return self._point.run

    def layer(self) -> int:
        """The block's index, from the name."""
        return layer_of(self.name)

    def add_hook(self, hook: HookFunction, dir: Direction = "fwd") -> LensHandle:
        """See :meth:`HookPoint.add_hook`."""
        return self._point.add_hook(hook, dir)

    def remove_hooks(self, dir: Directions = "fwd") -> None:
        """See :meth:`HookPoint.remove_hooks`."""
        self._point.remove_hooks(dir)

    def clear_context(self) -> None:
        """See :meth:`HookPoint.clear_context`."""
        self._point.clear_context()


class HookPoint(nn.Module):
    """An identity on one tensor, where functions can be attached.

    Usable in any ``nn.Module`` of a user's own, as TransformerLens' is; in a bridge it is made when first asked for.

    Attributes:
        name: canonical name, ``None`` outside a bridge.
        ctx: a dictionary for the functions' own use.
        hook_conversion: shape rule between the model's tensor and what functions see, or ``None``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.ctx: dict[Any, Any] = {}
        self.fwd_hooks: list[LensHandle] = []
        self.bwd_hooks: list[LensHandle] = []
        self.hook_conversion: BaseTensorConversion | None = None
        self.on_use: Callable[[HookPoint, int], None] | None = None
        """Told ``+1`` when a function is attached and ``-1`` when one is detached; a bridge mounts by it."""

    def __repr__(self) -> str:
        parts = [] if self.name is None else [repr(self.name)]
        parts += [f"{len(handles)} {kind}" for kind, handles in self._by_direction().items() if handles]
        return f"HookPoint({', '.join(parts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> HookPoint:
        # A copy has hooks of its own, of which those of an open block or run are not part: they end with their block.
        clone = HookPoint()
        memo[id(self)] = clone
        clone.name, clone.hook_conversion = self.name, self.hook_conversion
        clone.ctx = dict(self.ctx)
        clone.on_use = copy.deepcopy(self.on_use, memo)
        for kind, handles in self._by_direction().items():
            for handle in handles:
                if handle.scope is None:
                    copied = LensHandle(clone, handle.user_hook, handle.direction, handle.name, handle.is_permanent)
                    clone._by_direction()[kind].append(copied)
        return clone

    def _by_direction(self) -> dict[Direction, list[LensHandle]]:
        return {"fwd": self.fwd_hooks, "bwd": self.bwd_hooks}

    # -- attaching and detaching ---------------------------------------------------------------------------------------

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> LensHandle:
        """Attach ``hook``, called as ``hook(tensor, hook=point)``.

        Args:
            hook: the function; a backward one is given the gradient of the loss with respect to the tensor.
            dir: ``"fwd"`` or ``"bwd"``.
            is_permanent: keep it when hooks are reset.
            level: accepted for TransformerLens' callers; which block a function belongs to is decided by the block.
            prepend: run it before the functions already attached.

        Returns:
            A handle whose ``remove()`` detaches it.

        Raises:
            InputError: another direction.
        """
        return self.attach(LensHandle(self, hook, _direction(dir), self.name, is_permanent), prepend=prepend)

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> LensHandle:
        """Attach ``hook`` so that only ``including_permanent=True`` removes it."""
        return self.add_hook(hook, dir=dir, is_permanent=True)

    def attach(self, handle: LensHandle, *, prepend: bool = False) -> LensHandle:
        """Attach a function that comes with its scope and name."""
        handles = self._by_direction()[handle.direction]
        handles.insert(0 if prepend else len(handles), handle)
        if self.on_use is not None:
            try:
                self.on_use(self, +1)
            except BaseException:
                handles.remove(handle)
                raise
        return handle

    def detach(self, handle: LensHandle) -> None:
        """Detach a function if it is attached."""
        if detach_quietly((handle,)) and self.on_use is not None:
            self.on_use(self, -1)

    def handles(self, dir: Directions = "both", including_permanent: bool = True) -> list[LensHandle]:
        """The attached functions, forward ones first."""
        if dir not in ("fwd", "bwd", "both"):
            raise InputError(f"dir is 'fwd', 'bwd' or 'both'; found {dir!r}.")
        found = [] if dir == "bwd" else list(self.fwd_hooks)
        found += [] if dir == "fwd" else self.bwd_hooks
        return [handle for handle in found if including_permanent or not handle.is_permanent]

    def has_hooks(self, dir: Directions = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether a function is attached (at context ``level``, if given)."""
        found = self.handles(dir, including_permanent)
        return any(level is None or handle.context_level == level for handle in found)

    def remove_hooks(
        self, dir: Directions = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Detach functions, of context ``level`` only if given."""
        for handle in self.handles(dir, including_permanent):
            if level is None or handle.context_level == level:
                self.detach(handle)

    def clear_context(self) -> None:
        """Empty :attr:`ctx`."""
        self.ctx = {}

    def enable_reshape(self, hook_conversion: BaseTensorConversion | None = None) -> None:
        """Show functions the tensor through ``hook_conversion``; ``None`` shows it as the model has it."""
        self.hook_conversion = hook_conversion

    def layer(self) -> int:
        """The block's index, from the name.

        Raises:
            HookNameError: the point is not in a block.
        """
        return layer_of(self.name or "")

    @property
    def run(self) -> RunContext:
        """Positions, real-token mask, rows and generation step of the forward that is running.

        Raises:
            InputError: no forward of a bridged model is running in this thread.
        """
        run = current_run()
        if run is None:
            raise InputError("hook.run is known only while a forward of a bridged model is running.")
        return run

    # -- firing --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Show ``x`` to the attached functions and give back what goes on."""
        return self.fire(x)

    def is_live(self) -> bool:
        """Whether a function attached here acts in this thread or task now."""
        return any(acts(handle.scope) for handle in (*self.fwd_hooks, *self.bwd_hooks))

    def only_reads(self) -> bool:
        """Whether every function that acts here now is a forward one of ours that never writes."""
        if len(self.fwd_hooks) == 1 and not self.bwd_hooks and self.fwd_hooks[0].reads_only:
            return True
        return not any(_acts(handle) for handle in self.bwd_hooks) and all(
            handle.reads_only for handle in self.fwd_hooks if _acts(handle)
        )

    def fire(self, value: Tensor, *, private: bool = False) -> Tensor:
        """Show ``value`` to the functions that act here now, in order, and give back what goes on.

        Args:
            value: the model's tensor.
            private: the tensor is not ours to change (the caller owns it, or autograd has saved it): functions that may
                write get a copy.
        """
        forward = self.fwd_hooks
        if len(forward) == 1 and not self.bwd_hooks:
            only = forward[0]
            scope = only.scope
            if scope is not None and (scope.closed or scope not in open_scopes()):  # as acts() has it
                return value
            if self.hook_conversion is None:
                # The two common cases: one function of ours that only looks, one function that is shown the model's own.
                if only.reads_only:
                    only.user_hook(value, self)
                    return value
                if not (private or value.requires_grad):
                    shown = _call(only, value)
                    return value if shown is value else _laid_out_as(value, shown)
            return self._run_forward(value, (only,), private)
        if not (forward or self.bwd_hooks):
            return value
        forward = [handle for handle in forward if _acts(handle)]
        backward = [handle for handle in self.bwd_hooks if _acts(handle)] if self.bwd_hooks else None
        shown = self._run_forward(value, forward, private) if forward else value
        if backward:
            if private and shown is value:
                # A copy for one branch: its gradient is that branch's alone, so it needs a place in the graph.
                shown = value.view_as(value)
            shown = self._register_backward(shown, backward)
        return shown

    def _run_forward(self, value: Tensor, handles: Sequence[LensHandle], private: bool) -> Tensor:
        conversion = self.hook_conversion
        shown = value
        if (private or (value.requires_grad and value.is_leaf)) and not all(handle.reads_only for handle in handles):
            shown = value.clone()
        if conversion is not None:
            shown = conversion.convert(shown)
        for handle in handles:
            shown = _call(handle, shown)
        if conversion is not None:
            shown = conversion.revert(shown)
            _check(shown, value, handles[-1], "the conversion rule's revert gave")
        return _laid_out_as(value, shown)

    def _register_backward(self, value: Tensor, handles: Sequence[LensHandle]) -> Tensor:
        if not torch.is_grad_enabled():
            raise GradientError(
                f"The backward hook on {handles[0].name} cannot fire: gradients are off (torch.no_grad or "
                "inference_mode). Run the forward with gradients on."
            )
        if not value.is_floating_point():
            raise GradientError(f"{handles[0].name} holds integers and has no gradient.")
        if not value.requires_grad:
            # Frozen parameters: the gradient begins here. A detached leaf shares the storage, so no number changes.
            value = value.detach().requires_grad_(True)
        value.register_hook(partial(_run_backward, self, tuple(handles)))
        return value


def detach_quietly(handles: Iterable[LensHandle]) -> list[LensHandle]:
    """Detach functions without telling their points' ``on_use``, for a caller that unmounts for all of them at once.

    Returns:
        Those that were attached.
    """
    gone = []
    for handle in handles:
        attached = handle.point.fwd_hooks if handle.direction == "fwd" else handle.point.bwd_hooks
        try:
            attached.remove(handle)
        except ValueError:  # the function has been removed meanwhile, perhaps by another thread
            continue
        gone.append(handle)
    return gone


def _direction(dir: str) -> Direction:
    if dir not in ("fwd", "bwd"):
        raise InputError(f"dir is 'fwd' or 'bwd'; found {dir!r}.")
    return "fwd" if dir == "fwd" else "bwd"


def _run_backward(point: HookPoint, handles: tuple[LensHandle, ...], gradient: Tensor) -> Tensor:
    conversion = point.hook_conversion
    shown = gradient if all(handle.reads_only for handle in handles) else gradient.clone()
    if conversion is not None:
        shown = conversion.convert(shown)
    for handle in handles:
        shown = _call(handle, shown)
    return shown if conversion is None else conversion.revert(shown)


def _acts(handle: LensHandle) -> bool:
    return acts(handle.scope)


def _call(handle: LensHandle, shown: Tensor) -> Tensor:
    point = handle.point
    view = point if handle.name is None or handle.name == point.name else NamedHook(point, handle.name)
    before = shown.detach().clone() if handle.must_change else None
    shape = shown.shape
    try:
        if handle.reads_only or (current_span() is WHOLE and current_fast_attention() is None):
            result = handle.user_hook(shown, hook=view)
        else:
            with outside_run():
                result = handle.user_hook(shown, hook=view)
    except BaseException as error:
        add_note(error, f"raised by the hook {describe_function(handle.user_hook)} on {handle.name}")
        raise
    if handle.direction == "bwd" and isinstance(result, tuple) and len(result) == 1:
        result = result[0]  # torch's own backward hooks return one-tuples
    if result is None:
        result = shown
        if shown.shape != shape:
            raise HookValueError(_mismatch(handle, "left its tensor with shape", tuple(shape), tuple(shown.shape)))
    elif result is not shown:
        _check(result, shown, handle, "returned")
        if result.data_ptr() != shown.data_ptr():
            result = result.clone()  # the function may have kept it; a later one may write in place
    handle.calls += 1
    if before is not None:
        handle.changed = handle.changed or bool(bits_differ(before, result).any())
    return result  # type: ignore[no-any-return]


def _check(result: object, expected: Tensor, handle: LensHandle, verb: str) -> None:
    if not isinstance(result, Tensor):
        raise HookValueError(_mismatch(handle, f"{verb} a", "Tensor", type(result).__name__))
    for aspect, wanted, found in (
        ("shape", tuple(expected.shape), tuple(result.shape)),
        ("dtype", expected.dtype, result.dtype),
        ("device", expected.device, result.device),
    ):
        if wanted != found:
            raise HookValueError(_mismatch(handle, f"{verb} a tensor of {aspect}", wanted, found))


def _mismatch(handle: LensHandle, what: str, expected: object, found: object) -> str:
    kind = "hook" if handle.direction == "fwd" else "backward hook"
    return (
        f"The {kind} {describe_function(handle.user_hook)} on {handle.name} {what} {found}; expected {expected}. "
        "Nothing is broadcast or cast on the way back into the model."
    )


def describe_function(function: HookFunction) -> str:
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


def _laid_out_as(value: Tensor, shown: Tensor) -> Tensor:
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
