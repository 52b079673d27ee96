"""Shapes in annotations: read in the source, and held against what every test's calls take and give.

A module of ``ROOMS`` that is imported by the tests has its annotated functions wrapped: after a call, each tensor that went in
or came out has the dtype and the axes that its annotation says, and one word is one size in all of them. A call that raised is
not looked at: what was wrong about it is the function's to say.
"""

from __future__ import annotations

import ast
import builtins
import collections.abc
import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

PACKAGE = Path(__file__).parents[1] / "pellucid"
ROOMS = (
    "activation_cache",
    "analysis",
    "attribution",
    "circuits",
    "decomposition",
    "experiments",
    "gradients",
    "losses",
    "patching",
    "running_stats",
    "steering",
)
"""Modules and folders whose public functions say the shapes of their tensors."""

DTYPES = ("Bool", "Float", "Int", "Num", "Shaped")

# -- in the source -----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A tensor in a signature: whose, which argument (field, or ``return``), and its axes; ``None`` where it says none."""

    function: str
    argument: str
    axes: str | None
    explained: str
    """The docstrings that may explain a word: the function's and its class's."""


def tensors_of(source: str, module: str) -> Iterator[Found]:
    """Every tensor in the signatures of a module's public functions and methods, and in the fields of its public classes."""
    tree = ast.parse(source)
    for owner, field, doc in _fields(tree):
        for axes in _axes(field.annotation):
            yield Found(f"{module}.{owner}", ast.unparse(field.target), axes, doc)
    for owner, function, doc in _functions(tree):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        arguments += [each for each in (function.args.vararg, function.args.kwarg) if each is not None]
        hints = [(each.arg, each.annotation) for each in arguments] + [("return", function.returns)]
        for argument, hint in hints:
            for axes in _axes(hint):
                yield Found(f"{module}.{owner}{function.name}", argument, axes, doc)


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield "", node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            about = ast.get_docstring(node) or ""
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and _is_called(member.name):
                    yield f"{node.name}.", member, about + (ast.get_docstring(member) or "")


def _fields(tree: ast.Module) -> Iterator[tuple[str, ast.AnnAssign, str]]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if isinstance(member, ast.AnnAssign) and not ast.unparse(member.target).startswith("_"):
                    yield node.name, member, ast.get_docstring(node) or ""


def _is_called(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__", "__getitem__")


def _axes(hint: ast.AST | None) -> Iterator[str | None]:
    """The axes of each tensor in an annotation."""
    if isinstance(hint, ast.Subscript) and isinstance(hint.value, ast.Name) and hint.value.id in DTYPES:
        _, axes = typing.cast("ast.Tuple", hint.slice).elts
        yield ast.literal_eval(axes)
    elif isinstance(hint, ast.Name | ast.Attribute) and ast.unparse(hint) in ("Tensor", "torch.Tensor"):
        yield None
    elif isinstance(hint, ast.Constant) and isinstance(hint.value, str):
        yield from _axes(ast.parse(hint.value, mode="eval").body)
    elif hint is not None and not (isinstance(hint, ast.Subscript) and ast.unparse(hint.value) == "Literal"):
        for part in ast.iter_child_nodes(hint):
            yield from _axes(part)


def words_of(axes: str) -> list[str]:
    """The words among axes: ``"*rows pos-1 1 ..."`` has rows and pos."""
    words = [part.lstrip("*#?") for part in axes.split()]
    names = [
        node.id
        for word in words
        if word not in ("...", "")
        for node in ast.walk(ast.parse(word))
        if isinstance(node, ast.Name)
    ]
    return [name for name in names if name != "_"]


def rooms() -> Iterator[tuple[str, Path]]:
    """Name and file of each module of the rooms."""
    for room in ROOMS:
        folder = PACKAGE / room
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path


# -- in a call ---------------------------------------------------------------------------------------------------------


class ShapeError(AssertionError):
    """An annotation that was not true of a call."""


class Unknown:
    """A name that only a type checker has: nothing is said about it."""

    def __class_getitem__(cls, _: Any) -> type[Unknown]:
        return cls


class _Names(dict[str, Any]):
    """The names that annotations of a module use, those of type checkers too."""

    def __missing__(self, name: str) -> Any:
        return getattr(collections.abc, name, getattr(builtins, name, Unknown))


def hints_of(annotations: dict[str, Any], module: types.ModuleType) -> dict[str, Any]:
    """Those annotations that have axes, evaluated."""
    names = _Names(vars(module))
    names.update({name: getattr(jaxtyping, name) for name in DTYPES} | {"Tensor": Tensor})
    texts = {name: getattr(hint, "__forward_arg__", hint) for name, hint in annotations.items()}
    tree = {name: ast.parse(text, mode="eval").body for name, text in texts.items() if isinstance(text, str)}
    return {name: eval(texts[name], {}, names) for name, hint in tree.items() if {*_axes(hint)} - {None}}


def check(value: Any, hint: Any, place: str) -> None:
    """Every tensor in ``value`` against the annotation.

    Raises:
        ShapeError: naming the place, what was said and what was found.
    """
    kinds = _alternatives(hint)
    if isinstance(value, Tensor):
        said = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, AbstractArray)]
        if said and not any(isinstance(value, kind) for kind in said):
            raise ShapeError(f"{place} is {' or '.join(map(_shown, said))}; found {value.dtype} {list(value.shape)}.")
    elif type(value) is dict:  # other mappings may compute or read what is asked of them
        for kind in kinds:
            if isinstance(origin := typing.get_origin(kind), type) and issubclass(dict, origin):
                for name, each in value.items():
                    check(each, typing.get_args(kind)[1], f"{place}[{name!r}]")
    elif type(value) in (list, tuple):
        for kind in kinds:
            for number, (each, part) in enumerate(zip(value, _parts(kind, value), strict=False)):
                check(each, part, f"{place}[{number}]")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _shown(kind: Any) -> str:
    return f"{kind.__name__.partition('[')[0]}[{kind.dim_str}]"


