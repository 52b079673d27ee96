"""Hook points: where a user's functions meet a tensor of the model.

A :class:`HookPoint` stands on one tensor and calls each function that is attached as ``fn(tensor, hook=point)``; it may
change the tensor in place, return another one, or only look. Three rules make an edit an edit:

* what is returned has the shape, dtype and device of what was given, or the run stops there, naming the function;
* returning ``t + d`` and ``t.add_(d)`` go on as the same bits, so a returned tensor takes the memory layout of the
  original (matrix products may round differently on another layout);
* a function gets a copy where autograd has saved the tensor, where it is a leaf, where the caller owns it, and where
  gradients are on and other points hold parts of the same memory (queries, keys and values are parts of one tensor).

Functions belong to a *scope*: a ``with bridge.hooks(...)`` block, one ``run_with_hooks``, or one ``add_hook``, which acts
everywhere until it is removed. Scopes of blocks and runs act in the thread or task that opened them and nowhere else, they
may be closed in any order, and closing one leaves every other as it was.

A point's lists of functions are replaced, never changed: a forward that is going through one goes through the functions
that were attached when it began, whatever other threads attach and detach meanwhile.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from pellucid.arguments import check_choice, check_function, check_kind, check_texts, check_whole
from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.hook_introspection import HookIntrospectionMixin as HookIntrospectionMixin
from pellucid.hook_values import (
    AsItWas,
    HookedFunction,
    add_note,
    bits_differ,
    check_returned,
    describe_function,
    is_delicate,
    laid_out_as,
    no_effect,
    what_goes_on,
    with_a_gradient,
    with_bits_of,
)
from pellucid.names import layer_of
from pellucid.run_context import RunContext, Scope, acts, current_run, outside_run, the_run
from pellucid.torch_hooks import NoTorchHooks

HookFunction: TypeAlias = Callable[..., Any]
"""``fn(tensor, hook=point) -> Tensor | None``."""

Direction = Literal["fwd", "bwd"]
Directions = Literal["fwd", "bwd", "both"]

NOT_OPENED = Scope()  # of every function that no block, run or ``add_hook`` has yet: it acts nowhere

HOOKS_LOCK = threading.RLock()
"""Held while the functions of points are attached or detached, and while components are mounted for them."""


class PointOwner(Protocol):
    """The bridge of a point: it mounts what fires it.

    Attributes:
        in_use: every point that has a function, and perhaps some that have none any more. A point enters it before a
            function is put on it, so that an interrupt between the two hides none.
    """

    in_use: dict[HookPoint, None]

    def check_attachable(self, point: HookPoint) -> None:
        """Refuse a function on a point that is off."""

    def sync(self) -> None:
        """Mount what attached functions need, and unmount the rest."""


@dataclass(eq=False, slots=True)
class LensHandle:
    """One function attached to one point.

    Attributes:
        point: where it is attached.
        user_hook: the function.
        direction: ``"fwd"`` or ``"bwd"``.
        name: the name under which the user asked for the point.
        is_permanent: kept by ``reset_hooks`` unless told otherwise.
        scope: the block, run or ``add_hook`` it belongs to; it acts while and where that does.
        reads_only: a caching function of ours, which never writes.
        must_change: ``assert_effect``: note whether the tensor was changed.
        level: the context level that ``add_hook`` was given, if any.
        aliases: names under which it is called, once each, in the place of ``name``.
    """

    point: HookPoint
    user_hook: HookFunction
    direction: Direction
    name: str | None
    is_permanent: bool = False
    scope: Scope = NOT_OPENED
    reads_only: bool = False
    must_change: bool = False
    level: int | None = None
    aliases: tuple[str, ...] = ()
    calls: int = field(default=0, init=False)
    changed: bool = field(default=False, init=False)

    @property
    def context_level(self) -> int | None:
        """The level it was attached with, or the depth of the ``hooks()`` block it belongs to; ``None`` outside one."""
        return self.level if self.level is not None or self.scope.everywhere else self.scope.level

    @property
    def hook(self) -> LensHandle:
        """Itself: what ``handle.hook.remove()`` of TransformerLens' callers goes through."""
        return self

    @property
    def who(self) -> str:
        """What an error calls it."""
        return f"{'hook' if self.direction == 'fwd' else 'backward hook'} {describe_function(self.user_hook)} on {self.name}"

    def is_attached(self) -> bool:
        """Whether it is still on its point."""
        return self in self.point.fwd_hooks or self in self.point.bwd_hooks

    def remove(self) -> None:
        """Detach the function. Removing it twice is harmless."""
        self.point.detach((self,))

    def check_effect(self) -> None:
        """Raise if the function never ran or never changed its tensor.

        Raises:
            NoEffectError: see above.
        """
        if self.must_change and not self.changed:
            raise no_effect(f"{describe_function(self.user_hook)} on {self.name}", self.calls)


