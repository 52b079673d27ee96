"""Logits that are computed where a metric reads them.

A metric written for TransformerLens is a plain function of logits ``[batch, pos, d_vocab]``, and most read a few numbers
of them. With a large vocabulary (BLOOM's) unembedding every position costs as much as the blocks do, so such a function
is given a :class:`LazyLogits`: a tensor with a shape and a dtype and no numbers. Indexing it asks for the positions and
tokens indexed; any other operation asks for all. On the base run what is asked for is recorded; for each edit just that
is computed, and an edit for which the function asks for something else is told apart by :class:`ReadsElsewhere`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import InputError

_NUMBERLESS = frozenset(
    {"__get__", "dim", "size", "numel", "stride", "ndimension", "__len__", "is_floating_point", "element_size", "type"}
)
"""Functions of a tensor that need none of its numbers (``__get__`` is ``.shape``, ``.dtype``, ``.device``, ...)."""


class ReadsElsewhere(Exception):  # noqa: N818 (a signal, never seen by a user)
    """A metric asks an edit for logits that it did not ask the base run for."""


@dataclass(frozen=True)
class Asked:
    """Cells that one indexing touches: columns and token ids, ``None`` for all."""

    columns: frozenset[int]
    tokens: frozenset[int] | None


class LazyLogits(Tensor):
    """Logits ``[batch, pos, d_vocab]`` whose numbers come from ``fetch`` when they are asked for."""

    _fetch: Callable[[Asked, Any], Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, fetch: Callable[[Asked, Any], Tensor]
    ) -> LazyLogits:
        """Make one; ``fetch(asked, index)`` gives ``logits[index]``, a tensor of the caller's own."""
        made: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._fetch = fetch
        return made

    def __repr__(self, **ignored: Any) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Only reached by code that goes around __torch_function__: the numbers exist nowhere.
        kwargs = dict(kwargs or {})
        return func(*_whole(args), **{key: _whole(value) for key, value in kwargs.items()})

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        if name in _NUMBERLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _refuse_writing(name, kwargs, args)
        if name == "__getitem__" and isinstance(args[0], LazyLogits):
            with torch._C.DisableTorchFunctionSubclass():
                asked = asked_cells(args[1], args[0].shape)
            return read_only(args[0]._fetch(asked, args[1]))
        return func(*_whole(args), **{key: _whole(value) for key, value in kwargs.items()})


class ReadOnlyLogits(Tensor):
    """What indexing gave: numbers that may be used for anything but writing to."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        _refuse_writing(func.__name__, kwargs, args)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            sources = [arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, ReadOnlyLogits)]
            if isinstance(result, Tensor) and not isinstance(result, LazyLogits):
                shares = result.untyped_storage().data_ptr() in sources
                return result.as_subclass(ReadOnlyLogits if shares else Tensor)
        return result


def read_only(numbers: Tensor) -> Tensor:
    """``numbers``, refusing to be written to."""
    return numbers.as_subclass(ReadOnlyLogits)


def plain(result: Any) -> Any:
    """A metric's answer as an ordinary tensor."""
    return result.as_subclass(Tensor) if isinstance(result, ReadOnlyLogits) else result


def _refuse_writing(name: str, kwargs: Mapping[str, Any], args: tuple[Any, ...]) -> None:
    writes = name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE_OPERATORS)
    writes = writes or (name.endswith("_") and not name.endswith("__"))
    if writes and args and isinstance(args[0], LazyLogits | ReadOnlyLogits):
        raise InputError(
            f"A metric wrote to its logits ({name}). In a sweep they are computed where they are read, and writing to "
            "them would be lost: clone what you want to change."
        )
    if kwargs.get("out") is not None and isinstance(kwargs["out"], LazyLogits | ReadOnlyLogits):
        raise InputError(f"A metric wrote to its logits ({name}(out=...)). Clone what you want to change.")


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift matmul".split()
)


