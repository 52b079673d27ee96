"""Which places of a model an analysis goes through: a site, and the axes along which its cells lie.

A *site* is an activation that every block has, by the last part of its hook name (``resid_pre``, ``z``, ``attn_out``,
``mlp_post``, ``pattern``, ``ln1.hook_scale``), or one outside the blocks (``embed``). *By* names the axes of the result: a
cell is one place on each, and the edit of a cell reaches all of what is not named. ``by=("layer", "head")`` at ``z`` is one
edit for each head, at all positions; ``by=("pos",)`` at ``resid_pre`` is one for each position, in all layers at once.
Where several heads of queries share keys and values, ``"head"`` at those means their own heads, and the axis of the result
is ``kv_head``, so that it is never laid beside the heads of queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from pellucid.arguments import check_list, check_text
from pellucid.axes import HEADS, Index
from pellucid.errors import HookNameError, InputError, UnsupportedModelError
from pellucid.experiments.labelled import Attribute, Grid
from pellucid.experiments.options import NeuronGroups, SweepOptions
from pellucid.model_bridge.hooking.hooks import refuse_reshaped
from pellucid.model_bridge.running.runner import Prepared
from pellucid.model_bridge.running.tokens import TextOrTokens
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import Flag, HookSpec, get_act_name, nearest
from pellucid.padding import counts, real_positions
from pellucid.sweep import Edit, Value
from pellucid.sweep.edits import indices
from pellucid.sweep.unedited import Unedited
from pellucid.tables import BriefFields
from pellucid.token_text import SEVERAL, token_labels

SITES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("q", "k", "v", "z", "pattern", "attn_scores", "result", "mlp_pre", "mlp_post", "embed"),
)
"""Sites as people ask for them; any other hook of a block is one too."""

DEFAULTS = SweepOptions()

WORD_OF_AXIS: Mapping[str, str] = {
    "pos": "pos",
    "n_heads": "head",
    "n_key_value_heads": "kv_head",
    "key_pos": "key_pos",
    "d_mlp": "neuron",
}
"""What cells lie along, by axis word. Other axes are features."""
_WORDS = ("layer", "pos", "head", "kv_head", "key_pos", "neuron", "group")


@dataclass(frozen=True, eq=False, repr=False)
class Site(BriefFields):
    """An activation of every block, or one outside them.

    Attributes:
        name: as it was asked for.
        specs: its hook points, by layer in ascending order (``None`` outside the blocks).
    """

    name: str
    specs: Mapping[int | None, HookSpec]

    @property
    def first(self) -> HookSpec:
        """One of its hook points."""
        return next(iter(self.specs.values()))

    @property
    def flags(self) -> tuple[Flag, ...]:
        """Opt-in switches that it needs."""
        return () if self.first.flag is None else (self.first.flag,)

    @property
    def words(self) -> tuple[str, ...]:
        """Axes that cells can lie along."""
        layer = () if None in self.specs else ("layer",)
        own = {WORD_OF_AXIS[axis] for axis in self.first.axes if axis in WORD_OF_AXIS}
        if "neuron" in own:
            own.add("group")
        return (*layer, *(word for word in _WORDS if word in own))

    @property
    def heads(self) -> str | None:
        """Which of its axes is heads, and the size that counts them: ``"head"``, ``"kv_head"`` or ``None``."""
        return next((WORD_OF_AXIS[axis] for axis in self.first.axes if axis in HEADS), None)

    def own_word(self, word: str) -> str:
        """The axis that a word means here: ``"head"`` is whichever heads the site has."""
        return self.heads or word if word == "head" else word


@dataclass(frozen=True, eq=False, repr=False)
class Prompts(BriefFields):
    """The checked input of a run.

    Attributes:
        tokens: ``[row, pos]``, ``NO_TOKEN`` at virtual positions, which a wrapper of the model puts first.
        attention_mask: ``[row, pos]``, ``None`` if nothing is padding.
        labels: of each row, its tokens as a person should see them; ids without a tokenizer.
        virtual: how many of the positions are virtual.
    """

    tokens: Int[Tensor, "row pos"]
    attention_mask: Shaped[Tensor, "row pos"] | None
    labels: tuple[tuple[str, ...], ...]
    virtual: int = 0

    def input(self) -> tuple[Int[Tensor, "row pos"], Shaped[Tensor, "row pos"] | None]:
        """Token ids and mask as a run of the bridge takes them, without virtual positions."""
        mask = self.attention_mask
        return self.tokens[:, self.virtual :], None if mask is None else mask[:, self.virtual :]

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Columns of the padded sequence."""
        return self.tokens.shape[1]

    @property
    def real(self) -> Bool[Tensor, "row pos"]:
        """``[row, pos]`` bool: which columns are not padding."""
        return real_positions(self.attention_mask, self.n_rows, self.length, self.tokens.device)

    def counts(self) -> list[int]:
        """Real tokens of each row."""
        found: list[int] = counts(self.real).tolist()
        return found

    def text(self) -> list[str]:
        """Each row in one line, padding left out."""
        return [
            "".join(label for label, is_real in zip(row, real, strict=True) if is_real)
            for row, real in zip(self.labels, self.real.tolist(), strict=True)
        ]

    def differing(self, other: Prompts) -> list[int]:
        """Columns at which any row has another token than its counterpart."""
        columns: list[int] = (self.tokens != other.tokens).any(0).nonzero().flatten().tolist()
        return columns

    def unedited(self, bridge: TransformerBridge) -> Unedited:
        """Their run, which is still to be made.

        Raises:
            InputError: the model is in training mode.
        """
        tokens, mask = self.input()
        return Unedited(bridge, bridge.check_input(tokens, attention_mask=mask))

    def columns(self) -> list[str]:
        """The label of each column: its token, where all rows have the same."""
        return [row[0] if len(set(row)) == 1 else SEVERAL for row in zip(*self.labels, strict=True)]


