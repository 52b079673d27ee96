"""What a user's function computes, as a hash: its code, and every value that the code can read.

Two functions of one name are told apart by their bytecode, defaults, closure and the globals that they read; file and line
do not count, so code may move. What cannot be described to the last bit (an open file, a lock) is refused by its name: a job
that is gone on with could not tell whether it is still the same.

An object may say itself what its numbers depend on, with a method ``job_identity()``: one that counts its calls, say, or an
attached autoencoder, which keeps what a run has given it. What the method returns is compared as any other value.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import json
import logging
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import xarray
from torch import Tensor

from pellucid.errors import InputError
from pellucid.hook_points import HookPoint, LensHandle, NamedHook
from pellucid.model_bridge.weights.hashing import tensor_hash

LIBRARIES = frozenset(
    {"torch", "numpy", "transformers", "accelerate", "peft", "xarray", "einops", "safetensors", "tqdm", "pellucid"}
) | {"sae_lens", "transformer_lens"}
"""Their code, as Python's own, is known by its name; an attached autoencoder says its library's version beside."""

DEEPEST = 60
"""How far values are followed into one another."""

_BY_TEXT = (bool, int, float, complex, str, bytes, bytearray, type(None), type(Ellipsis), range, slice, re.Pattern)
_BY_TEXT += (torch.dtype, torch.device, torch.layout, np.generic, np.dtype, enum.Enum, PurePath)  # type: ignore[assignment]


def function_hash(function: Callable[..., Any], words: Mapping[int, str]) -> str:
    """SHA-256 of what ``function`` computes.

    Args:
        function: a function, a partial, a method or an object that can be called.
        words: what to call objects that the function may hold and that are described elsewhere, by ``id``: the model.

    Raises:
        InputError: it holds something that cannot be described, with the way to it.
    """
    return _hash(_Description(words).of(function, []))


def code_hash(function: Callable[..., Any]) -> str | None:
    """SHA-256 of a function's bytecode alone, and of what it wraps; ``None`` for what is no Python code."""
    found = [each for each in (function, _innermost(function)) if isinstance(each, types.FunctionType)]
    return _hash([list(_code(each.__code__)) for each in found]) if found else None


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _hash(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, ensure_ascii=True).encode()).hexdigest()


