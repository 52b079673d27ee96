"""``pellucid attribute --method atp|atp*|relp|ig``: attribution patching between two prompts, or over a table of pairs.

The folder of ``--out`` gets two files. ``attribution_patching.json`` is the whole document that ``--format json`` prints;
its ``result`` is read back by ``pellucid.analysis.labelled.data_set_from_document``. ``attribution_patching.csv`` has a line
for each cell. Until they are written it holds the state of the pass over pairs: the same command goes on from there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from rich.table import Table
from rich.text import Text

from pellucid.analysis.labelled import data_set_to_document
from pellucid.attribution import AttributionPatching
from pellucid.attribution.choices import TITLES
from pellucid.cli.cells import write_cells
from pellucid.cli.files import ATTRIBUTION_PATCHING_FILES, UNFINISHED_FOLDER
from pellucid.cli.models import open_bridge, source_of
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.pairs import TypedPairs
from pellucid.cli.terminal import results
from pellucid.errors import InputError
from pellucid.experiments.options import Method, SweepOptions
from pellucid.storage.json_text import Json, write_json_file

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

JSON_FILE, CSV_FILE = ATTRIBUTION_PATCHING_FILES
TOKENS = {"pos": "token", "key_pos": "key_token"}
MOST_AXES = 3


@dataclass(frozen=True)
class AttributionPatchingRequest:
    """What to attribute, and where the result goes."""

    method: Method
    pairs: TypedPairs
    site: str
    axes: tuple[str, ...] | None
    n_points: int
    check: int
    top_k: int
    prepend_bos: bool | None
    out: Path | None
    picture: Path | None
    agreement: Path | None
    force: bool


def attribute_patching(choice: ModelChoice, request: AttributionPatchingRequest, format: Format) -> None:
    """Attribute, patch some cells, write the files, print.

    Raises:
        InputError: prompts that are missing, an answer that is not one token, a picture of too many axes.
        MissingExtraError: a picture is asked for and the extra ``plots`` is not installed.
        PellucidError: the model cannot be opened; a site and a method that do not go together.
    """
    request.pairs.refuse(choice)
    bridge = open_bridge(choice)
    experiment = AttributionPatching(
        bridge,
        request.pairs.read(bridge),
        site=request.site,
        by=request.axes,
        method=request.method,
        n_points=request.n_points,
        check=request.check,
        options=SweepOptions(prepend_bos=request.prepend_bos),
    )
    unfinished = None if request.out is None else request.out / UNFINISHED_FOLDER
    found = experiment.run(checkpoint=unfinished)
    assert isinstance(found, xr.Dataset)
    found = found.assign_attrs(model=choice.name)
    if request.picture is not None and found.effect.ndim > MOST_AXES:
        raise InputError(
            f"A picture has up to three axes; --axes has {found.effect.ndim}. Leave one out, or take --out."
        )
    document: dict[str, Json] = {
        **source_of(choice),
        "dtype": str(bridge.dtype).removeprefix("torch."),
        "summary": found.attrs["summary"].splitlines(),
        "strongest": strongest(found, request.top_k),
        "result": data_set_to_document(found),
    }
    written = _write(found, document, request)
    if unfinished is not None:
        shutil.rmtree(unfinished)
    if format is Format.json:
        write_json(document)
    else:
        _print(found, request, written, format)


def strongest(found: xr.Dataset, count: int) -> list[dict[str, Json]]:
    """The cells of the largest effects, those first, with what patching measured where it was done."""
    effect = found.effect
    listed: list[dict[str, Json]] = []
    for cell in np.argsort(-np.abs(effect.values).ravel(), kind="stable")[:count]:
        places = np.unravel_index(int(cell), effect.shape)
        at: dict[str, Json] = {}
        for dim, place in zip(map(str, effect.dims), places, strict=True):
            at[dim] = effect.coords[dim].values[place].item()
            if dim in TOKENS:
                at[TOKENS[dim]] = str(effect.coords[TOKENS[dim]].values[place])
        at["effect"] = float(effect.values[places])
        if "patched" in found and math.isfinite(found.patched.values[places]):
            at["patched"] = float(found.patched.values[places])
        listed.append(at)
    return listed


# -- files -------------------------------------------------------------------------------------------------------------


def _write(found: xr.Dataset, document: dict[str, Json], request: AttributionPatchingRequest) -> list[Path]:
    written = []
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        write_json_file(request.out / JSON_FILE, document)
        dims = [str(dim) for dim in found.effect.dims]
        write_cells(
            request.out / CSV_FILE,
            {dim: found.coords[dim].values.tolist() for dim in dims},
            {dim: (name, found.coords[name].values.tolist()) for dim, name in TOKENS.items() if dim in dims},
            {name: found[name].values for name in ("effect", "standard_error", "patched") if name in found},
        )
        written += [request.out / JSON_FILE, request.out / CSV_FILE]
    if request.picture is not None:
        from pellucid.plots import save_picture

        save_picture(draw(found), request.picture, overwrite=request.force)
        written.append(request.picture)
    if request.agreement is not None:
        from pellucid.plots import agreement_map, save_picture

        save_picture(agreement_map(found), request.agreement, overwrite=request.force)
        written.append(request.agreement)
    return written


def draw(found: xr.Dataset) -> Figure:
    """The estimate, and beside it what patching measured, on one scale; of three axes the first has panels."""
    from pellucid.plots import bars, heat_map

    attrs, effect = found.attrs, found.effect
    name = TITLES[attrs["method"]]
    title = f"{name} of {attrs['site']}, {attrs['direction']}: {attrs['metric']}"
    subtitle = attrs["summary"].splitlines()[0]
    unit = (
        "share of clean less corrupted" if attrs["value"] == "normalized" else f"{attrs['metric']} ({attrs['units']})"
    )
    labels = {dim: coord for dim, coord in TOKENS.items() if dim in effect.dims}
    if effect.ndim == 3:
        return heat_map(effect, title=title, unit=unit, subtitle=subtitle, facet=str(effect.dims[0]), labels=labels)
    shown = {name: effect} | ({"patched": found.patched} if "patched" in found else {})
    if effect.ndim == 1:
        return bars(shown, title=title, unit=unit, subtitle=subtitle, labels=labels)
    return heat_map(shown, title=title, unit=unit, subtitle=subtitle, labels=labels)


# -- the terminal ------------------------------------------------------------------------------------------------------


def _print(found: xr.Dataset, request: AttributionPatchingRequest, written: Sequence[Path], format: Format) -> None:
    console, attrs = results(format), found.attrs
    for number, line in enumerate(attrs["summary"].splitlines()):
        console.print(Text(line, "bold" if number == 0 else ""))
    for name in ("clean", "corrupted"):
        if len(attrs.get(name, ())) == 1:
            console.print(Text(f"{name:<10} {attrs[name][0]}   {attrs['metric']} {attrs[f'{name}_metric']:.3f}", "dim"))
    console.print()
    console.print(_strongest(found, request.top_k))
    console.print()
    if written:
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    else:
        console.print("Next: --out FOLDER for the numbers, --picture FILE.html for a picture, --method ig for another")


def _strongest(found: xr.Dataset, count: int) -> Table:
    dims = [str(dim) for dim in found.effect.dims]
    made = table(*dims, "effect", "patched", title="Largest", numbers=("effect", "patched"))
    short = {"layer": "L", "head": "H", "kv_head": "H", "neuron": "N"}
    for cell in strongest(found, count):
        places = [
            f"{cell[dim]} {cell[TOKENS[dim]]}" if dim in TOKENS else f"{short.get(dim, '')}{cell[dim]}" for dim in dims
        ]
        measured = f"{float(str(cell['patched'])):+.3f}" if "patched" in cell else "-"
        made.add_row(*places, f"{float(str(cell['effect'])):+.3f}", measured)
    return made