def read_prompts(
    bridge: TransformerBridge,
    input: TextOrTokens,
    options: SweepOptions = DEFAULTS,
) -> Prompts:
    """Token ids, mask and labels of an input, read as ``options`` say.

    Raises:
        InputError: it cannot be run.
    """
    prepared: Prepared = bridge.check_input(
        input,
        prepend_bos=options.prepend_bos,
        padding_side=options.padding_side,
        attention_mask=options.attention_mask,
    )
    assert prepared.tokens is not None
    run = bridge.positions_of(prepared)
    assert run.tokens is not None
    rows: list[list[int]] = prepared.tokens.tolist()
    tokenizer = bridge.tokenizer
    labels = (
        [[str(token) for token in row] for row in rows]
        if tokenizer is None
        else [token_labels(tokenizer, row) for row in rows]
    )
    before = tuple(f"<virtual {place}>" for place in range(run.virtual))
    return Prompts(run.tokens, run.attention_mask, tuple((*before, *row) for row in labels), run.virtual)


def refuse_different_lengths(first: Prompts, second: Prompts, names: tuple[str, str]) -> None:
    """A position of one run must be the same position of the other.

    Raises:
        InputError: other numbers of rows or of tokens; says which row, and what to do.
    """
    if first.n_rows != second.n_rows:
        raise InputError(
            f"{names[0]} has {first.n_rows} rows and {names[1]} {second.n_rows}: each row needs its counterpart."
        )
    for row, (one, other) in enumerate(zip(first.counts(), second.counts(), strict=True)):
        if one != other:
            where = f" in row {row}" if first.n_rows > 1 else ""
            raise InputError(
                f"{names[0]} and {names[1]} have different numbers of tokens{where}, {one} and {other}: "
                f"{'|'.join(first.labels[row])} and {'|'.join(second.labels[row])}. A position must mean the same in both: "
                "reword one of them, so that words are exchanged for words of as many tokens."
            )
    if not torch.equal(first.real, second.real):
        raise InputError(
            f"{names[0]} and {names[1]} are padded in different places. Pad both alike: give token ids of one shape "
            "with one attention_mask."
        )


def find_site(bridge: TransformerBridge, site: str, layers: Index = None) -> Site:
    """The hook points of a site.

    Args:
        bridge: the model.
        site: see :mod:`pellucid.experiments.places`.
        layers: which layers; by default all.

    Raises:
        HookNameError: no such site; the nearest ones are listed.
        InputError: layers that the model does not have, or layers of a site outside the blocks; a point of it that is shown
            in another shape.
    """
    check_text("site", site)
    refuse_mid(bridge, site)
    n_layers = bridge.cfg.n_layers
    for template in (get_act_name(site, "{i}"), f"blocks.{{i}}.{site}"):
        if template.format(i=0) in bridge.hook_index:
            chosen = sorted(indices(layers, n_layers, "layers"))
            return _as_in_the_table(
                bridge, {layer: bridge.hook_spec(template.format(i=layer)) for layer in chosen}, site
            )
    for name in (site, f"hook_{site}"):
        # By its name: Granite's hook_embed is what enters the first block.
        if name in bridge.hook_index and not name.startswith("blocks."):
            if layers is not None:
                raise InputError(f"The site {site!r} is outside the blocks: leave layers out.")
            return _as_in_the_table(bridge, {None: bridge.hook_spec(name)}, site)
    why = bridge.adapter.unreachable.get(get_act_name(site, 0).removeprefix("blocks.0."))
    if why is not None:
        raise HookNameError(f"No site is called {site!r} in this model. {why}.")
    raise HookNameError(
        f"No site is called {site!r}. Nearest: {', '.join(nearest(site, SITES))}. A site is an activation of every block: "
        f"{', '.join(SITES)}, or another hook name without its layer, such as ln1.hook_scale."
    )


