"""``pellucid attribute --method atp|atp*|relp|ig``: attribution patching between two prompts, or over a table of pairs.

The folder of ``--out`` gets two files. ``attribution_patching.json`` is the whole document that ``--format json`` prints;
its ``result`` is read back by ``pellucid.analysis.labelled.data_set_from_document``. ``attribution_patching.csv`` has a line
for each cell.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from rich.table import Table
from rich.text import Text

from pellucid.analysis.labelled import data_set_to_document
from pellucid.attribution import AttributionPatching
from pellucid.attribution.choices import TITLES
from pellucid.cli.files import ATTRIBUTION_PATCHING_FILES
from pellucid.cli.models import open_bridge, source_of
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.prompt import as_typed
from pellucid.cli.terminal import results
from pellucid.cli.tokens import expected, read_token
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo.prompts import PATCHING_PAIR
from pellucid.errors import InputError
from pellucid.experiments.options import Method, SweepOptions
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json, write_json_file
from pellucid.storage.whole_files import whole_file

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

JSON_FILE, CSV_FILE = ATTRIBUTION_PATCHING_FILES
TOKENS = {"pos": "token", "key_pos": "key_token"}
MOST_AXES = 3


@dataclass(frozen=True)
class AttributionPatchingRequest:
    """What to attribute, and where the result goes."""

    method: Method
    clean: str | None
    corrupted: str | None
    answer: str | None
    foil: str | None
    pairs: Path | None
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
    typed = _typed(choice, request)
    bridge = open_bridge(choice)
    experiment = AttributionPatching(
        bridge,
        typed if isinstance(typed, PromptPairs) else _pair(bridge, *typed),
        site=request.site,
        by=request.axes,
        method=request.method,
        n_points=request.n_points,
        check=request.check,
        options=SweepOptions(prepend_bos=request.prepend_bos),
    )
    found = experiment.run()
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
    if format is Format.json:
        write_json(document)
    else:
        _print(found, request, written, format)


def _typed(
    choice: ModelChoice, request: AttributionPatchingRequest
) -> PromptPairs | tuple[str, str, str | None, str | None]:
    """The pairs of a table; or two prompts and the tokens as they were typed. The embedded model has its own."""
    given = (request.clean, request.corrupted, request.answer, request.foil)
    if request.pairs is not None:
        if any(each is not None for each in given):
            raise InputError("--pairs has prompts and answers: leave --clean, --corrupted, --answer and --foil out.")
        return PromptPairs.from_csv(request.pairs)
    if all(each is None for each in given) and choice.is_demo:
        return PATCHING_PAIR.clean, PATCHING_PAIR.corrupted, PATCHING_PAIR.answer, PATCHING_PAIR.foil
    typed = []
    for option, text in (("--clean", request.clean), ("--corrupted", request.corrupted)):
        if text is None:
            raise InputError(
                f"{option} is missing: give two prompts of as many tokens, or a table of them, --pairs FILE.csv."
            )
        if not text:
            raise InputError(f"{option} is empty: there is nothing to run.")
        typed.append(as_typed(text, f"{option} is not UTF-8: set a UTF-8 locale."))
    return typed[0], typed[1], request.answer, request.foil


def _pair(bridge: TransformerBridge, clean: str, corrupted: str, answer: str | None, foil: str | None) -> PromptPairs:
    logits = bridge(clean)[0, -1].detach()
    if answer is None:
        raise InputError(
            f"--answer is missing: the token that is right after the clean prompt. {expected(bridge.tokenizer, logits)}"
        )
    ids = [read_token(bridge.tokenizer, answer, "--answer", logits)]
    if foil is None:
        return PromptPairs([clean], [corrupted], ids, name="prompts")
    other = read_token(bridge.tokenizer, foil, "--foil", logits)
    if [other] == ids:
        raise InputError("--answer and --foil are the same token.")
    return PromptPairs([clean], [corrupted], ids, [other], name="prompts")


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
        with whole_file(request.out / CSV_FILE) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            _write_csv(found, csv.writer(file))
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


def _write_csv(found: xr.Dataset, writer: Any) -> None:
    """A line for each cell: its place on each axis, the token at a position, and each number, empty where there is none."""
    dims = [str(dim) for dim in found.effect.dims]
    columns = [name for name in ("effect", "standard_error", "patched") if name in found]
    writer.writerow([*(name for dim in dims for name in (dim, TOKENS.get(dim)) if name is not None), *columns])
    numbers = zip(*(found[name].values.ravel().tolist() for name in columns), strict=True)
    for cell, values in zip(itertools.product(*(range(found.sizes[dim]) for dim in dims)), numbers, strict=True):
        line: list[Any] = []
        for dim, place in zip(dims, cell, strict=True):
            line.append(found.coords[dim].values[place].item())
            line += [str(found.coords[TOKENS[dim]].values[place])] if dim in TOKENS else []
        writer.writerow([*line, *("" if math.isnan(value) else repr(value) for value in values)])


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
