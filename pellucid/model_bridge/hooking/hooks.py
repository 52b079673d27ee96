"""The hook points of one model: which of them a name means, what is attached to them, and taking it off again.

What tokens are and how a run is made is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from pellucid.arguments import check_list
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import GradientError, HookDisabledError, HookUnreachableError, InputError, UnsupportedModelError
from pellucid.hook_points import Direction, Directions, HookFunction, HookPoint, LensHandle
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.names import FROM_EMBEDDINGS, SETTERS, Flag, HookSpec, NamesFilter, is_part, table_of_points
from pellucid.run_context import acts
from pellucid.tables import NamesView, Table

HookRequest: TypeAlias = tuple[NamesFilter, HookFunction]
"""``(name, glob, list or predicate, function)``."""


class HookDict(Mapping[str, HookPoint]):
    """Hook points by name. Iterates each point once, under its canonical name; look-up takes either name.

    Opt-in points that are off are absent; looking one up says which call switches it on.
    """

    def __init__(self, tree: ComponentTree) -> None:
        self._tree = tree

    def __getitem__(self, name: str) -> HookPoint:
        self._tree.index.select(name, self._tree.cfg.flags)
        return self._tree.point(name)

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec, _ in self._tree.index.select(None, self._tree.cfg.flags))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        if name not in self._tree.index:
            return False
        spec = self._tree.index[str(name)]
        return spec.flag is None or self._tree.cfg.flags[spec.flag]

    def keys(self) -> NamesView:
        """Canonical names in firing order; a notebook shows them as a table."""
        return NamesView(self)

    def _table(self) -> Table:
        specs = [spec for spec, _ in self._tree.index.select(None, self._tree.cfg.flags)]
        return table_of_points("HookDict (bridge.explain(name) says what one holds)", specs)

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()


class Hooks:
    """The functions on the hook points of one model.

    Args:
        tree: its components.
    """

    def __init__(self, tree: ComponentTree) -> None:
        self._tree = tree

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """Sizes and switches; the vocabulary is not looked up (:attr:`ComponentTree.cfg`): no point depends on it."""
        cfg: TransformerBridgeConfig = self._tree.adapter.cfg
        return cfg

    def set_flag(self, flag: Flag, value: bool) -> None:
        """Switch opt-in points on or off.

        Raises:
            HookDisabledError: a function is on one that is to be switched off.
            UnsupportedModelError: the model has no such point.
        """
        if value and not any(spec.flag == flag for spec in self._tree.index.values()):
            there = sorted({SETTERS[spec.flag] for spec in self._tree.index.values() if spec.flag is not None})
            raise UnsupportedModelError(
                f"{flag} switches nothing on: {self._tree.adapter.family.title} has no such hook point in this "
                f"configuration. It has: {', '.join(there)}."
            )
        if not value:
            for handle in list(self._tree.handles()):
                spec = self._tree.spec_of(handle.point)
                if spec is not None and spec.flag == flag:
                    raise HookDisabledError(
                        f"A hook is on {spec.name}; remove it (reset_hooks) before switching {flag} off."
                    )
        setattr(self.cfg, flag, bool(value))

    @contextmanager
    def flags_set(self, wanted: Mapping[Flag, bool]) -> Iterator[None]:
        """Opt-in points on or off for the length of a block; then all are as they were."""
        before = dict(self.cfg.flags)
        try:
            self._set_flags({**before, **wanted})
            yield
        finally:
            self._set_flags(before)

    def _set_flags(self, wanted: Mapping[Flag, bool]) -> None:
        for value in (False, True):  # off first: two of them exclude each other
            for flag, is_on in wanted.items():
                if is_on is value and self.cfg.flags[flag] is not value:
                    self.set_flag(flag, value)

    def requests(
        self, requests: Sequence[HookRequest], direction: Direction, span: tuple[int, int] | None = None
    ) -> list[LensHandle]:
        """Functions to attach, made of ``(name, glob, list or predicate, function)`` pairs; nothing is attached yet.

        Args:
            requests: the pairs.
            direction: ``"fwd"`` or ``"bwd"``.
            span: the first block of the run and the one before which it ends; a named point outside is refused.

        Raises:
            InputError: no such pairs.
            HookNameError: a name that matches nothing.
        """
        handles = []
        for request in check_list(f"{direction}_hooks", requests, "(name, function) pairs", empty=True):
            if not isinstance(request, (tuple, list)) or len(request) != 2:
                raise InputError(f"{direction}_hooks is a list of (name, function) pairs; found {request!r} in it.")
            names_filter, function = request
            if not callable(function):
                raise InputError(
                    f"A hook is (name, function); found {function!r} as the function for {names_filter!r}."
                )
            for spec, asked in self.select(names_filter, direction, "a hook's name", span):
                handles.append(LensHandle(self._tree.point_of(spec), function, direction, asked))
        return handles

    def select(
        self, names_filter: NamesFilter, direction: Direction, argument: str, span: tuple[int, int] | None = None
    ) -> list[tuple[HookSpec, str]]:
        """Points that a filter means in one direction, each with the name that the user asked for.

        Raises:
            GradientError: the gradient of token ids is asked for by name.
        """
        everything: Any = names_filter
        if everything is True:
            names_filter = None
        chosen = self._tree.index.select(names_filter, self.cfg.flags, argument=argument)
        if direction == "bwd":
            named = [names_filter] if isinstance(names_filter, str) else [] if callable(names_filter) else names_filter
            exact = set(named or ()) & {name for spec, _ in chosen for name in (spec.name, *spec.aliases)}
            integers = [(spec, asked) for spec, asked in chosen if spec.kind == "int"]
            if any(asked in exact for _, asked in integers) or len(integers) == len(chosen):
                raise GradientError(f"{integers[0][0].name} holds token ids, which have no gradient.")
            # A glob or a predicate means those that have one.
            chosen = [pair for pair in chosen if pair not in integers]
        return chosen if span is None else self.reachable(chosen, names_filter, span)

    def reachable(
        self, chosen: list[tuple[HookSpec, str]], names_filter: NamesFilter, span: tuple[int, int]
    ) -> list[tuple[HookSpec, str]]:
        """Points that a run from block ``start`` up to block ``stop`` passes; a named one it does not pass is refused."""
        start, stop = span
        passed = [(spec, asked) for spec, asked in chosen if is_part(spec, start, stop, self.cfg.n_layers)]
        entries = (
            [names_filter] if isinstance(names_filter, str) or callable(names_filter) else list(names_filter or ())
        )
        names = {spec.name for spec, _ in passed}
        for entry in entries:
            met = self._tree.index.select(entry, self.cfg.flags)
            if not any(spec.name in names for spec, _ in met):
                limits = [f"start_at_layer={start}"] if start >= 0 else []
                limits += ["inputs_embeds"] if start == FROM_EMBEDDINGS else []
                limits += [f"stop_at_layer={stop}"] if stop <= self.cfg.n_layers else []
                what = repr(entry) if isinstance(entry, str) else "What the predicate matches"
                raise HookUnreachableError(
                    f"{what} is not on the way of a run with {' and '.join(limits)}: nothing would be hooked there."
                )
        return passed

    def reset(
        self, clear_contexts: bool, direction: Directions, including_permanent: bool, level: int | None = None
    ) -> None:
        """Remove functions that act here; see ``reset_hooks`` of the bridge."""
        for point in list(self._tree.live_points()):
            chosen = [
                handle
                for handle in point.handles(direction, including_permanent)
                if _is_resettable(handle) and (level is None or handle.context_level == level)
            ]
            if chosen:
                point.drop(chosen.__contains__)
        self._tree.sync()
        if clear_contexts:
            self.clear_contexts()

    def clear_contexts(self) -> None:
        """Empty the ``ctx`` of every hook point."""
        for point in self._tree.live_points():
            point.clear_context()

    def attached(self, name_filter: NamesFilter, dir: Directions, permanent: bool) -> dict[str, list[LensHandle]]:
        """Attached functions by canonical name; points without any are left out."""
        chosen = {spec.name for spec, _ in self._tree.index.select(name_filter, self.cfg.flags)}
        found: dict[str, list[LensHandle]] = {}
        for point in self._tree.live_points():
            handles = point.handles(dir, permanent)
            if handles and point.name in chosen:
                found[str(point.name)] = handles
        return found

    def explain(self, name: str) -> str:
        """What a hook point holds: its shape, dtype, other names and the module it stands on, in a few lines."""
        spec = self._tree.index[name]
        component = self._tree.components[spec.component]
        dtype = {"model": str(self.cfg.dtype), "wide": "float32 at least", "int": "int64"}[spec.kind]
        lines = [
            f"{spec.name}: {spec.doc}",
            f"  shape   [{', '.join(spec.axes)}], {dtype}",
            f"  module  {component.path} ({type(component.module).__name__})",
        ]
        if spec.aliases:
            lines.append(f"  also    {', '.join(spec.aliases)}")
        if spec.flag is not None:
            state = "on" if self.cfg.flags[spec.flag] else "off"
            lines.append(f"  opt-in  {spec.flag} is {state}")
        if self.cfg.apply_residual_connection_post_layernorm and spec.site in ("hook_in", "hook_out"):
            lines.append("  note    this model takes the residual after the layer norm")
        return "\n".join(lines)


def _is_resettable(handle: LensHandle) -> bool:
    return acts(handle.scope) and (handle.scope.everywhere or not handle.reads_only)


def refuse_reshaped(points: Iterable[HookPoint], who: str) -> None:
    """Refuse points that show functions another shape than the hook table's (``enable_reshape``).

    Args:
        points: those whose axes have to be the table's.
        who: what needs them, for the error.

    Raises:
        InputError: naming the first.
    """
    for point in points:
        if point.hook_conversion is not None:
            raise InputError(
                f"{who} cannot tell the axes of {point.name}, which is shown in another shape: take its conversion off, "
                f"bridge.get_hook_point({point.name!r}).enable_reshape(None)."
            )
