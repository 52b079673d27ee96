"""Hook names: what a hook point is called, what it holds, and how a user's filter is turned into points.

A :class:`HookSpec` is one line of an architecture's hook table: the canonical name, the other names that reach the same
point, the axes of its tensor and where it lives. A :class:`HookIndex` is that table written out for a given number of
layers; every look-up, filter and suggestion in the library goes through it, so a name means one thing everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pellucid.errors import HookDisabledError, HookNameError
from pellucid.tables import NamesView, Table, merge_layers

NamesFilter: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None
"""A name, a glob (``blocks.*.mlp.hook_post``), a list of those, a predicate on names, or ``None`` for every point."""

Kind = Literal["model", "wide", "int"]
"""Dtype of a point: the model's; float32 for half-precision models (a norm's internals); integers (token ids)."""

Reach = Literal["own", "later"]
"""Which columns of a block's output a point of it can change: its own, or, through keys and values, all later ones too."""

Flag = Literal["use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in"]

SETTERS: Mapping[Flag, str] = {
    "use_attn_result": "set_use_attn_result(True)",
    "use_split_qkv_input": "set_use_split_qkv_input(True)",
    "use_attn_in": "set_use_attn_in(True)",
    "use_hook_mlp_in": "set_use_hook_mlp_in(True)",
}
"""The call that switches an opt-in point on, by the configuration flag it sets."""

EXCLUDE_EACH_OTHER: tuple[Flag, Flag] = ("use_attn_in", "use_split_qkv_input")
"""Points that would feed the same projections."""


@dataclass(frozen=True)
class HookSpec:
    """One hook point.

    Attributes:
        name: canonical name, TransformerLens' (``blocks.{i}.attn.hook_q`` in a table, ``blocks.3.attn.hook_q`` in an
            index).
        component: canonical name of the component that fires it (``blocks.{i}.attn``).
        site: the attribute of that component which is the hook point (``hook_q``).
        axes: axis words of the tensor, see :mod:`pellucid.axes`.
        doc: what the tensor is, in one line.
        aliases: other names of the same point, TransformerLens' bridge's.
        kind: dtype of the tensor.
        flag: the configuration flag that switches an opt-in point on, or ``None``.
        layer: the block it belongs to, ``None`` outside the blocks.
        reach: see :data:`Reach`; an index of hooks finds it out.
        width: of the last axis, where the model's configuration does not know it (features of an autoencoder).
    """

    name: str
    component: str
    site: str
    axes: tuple[str, ...]
    doc: str
    aliases: tuple[str, ...] = ()
    kind: Kind = "model"
    flag: Flag | None = None
    layer: int | None = None
    reach: Reach = "own"
    width: int | None = None

    @property
    def pos_axis(self) -> int:
        """Index of the ``pos`` axis, for slicing by position."""
        return self.axes.index("pos")

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        """Sizes by axis word: those that are ``known``, and :attr:`width`."""
        return known if self.width is None else {**known, self.axes[-1]: self.width}

    def at_layer(self, layer: int) -> HookSpec:
        """The same line of the table, written out for block ``layer``."""
        fill = {"i": layer}
        return replace(
            self,
            name=self.name.format(**fill),
            component=self.component.format(**fill),
            aliases=tuple(alias.format(**fill) for alias in self.aliases),
            layer=layer,
        )


