"""``pellucid circuit``: from pairs of prompts to the edges that carry a behaviour, their error and their faithfulness.

The folder of ``--out`` gets ``circuit.json`` (the document that ``--format json`` prints), ``circuit.safetensors`` (the
scores of every edge and pair, which :meth:`Circuit.load` reads), ``circuit.graphml`` and ``circuit.csv`` (its edges). Until
they are written it holds the state of the two passes, scores and curve: the same command goes on from there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from rich.text import Text

from pellucid.circuits.circuit import Circuit
from pellucid.circuits.curve import Faithfulness
from pellucid.circuits.edges import EdgeAttribution
from pellucid.circuits.ends import wiring_of
from pellucid.circuits.files import document_of
from pellucid.circuits.options import CurveChoices, EdgeChoices
from pellucid.circuits.scores import Stability
from pellucid.circuits.wiring import ARROW
from pellucid.cli.files import CIRCUIT_FILES, UNFINISHED_FOLDER
from pellucid.cli.models import open_bridge, source_of
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.pairs import TypedPairs
from pellucid.cli.terminal import results
from pellucid.errors import InputError
from pellucid.storage.json_text import Json, write_json_file

JSON_FILE, SCORES_FILE, GRAPH_FILE, CSV_FILE = CIRCUIT_FILES


@dataclass(frozen=True)
class CircuitRequest:
    """What to look for, and where the result goes."""

    pairs: TypedPairs
    edges: int
    prune: bool
    curve: bool
    top_k: int
    choices: EdgeChoices
    curve_choices: CurveChoices
    out: Path | None
    picture: Path | None
    force: bool


@dataclass(frozen=True)
class Found:
    """Everything there is to show."""

    circuit: Circuit
    stability: Stability | None
    curve: xr.Dataset | None
    document: dict[str, Json]


def find_circuit(choice: ModelChoice, request: CircuitRequest, format: Format) -> None:
    """Score every edge, keep the strongest, measure what they keep, write the files, print.

    Raises:
        InputError: arguments that are missing or contradict each other, pairs that cannot be read.
        GradientError: nothing flows back from the metric.
        UnsupportedModelError: the model's residual stream is not the sum of what its parts add.
        MissingExtraError: a picture is asked for and the extra ``plots`` is not installed.
        OtherJobError: the folder holds the state of another command.
        PellucidError: the model cannot be opened.
    """
    request.pairs.refuse(choice)
    bridge = open_bridge(choice)
    pairs = request.pairs.read(bridge)
    total = len(wiring_of(bridge))
    if request.edges > total:
        raise InputError(f"--edges is at most {total:,}, all edges of the model; found {request.edges:,}.")
    unfinished = None if request.out is None else request.out / UNFINISHED_FOLDER
    whole = EdgeAttribution(bridge, pairs, **vars(request.choices)).run(checkpoint=unfinished)
    top = whole.top(request.edges)
    stability = top.stability(seed=request.curve_choices.seed) if len(pairs) > 1 else None
    circuit = top.prune() if request.prune else top
    curve = None
    if request.curve:
        asked = vars(request.curve_choices) | {"direction": request.choices.direction}
        curve = Faithfulness(bridge, whole, pairs, **asked).run(checkpoint=unfinished)
    document: dict[str, Json] = {**source_of(choice), **document_of(circuit.dataset(stability))}
    if stability is not None:
        document["stability"] = {
            name: {"jaccard": overlap.mean, "low": overlap.low, "high": overlap.high}
            for name, overlap in (("resamples", stability.resamples), ("halves", stability.halves))
        }
    if curve is not None:
        document["faithfulness"] = _curve_document(curve)
    found = Found(circuit, stability, curve, document)
    written = _write(found, request)
    if unfinished is not None:
        shutil.rmtree(unfinished)
    if format is Format.json:
        write_json(document)
    else:
        _print(found, request, written, format)


def _curve_document(curve: xr.Dataset) -> dict[str, Any]:
    names = ("faithfulness", "low", "high", "random_faithfulness")
    columns: dict[str, Any] = {name: curve[name].values.tolist() for name in names}
    return {"size": curve["size"].values.tolist(), **columns, "about": dict(curve.attrs)}


def _write(found: Found, request: CircuitRequest) -> list[Path]:
    """Write what is asked for; the files that were written."""
    written: list[Path] = []
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        write_json_file(request.out / JSON_FILE, found.document)
        found.circuit.save(request.out / SCORES_FILE, overwrite=True)
        for name in (GRAPH_FILE, CSV_FILE):
            found.circuit.export(request.out / name, found.stability, overwrite=True)
        written += [request.out / name for name in CIRCUIT_FILES]
    if request.picture is not None:
        from pellucid.plots import circuit_diagram, save_picture

        save_picture(circuit_diagram(found.circuit.dataset()), request.picture, overwrite=request.force)
        written.append(request.picture)
    return written


def _print(found: Found, request: CircuitRequest, written: list[Path], format: Format) -> None:
    console, circuit, about = results(format), found.circuit, found.circuit.scores.about
    console.print(
        Text.assemble(
            (f"{len(circuit):,} of {len(circuit.wiring):,} edges", "bold"),
            f" by {about['method']}, {about['n_pairs']} pairs. A score is the {about['sign']} ({about['metric']}, "
            f"{about['units']}).",
        )
    )
    if found.stability is None:
        console.print(Text("One pair has no error: give a table of pairs, --pairs FILE.csv.", "dim"))
    else:
        resamples, halves = found.stability.resamples, found.stability.halves
        console.print(
            f"Drawn anew, the {found.stability.n} strongest share {resamples.mean:.2f} ({resamples.low:.2f} to "
            f"{resamples.high:.2f}) in Jaccard's measure; of two halves {halves.mean:.2f} ({halves.low:.2f} to "
            f"{halves.high:.2f})."
        )
    console.print()
    columns = ["edge", "score", "error", *(["in top"] if found.stability is not None else [])]
    made = table(*columns, title="Strongest", numbers=columns[1:])
    edges = circuit.dataset(found.stability)
    for place in range(min(request.top_k, len(circuit))):
        one = edges.isel(edge=place)
        row = [
            f"{one.sender.item()}{ARROW}{one.receiver.item()}",
            f"{float(one.score):+.3f}",
            _number(float(one.error)),
        ]
        made.add_row(*row, *([f"{float(one.in_top):.0%}"] if found.stability is not None else []))
    console.print(made)
    if found.curve is not None:
        console.print()
        console.print(_curve_table(found.curve))
        cpr, cmd = (f"{found.curve.attrs[name]:.3f}" for name in ("cpr", "cmd"))
        console.print(f"CPR {cpr}, CMD {cmd}: area under the curve, and between it and 1")
    console.print()
    if written:
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    else:
        console.print("Next: --curve for what the circuit keeps, --out FOLDER for everything, --picture FILE.html")


def _curve_table(curve: xr.Dataset) -> Any:
    columns = ["edges", "share", "kept", "95 % from", "to", *(["random"] if curve.sizes["random"] else [])]
    made = table(*columns, title="Faithfulness: all other edges patched", numbers=columns)
    for place in range(curve.sizes["size"]):
        one = curve.isel(size=place)
        row = [f"{int(one['size']):,}", f"{float(one.share):.1%}"]
        row += [_number(float(one[name])) for name in ("faithfulness", "low", "high")]
        row += [f"{float(one.random_faithfulness.mean()):.2f}"] if curve.sizes["random"] else []
        made.add_row(*row)
    return made


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"
