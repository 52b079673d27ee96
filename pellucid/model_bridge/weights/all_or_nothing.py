"""Writing several tensors as one: all are written, or all are as before. Ctrl-C waits meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pellucid.interrupts import ctrl_c_goes_to


def write_all(
    writes: Sequence[tuple[Tensor, Tensor]],
    spare: list[Tensor] | None = None,
    done: Callable[[], None] | None = None,
) -> None:
    """Copy each value into its storage; put everything back if one copy fails. Ctrl-C waits until it is through.

    Args:
        writes: ``(storage, value)`` pairs.
        spare: where to keep the old values meanwhile; filled, and used again by a call with the same shapes.
        done: called when all is written, in the section that puts everything back if it is not.
    """
    targets = [target.detach() for target, _ in writes]
    before = [] if spare is None else spare
    if [(old.shape, old.dtype, old.device) for old in before] != [
        (new.shape, new.dtype, new.device) for new in targets
    ]:
        before[:] = [torch.empty(new.shape, dtype=new.dtype, device=new.device) for new in targets]
    with undisturbed():
        for target, old in zip(targets, before, strict=True):
            old.copy_(target)
        try:
            for target, (_, value) in zip(targets, writes, strict=True):
                target.copy_(value)
            if done is not None:
                done()
        except BaseException:
            for target, old in zip(targets, before, strict=True):
                target.copy_(old)
            raise


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, then let it act."""
    held: list[int] = []
    try:
        with ctrl_c_goes_to(lambda number, frame: held.append(number)):
            yield
    finally:
        if held:
            signal.raise_signal(signal.SIGINT)
