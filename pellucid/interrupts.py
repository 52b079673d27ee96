"""Ctrl-C in other hands for a while: what may not be left half done is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ctrl_c_goes_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let Ctrl-C call ``handler`` for the length of a ``with`` block.

    It stays as it is in another thread than the main one, which Ctrl-C never interrupts, where it is ignored (a command in
    the background of a script), and where its handler is none of Python's, which could not be put back.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous in (signal.SIG_IGN, None):
        yield
        return
    try:
        try:
            signal.signal(signal.SIGINT, handler)
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
    finally:
        signal.signal(signal.SIGINT, previous)  # an interrupt may have kept the first call from its end