class HookHandles(tuple[LensHandle, ...]):
    """The functions that one ``add_hook`` attached, one a point; ``remove()`` detaches all of them."""

    __slots__ = ()

    def remove(self) -> None:
        """Detach the functions. Removing them twice is harmless."""
        owner = self[0].point.owner if self else None
        for handle in self:
            handle.scope.closed = True  # they share one
            if owner is None:
                handle.point.drop_closed()
        if owner is not None:
            owner.sync()


class NamedHook:
    """A point as one function sees it: under the name that function was registered with."""

    def __init__(self, point: HookPoint, name: str) -> None:
        self._point = point
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

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


class HookPoint(NoTorchHooks):
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
        # In a dictionary: setting an attribute of a module takes 7 us, and a cache of 24 layers sets a thousand of them.
        self._attached: dict[Direction, list[LensHandle]] = {"fwd": [], "bwd": []}
        self.hook_conversion: BaseTensorConversion | None = None
        self.owner: PointOwner | None = None

    def torch_hooks_go_to(self) -> str | None:
        """See :class:`NoTorchHooks`."""
        instead = f"Attach the function to the point: bridge.add_hook({self.name!r}, function)."
        return None if self.owner is None else instead

    def __repr__(self) -> str:
        parts = [] if self.name is None else [repr(self.name)]
        parts += [f"{len(handles)} {kind}" for kind, handles in self._attached.items() if handles]
        return f"HookPoint({', '.join(parts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> HookPoint:
        # A copy has hooks of its own, of which those of an open block or run are not part: they end with their block.
        clone = HookPoint()
        memo[id(self)] = clone
        clone.name, clone.hook_conversion = self.name, self.hook_conversion
        clone.ctx = dict(self.ctx)
        for handle in self.handles():
            if handle.scope.everywhere and not handle.scope.closed:
                function = handle.user_hook
                function = copy.deepcopy(function, memo) if isinstance(function, HookedFunction) else function
                copied = LensHandle(clone, function, handle.direction, handle.name, handle.is_permanent)
                copied.level, copied.aliases, copied.scope = handle.level, handle.aliases, Scope()
                copied.scope.everywhere = True
                clone.put(copied)
        clone.owner = copy.deepcopy(self.owner, memo)  # which knows the points in use, and is being copied itself
        return clone

    def __getstate__(self) -> dict[str, Any]:
        # See __deepcopy__: functions of an open block or run end with it, and are no part of a copy.
        def lasting(handles: list[LensHandle]) -> list[LensHandle]:
            return [handle for handle in handles if handle.scope.everywhere and not handle.scope.closed]

        attached = {direction: lasting(handles) for direction, handles in self._attached.items()}
        return {**vars(self), "_attached": attached}

    @property
    def fwd_hooks(self) -> list[LensHandle]:
        """Functions that are given the tensor, in the order in which they run."""
        return self._attached["fwd"]

    @property
    def bwd_hooks(self) -> list[LensHandle]:
        """Functions that are given its gradient, in the order in which they run."""
        return self._attached["bwd"]

    # -- attaching and detaching ---------------------------------------------------------------------------------------

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: Sequence[str] | None = None,
    ) -> LensHandle:
        """Attach ``hook``, called as ``hook(tensor, hook=point)``.

        Args:
            hook: the function; a backward one is given the gradient of the loss with respect to the tensor.
            dir: ``"fwd"`` or ``"bwd"``.
            is_permanent: keep it when hooks are reset.
            level: a context level of the caller's own, by which ``remove_hooks`` and ``has_hooks`` find it.
            prepend: run it before the functions already attached.
            alias_names: call it once for each of these names (``hook.name`` then), on what the call before left.

        Returns:
            A handle whose ``remove()`` detaches it.

        Raises:
            InputError: another direction; names that are none.
        """
        check_function("hook", hook, "a function of a tensor and its hook point")
        check_choice("dir", dir, ("fwd", "bwd"))
        own_level = None if level is None else check_whole("level", level)
        aliases = () if alias_names is None else tuple(check_texts("alias_names", alias_names))
        handle = LensHandle(self, hook, dir, self.name, is_permanent, level=own_level, aliases=aliases)
        return attach_for_good((handle,), self.owner, prepend)[0]

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> LensHandle:
        """Attach ``hook`` so that only ``including_permanent=True`` removes it."""
        return self.add_hook(hook, dir=dir, is_permanent=True)

    def put(self, handle: LensHandle, prepend: bool = False) -> None:
        """Put a function on the point, last or first; whoever calls mounts what fires it."""
        with HOOKS_LOCK:
            if self.owner is not None:
                self.owner.in_use[self] = None
            attached = self._attached[handle.direction]
            self._attached[handle.direction] = [handle, *attached] if prepend else [*attached, handle]

    def drop(self, unwanted: Callable[[LensHandle], bool]) -> None:
        """Take functions off the point; whoever calls unmounts what fired it."""
        with HOOKS_LOCK:
            for direction, attached in self._attached.items():
                self._attached[direction] = [handle for handle in attached if not unwanted(handle)]

    def drop_closed(self) -> bool:
        """Take off the functions whose scope has ended, and say whether any is left."""
        for direction, attached in self._attached.items():
            if attached and [handle for handle in attached if handle.scope.closed]:
                with HOOKS_LOCK:
                    self._attached[direction] = [each for each in self._attached[direction] if not each.scope.closed]
        return bool(self._attached["fwd"] or self._attached["bwd"])

    def detach(self, handles: Sequence[LensHandle]) -> None:
        """Detach those of ``handles`` that are attached here."""
        self.drop(lambda handle: handle in handles)
        if self.owner is not None:
            self.owner.sync()

    def handles(self, dir: Directions = "both", including_permanent: bool = True) -> list[LensHandle]:
        """The attached functions, forward ones first."""
        check_choice("dir", dir, ("fwd", "bwd", "both"))
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
        found = self.handles(dir, including_permanent)
        self.detach([handle for handle in found if level is None or handle.context_level == level])

    def clear_context(self) -> None:
        """Empty ``ctx``."""
        self.ctx = {}

    def enable_reshape(self, hook_conversion: BaseTensorConversion | None = None) -> None:
        """Show functions the tensor through ``hook_conversion``; ``None`` shows it as the model has it."""
        check_kind("hook_conversion", hook_conversion, (BaseTensorConversion, type(None)), "a shape rule, or None")
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
        return the_run()

    # -- firing --------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Show ``x`` to the attached functions and give back what goes on."""
        return self.fire(x)

    def is_live(self) -> bool:
        """Whether a function attached here acts in this thread or task now."""
        return bool([handle for attached in self._attached.values() for handle in attached if acts(handle.scope)])

    def only_reads(self) -> bool:
        """Whether every function that acts here now is a forward one of ours that never writes."""
        return all(
            handle.reads_only and handle.direction == "fwd"
            for attached in self._attached.values()
            for handle in attached
            if acts(handle.scope)
        )

    def fire(self, value: Tensor, *, copy_before_edit: bool = False) -> Tensor:
        """Show ``value`` to the functions that act here now, in order, and give back what goes on.

        Args:
            value: the model's tensor.
            copy_before_edit: functions that may write get a copy: the tensor is not ours to change (the caller owns it, or
                autograd has saved it).
        """
        attached = self._attached
        if not (attached["fwd"] or attached["bwd"]):
            return value
        run = current_run()
        if run is not None:
            run.fired.add(self)
        forward = [handle for handle in attached["fwd"] if acts(handle.scope)]
        writes = bool([handle for handle in forward if not handle.reads_only])
        backward = [handle for handle in attached["bwd"] if acts(handle.scope)]
        shown = value
        if forward:
            if not (writes or backward) and self.hook_conversion is None:
                for handle in forward:  # caches and statistics, at most points of most runs
                    handle.calls += 1
                    handle.user_hook(value, self)
                return value
            shown = self._run_forward(value, forward, writes and (copy_before_edit or is_delicate(value)))
        if backward:
            if copy_before_edit and shown is value:
                # A copy for one branch: its gradient is that branch's alone, so it needs a place in the graph.
                shown = value.view_as(value)
            shown = with_a_gradient(shown, str(backward[0].name))
            shown.register_hook(partial(_run_backward, self, tuple(backward)))
        return shown

    def _run_forward(self, value: Tensor, handles: Sequence[LensHandle], copies: bool) -> Tensor:
        return laid_out_as(value, _through(self.hook_conversion, value.clone() if copies else value, handles))


