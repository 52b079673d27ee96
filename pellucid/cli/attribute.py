"""``pellucid attribute``: direct logit attribution of one prompt to a table, files and a picture.

The folder of ``--out`` gets two files. ``attribution.json`` is the whole document that ``--format json`` prints; its
``result`` is read back by ``pellucid.experiments.labelled.from_document``. ``attribution.csv`` has a line for each cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from rich.table import Table
from rich.text import Text

from pellucid.analysis.attribution import logit_attribution
from pellucid.cli.cells import write_cells
from pellucid.cli.files import ATTRIBUTE_FILES
from pellucid.cli.models import open_bridge, source_of
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.prompt import read_prompt
from pellucid.cli.terminal import results
from pellucid.cli.tokens import read_token
from pellucid.demo.predictions import Prediction, next_tokens
from pellucid.demo.prompts import PATCHING_PAIR
from pellucid.errors import InputError
from pellucid.experiments.labelled import to_document
from pellucid.storage.json_text import Json, write_json_file
from pellucid.token_text import token_label, token_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

JSON_FILE, CSV_FILE = ATTRIBUTE_FILES
TOKENS = {"pos": "token", "source": "source_token"}
"""For axes of positions, the coordinate that holds their tokens."""


@dataclass(frozen=True)
class AttributeRequest:
    """What to attribute, and where the result goes."""

    text: str | None
    answer: str | None
    foil: str | None
    by: str
    positions: str
    top_k: int
    check: int
    prepend_bos: bool | None
    out: Path | None
    picture: Path | None
    force: bool


@dataclass(frozen=True)
class Found:
    """Everything there is to show."""

    about: dict[str, Json]
    tokens: list[str]
    next_tokens: list[Prediction]
    result: xr.DataArray

    def sums(self) -> dict[str, float]:
        """``logit``, ``constant`` and ``remainder``, at the last position."""
        coords = self.result.coords
        return {name: float(np.atleast_1d(coords[name].values)[-1]) for name in ("logit", "constant", "remainder")}

    def place(self, dim: str, index: int) -> str:
        """A place of an axis as a person should see it."""
        value = self.result.coords[dim].values[index]
        if dim in TOKENS:
            return f"{value} {self.result.coords[TOKENS[dim]].values[index]}"
        letter = {"layer": "L", "head": "H"}.get(dim, "")
        return f"{letter}{value}"

    def strongest(self, count: int) -> list[dict[str, Json]]:
        """The cells of the largest attributions, those first."""
        values, dims = self.result.values, [str(dim) for dim in self.result.dims]
        found: list[dict[str, Json]] = []
        for cell in np.argsort(-np.abs(values).ravel(), kind="stable")[:count]:
            places = np.unravel_index(int(cell), values.shape)
            at: dict[str, Json] = {}
            for dim, place in zip(dims, places, strict=True):
                at[dim] = self.result.coords[dim].values[place].item()
                if dim in TOKENS:
                    at[TOKENS[dim]] = str(self.result.coords[TOKENS[dim]].values[place])
            found.append(at | {"value": float(values[places])})
        return found


def attribute_logit(choice: ModelChoice, request: AttributeRequest, format: Format) -> None:
    """Attribute, write the files, print.

    Raises:
        InputError: text that is missing, an answer that is not one token, a picture of too many axes.
        MissingExtraError: a picture is asked for and the extra ``plots`` is not installed.
        PellucidError: the model cannot be opened.
    """
    if request.picture is not None and request.by == "source" and request.positions == "all":
        raise InputError("A picture has up to three axes; --by source --positions all has four. Take --positions last.")
    text, typed_answer, typed_foil = _asked(choice, request)
    bridge = open_bridge(choice)
    tokens = bridge.to_tokens(text, prepend_bos=request.prepend_bos)
    with torch.no_grad():
        logits = bridge(tokens)[0, -1]
    answer = (
        int(logits.argmax()) if typed_answer is None else read_token(bridge.tokenizer, typed_answer, "--answer", logits)
    )
    foil = None if typed_foil is None else read_token(bridge.tokenizer, typed_foil, "--foil", logits)
    result = logit_attribution(
        bridge,
        tokens,
        answer,
        foil,
        by=request.by,  # type: ignore[arg-type]
        positions=request.positions,  # type: ignore[arg-type]
        top_k=request.top_k,
        check=request.check,
    )
    named = {"answer": answer} | ({} if foil is None else {"foil": foil})
    about: dict[str, Json] = {
        **source_of(choice),
        "dtype": str(bridge.dtype).removeprefix("torch."),
        **{name: {"id": token, "token": token_label(bridge.tokenizer, token)} for name, token in named.items()},
    }
    found = Found(
        about,
        token_labels(bridge.tokenizer, tokens[0].tolist()),
        next_tokens(bridge.tokenizer, logits, 3),
        result.assign_attrs(model=choice.name),
    )
    document = _document(found, request)
    written = _write(found, document, request)
    if format is Format.json:
        write_json(document)
    else:
        _print(found, request, written, format)


def _asked(choice: ModelChoice, request: AttributeRequest) -> tuple[str, str | None, str | None]:
    """Text, answer and foil; the embedded model has its own."""
    if request.text is None and choice.is_demo:
        if request.answer is None and request.foil is None:
            return PATCHING_PAIR.clean, PATCHING_PAIR.answer, PATCHING_PAIR.foil
        return PATCHING_PAIR.clean, request.answer, request.foil
    return read_prompt(request.text, None), request.answer, request.foil


# -- files -------------------------------------------------------------------------------------------------------------


def _document(found: Found, request: AttributeRequest) -> dict[str, Json]:
    return {
        **found.about,
        "tokens": found.tokens,
        "next_tokens": [asdict(token) for token in found.next_tokens],
        **found.sums(),
        "strongest": found.strongest(request.top_k),
        "result": to_document(found.result),
    }


def _write(found: Found, document: dict[str, Json], request: AttributeRequest) -> list[Path]:
    """Write what is asked for; the files that were written."""
    written = []
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        write_json_file(request.out / JSON_FILE, document)
        result = found.result
        write_cells(
            request.out / CSV_FILE,
            {str(dim): result.coords[dim].values.tolist() for dim in result.dims},
            {dim: (name, result.coords[name].values.tolist()) for dim, name in TOKENS.items() if dim in result.dims},
            {"attribution": result.values},
        )
        written += [request.out / JSON_FILE, request.out / CSV_FILE]
    if request.picture is not None:
        from pellucid.plots import save_picture

        save_picture(draw(found), request.picture, overwrite=request.force)
        written.append(request.picture)
    return written


def draw(found: Found) -> Figure:
    """Bars of one axis, a heat map of two, one for each place of the first of three."""
    from pellucid.plots import bars, heat_map

    result = found.result
    title = f"{str(result.name).capitalize()}: {_answer(found)}"
    subtitle = "".join(found.tokens)
    labels = {dim: coord for dim, coord in TOKENS.items() if dim in result.dims}
    if result.ndim == 1:
        return bars(result, title=title, unit="logits", subtitle=subtitle, labels=labels)
    facet = str(result.dims[0]) if result.ndim == 3 else None
    return heat_map(result, title=title, unit="logits", subtitle=subtitle, facet=facet, labels=labels)


def _answer(found: Found) -> str:
    attrs = found.result.attrs
    less = f" less {attrs['foil'][0]}" if "foil" in attrs else ""
    return f"{attrs['answer'][0]}{less}"


# -- the terminal ------------------------------------------------------------------------------------------------------


def _print(found: Found, request: AttributeRequest, written: Sequence[Path], format: Format) -> None:
    console, attrs = results(format), found.result.attrs
    console.print(Text.assemble(("prompt ", "bold"), " ".join(found.tokens)))
    best = "  ".join(f"{token.token} {token.probability:.0%}" for token in found.next_tokens)
    console.print(Text(f"next   {best}", "dim"))
    console.print()
    sums = found.sums()
    said = (
        f"{str(found.result.name).removesuffix(' attribution')} {sums['logit']:+.3f}; constant {sums['constant']:+.3f}"
    )
    if request.by != "component":
        said += f"; all other parts {sums['remainder']:+.3f}"
    console.print(Text.assemble((f"{_answer(found)}: ", "bold"), said))
    console.print()
    console.print(_strongest(found, request.top_k))
    if request.check:
        console.print()
        console.print(
            Text(
                f"Measured: {len(attrs['checked'])} parts taken away from what the final norm reads, its scale kept; the "
                f"largest disagreement is {attrs['disagreement']:.1e}.",
                "dim",
            )
        )
        console.print(_measured(found))
    console.print()
    if written:
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    else:
        console.print("Next: --by head, --out FOLDER for the numbers, --picture FILE.html for a picture")


def _strongest(found: Found, count: int) -> Table:
    dims = [str(dim) for dim in found.result.dims]
    made = table(*dims, "attribution", title="Largest", numbers=("attribution",))
    index = {dim: found.result.coords[dim].values.tolist() for dim in dims}
    for cell in found.strongest(count):
        places = [found.place(dim, index[dim].index(cell[dim])) for dim in dims]
        made.add_row(*places, f"{float(str(cell['value'])):+.3f}")
    return made


def _measured(found: Found) -> Table:
    attrs = found.result.attrs
    made = table("part", "attributed", "measured", numbers=("attributed", "measured"))
    for part, attributed, measured in zip(attrs["checked"], attrs["attributed"], attrs["measured"], strict=True):
        made.add_row(part, f"{attributed:+.3f}", f"{measured:+.3f}")
    return made
