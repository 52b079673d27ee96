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

import torch
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
from pellucid.cli.prompt import as_typed
from pellucid.cli.terminal import results
from pellucid.cli.tokens import read_token
from pellucid.corpora.pairs import PromptPairs
from pellucid.demo.prompts import PATCHING_PAIR
from pellucid.errors import InputError
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json, write_json_file
from pellucid.token_text import token_label

JSON_FILE, SCORES_FILE, GRAPH_FILE, CSV_FILE = CIRCUIT_FILES


@dataclass(frozen=True)
class CircuitRequest:
    """What to look for, and where the result goes."""

    pairs: Path | None
    clean: str | None
    corrupted: str | None
    answer: str | None
    foil: str | None
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
    refuse_both(request)
    bridge = open_bridge(choice)
    pairs = _pairs(bridge, choice, request)
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


def refuse_both(request: CircuitRequest) -> None:
    """Refuse a table of pairs and one pair together, and one pair that is not whole.

    Raises:
        InputError: so it is.
    """
    one = {
        "--clean": request.clean,
        "--corrupted": request.corrupted,
        "--answer": request.answer,
        "--foil": request.foil,
    }
    given = [option for option, value in one.items() if value is not None]
    empty = [option for option, value in one.items() if value == ""]
    if empty:
        raise InputError(f"{empty[0]} is empty: there is nothing to run.")
    if request.pairs is not None and given:
        raise InputError(f"{given[0]} is of one pair, and --pairs is a table of them: give one or the other.")
    if given and len(given) < (3 if request.foil is None else 4):
        missing = next(option for option, value in one.items() if value is None)
        raise InputError(
            f"{missing} is missing. One pair has --clean and --corrupted, prompts of as many tokens, --answer and, to "
            "compare with, --foil, the next token of each."
        )


def _pairs(bridge: TransformerBridge, choice: ModelChoice, request: CircuitRequest) -> PromptPairs:
    if request.pairs is not None:
        return PromptPairs.from_csv(request.pairs)
    if request.clean is None:
        if not choice.is_demo:
            raise InputError(
                "Give --pairs FILE.csv, a table with the columns clean, corrupted, answer, foil; or one pair: --clean, "
                "--corrupted, --answer, --foil."
            )
        pair = PATCHING_PAIR
        return PromptPairs([pair.clean], [pair.corrupted], [pair.answer], [pair.foil], name="demo")
    prompts = [
        as_typed(str(text), f"{option} is not UTF-8: set a UTF-8 locale.")
        for option, text in (("--clean", request.clean), ("--corrupted", request.corrupted))
    ]
    with torch.no_grad():
        clean, corrupted = (bridge(text)[0, -1] for text in prompts)
    answer = read_token(bridge.tokenizer, str(request.answer), "--answer", clean)
    foil = None if request.foil is None else read_token(bridge.tokenizer, request.foil, "--foil", corrupted)
    if answer == foil:
        raise InputError(f"--answer and --foil are the same token, {token_label(bridge.tokenizer, answer)}.")
    return PromptPairs(prompts[:1], prompts[1:], [answer], None if foil is None else [foil], name="one pair")


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