def attach_for_good(handles: Sequence[LensHandle], owner: PointOwner | None, prepend: bool = False) -> HookHandles:
    """Attach functions that act everywhere until they are removed; nothing of them stays if this is interrupted.

    Args:
        handles: the functions, made for this call.
        owner: the bridge of their points, which mounts what fires them.
        prepend: put them before the functions already attached.

    Raises:
        HookDisabledError: an opt-in point that is off.
    """
    scope = Scope()  # it acts nowhere until everything stands
    try:
        for handle in handles:
            if owner is not None:
                owner.check_attachable(handle.point)
            handle.scope = scope
            handle.point.put(handle, prepend)
        if owner is not None:
            owner.sync()
        scope.everywhere = True
        return HookHandles(handles)
    except BaseException:
        scope.closed = True
        for handle in handles:
            handle.point.drop_closed()
        if owner is not None:
            owner.sync()
        raise


def _run_backward(point: HookPoint, handles: tuple[LensHandle, ...], gradient: Tensor) -> Tensor:
    shown = gradient if all(handle.reads_only for handle in handles) else gradient.clone()
    return _through(point.hook_conversion, shown, handles)


def _through(conversion: BaseTensorConversion | None, value: Tensor, handles: Sequence[LensHandle]) -> Tensor:
    """What functions leave of ``value``, shown by ``conversion``; the bits of ``value`` where they only looked."""
    shown = value if conversion is None else conversion.convert(value)
    before, gave = (None if conversion is None else AsItWas(shown)), False
    for handle in handles:
        given = _call(handle, shown)
        shown, gave = (shown, gave) if given is None else (given, True)
    if conversion is None or before is None:
        return shown
    looked = not gave and before.is_still(shown)
    back = conversion.revert(shown)  # of what was looked at too: a rule without a way back is refused
    check_returned(back, value, handles[-1].who, "the conversion rule's revert gave")
    return with_bits_of(value, back) if looked else back


def _call(handle: LensHandle, shown: Tensor) -> Tensor | None:
    """What the function gave to go on, ``None`` if it gave nothing."""
    point, gave = handle.point, None
    before = shown.detach().clone() if handle.must_change else None
    for name in handle.aliases or (handle.name,):
        view = point if name is None or name == point.name else NamedHook(point, name)
        shape = shown.shape
        try:
            result = outside_run(handle.user_hook, shown, hook=view)
        except BaseException as error:
            add_note(error, f"raised by the hook {describe_function(handle.user_hook)} on {name}")
            raise
        if handle.direction == "bwd" and isinstance(result, tuple) and len(result) == 1:
            result = result[0]  # torch's own backward hooks return one-tuples
        if result is shown and shown.shape == shape:  # the name of a function takes longer to find than this
            gave = shown
        elif result is not None or shown.shape != shape:
            shown = gave = what_goes_on(result, shown, shape, handle.who)
        handle.calls += 1
    handle.changed |= before is not None and bool(bits_differ(before, shown).any())
    return gave