def _whole(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        with torch._C.DisableTorchFunctionSubclass():
            everything = Asked(frozenset(range(value.shape[1])), None)
        return value._fetch(everything, (slice(None),))
    if isinstance(value, tuple | list):
        return type(value)(_whole(item) for item in value)
    return value


def asked_cells(index: Any, shape: Sequence[int]) -> Asked:
    """The columns and tokens that ``logits[index]`` touches: exactly, or all of an axis where that is hard to tell.

    Args:
        index: anything a tensor can be indexed with.
        shape: ``[batch, pos, d_vocab]``.
    """
    everything = Asked(frozenset(range(shape[1])), None)
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is None or isinstance(part, bool) for part in parts):
        return everything
    if any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts):
        return everything
    dots = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        return everything
    missing = len(shape) - (len(parts) - len(dots))
    if missing < 0:
        return everything  # torch will say what is wrong
    if dots:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * missing
    parts += [slice(None)] * (len(shape) - len(parts))
    columns = _touched(parts[1], shape[1])
    tokens = _touched(parts[2], shape[2])
    return Asked(frozenset(range(shape[1])) if columns is None else columns, tokens)


def _touched(part: Any, size: int) -> frozenset[int] | None:
    """Indices on one axis, ``None`` for all."""
    if isinstance(part, slice):
        return None if part == slice(None) else frozenset(range(size)[part])
    try:
        flat = torch.as_tensor(part).flatten()
    except (TypeError, ValueError, RuntimeError):
        return None
    if flat.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        return None
    return frozenset(i % size for i in flat.tolist())


class Cells:
    """Computed cells of one edit's logits: some columns, some tokens (or all), served by index.

    Args:
        numbers: ``[batch, column, token]``.
        columns: the columns, in order.
        tokens: the token ids, in order; ``None`` for the whole vocabulary.
        shape: ``[batch, pos, d_vocab]`` of the logits they are part of.
    """

    def __init__(
        self, numbers: Tensor, columns: Sequence[int], tokens: Sequence[int] | None, shape: Sequence[int]
    ) -> None:
        self.numbers, self.columns, self.tokens, self.shape = numbers, tuple(columns), tokens, tuple(shape)

    def fetch(self, asked: Asked, index: Any) -> Tensor:
        """``logits[index]``, if every cell of it was computed.

        Raises:
            ReadsElsewhere: it was not.
        """
        if not asked.columns.issubset(self.columns):
            raise ReadsElsewhere
        if self.tokens is not None and (asked.tokens is None or not asked.tokens.issubset(self.tokens)):
            raise ReadsElsewhere
        if self.numbers.shape == self.shape:
            return self.numbers[index].clone()
        parts = index if isinstance(index, tuple) else (index,)
        simple = len(parts) == 3 and all(isinstance(part, int) for part in parts[1:])
        if simple:  # the commonest: logits[row, -1, token]
            column = self.columns.index(parts[1] % self.shape[1])
            token = parts[2] % self.shape[2]
            place = token if self.tokens is None else self.tokens.index(token)
            return self.numbers[:, column, place][parts[0]].clone()
        if len(parts) >= 2 and isinstance(parts[1], int) and self.tokens is None and Ellipsis not in parts[:1]:
            column = self.columns.index(parts[1] % self.shape[1])
            return self.numbers[:, column][(parts[0], *parts[2:])].clone()
        return self._spread()[index].clone()

    def _spread(self) -> Tensor:
        """The cells in their places, NaN where nothing was computed: for an index of any form."""
        whole = torch.full(self.shape, torch.nan, dtype=self.numbers.dtype, device=self.numbers.device)
        columns = torch.tensor(self.columns, device=whole.device)
        if self.tokens is None:
            whole[:, columns] = self.numbers
        else:
            tokens = torch.tensor(self.tokens, device=whole.device)
            whole[:, columns[:, None], tokens] = self.numbers
        return whole


class Recorder:
    """What a plain metric asks the base run's logits for.

    Args:
        logits_of: columns and tokens to the base run's cells.
        shape: of the logits.
        dtype: of the logits.
        device: of the logits.
    """

    def __init__(
        self,
        logits_of: Callable[[Asked], Cells],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._logits_of = logits_of
        self.asked: list[Asked] = []
        self.logits = LazyLogits(shape, dtype, device, self._fetch)

    def _fetch(self, asked: Asked, index: Any) -> Tensor:
        self.asked.append(asked)
        return self._logits_of(asked).fetch(asked, index)

    def union(self) -> Asked:
        """Everything that was asked for."""
        columns = frozenset[int]().union(*(asked.columns for asked in self.asked))
        if any(asked.tokens is None for asked in self.asked):
            return Asked(columns, None)
        return Asked(columns, frozenset[int]().union(*(asked.tokens or () for asked in self.asked)))