def _code(code: types.CodeType) -> Iterator[Any]:
    """Everything of a code object that is computed with: not its file, its lines or its name."""
    yield code.co_code.hex()
    yield [*code.co_names, "|", *code.co_varnames, "|", *code.co_freevars, "|", *code.co_cellvars]
    yield [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield list(_code(constant))
        elif isinstance(constant, frozenset):
            yield sorted(map(repr, constant))
        else:
            yield f"{type(constant).__name__} {constant!r}"


def _globals_read(code: types.CodeType) -> list[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_globals_read(constant))
    return sorted(names)


def _is_library(module: str | None) -> bool:
    outermost = (module or "").partition(".")[0]
    return outermost in LIBRARIES or outermost in sys.stdlib_module_names


class _Description:
    """Values as JSON that differs where they do; each object once, so that circles end."""

    def __init__(self, words: Mapping[int, str]) -> None:
        self._words = words
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is an object's own as long as it lives

    def of(self, value: Any, way: list[str]) -> Any:
        """Describe ``value``, which was reached by ``way``."""
        if isinstance(value, _BY_TEXT):
            return f"{type(value).__module__}.{type(value).__qualname__} {value!r}"
        if id(value) in self._words:
            return ["model", self._words[id(value)]]
        if id(value) in self._seen:
            return ["seen", self._seen[id(value)]]
        if len(way) > DEEPEST:
            raise self._unknown(value, way)
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        for describe in (self._numbers, self._collection, self._callable, self._object):
            found = describe(value, way)
            if found is not None:
                return found
        raise self._unknown(value, way)

    def _unknown(self, value: Any, way: list[str]) -> InputError:
        where = " of ".join(reversed(way[-4:])) or "it"
        return InputError(
            f"it holds a {type(value).__module__}.{type(value).__qualname__} ({where}), which cannot be compared with that "
            "of a later call. Keep such a thing out of the function, or make the function an object with a method "
            "job_identity() that returns all that its numbers depend on, as numbers, text, tensors and lists of them."
        )

    def _all(self, values: Any, way: list[str]) -> list[Any]:
        return [self.of(value, way) for value in values]

    def _named(self, values: Mapping[Any, Any], way: list[str]) -> list[Any]:
        return [[self.of(key, way), self.of(value, [*way, str(key)])] for key, value in values.items()]

    def _numbers(self, value: Any, way: list[str]) -> Any:
        if isinstance(value, Tensor):
            if (
                value.is_meta
                or value.layout != torch.strided
                or type(value).__torch_dispatch__ is not (Tensor.__torch_dispatch__)
            ):
                raise self._unknown(value, way)
            return ["tensor", str(value.dtype), list(value.shape), tensor_hash(value.detach())]
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            data = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return ["array", str(value.dtype), list(value.shape), data]
        if isinstance(value, np.ndarray):
            return ["array", list(value.shape), self._all(value.tolist(), way)]
        if isinstance(value, torch.Generator):
            return ["generator", tensor_hash(value.get_state())]
        if isinstance(value, xarray.DataArray | xarray.Dataset):
            return ["xarray", self.of(value.to_dict(), way)]
        return None

    def _collection(self, value: Any, way: list[str]) -> Any:
        kind = type(value).__qualname__
        if isinstance(value, dict | types.MappingProxyType):
            return [kind, self._named(value, way)]
        if isinstance(value, list | tuple | deque):
            return [kind, self._all(value, way)]
        if isinstance(value, set | frozenset):
            return [kind, sorted(json.dumps(each) for each in self._all(value, way))]
        return None

    def _callable(self, value: Any, way: list[str]) -> Any:
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, functools.partial):
            return ["partial", self.of(value.func, way), self._all(value.args, way), self._named(value.keywords, way)]
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__func__, way), self.of(value.__self__, [*way, "self"])]
        if isinstance(value, types.FunctionType):
            return self._function(value, way)
        if isinstance(value, type):
            return self._class(value, way)
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            owner = getattr(value, "__self__", None)
            holds = None if owner is None or isinstance(owner, types.ModuleType) else self.of(owner, [*way, "self"])
            return ["builtin", value.__qualname__, holds]
        return None

    def _function(self, value: types.FunctionType, way: list[str]) -> Any:
        if _is_library(value.__module__) and "<locals>" not in value.__qualname__:
            return ["function", value.__module__, value.__qualname__]
        inner = [*way, value.__qualname__]
        cells: dict[str, Any] = {}
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                cells[name] = cell.cell_contents
            except ValueError:  # a variable that has no value yet
                cells[name] = "unbound"
        read = {name: value.__globals__[name] for name in _globals_read(value.__code__) if name in value.__globals__}
        return [
            "function",
            list(_code(value.__code__)),
            self.of(value.__defaults__, inner),
            self.of(value.__kwdefaults__, inner),
            self._named(cells, inner),
            self._named(read, inner),
        ]

    def _class(self, value: type, way: list[str]) -> Any:
        name = f"{value.__module__}.{value.__qualname__}"
        if _is_library(value.__module__) and "<locals>" not in value.__qualname__:
            return ["class", name]
        parts = {
            key: getattr(part, "__func__", getattr(part, "fget", part))
            for key, part in vars(value).items()
            if isinstance(part, types.FunctionType | staticmethod | classmethod | property | int | float | str | Tensor)
            and key not in ("__module__", "__doc__", "__qualname__", "__firstlineno__")
        }
        return ["class", name, self._named(parts, [*way, name]), self._all(value.__bases__, way)]

    def _object(self, value: Any, way: list[str]) -> Any:
        kind = type(value)
        if isinstance(value, HookPoint | NamedHook | LensHandle | logging.Logger):
            return [kind.__qualname__, value.name]
        described = getattr(value, "job_identity", None)
        if callable(described):
            return [self.of(kind, way), self.of(described(), [*way, kind.__qualname__])]
        slots = [name for base in kind.__mro__ for name in _slots(base) if hasattr(value, name)]
        if not hasattr(value, "__dict__") and not slots:
            return None
        state = dict(vars(value)) if hasattr(value, "__dict__") else {}
        state.update({name: getattr(value, name) for name in slots})
        return [self.of(kind, way), self._named(state, [*way, kind.__qualname__])]


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