def nearest(name: str, valid: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` valid names closest to ``name`` (by :mod:`difflib`), best first.

    Of hook names those that end alike come first: ``blocks.9.hook_z`` means a ``hook_z``.
    """
    names = list(valid)
    _, dot, last = name.rpartition(".")
    alike = [other for other in names if dot and other.endswith(f".{last}")]
    found = difflib.get_close_matches(name, alike, n=count, cutoff=0.0)
    found += difflib.get_close_matches(name, names, n=2 * count, cutoff=0.0)
    return list(dict.fromkeys(found))[:count]


def layer_of(name: str) -> int:
    """The layer in ``blocks.{layer}....``.

    Raises:
        HookNameError: the name has no layer.
    """
    match = re.match(r"blocks\.(\d+)\.", name)
    if match is None:
        raise HookNameError(f"{name!r} has no layer: only names that begin with 'blocks.<layer>.' do.")
    return int(match.group(1))


class HookIndex(Mapping[str, HookSpec]):
    """Every hook point of a model by name: iterates canonical names in firing order, looks up by any name.

    Args:
        before: points fired before the blocks.
        block: points of one block, with ``{i}`` for the layer.
        after: points fired after the blocks.
        n_layers: number of blocks.
        last_aliases: further names of points of the last block (alias to name with ``{i}``).
        unreachable: names within a block that other models have, and why this one has not.
        first_aliases: the same of the first block.
    """

    def __init__(
        self,
        before: Sequence[HookSpec],
        block: Sequence[HookSpec],
        after: Sequence[HookSpec],
        n_layers: int,
        last_aliases: Mapping[str, str] = {},
        unreachable: Mapping[str, str] = {},
        first_aliases: Mapping[str, str] = {},
    ) -> None:
        specs = [*before]
        block = _with_reach(block)
        for layer in range(n_layers):
            specs += [spec.at_layer(layer) for spec in block]
        specs += after
        for layer, aliases in ((0, first_aliases), (n_layers - 1, last_aliases)):
            for alias, name in aliases.items():
                named = name.format(i=layer)
                specs = [
                    replace(spec, aliases=(*spec.aliases, alias)) if spec.name == named else spec for spec in specs
                ]
        self._specs = {spec.name: spec for spec in specs}
        self._canonical = {alias: spec.name for spec in specs for alias in spec.aliases}
        self.n_layers = n_layers
        self._unreachable = dict(unreachable)
        self._selections: dict[tuple[object, ...], list[tuple[HookSpec, str]]] = {}

    def __getitem__(self, name: str) -> HookSpec:
        if not isinstance(name, str):
            raise HookNameError(f"The name of a hook point is a string; found {name!r} ({type(name).__name__}).")
        spec = self._specs.get(name)
        if spec is None:
            canonical = self._canonical.get(name)
            if canonical is None:
                raise HookNameError(self._unknown(name))
            spec = self._specs[canonical]
        return spec

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs or name in self._canonical

    def keys(self) -> NamesView:
        """Canonical names in firing order; a notebook shows them as a table."""
        return NamesView(self)

    def __repr__(self) -> str:
        return str(table_of_points("HookIndex", self._specs.values()))

    def _repr_html_(self) -> str:
        return table_of_points("HookIndex", self._specs.values()).html()

    def canonical_names(self) -> KeysView[str]:
        """The names that it iterates, to look one up in."""
        return self._specs.keys()

    def all_names(self) -> Iterator[str]:
        """Canonical names and aliases."""
        yield from self._specs
        yield from self._canonical

    def joined(self, more: Sequence[HookSpec]) -> HookIndex:
        """The index with further points, each after the one whose name its own begins with; the last of a name counts."""
        made = copy.copy(self)
        made._specs, made._selections = {}, {}
        for spec in self._specs.values():
            made._specs[spec.name] = spec
            made._specs |= {inside.name: inside for inside in more if inside.name.rpartition(".")[0] == spec.name}
        made._canonical = {alias: spec.name for spec in made._specs.values() for alias in spec.aliases}
        return made

    def _unknown(self, name: str) -> str:
        numbered = re.match(r"blocks\.(\d+)\.", name)
        lines = [f"No hook point is called {name!r}."]
        if numbered and int(numbered.group(1)) >= self.n_layers:
            lines.append(f"The model has {self.n_layers} layers, 0 to {self.n_layers - 1}.")
        lines += self._why_not(name)
        lines.append("Nearest names: " + ", ".join(nearest(name, self.all_names())) + ".")
        return " ".join(lines)

    def _why_not(self, name: str) -> list[str]:
        """Why a name, or a glob over the layers, is none here, where that can be said."""
        inside = re.match(r"blocks\.[^.]+\.(.+)", name)
        why = self._unreachable.get(inside[1] if inside else name)
        return [] if why is None else [f"{why}."]

    def select(
        self, names_filter: NamesFilter, flags: Mapping[Flag, bool], *, argument: str = "names_filter"
    ) -> list[tuple[HookSpec, str]]:
        """Turn a filter into points, each with the name the user asked for.

        A point that a glob or a predicate meets under several names is given once, under its canonical name if that
        one matches. Opt-in points that are off are left out of globs and predicates and refused when named.

        Args:
            names_filter: see :data:`NamesFilter`.
            flags: which opt-in points are on.
            argument: what to call the filter in an error.

        Returns:
            ``(spec, name asked for)`` pairs, in firing order for globs and predicates, in the user's order for lists.

        Raises:
            HookNameError: a name, glob, list entry or predicate matches nothing.
            HookDisabledError: a named opt-in point is off.
        """
        if isinstance(names_filter, str) and names_filter in self:
            return self._select_name(names_filter, flags)
        if callable(names_filter):
            chosen = [pair for pair in self._matching(names_filter) if _is_on(pair[0], flags)]
            if not chosen:
                raise HookNameError(f"The predicate given as {argument} matches none of the {len(self)} hook points.")
            return chosen
        entries = _entries(names_filter, argument)
        # Remembered: a glob is matched with a thousand names, and a cache may be asked for hundreds of them, run after run.
        key = (entries, *(flag for flag, is_on in flags.items() if is_on))
        known = self._selections.get(key)
        if known is None:
            known = self._select_all(flags) if entries is None else self._select_names(entries, flags)
            if len(self._selections) >= 64:
                self._selections.clear()
            self._selections[key] = known
        return list(known)

    def _select_all(self, flags: Mapping[Flag, bool]) -> list[tuple[HookSpec, str]]:
        return [(spec, spec.name) for spec in self._specs.values() if _is_on(spec, flags)]

    def _select_names(self, entries: Sequence[str], flags: Mapping[Flag, bool]) -> list[tuple[HookSpec, str]]:
        seen: dict[str, tuple[HookSpec, str]] = {}
        for entry in entries:
            for spec, asked in self._select_name(entry, flags):
                seen.setdefault(spec.name, (spec, asked))
        return list(seen.values())

    def _select_name(self, name: str, flags: Mapping[Flag, bool]) -> list[tuple[HookSpec, str]]:
        if name not in self and any(mark in name for mark in "*?["):
            pattern = re.compile(fnmatch.translate(name))
            matching = self._matching(lambda known: pattern.match(known) is not None)
            chosen = [pair for pair in matching if _is_on(pair[0], flags)]
            if chosen:
                return chosen
            if matching:
                raise _disabled(matching[0][0], matching[0][0].name)
            raise HookNameError(
                " ".join([f"The glob {name!r} matches no hook point.", *self._why_not(name)])
                + f" Nearest names: {', '.join(nearest(name, self))}."
            )
        spec = self[name]
        if not _is_on(spec, flags):
            raise _disabled(spec, name)
        return [(spec, name)]

    def _matching(self, accepts: Callable[[str], bool]) -> list[tuple[HookSpec, str]]:
        chosen = []
        for spec in self._specs.values():
            asked = next((name for name in (spec.name, *spec.aliases) if accepts(name)), None)
            if asked is not None:
                chosen.append((spec, asked))
        return chosen


def table_of_points(what: str, specs: Iterable[HookSpec]) -> Table:
    """Hook points as a table with one line for all layers."""
    rows = [(spec.name, ", ".join(spec.axes), spec.flag or "") for spec in specs]
    return Table(f"{what}: {len(rows)} hook points", ("name", "layers", "axes", "opt-in"), merge_layers(rows))


def _entries(names_filter: str | Sequence[str] | None, argument: str) -> tuple[str, ...] | None:
    """The names and globs of a filter, ``None`` for every point.

    Raises:
        HookNameError: no strings, or none at all.
    """
    if names_filter is None or isinstance(names_filter, str):
        return None if names_filter is None else (names_filter,)
    if not isinstance(names_filter, Iterable):
        raise HookNameError(
            f"{argument} is a name, a glob, a list of names or a function of names; found {names_filter!r}."
        )
    entries = tuple(names_filter)
    if not entries:
        raise HookNameError(f"The list given as {argument} is empty: name at least one hook point.")
    wrong = [entry for entry in entries if not isinstance(entry, str)]
    if wrong:
        raise HookNameError(f"{argument} takes names; found {wrong[0]!r} of type {type(wrong[0]).__name__}.")
    return entries


def _is_on(spec: HookSpec, flags: Mapping[Flag, bool]) -> bool:
    return spec.flag is None or flags[spec.flag]


def _disabled(spec: HookSpec, asked: str) -> HookDisabledError:
    assert spec.flag is not None
    return HookDisabledError(
        f"Cannot add hook {asked} because {spec.flag} is False. Call {SETTERS[spec.flag]} on the bridge first."
    )


# --------------------------------------------------------------------------------------------------------------------
# TransformerLens' shorthands
# --------------------------------------------------------------------------------------------------------------------


def _with_reach(block: Sequence[HookSpec]) -> list[HookSpec]:
    """The points of a block, in firing order, with their reach: what comes before the scores goes into keys and values,
    unless it is the queries' alone, or the MLP's, whose norm may run first.
    """
    scores = next((place for place, spec in enumerate(block) if "key_pos" in spec.axes), len(block))
    return [
        replace(spec, reach="own" if place >= scores or spec.site in OF_QUERIES or _is_mlps(spec) else "later")
        for place, spec in enumerate(block)
    ]


def _is_mlps(spec: HookSpec) -> bool:
    return spec.component.endswith((".ln2", ".mlp"))


OF_QUERIES = frozenset({"hook_q_input", "hook_q_in", "hook_q", "hook_q_normed", "hook_rot_q"})
"""Sites of an attention that feed its queries only."""

FROM_TOKENS, FROM_EMBEDDINGS = -2, -1
"""Where a run begins that is not given the residual of a block."""


PATTERN_SITES = ("hook_attn_scores", "hook_pattern")
"""What a fused attention never makes."""

BEFORE_BLOCKS = ("embed", "embed_ln", "pos_embed")
"""Components that run before the blocks."""


def runs_through(spec: HookSpec, start: int, stop: int, n_layers: int) -> bool:
    """Whether a run that is given the residual entering block ``start`` and ends before block ``stop`` fires a point.

    ``start`` is :data:`FROM_TOKENS` or :data:`FROM_EMBEDDINGS` for a run from there, ``stop`` is ``n_layers + 1`` for one to
    the logits. The entry of block ``stop`` fires too, on what the run returns; it is no part of the run (:func:`is_part`).
    """
    enters = spec.site == "hook_in" and spec.component == f"blocks.{stop}"
    return enters or is_part(spec, start, stop, n_layers)


def is_part(spec: HookSpec, start: int, stop: int, n_layers: int) -> bool:
    """Whether a point is one of those between ``start`` and ``stop``, as :func:`runs_through` takes them."""
    if spec.layer is not None:
        return start <= spec.layer < stop
    if spec.component == "embed":
        return start == FROM_TOKENS
    return start < 0 if spec.component in BEFORE_BLOCKS else stop > n_layers


_IN_ATTENTION = frozenset("q k v z attn_scores pattern result".split())
_IN_MLP = frozenset(("pre", "post"))
_SHORTHANDS = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
_SECTIONS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """TransformerLens' shorthand for hook names.

    ``get_act_name("q", 3)`` is ``"blocks.3.attn.hook_q"``, ``get_act_name("scale", 3, "ln1")`` is
    ``"blocks.3.ln1.hook_scale"``, ``get_act_name("k6a")`` is ``"blocks.6.attn.hook_k"``, and a full name is itself.
    """
    if not isinstance(name, str) or not name:
        raise HookNameError(f"name is a hook's short name, such as 'q'; found {name!r}.")
    if layer is not None and not isinstance(layer, bool | str):
        with contextlib.suppress(TypeError):
            layer = operator.index(layer)  # a NumPy integer, a 0-d tensor
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, str | int) or layer in ("", -1)):
        raise HookNameError(f"layer is a whole number from 0 on; found {layer!r}.")
    if layer_type is not None and not isinstance(layer_type, str):
        raise HookNameError(f"layer_type is a string, such as 'attn' or 'ln1'; found {layer_type!r}.")
    if layer is None and layer_type is None:
        if "." in name or name.startswith("hook_"):
            return name
        packed = re.fullmatch(r"([a-z]+)(\d+)([a-z]?.*)", name)
        if packed is not None:
            name, layer, layer_type = packed.group(1), packed.group(2), packed.group(3) or None
    name = _SHORTHANDS.get(name, name)
    if layer is None and name in ("scale", "normalized"):
        return f"ln_final.hook_{name}"
    section = _SECTIONS.get(layer_type or "", layer_type or "")
    if name in _IN_ATTENTION:
        section = "attn"
    elif name in _IN_MLP:
        section = "mlp"
    parts = [f"blocks.{layer}"] if layer is not None else []
    return ".".join([*parts, *([section] if section else []), f"hook_{name}"])
