"""Hugging Face's own code, run with a few of the names that it looks up standing for ours.

What Hugging Face computes inside one function (scores, pattern, a norm's inside) cannot be reached from its modules, and is
not written again here. The very code object runs, bound to a copy of its module's names in which some are replaced:
``softmax``, say, by one that shows a hook point its input first. So the arithmetic is Hugging Face's, in whatever release
is installed. Nothing of Hugging Face's is changed: the copy is ours, and other models know nothing of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import UnsupportedModelError


def rebound(
    function: Callable[..., Any], names: Mapping[str, Any], on: Callable[[Any], Any] | None = None
) -> FunctionType:
    """``function`` with ``names`` in the place of those that its module has; what its module has not is left out.

    A decorated function (transformers 5.24 decorates most forwards) is its decorator's wrapper again, around the inner
    function bound anew.

    Args:
        function: Hugging Face's.
        names: what stands for what.
        on: for a method, what the innermost function is given in the place of its ``self``.

    Raises:
        UnsupportedModelError: no plain Python function, or wrapped in a way that is not known.
    """
    if not isinstance(function, FunctionType):
        raise UnsupportedModelError(
            f"{function!r} is no plain function, and what it computes inside cannot be reached."
        )
    closure = function.__closure__
    known = function.__globals__
    wrapped = vars(function).get("__wrapped__")
    if wrapped is None:
        known = known | {name: value for name, value in names.items() if name in known}
    else:
        holding = [cell for cell in closure or () if cell.cell_contents is wrapped]
        if len(holding) != 1:
            raise UnsupportedModelError(
                f"{function.__module__}.{function.__qualname__} is wrapped in a way that is not known, and what it computes "
                "inside cannot be reached."
            )
        inner = CellType(rebound(wrapped, names, on))
        closure = tuple(inner if cell is holding[0] else cell for cell in closure or ())
    made = FunctionType(function.__code__, known, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    if on is None or wrapped is not None:
        return made

    def on_stand_in(self: Any, *args: Any, **kwargs: Any) -> Any:
        return made(on(self), *args, **kwargs)

    return on_stand_in  # type: ignore[return-value]


def names_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The names of the module in which a function was written, whatever decorates it."""
    names: Mapping[str, Any] = getattr(inspect.unwrap(function), "__globals__", {})
    return names


def words_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names and attributes that a function's own code looks up."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names


class Standing:
    """A module or object of which some attributes are replaced; the others are its own.

    Args:
        real: what it stands for.
        replaced: its attributes that are ours.
    """

    def __init__(self, real: Any, replaced: Mapping[str, Any]) -> None:
        vars(self).update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_real"], name)


class TappedFunctional(Standing):
    """``torch.nn.functional`` whose softmax shows what it is given, and whose dropout, or softmax, what it gives.

    In each of Hugging Face's eager attentions the one softmax is given the scores, and the one dropout after it (called in
    evaluation mode too) gives the pattern.

    Args:
        on_scores: shown the scores, gives what goes on.
        on_pattern: the same for the pattern.
        pattern_at: see :class:`~pellucid.model_bridge.family.Attention`.
    """

    def __init__(
        self, on_scores: Callable[[Tensor], Tensor], on_pattern: Callable[[Tensor], Tensor], pattern_at: str
    ) -> None:
        super().__init__(F, {"_on_scores": on_scores, "_on_pattern": on_pattern, "_pattern_at": pattern_at})

    def softmax(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``F.softmax`` of the scores."""
        if input.dtype is torch.float64:
            kwargs["dtype"] = torch.float64  # Hugging Face goes through float32 even there
        pattern = F.softmax(self._on_scores(input), *args, **kwargs)
        return self._on_pattern(pattern) if self._pattern_at == "softmax" else pattern

    def dropout(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``F.dropout``, giving the pattern."""
        pattern = F.dropout(input, *args, **kwargs)
        return self._on_pattern(pattern) if self._pattern_at == "dropout" else pattern


def tapped_names(functional: TappedFunctional) -> dict[str, Any]:
    """What ``F`` and ``nn`` stand for in Hugging Face's attention code."""
    return {"F": functional, "nn": Standing(nn, {"functional": functional})}


WIDE_TORCH = Standing(torch, {"float32": torch.float64})
"""``torch`` whose float32 is float64: for float64 models, whose norms Hugging Face computes in float32 otherwise."""


@cache
def _widened(function: Callable[..., Any]) -> FunctionType:
    """A norm's forward in float64: bound once, not at each call of each layer."""
    return rebound(function, {"torch": WIDE_TORCH})


def in_float64(method: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """``method`` of a norm, in float64 throughout if its weights are float64; else itself."""
    plain = getattr(method, "__func__", None)
    weight = next(iter(module._parameters.values()), None)  # module.parameters() walks children, in each call of a norm
    if plain is None or weight is None or weight.dtype is not torch.float64:
        return method
    return partial(_widened(plain), module)
