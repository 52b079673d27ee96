"""Neuron lists that others have published, as lists of Pellucid's.

- RUCAIBox/Language-Specific-Neurons: ``*.neuron.pth``, language neurons of arXiv 2402.16438.
- kojima-takeshi188/lang_neuron and apple/ml-selfcond: ``expertise*.csv``, expert units of arXiv 2404.02431 and Suau et al.

Files are data to be checked: tensors are loaded with ``weights_only=True``, which runs no code.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.analysis.expert_neurons import VALUES, ExpertNeurons, Unit
from pellucid.analysis.linear_units import find_linear, linears_of, unit_places
from pellucid.analysis.neurons import Neuron
from pellucid.arguments import check_count, check_kind, check_path, check_text, check_texts
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import InputError
from pellucid.model_bridge.family import Family
from pellucid.model_bridge.supported_architectures.bloom import BLOOM

BLOOM_LANGUAGES = ("en", "zh", "fr", "es", "vi", "id")
"""Order of the languages in the published ``BLOOM-7B.neuron.pth``; the file itself does not say it."""


def read_language_neurons(
    path: str | os.PathLike[str],
    languages: Sequence[str],
    *,
    n_layers: int | None = None,
    d_mlp: int | None = None,
) -> dict[str, tuple[Neuron, ...]]:
    """Neurons of a published ``*.neuron.pth``: a list by language of a list by layer of ``[neuron]`` int64 tensors.

    Args:
        path: the file.
        languages: labels in the file's order, which it does not hold; for the published BLOOM file
            :data:`BLOOM_LANGUAGES`.
        n_layers: layers that the model has, to be checked.
        d_mlp: neurons of a layer, to be checked.

    Returns:
        by language, (layer, neuron) pairs, sorted.

    Raises:
        InputError: a file that is damaged or holds anything but such lists; another number of languages or layers; neurons
            outside the model, or listed twice.
        OSError: it cannot be read.
    """
    name = os.fspath(check_path("path", path))
    languages = check_texts("languages", languages)
    for argument, value in (("n_layers", n_layers), ("d_mlp", d_mlp)):
        if value is not None:
            check_count(argument, value)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {name}.")
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for one reason: not a file of plain tensors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name} holds more than tensors in lists, or is damaged, and is not loaded ({reason}). Neuron files are lists "
            "by language of lists by layer of tensors."
        ) from error
    expected = "a list by language of lists by layer of [neuron] int64 tensors"
    if not isinstance(held, list) or not all(isinstance(by_layer, list) for by_layer in held):
        raise InputError(f"{name} holds a {type(held).__name__}; a neuron file is {expected}.")
    if len(held) != len(languages) or len(set(languages)) < len(languages):
        raise InputError(
            f"{name} has neurons of {len(held)} languages; give that many different labels, in the file's order. Found "
            f"{list(languages)}."
        )
    layers = {len(by_layer) for by_layer in held}
    if len(layers) > 1 or (n_layers is not None and layers != {n_layers}):
        wanted = "the same number for all" if n_layers is None else f"{n_layers}, as the model has"
        raise InputError(f"{name} has lists of {sorted(layers)} layers; expected {wanted}.")
    return {
        language: _by_layer(by_layer, f"{name}, language {language!r}", d_mlp, expected)
        for language, by_layer in zip(languages, held, strict=True)
    }


def _by_layer(by_layer: Sequence[Any], where: str, d_mlp: int | None, expected: str) -> tuple[Neuron, ...]:
    found: list[Neuron] = []
    for layer, indices in enumerate(by_layer):
        if not isinstance(indices, Tensor) or indices.dim() != 1 or indices.dtype != torch.int64:
            shown = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
            raise InputError(f"{where}, layer {layer} holds {shown}; a neuron file is {expected}.")
        listed = sorted(indices.tolist())
        if len(set(listed)) < len(listed):
            raise InputError(f"{where}, layer {layer} lists a neuron twice.")
        if listed and (listed[0] < 0 or (d_mlp is not None and listed[-1] >= d_mlp)):
            wrong = listed[0] if listed[0] < 0 else listed[-1]
            top = "" if d_mlp is None else f", and the model has 0 to {d_mlp - 1}"
            raise InputError(f"{where}, layer {layer} lists neuron {wrong}{top}.")
        found += [(layer, index) for index in listed]
    return tuple(found)


def read_expertise(
    path: str | os.PathLike[str], cfg: TransformerBridgeConfig, label: str | None = None, family: Family = BLOOM
) -> ExpertNeurons:
    """Expert units of a published ``expertise*.csv``.

    Its columns are ``ap``, ``layer`` (``transformer.h.3.mlp.dense_h_to_4h``), ``unit`` (the output feature) and, where it
    was made for forcing, ``off_mean``, ``on_p50`` and ``on_p90``. Features of a fused projection (BLOOM's
    ``query_key_value``) become units of ``attn.hook_q``, ``attn.hook_k`` and ``attn.hook_v``.

    Args:
        path: the file.
        cfg: sizes of the model that the file is about (``bridge.cfg``).
        family: its family (``bridge.adapter.family``), whose modules the file names; by default BLOOM.
        label: what the units are experts for, by default the file's ``concept``.

    Returns:
        a table with one label; values that the file does not have are NaN.

    Raises:
        InputError: columns or numbers that are missing or wrong, with the line; units that the model does not have.
        OSError: it cannot be read.
    """
    name = os.fspath(check_path("path", path))
    check_kind("cfg", cfg, TransformerBridgeConfig, "a model's sizes, bridge.cfg")
    check_kind("family", family, Family, "a model's family, bridge.adapter.family")
    if label is not None:
        check_text("label", label)
    rows: list[tuple[Unit, dict[str, float]]] = []
    concepts: dict[str, None] = {}
    known: dict[str, list[tuple[str, int]]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in ("ap", "layer", "unit") if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{name} has no column {missing[0]!r}: it is no table of expertise.")
            for row in reader:
                rows.append(_expert(row, f"{name}, line {reader.line_num}", cfg, family, known))
                if row.get("concept"):
                    concepts[str(row["concept"])] = None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{name} is no CSV file in UTF-8: {error}") from error
    if not rows:
        raise InputError(f"{name} has no rows.")
    if label is None and len(concepts) != 1:
        raise InputError(f"{name} names {len(concepts)} concepts ({', '.join(concepts)}): give label=.")
    units = [unit for unit, _ in rows]
    if len(set(units)) < len(units):
        raise InputError(f"{name} lists a unit twice: {next(unit for unit in units if units.count(unit) > 1)}.")
    coords = {
        "label": [label if label is not None else next(iter(concepts))],
        "place": ("unit", [unit.place for unit in units]),
        "layer": ("unit", [unit.layer for unit in units]),
        "index": ("unit", [unit.index for unit in units]),
    }
    columns = {
        column: (("label", "unit"), np.array([[numbers[column] for _, numbers in rows]])) for column in ("ap", *VALUES)
    }
    return ExpertNeurons(xr.Dataset(columns, coords))


def _expert(
    row: dict[str, str],
    where: str,
    cfg: TransformerBridgeConfig,
    family: Family,
    known: dict[str, list[tuple[str, int]]],
) -> tuple[Unit, dict[str, float]]:
    linear = find_linear(family, row["layer"] or "")
    if linear is None:
        example = f"{family.blocks_path}.3.{family.mlp.inside(family.mlp.down)}"
        raise InputError(
            f"{where}: {row['layer']!r} is no linear layer of a {family.title}, such as {example}: it has "
            f"{', '.join(linears_of(family))}. Of another family, give family=bridge.adapter.family."
        )
    layer, module = linear
    try:
        feature = int(row["unit"])
        numbers = {column: float(row.get(column) or math.nan) for column in ("ap", *VALUES)}
    except ValueError as error:
        raise InputError(f"{where}: {error}.") from None
    if module not in known:
        known[module] = unit_places(family, cfg, module)
    width = len(known[module])
    if not 0 <= layer < cfg.n_layers or not 0 <= feature < width:
        raise InputError(
            f"{where}: the model has layers 0 to {cfg.n_layers - 1}, and {module} features 0 to {width - 1}; found layer "
            f"{layer}, unit {feature}."
        )
    if not 0 <= numbers["ap"] <= 1:
        raise InputError(f"{where}: an average precision is from 0 to 1; found {row['ap']!r}.")
    place, index = known[module][feature]
    return Unit(place, layer, index), numbers
