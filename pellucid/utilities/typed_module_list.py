"""A list of modules that says of which class they are, under TransformerLens' name."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)


class TypedModuleList(nn.ModuleList, Generic[T]):
    """torch's ``ModuleList``, and nothing more; ``TypedModuleList[Block]`` is for type checkers."""
