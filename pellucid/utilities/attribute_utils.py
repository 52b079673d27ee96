"""Attributes by dotted path, under TransformerLens' names."""

from __future__ import annotations

from operator import attrgetter
from typing import Any


def get_nested_attr(obj: Any, attr_str: str) -> Any:
    """``obj.a.b.c`` for ``"a.b.c"``."""
    return attrgetter(attr_str)(obj)


def set_nested_attr(obj: Any, attr_str: str, value: Any) -> None:
    """``obj.a.b.c = value`` for ``"a.b.c"``."""
    *path, name = attr_str.split(".")
    setattr(attrgetter(".".join(path))(obj) if path else obj, name, value)