def _as_in_the_table(bridge: TransformerBridge, specs: dict[int | None, HookSpec], site: str) -> Site:
    refuse_reshaped((bridge.runner.tree.point_of(spec) for spec in specs.values()), f"The site {site!r}")
    return Site(site, specs)


def refuse_mid(bridge: TransformerBridge, site: str) -> None:
    """Refuse the residual between attention and MLP where there is none.

    Raises:
        UnsupportedModelError: the blocks run both in parallel.
    """
    family = bridge.adapter.family
    if family.block.parallel and site in ("resid_mid", "hook_resid_mid"):
        raise UnsupportedModelError(
            f"Attention and MLP of {family.title} both read what enters the block: there is no residual between them, "
            "resid_mid. Take resid_pre or resid_post, or what each adds, attn_out and mlp_out."
        )


def check_by(site: Site, by: str | Sequence[str]) -> tuple[str, ...]:
    """The axes of the result.

    Raises:
        InputError: one that the site does not have, twice the same, or none.
    """
    asked = (by,) if isinstance(by, str) else tuple(check_list("by", by, "strings", empty=True))
    words = tuple(map(site.own_word, asked))
    wrong = [word for word in words if word not in site.words]
    if wrong or not words:
        raise InputError(
            f"by={list(words)!r}: the cells at {site.name} can lie along {', '.join(site.words)}"
            + (f"; {wrong[0]!r} is none of them." if wrong else "; name at least one.")
        )
    if len(set(words)) != len(words):
        raise InputError(f"by={list(words)!r} names an axis twice.")
    if "group" in words and "layer" in words:
        raise InputError("A group has its own neurons in each layer: leave 'layer' out of by.")
    if "group" in words and "neuron" in words:
        raise InputError("by names both 'neuron' and 'group': choose one.")
    return words


