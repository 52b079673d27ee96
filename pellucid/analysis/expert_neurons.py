"""Expert neurons: units whose response to a document tells documents of one label from those of the others.

A unit's response is its mean over the tokens of a document (or its maximum), and its expertise the average precision of
that response as a classifier's score (Suau et al. 2022; for languages Kojima et al. 2024, arXiv 2404.02431). Units are
named by the hook they are at, so it is clear what was measured: that work takes neurons *before* GELU (``mlp.hook_pre``),
language neurons (:mod:`pellucid.analysis.language_neurons`) are taken after it (``mlp.hook_post``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Num
from torch import Tensor

from pellucid.analysis.neurons import NeuronChange, force, place_of, unit_shape
from pellucid.arguments import (
    check_choice,
    check_count,
    check_kind,
    check_list,
    check_mapping,
    check_number,
    check_text,
    check_texts,
)
from pellucid.conversion_utils.fused_qkv import fused_unit
from pellucid.errors import InputError
from pellucid.model_bridge.corpus.collected import Collected
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import layer_of, nearest
from pellucid.running_stats import AveragePrecision, average_precision

Which: TypeAlias = Literal["top", "bottom", "both"]
Value: TypeAlias = Literal["on_p50", "on_p90", "off_mean"]

PUBLISHED_PLACES = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_attn_out", "mlp.hook_pre", "hook_mlp_out")
"""Where the units of arXiv 2404.02431 are: the outputs of the four linear layers of each block of a BLOOM, or of another
model whose MLP has no gate and whose branches no norm follows; of any family: ``linear_units.published_places``."""

VALUES: tuple[Value, ...] = ("on_p50", "on_p90", "off_mean")


@dataclass(frozen=True, order=True)
class Unit:
    """One number of a block: a hook within it (``mlp.hook_pre``), the layer, and the index there.

    At places with heads the index is ``head * d_head + dim``.
    """

    place: str
    layer: int
    index: int


@dataclass(frozen=True, order=True)
class HeadUnit:
    """A unit of a place with heads."""

    place: str
    layer: int
    head: int
    dim: int


def unit_of_linear(module: str, layer: int, index: int, n_heads: int, d_head: int) -> Unit:
    """The unit that an output feature of a linear layer is, as published lists count them.

    ``query_key_value`` is fused: its features are queries, keys and values of one head after another. They become units of
    ``attn.hook_q``, ``attn.hook_k`` and ``attn.hook_v``.

    Args:
        module: ``self_attention.query_key_value``, ``self_attention.dense``, ``mlp.dense_h_to_4h`` or
            ``mlp.dense_4h_to_h``.
        layer: the block.
        index: the output feature.
        n_heads: heads of the model.
        d_head: features of a head.

    Raises:
        InputError: another module, or a feature that ``query_key_value`` does not have.
    """
    check_text("module", module)
    check_count("layer", layer, at_least=0)
    check_count("index", index, at_least=0)
    check_count("n_heads", n_heads)
    check_count("d_head", d_head)
    if module == "self_attention.query_key_value":
        part, head, dim = fused_unit(index, n_heads, d_head)
        return Unit(f"attn.hook_{part}", layer, head * d_head + dim)
    places = {
        "self_attention.dense": "hook_attn_out",
        "mlp.dense_h_to_4h": "mlp.hook_pre",
        "mlp.dense_4h_to_h": "hook_mlp_out",
    }
    if module not in places:
        near = ", ".join(nearest(module, ["self_attention.query_key_value", *places]))
        raise InputError(f"A block of BLOOM has no linear layer {module!r}. Nearest: {near}.")
    return Unit(places[module], layer, index)


def head_unit(unit: Unit, d_head: int) -> HeadUnit:
    """The head and the dimension of a unit of ``attn.hook_q``, ``attn.hook_k``, ``attn.hook_v`` or ``attn.hook_z``.

    Raises:
        InputError: a place without heads.
    """
    check_kind("unit", unit, Unit, "a Unit")
    check_count("d_head", d_head)
    if unit.place not in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"):
        raise InputError(f"{unit.place} has no heads: its units are counted by one index, {unit.index}.")
    return HeadUnit(unit.place, unit.layer, *divmod(unit.index, d_head))


class ExpertNeurons:
    """Expertise of units for labels, and the choice among them.

    Args:
        table: variables ``ap``, ``on_p50``, ``on_p90``, ``off_mean`` ``[label, unit]``, float64; coordinates ``place``,
            ``layer`` and ``index`` ``[unit]``, ``label``.
    """

    def __init__(self, table: xr.Dataset) -> None:
        check_kind("table", table, xr.Dataset, "an xarray.Dataset")
        missing = [name for name in ("ap", *VALUES) if name not in table.data_vars]
        missing += [name for name in ("label", "place", "layer", "index") if name not in table.coords]
        if missing:
            raise InputError(f"table is of expertise and has no {', '.join(missing)}.")
        self.table = table

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that units were tried on."""
        return tuple(self.table.coords["label"].values.tolist())

    @property
    def units(self) -> list[Unit]:
        """Every unit, in the order of the ``unit`` axis."""
        coords = (self.table.coords[name].values.tolist() for name in ("place", "layer", "index"))
        return [Unit(*entry) for entry in zip(*coords, strict=True)]

    def best(self, label: str, k: int, which: Which = "top") -> list[Unit]:
        """The units of highest average precision, of lowest, or ``k`` of each.

        Equal ones are taken in the order of the ``unit`` axis. The published choice is ``best(label, 1000, "both")``: a unit
        that is silent on a language alone tells it too.

        Raises:
            InputError: an unknown label, another ``which``, or more units than there are.
        """
        ap = self._of(label)["ap"].values
        parts = {"top": [-ap], "bottom": [ap], "both": [-ap, ap]}
        check_choice("which", which, tuple(parts))
        check_count("k", k)
        if k * len(parts[which]) > len(ap):
            raise InputError(f"There are {len(ap)} units; k={k} with which={which!r} asks for {k * len(parts[which])}.")
        units = self.units
        return [units[place] for part in parts[which] for place in np.argsort(part, kind="stable")[:k]]

    def values(self, label: str, units: Sequence[Unit], value: Value = "on_p50") -> list[float]:
        """What units are on documents of a label: their median, 90th percentile, or their mean on the other documents.

        Raises:
            InputError: an unknown label, unit or value.
        """
        check_choice("value", value, VALUES)
        units = _units(units)
        column = self._of(label)[value].values
        at = {unit: place for place, unit in enumerate(self.units)}
        unknown = [unit for unit in units if unit not in at]
        if unknown:
            raise InputError(f"The table has no {unknown[0]}, which units names.")
        return [float(column[at[unit]]) for unit in units]

    def forced(self, label: str, k: int, which: Which = "both", value: Value = "on_p50") -> list[NeuronChange]:
        """The published intervention: the best units held at their median on documents of the label.

        Returns:
            one change for each place, for :func:`~pellucid.analysis.neurons.changed`.
        """
        units = self.best(label, k, which)
        return force_units(units, self.values(label, units, value))

    def rows(self, label: str) -> list[dict[str, Any]]:
        """A row for each unit: place, layer, index, ap, on_p50, on_p90, off_mean; for tables and files."""
        one = self._of(label)
        columns = {name: one[name].values.tolist() for name in ("ap", *VALUES)}
        return [
            {**asdict(unit), **{name: column[place] for name, column in columns.items()}}
            for place, unit in enumerate(self.units)
        ]

    def _of(self, label: str) -> xr.Dataset:
        if check_text("label", label) not in self.labels:
            raise InputError(f"There is no label {label!r}. Nearest: {', '.join(nearest(label, self.labels))}.")
        return self.table.sel(label=label)

    def __repr__(self) -> str:
        places = ", ".join(dict.fromkeys(self.table.coords["place"].values.tolist()))
        return f"ExpertNeurons({', '.join(self.labels)}; {self.table.sizes['unit']} units at {places})"


