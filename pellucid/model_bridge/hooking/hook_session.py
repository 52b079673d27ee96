"""A session: functions that are attached, and components that are mounted, for the length of a run or a block.

A session is the scope of its functions (:class:`~pellucid.run_context.Scope`). Opening attaches, closing detaches, in an
order in which each step can be made twice, so that whatever an interrupt leaves of one is finished by the next call that
syncs the tree. A run is made with :meth:`HookSession.during`: its scope is set in a context of its own, which the
interpreter leaves by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakSet

from pellucid.hook_points import LensHandle
from pellucid.model_bridge.hooking.mounting import ComponentTree, refuse_parallel_gradients
from pellucid.run_context import Scope, enter_scope, in_own_context, leave_scope

T = TypeVar("T")


class HookSession(Scope):
    """Functions attached, and components mounted, for a while.

    Sessions nest and may end in any order, in any thread.

    Args:
        tree: the components.
        handles: the functions, made for this session, in the order in which those of one point run.
        components: names of components that stay mounted besides those that the functions need.
        keep: leave the functions on at the end, as if they had been added for good.

    Raises:
        GradientError: gradients are wanted on two ways that exclude each other.
    """

    def __init__(
        self,
        tree: ComponentTree,
        handles: Sequence[LensHandle] = (),
        components: Sequence[str] = (),
        keep: bool = False,
    ) -> None:
        refuse_parallel_gradients(tree.index, handles)
        self.components = tuple(components)
        self._tree, self._handles, self._keep = tree, handles, keep
        self._is_over = False

    def during(self, work: Callable[[], T]) -> T:
        """Call ``work`` with the functions acting in it, and in nothing else."""
        try:
            try:
                return in_own_context(self._opened, work)
            finally:
                self.close()
        finally:
            self.close()  # an interrupt may have kept the first call from its end; a second one changes nothing

    def _opened(self, work: Callable[[], T]) -> T:
        self.open()
        return work()

    @contextmanager
    def block(self) -> Iterator[None]:
        """The functions act in this thread or task until the ``with`` block ends."""
        self.is_block, self.threads = True, WeakSet(threading.enumerate())
        try:
            try:
                self.open()
                yield
            finally:
                self.close()
        finally:
            self.close()  # see during

    def open(self) -> None:
        """Attach, mount, and act in this thread or task."""
        for handle in self._handles:
            handle.scope = self
            handle.point.put(handle)
        if self.components:
            self._tree.hold(self)
        self._tree.sync()
        enter_scope(self)

    def close(self) -> None:
        """Act no more, detach and unmount. Closing again is harmless, and finishes what an interrupt left undone."""
        if self._is_over:
            return
        if self._keep:
            self.everywhere, self.components = True, ()
        else:
            self.closed = True
        leave_scope(self)
        self._handles = ()  # which know this scope: no circle is left
        self._tree.sync()
        self._is_over = True
