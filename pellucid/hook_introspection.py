"""``list_hooks`` for any class that has a ``hook_dict`` of hook points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pellucid.errors import InputError


def accepts(names_filter: str | Sequence[str] | Callable[[str], bool] | None) -> Callable[[str], bool]:
    """A predicate on names of one: itself, the same name, a name of the list, or every name.

    Raises:
        InputError: something else.
    """
    if names_filter is None:
        return lambda _: True
    if callable(names_filter):
        return names_filter
    if isinstance(names_filter, str):
        return names_filter.__eq__
    if isinstance(names_filter, list | tuple | set | frozenset):
        return set(names_filter).__contains__
    raise InputError(f"A filter is a name, a list of names or a function of names; found {names_filter!r}.")


class HookIntrospectionMixin:
    """Which functions are attached to the hook points of ``self.hook_dict``."""

    hook_dict: Any

    def list_hooks(
        self,
        name_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[Any]]:
        """Attached functions by the name of their point; points without any are left out.

        Args:
            name_filter: a name, a list of names or a predicate; ``None`` for every point.
            dir: one direction, or both.
            including_permanent: those too that ``reset_hooks`` keeps.
        """
        points: Mapping[str, Any] = self.hook_dict
        wanted = accepts(name_filter)
        found = {name: point.handles(dir, including_permanent) for name, point in points.items() if wanted(name)}
        return {name: handles for name, handles in found.items() if handles}