def force_units(units: Sequence[Unit], values: float | Sequence[float]) -> list[NeuronChange]:
    """Hold units at values: one change for each place they are at.

    Raises:
        InputError: another number of values.
    """
    units = _units(units)
    if isinstance(values, Real):
        given = [check_number("values", values)] * len(units)
    else:
        numbers = check_list("values", values, "numbers", empty=True)
        given = [check_number("an entry of values", value) for value in numbers]
    if len(given) != len(units):
        raise InputError(f"There are {len(units)} units and {len(given)} values: give one value, or one for each.")
    by_place: dict[str, list[tuple[Unit, float]]] = {}
    for unit, value in zip(units, given, strict=True):
        by_place.setdefault(unit.place, []).append((unit, value))
    return [
        force([(unit.layer, unit.index) for unit, _ in listed], [value for _, value in listed], place)
        for place, listed in by_place.items()
    ]


def expertise(
    responses: Collected | Mapping[str, Mapping[str, Num[Tensor, "_ ..."]]],
    labels: Iterable[str] | None = None,
    statistic: str = "average_precision",
) -> ExpertNeurons:
    """Average precision of every unit for every label, from responses that were collected.

    Args:
        responses: what ``bridge.collect(corpus, {"blocks.*.mlp.hook_pre": [AveragePrecision()]})`` gives, over a corpus
            with one document a row; or by hook name (``blocks.3.mlp.hook_pre``) and label, ``[document, *units]``, pooled
            over the tokens of each document.
        labels: which to try, each against all others; by default all.
        statistic: of a collection: ``"average_precision"`` (pooled by mean) or ``"average_precision_max"``.

    Returns:
        average precision as scikit-learn has it (ties pass one threshold together), the median and 90th percentile over
        documents of the label (NumPy's linear interpolation), and the mean over the others.

    Raises:
        InputError: nothing to compare with, responses that do not fit one another, or that are not finite.
    """
    if isinstance(responses, Collected):
        names, known = [hook.spec.name for hook in responses.hooks], list(responses.labels)
    else:
        names = list(check_mapping("responses", responses, "hook names to responses by label, or is a collection"))
        for name in names:
            inner = check_mapping(f"responses[{name!r}]", responses[name], "labels to tensors [document, *units]")
            for label, found in inner.items():
                check_kind(f"responses[{name!r}][{label!r}]", found, Tensor, "a tensor [document, *units]")
        known = list(responses[names[0]]) if names else []
        if statistic != "average_precision":
            raise InputError(f"statistic={statistic!r} would have no effect: it is of a collection.")
    if not names:
        raise InputError("responses is empty: there is nothing to compare.")
    check_text("statistic", statistic)
    chosen = check_texts("labels", labels) if labels is not None else known
    unknown = [label for label in chosen if label not in known]
    if unknown or not chosen:
        raise InputError(
            f"There are responses of the labels {', '.join(known)}; labels asks for {unknown[:1] or 'none'}."
        )
    if len(known) < 2:
        raise InputError(f"Expertise tells documents of a label from others; there is only {known[0]!r}.")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("ap", *VALUES)}
    where: list[Unit] = []
    for name in names:
        flat = _responses_at(responses, name, known, statistic)
        layer = layer_of(name)
        width = flat[known[0]].shape[1]
        where += [Unit(name.removeprefix(f"blocks.{layer}."), layer, index) for index in range(width)]
        everything = torch.cat([flat[label] for label in known])
        which = [label for label in known for _ in range(len(flat[label]))]
        measured: dict[str, list[np.ndarray]] = {column: [] for column in columns}
        for label in chosen:
            positive = torch.tensor([other == label for other in which], device=everything.device)
            on = flat[label].double().cpu().numpy()
            measured["ap"].append(average_precision(everything, positive, what=name).cpu().numpy())
            measured["on_p50"].append(np.quantile(on, 0.5, axis=0))
            measured["on_p90"].append(np.quantile(on, 0.9, axis=0))
            measured["off_mean"].append(everything[~positive].double().mean(0).cpu().numpy())
        for column, rows in measured.items():
            columns[column].append(np.stack(rows))
    coords = {
        "label": chosen,
        "place": ("unit", [unit.place for unit in where]),
        "layer": ("unit", [unit.layer for unit in where]),
        "index": ("unit", [unit.index for unit in where]),
    }
    table = {name: (("label", "unit"), np.concatenate(parts, axis=1)) for name, parts in columns.items()}
    return ExpertNeurons(xr.Dataset(table, coords))