def _parts(kind: Any, value: Sequence[Any]) -> Sequence[Any]:
    """What an annotation says of each entry."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and len(arguments) == len(value) and ... not in arguments:
        return arguments
    if origin is tuple and ... not in arguments:
        return ()
    if isinstance(origin, type) and issubclass(type(value), origin):
        return [arguments[0]] * len(value)
    return ()


def checked(function: Callable[..., Any], name: str, annotations: dict[str, Any], module: types.ModuleType) -> Any:
    """The function, with its annotations held against each call that it answers."""
    signature, hints = inspect.signature(function), functools.cache(lambda: hints_of(annotations, module))

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        given = function(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        with jaxtyped("context"):
            for argument, hint in hints().items():
                if argument in arguments or argument == "return":
                    check(given if argument == "return" else arguments[argument], hint, f"{name}: {argument}")
        return given

    # A warning points at the user's line, past the library's own files: this frame is one of them.
    called.__code__ = called.__code__.replace(co_filename=function.__code__.co_filename)
    return called


def says_axes(annotations: dict[str, Any]) -> bool:
    """Whether any of them has axes."""
    texts = [str(getattr(hint, "__forward_arg__", hint)) for hint in annotations.values()]
    return any(f"{dtype}[Tensor" in text for text in texts for dtype in DTYPES)


def check_calls(module: types.ModuleType) -> None:
    """Wrap the module's functions and methods whose annotations have axes."""
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            setattr(module, name, _wrapped(value, name, module))
        elif inspect.isclass(value):
            if issubclass(value, tuple) and says_axes(
                value.__annotations__
            ):  # a NamedTuple: its fields are its arguments
                value.__new__ = staticmethod(checked(value.__new__, name, value.__annotations__, module))  # type: ignore[method-assign]
            for own, member in list(vars(value).items()):
                if not hasattr(value, "_fields") and (new := _wrapped(member, f"{name}.{own}", module)) is not member:
                    setattr(value, own, new)


def _wrapped(member: Any, name: str, module: types.ModuleType) -> Any:
    if isinstance(member, property):
        return property(_wrapped(member.fget, name, module), member.fset, member.fdel, member.__doc__)
    if isinstance(member, functools.cached_property):
        member.func = _wrapped(member.func, name, module)
        return member
    if isinstance(member, classmethod | staticmethod):
        return type(member)(_wrapped(member.__func__, name, module))
    if not inspect.isfunction(member) or not says_axes(member.__annotations__):
        return member
    return checked(member, name, member.__annotations__, module)


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        check_calls(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        parts = name.split(".")
        if parts[0] != "pellucid" or len(parts) < 2 or parts[1] not in ROOMS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


def install() -> None:
    """From here on, modules of the rooms are wrapped when they are imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