@dataclass(frozen=True, eq=False, repr=False)
class Cells(BriefFields):
    """Where the cells of a site lie, and what an edit of one reaches.

    Attributes:
        site: the site.
        by: axes, the last fastest.
        places: by axis word, its places: layers, columns, heads, first neurons, names of groups.
        columns: positions that are edited where ``pos`` is no axis, ``None`` for all.
        heads: the heads, the same.
        groups: by neuron or group, the neurons of each layer.
        labels: of each column, its token.
    """

    site: Site
    by: tuple[str, ...]
    places: Mapping[str, Sequence[Any]]
    columns: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    groups: Mapping[Any, Mapping[int | None, Sequence[int]]]
    labels: Sequence[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Places of each axis."""
        return tuple(len(self.places[word]) for word in self.by)

    @property
    def coords(self) -> dict[str, tuple[str, list[Any]]]:
        """Coordinates of the result: by name, the axis it lies along and its values."""
        coords: dict[str, tuple[str, list[Any]]] = {word: (word, list(self.places[word])) for word in self.by}
        for word, name in (("pos", "token"), ("key_pos", "key_token")):
            if word in self.by:
                coords[name] = (word, [self.labels[column] for column in self.places[word]])
        return coords

    def all(self) -> Iterator[dict[str, Any]]:
        """Each cell's place on each axis, the last axis fastest."""
        for cell in itertools.product(*(self.places[word] for word in self.by)):
            yield dict(zip(self.by, cell, strict=True))

    def at(self, cell: int) -> dict[str, Any]:
        """A cell's place on each axis, by its number."""
        at = dict[str, Any]()
        for word in reversed(self.by):
            cell, place = divmod(cell, len(self.places[word]))
            at[word] = self.places[word][place]
        return {word: at[word] for word in self.by}

    def edits(self, at: Mapping[str, Any], value: Callable[[HookSpec], Value]) -> list[Edit]:
        """The edits of one cell; ``value`` says what goes to a hook point."""
        specs = [self.site.specs[at["layer"]]] if "layer" in at else list(self.site.specs.values())
        members = []
        for member in specs:
            group = self.groups[at["neuron"] if "neuron" in at else at["group"]] if self.groups else None
            if group is not None and member.layer not in group:
                continue
            members.append(
                Edit(
                    member.name,
                    value(member),
                    positions=at.get("pos", self.columns),
                    heads=at.get(str(self.site.heads), self.heads),
                    neurons=None if group is None else group[member.layer],
                    keys=at.get("key_pos"),
                )
            )
        return members


def find_cells(
    bridge: TransformerBridge, prompts: Prompts, site: Site, by: Sequence[str], options: SweepOptions
) -> Cells:
    """The cells of a site.

    Args:
        bridge: the model.
        prompts: the base run's.
        site: where.
        by: axes, checked.
        options: ``positions``, ``heads`` and ``neurons`` of them.

    Raises:
        InputError: an index out of range, or one that the site has no axis for.
    """
    spec = site.first
    positions, heads, neurons = options.positions, options.heads, options.neurons
    if heads is not None and site.heads is None:
        raise InputError(f"{site.name} has no heads: leave heads out. Its axes are {', '.join(spec.axes)}.")
    if neurons is not None and not {"neuron", "group"} & set(by):
        raise InputError("neurons= goes with 'neuron' (how many a cell) or 'group' (the groups by name) in by.")
    columns = indices(positions, prompts.length, "positions")
    sizes = bridge.cfg.sizes()
    chosen_heads = next((indices(heads, sizes[axis], "heads") for axis in spec.axes if axis in HEADS), ())
    groups = _groups(bridge, site, by, neurons)
    places: dict[str, Sequence[Any]] = {
        "layer": list(site.specs),
        "pos": columns,
        "head": chosen_heads,
        "kv_head": chosen_heads,
        "key_pos": range(prompts.length),
        "neuron": list(groups),
        "group": list(groups),
    }
    return Cells(
        site,
        tuple(by),
        {word: places[word] for word in by},
        None if positions is None else columns,
        None if heads is None else chosen_heads,
        groups,
        prompts.columns(),
    )


def make_grid(
    bridge: TransformerBridge,
    prompts: Prompts,
    site: Site,
    by: Sequence[str],
    value: Callable[[HookSpec], Value],
    options: SweepOptions,
) -> Grid:
    """The cells and the edit of each.

    Args:
        bridge: the model.
        prompts: the base run's.
        site: where.
        by: axes, checked.
        value: what goes to a hook point.
        options: ``positions``, ``heads`` and ``neurons`` of them.

    Raises:
        InputError: an index out of range, or one that the site has no axis for.
    """
    cells = find_cells(bridge, prompts, site, by, options)
    edits, of_columns = [], []
    for at in cells.all():
        edits.append(cells.edits(at, value))
        of_columns.append(tuple(at[word] for word in ("pos", "key_pos") if word in at))
    return Grid(cells.by, cells.coords, cells.shape, edits, of_columns)


def default_by(site: Site, second: Sequence[str]) -> tuple[str, ...]:
    """``layer`` and the first of ``second`` that the site has."""
    others = [site.own_word(word) for word in second if site.own_word(word) in site.words][:1]
    return tuple(word for word in ("layer", *others) if word in site.words) or site.words[:1]


def _groups(
    bridge: TransformerBridge, site: Site, by: Sequence[str], neurons: int | NeuronGroups | None
) -> Mapping[Any, Mapping[int | None, Sequence[int]]]:
    """Neurons of each layer that a cell has; none where cells do not lie along neurons."""
    n_neurons = bridge.cfg.d_mlp or 4 * bridge.cfg.d_model
    if "neuron" in by:
        size = 1 if neurons is None else neurons
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(
                f"With 'neuron' in by, neurons= is how many a cell has, 1 or more; found {neurons!r}. Groups by name go "
                "with by='group'."
            )
        return {
            first: dict.fromkeys(site.specs, range(first, min(first + size, n_neurons)))
            for first in range(0, n_neurons, size)
        }
    if "group" not in by:
        return {}
    if not isinstance(neurons, Mapping) or not neurons:
        raise InputError("by='group' needs neurons={name: {layer: [neuron, ...], ...}, ...}.")
    groups: dict[Any, Mapping[int | None, Sequence[int]]] = {}
    for name, by_layer in neurons.items():
        checked: dict[int | None, Sequence[int]] = {}
        for layer, chosen in by_layer.items():
            (number,) = indices(layer, bridge.cfg.n_layers, f"layers of the group {name!r}")
            if number not in site.specs:
                raise InputError(f"The group {name!r} has neurons in layer {number}, which layers= leaves out.")
            if number in checked:
                raise InputError(f"The group {name!r} names layer {number} twice.")
            if len(chosen):
                of = f"neurons of the group {name!r} in layer {number}"
                checked[number] = indices([int(neuron) for neuron in chosen], n_neurons, of)
        groups[str(name)] = checked
    return groups


def about_run(bridge: TransformerBridge, analysis: str, **more: Attribute) -> dict[str, Attribute]:
    """What every result says of itself."""
    return {
        "analysis": analysis,
        "model": bridge.cfg.model_name,
        "dtype": str(bridge.dtype).removeprefix("torch."),
        **more,
    }