def _responses_at(
    responses: Collected | Mapping[str, Mapping[str, Tensor]], name: str, labels: Sequence[str], statistic: str
) -> dict[str, Tensor]:
    """By label, ``[document, unit]`` at one hook: one at a time, so that not all are held twice."""
    found: dict[str, Tensor] = {}
    for label in labels:
        if isinstance(responses, Collected):
            kept = responses.get(name, statistic, label)
            if not isinstance(kept, AveragePrecision):
                raise InputError(f"{statistic} at {name} keeps no responses of documents: collect AveragePrecision().")
            found[label] = kept.result().flatten(1)
        elif list(responses[name]) != list(labels):
            raise InputError(f"{name} has responses of {list(responses[name])}, and others of {list(labels)}.")
        else:
            found[label] = responses[name][label].flatten(1)
    return found


def check_units(bridge: TransformerBridge, units: Iterable[Unit]) -> None:
    """Refuse units that the model does not have.

    Raises:
        HookNameError: no such place.
        InputError: no such layer or index.
    """
    for place, listed in _by_place(units).items():
        width = int(np.prod(unit_shape(bridge, place_of(bridge, place))))
        for unit in listed:
            if not (0 <= unit.layer < bridge.cfg.n_layers and 0 <= unit.index < width):
                raise InputError(
                    f"There is no {unit}: {place} has layers 0 to {bridge.cfg.n_layers - 1} of units 0 to {width - 1}."
                )


def _units(units: Iterable[Unit]) -> list[Unit]:
    listed = check_list("units", units, "Units", empty=True)
    return [check_kind("an entry of units", unit, Unit, "a Unit") for unit in listed]


def _by_place(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(unit.place, []).append(unit)
    return found
