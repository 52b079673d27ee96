"""Attributes by dotted path, under TransformerLens' names."""

from __future__ import annotations

from typing import Any

from pellucid.arguments import check_text
from pellucid.errors import AttributePathError, InputError, KindError


def get_nested_attr(obj: Any, attr_str: str) -> Any:
    """``obj.a.b.c`` for ``"a.b.c"``.

    Raises:
        AttributePathError: there is no such attribute.
        InputError: no path.
    """
    return _follow(obj, check_text("attr_str", attr_str), attr_str.split("."))


def set_nested_attr(obj: Any, attr_str: str, value: Any) -> None:
    """``obj.a.b.c = value`` for ``"a.b.c"``; ``c`` need not be there before, as with ``setattr``.

    Raises:
        AttributePathError: there is no ``obj.a.b``, or it does not let ``c`` be set.
        KindError: a value that the object does not take.
        InputError: no path.
    """
    *path, name = check_text("attr_str", attr_str).split(".")
    if not name:
        raise InputError(f"attr_str={attr_str!r} does not say which attribute: a part of it is empty.")
    owner = _follow(obj, attr_str, path)
    try:
        setattr(owner, name, value)
    except AttributeError as error:
        raise AttributePathError(f"attr_str={attr_str!r}: {name!r} cannot be set: {error}") from error
    except TypeError as error:  # a module wants a Parameter where it has one
        raise KindError(f"value does not fit attr_str={attr_str!r}: {error}") from error


def _follow(obj: Any, attr_str: str, path: list[str]) -> Any:
    for name in path:
        if not name:
            raise InputError(f"attr_str={attr_str!r} does not say which attribute: a part of it is empty.")
        try:
            obj = getattr(obj, name)
        except AttributeError as error:
            raise AttributePathError(f"attr_str={attr_str!r} stops at {name!r}: {error}") from error
    return obj
