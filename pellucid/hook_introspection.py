"""``list_hooks`` for any class that has a ``hook_dict`` of hook points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pellucid.arguments import check_choice, check_list, check_text
from pellucid.errors import HookNameError, InputError
from pellucid.names import nearest


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


def chosen(
    argument: str, names_filter: str | Sequence[str] | Callable[[str], bool] | None, names: Sequence[str]
) -> list[str]:
    """Those of ``names`` that a filter takes, in their order; every name that it says is among them.

    Args:
        argument: what the filter is called, for an error.
        names_filter: a name, a list of names or a predicate; ``None`` for every name.
        names: of all hook points.

    Raises:
        HookNameError: no such point, or a predicate that takes none.
        InputError: no filter.
    """
    if not (names_filter is None or callable(names_filter)):
        names_filter = [names_filter] if isinstance(names_filter, str) else names_filter
        names_filter = check_list(argument, names_filter, "hook names")
        for name in names_filter:
            check_text(f"a name of {argument}", name)
            if name not in names:
                near = ", ".join(nearest(name, names)) or "none: call setup() when the points are made"
                raise HookNameError(f"No hook point is called {name!r}. Nearest names: {near}.")
    wanted = accepts(names_filter)
    found = [name for name in names if wanted(name)]
    if not found and names_filter is not None:
        raise HookNameError(f"{argument} matches none of the {len(names)} hook points.")
    return found


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

        Raises:
            HookNameError: no such point.
            InputError: no filter, or no direction.
        """
        check_choice("dir", dir, ("fwd", "bwd", "both"))  # said also where there are no points
        points: Mapping[str, Any] = self.hook_dict
        names = chosen("name_filter", name_filter, list(points))
        found = {name: points[name].handles(dir, including_permanent) for name in names}
        return {name: handles for name, handles in found.items() if handles}
