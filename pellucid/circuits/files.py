"""Circuits as files: one safetensors file that holds everything, and tables and graphs for other programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
import xarray as xr

from pellucid.arguments import check_path
from pellucid.circuits.scores import EdgeScores
from pellucid.circuits.wiring import Wiring
from pellucid.errors import InputError, StoreError
from pellucid.storage.json_text import finite, to_json, to_line
from pellucid.storage.safetensors_files import read_safetensors, write_safetensors
from pellucid.storage.whole_files import whole_file

FORMAT = "pellucid circuit 1"


def save(path: str | os.PathLike[str], scores: EdgeScores, chosen: np.ndarray, overwrite: bool) -> Path:
    """See :meth:`pellucid.circuits.circuit.Circuit.save`."""
    place = check_file(path, (".safetensors",), overwrite)
    tensors = {
        "values": torch.from_numpy(np.ascontiguousarray(scores.values)),
        "sizes": torch.from_numpy(np.asarray(scores.sizes, dtype=np.int64)),
        "chosen": torch.from_numpy(np.asarray(chosen, dtype=np.int64)),
    }
    about = {"format": FORMAT, "wiring": scores.wiring.about(), "about": finite(dict(scores.about))}
    write_safetensors(place, tensors, to_line(about))
    return place


def load(path: str | os.PathLike[str]) -> tuple[EdgeScores, np.ndarray]:
    """See :meth:`pellucid.circuits.circuit.Circuit.load`.

    Raises:
        StoreError: missing, damaged, or no circuit.
    """
    place = check_path("path", path).expanduser()
    tensors, about = read_safetensors(place)
    if not isinstance(about, Mapping) or about.get("format") != FORMAT:
        raise StoreError(f"{place.name} is no saved circuit: its metadata has no {FORMAT!r}.")
    try:
        wiring = Wiring(**about["wiring"])
        values, sizes, chosen = (tensors[name].numpy() for name in ("values", "sizes", "chosen"))
        fits = values.shape == (len(sizes), len(wiring)) and len(chosen) <= len(wiring)
        if not fits or (len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(wiring)):
            raise ValueError("its tensors do not fit its edges")
        return EdgeScores(wiring, values, sizes, dict(about["about"])), chosen
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{place.name} is damaged: {error}.") from error


def check_file(path: str | os.PathLike[str], endings: Sequence[str], overwrite: bool) -> Path:
    """The path of a file that may be written.

    Raises:
        InputError: another ending, no such folder, or a file that is there already.
    """
    place = check_path("path", path).expanduser().resolve()
    if place.suffix.lower() not in endings:
        raise InputError(f"path: the file's name ends in {', '.join(endings)}; found {place.name!r}.")
    if place.exists() and not overwrite:
        raise InputError(f"{path} exists: give another path, or overwrite=True.")
    if not place.parent.is_dir():
        raise InputError(f"There is no folder {place.parent}: make it first, or give another path.")
    return place


def document_of(edges: xr.Dataset) -> dict[str, Any]:
    """The labelled edges as JSON has them: one object an edge, and what made them."""
    columns = {str(name): edges[name].values.tolist() for name in [*edges.coords, *edges.data_vars]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"about": finite(dict(edges.attrs)), "edges": finite(rows)}


def export(path: str | os.PathLike[str], edges: xr.Dataset, graph: nx.DiGraph, overwrite: bool) -> Path:
    """See :meth:`pellucid.circuits.circuit.Circuit.export`."""
    writers: dict[str, Callable[[], str]] = {
        ".json": lambda: to_json(document_of(edges)),
        ".graphml": lambda: "\n".join(nx.generate_graphml(graph)) + "\n",
        ".csv": lambda: edges.to_dataframe().to_csv(index=False),
    }
    place = check_file(path, list(writers), overwrite)
    with whole_file(place) as draft:
        draft.write_text(writers[place.suffix.lower()](), "utf-8")
    return place
