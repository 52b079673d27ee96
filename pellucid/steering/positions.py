"""Which positions of a forward an edit acts at, said so that it is the same with a key/value cache and without.

A position is a row's own: its real tokens are counted from 0, padding is none of them, and what is generated counts on. A
negative one counts from the end of the row's prompt, which is all of the input outside ``generate``. So ``-1`` is the last
token of the prompt, whatever was generated since, and ``slice(-1, None)`` is it and every later one. Generation steps are
those of ``hook.run.steps``: 0 in the prompt, ``k`` at generated token number ``k - 1``, from which new token ``k`` is
decided.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from pellucid.arguments import check_list, check_whole
from pellucid.axes import Index
from pellucid.errors import InputError
from pellucid.run_context import RunContext

Word: TypeAlias = Literal["last", "prompt", "generated"]
Positions: TypeAlias = Index | Word
"""A row's own positions: one, a slice, several; ``None`` for every real one; or a word: ``"last"`` is -1, ``"prompt"`` is
``slice(0, <end of the prompt>)``, ``"generated"`` all after it."""

WORDS: tuple[Word, ...] = ("last", "prompt", "generated")


def check_positions(positions: Any) -> None:
    """Refuse what names no positions.

    Raises:
        InputError: another word, no whole numbers, none at all, a slice that goes backwards.
    """
    if isinstance(positions, str):
        if positions not in WORDS:
            raise InputError(
                f"positions={positions!r} is no word for positions: give {', '.join(map(repr, WORDS))}, or numbers."
            )
        return
    check_index("positions", positions)


def check_index(argument: str, index: Any, at_least: int | None = None) -> None:
    """Refuse what is no index of places that are counted while the model runs.

    Raises:
        InputError: no whole numbers, none at all, a slice that goes backwards, a number below ``at_least``.
    """
    if index is None:
        return
    if isinstance(index, slice):
        for number in (index.start, index.stop, index.step):
            if number is not None:
                check_whole(f"{argument}: the numbers of a slice", number)
        if index.step is not None and index.step < 1:
            raise InputError(f"{argument}: a slice goes forwards, in steps of 1 or more; found {index}.")
        numbers = [number for number in (index.start, index.stop) if number is not None]
    elif isinstance(index, int) and not isinstance(index, bool):
        numbers = [index]
    else:
        numbers = [
            check_whole(f"an entry of {argument}", each) for each in check_list(argument, index, "whole numbers")
        ]
    low = [number for number in numbers if at_least is not None and number < at_least]
    if low:
        raise InputError(f"{argument}: {low[0]} is none of them; they are {at_least} or more.")


def selected(run: RunContext, positions: Positions, steps: Index) -> Bool[Tensor, "batch pos"]:
    """``[batch, pos]`` bool: the positions of this forward that an edit acts at; never padding.

    Args:
        run: the forward.
        positions: see :data:`Positions`.
        steps: of a generation, from 0; ``None`` for all. Outside ``generate`` no position has a step.
    """
    real = run.real
    if steps is not None:
        real = real & _at_steps(run, steps)
    if positions is None:
        return real
    if positions == "generated":
        return real & _at_steps(run, slice(1, None))
    if positions == "prompt":
        return real if run.step is None else real & _at_steps(run, 0)
    index: Any = -1 if positions == "last" else positions
    return real & _met(run.positions, index, run.prompt_lengths[:, None])


def _at_steps(run: RunContext, steps: Index) -> Tensor | bool:
    """``[pos]`` bool: which positions have one of these steps; outside ``generate``, none."""
    step = run.steps
    return False if step is None else _met(step, steps, None)


def _met(numbers: Tensor, index: Any, end: Tensor | None) -> Tensor:
    """Where ``numbers`` are among an index; negative ones count from ``end``."""
    met: Tensor = torch.zeros((), dtype=torch.bool, device=numbers.device)
    if isinstance(index, slice):
        start, stop = (_bound(number, end) for number in (index.start or 0, index.stop))
        met = numbers >= start
        if stop is not None:
            met = met & (numbers < stop)
        if index.step not in (None, 1):
            met = met & ((numbers - start) % index.step == 0)
        return met
    for each in [index] if isinstance(index, int) else index:
        place = each if each >= 0 or end is None else end + each  # before the beginning of a short row: nowhere
        met = met | (numbers == place)
    return met


def _bound(number: int | None, end: Tensor | None) -> Any:
    """A bound of a slice, which is cut at the beginning as Python's are."""
    if number is None or number >= 0 or end is None:
        return number
    return (end + number).clamp(min=0)


def to_json(index: Any) -> Any:
    """An index as JSON."""
    if isinstance(index, slice):
        return {"start": index.start, "stop": index.stop, "step": index.step}
    return index if index is None or isinstance(index, int | str) else [int(each) for each in index]


def from_json(index: Any) -> Any:
    """The inverse of :func:`to_json`."""
    if isinstance(index, dict):
        return slice(index["start"], index["stop"], index["step"])
    return index
