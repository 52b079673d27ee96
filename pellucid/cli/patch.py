"""``pellucid patch``: activation patching from two prompts to a table, files and a picture.

The folder of ``--out`` gets two files. ``patch.json`` is the whole document that ``--format json`` prints; its ``result``
is read back by ``pellucid.experiments.labelled.from_document``. ``patch.csv`` has a line for each cell, for spreadsheets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pellucid.cli.cells import write_cells
from pellucid.cli.files import PATCH_FILES
from pellucid.cli.models import open_bridge, source_of
from pellucid.cli.options import Format, MetricName, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.prompt import as_typed
from pellucid.cli.terminal import messages, results
from pellucid.cli.tokens import expected, read_token
from pellucid.demo.predictions import Prediction, next_tokens
from pellucid.demo.prompts import PATCHING_PAIR
from pellucid.errors import InputError
from pellucid.experiments.activation_patching import ActivationPatching
from pellucid.experiments.labelled import to_document
from pellucid.experiments.options import PatchingChoices, SweepOptions
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.json_text import Json, write_json_file
from pellucid.sweep import KLDivergence, LogitDifference, LogProbability, Metric, Probability
from pellucid.token_text import token_label

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

JSON_FILE, CSV_FILE = PATCH_FILES
WIDEST_GRID = 34
"""Columns of numbers that a table may have."""

READS_ANSWER = (MetricName.logit_difference, MetricName.log_probability, MetricName.probability)


@dataclass(frozen=True)
class PatchRequest:
    """What to patch, and where the result goes."""

    clean: str | None
    corrupted: str | None
    answer: str | None
    foil: str | None
    metric: MetricName
    choices: PatchingChoices
    options: SweepOptions
    out: Path | None
    picture: Path | None
    force: bool
    top_k: int
    plan: bool


@dataclass(frozen=True)
class Side:
    """One of the two prompts: its tokens as people see them, what the model expects after it, and its metric."""

    text: str
    tokens: tuple[str, ...]
    next_tokens: list[Prediction]
    metric: float


@dataclass(frozen=True)
class Found:
    """Everything there is to show."""

    about: dict[str, Json]
    clean: Side
    corrupted: Side
    result: xr.DataArray
    normal: float

    @property
    def whole(self) -> bool:
        """Whether it was not interrupted."""
        return bool(self.result.attrs["done"] == self.result.attrs["cells"])

    def labels(self, column: int) -> str:
        """A column's token; both where the prompts differ, the edited run's first."""
        base, source = self.corrupted.tokens[column], self.clean.tokens[column]
        if self.result.attrs["base_run"] == "clean":
            base, source = source, base
        return base if base == source else f"{base}←{source}"

    def strongest(self, count: int) -> list[dict[str, Json]]:
        """The cells that move the metric most, those first."""
        values = self.result.values
        moved = np.abs(values - self.normal).ravel()
        order = [int(i) for i in np.argsort(-np.where(np.isnan(moved), -1.0, moved), kind="stable")[:count]]
        found: list[dict[str, Json]] = []
        for cell in order:
            if math.isnan(moved[cell]):
                continue
            places = np.unravel_index(cell, values.shape)
            at: dict[str, Json] = {}
            for dim, place in zip(map(str, self.result.dims), places, strict=True):
                at[dim] = self.result.coords[dim].values[place].item()
                if dim in ("pos", "key_pos"):
                    at["token" if dim == "pos" else "key_token"] = self.labels(int(str(at[dim])))
            found.append(at | {"value": float(values[places])})
        return found


def patch_model(choice: ModelChoice, request: PatchRequest, format: Format) -> bool:
    """Patch, write the files, print.

    Returns:
        Whether it ran to its end; at an interrupt what was done is shown and written.

    Raises:
        InputError: arguments that are missing or contradict each other, prompts of different token counts, an answer that
            is not one token.
        HookNameError: no such site.
        MissingExtraError: a picture is asked for and the extra ``plots`` is not installed.
        PellucidError: the model cannot be opened.
    """
    prompts = _prompts(choice, request)
    bridge = open_bridge(choice)
    experiment = ActivationPatching(bridge, *prompts, metric=None, options=request.options, **vars(request.choices))
    if request.picture is not None and len(experiment.axes) > 3:
        raise InputError(
            f"A picture has up to three axes; --by has {len(experiment.axes)}. Leave one out, or take --out."
        )
    logits = experiment.last_logits()
    metric, named = _metric(bridge, choice, request, logits)
    experiment = experiment.with_metric(metric)
    if request.plan:
        _show_plan(experiment, format)
        return True
    messages().print(Text(str(experiment.plan()), "dim"))
    result = experiment.run(on_interrupt="return")
    sides = {
        name: Side(
            text,
            prompt.labels[0],
            next_tokens(bridge.tokenizer, logits[name][0], 3),
            float(metric(logits[name][:, None])),
        )
        for text, (name, prompt) in zip(prompts, experiment.prompts.items(), strict=True)
    }
    base = "corrupted" if request.choices.direction == "denoising" else "clean"
    normal = float(base == "clean") if request.choices.normalize else sides[base].metric
    about: dict[str, Json] = {
        **source_of(choice),
        "dtype": str(bridge.dtype).removeprefix("torch."),
        **named,
    }
    found = Found(about, sides["clean"], sides["corrupted"], result.assign_attrs(model=choice.name), normal)
    document = _document(found, request)
    written = _write(found, document, request)
    if format is Format.json:
        write_json(document)
    else:
        _print(found, request, written, format)
    return found.whole


# -- what is asked for -------------------------------------------------------------------------------------------------


def _prompts(choice: ModelChoice, request: PatchRequest) -> tuple[str, str]:
    """The clean and the corrupted prompt."""
    clean, corrupted = request.clean, request.corrupted
    if clean is None and corrupted is None and choice.is_demo:
        return PATCHING_PAIR.clean, PATCHING_PAIR.corrupted
    if clean is None or corrupted is None:
        missing = "--clean" if clean is None else "--corrupted"
        raise InputError(
            f"{missing} is missing. Give two prompts of as many tokens that differ in what you study, such as --clean 'The "
            "Eiffel Tower is in' --corrupted 'The Brandenburg Gate is in', and the next token of each: --answer, --foil."
        )
    for option, text in (("--clean", clean), ("--corrupted", corrupted)):
        if not text:
            raise InputError(f"{option} is empty: there is nothing to run.")
    typed = [
        as_typed(text, f"{option} is not UTF-8: set a UTF-8 locale.")
        for option, text in (("--clean", clean), ("--corrupted", corrupted))
    ]
    return typed[0], typed[1]


def _metric(
    bridge: TransformerBridge, choice: ModelChoice, request: PatchRequest, logits: Mapping[str, Tensor]
) -> tuple[Metric, dict[str, Json]]:
    """The metric, and the tokens it reads as the document names them."""
    if request.metric not in READS_ANSWER:
        _refuse_token(request.answer, "--answer", request.metric)
        _refuse_token(request.foil, "--foil", request.metric)
        return KLDivergence(logits["clean"]), {}
    typed_answer, typed_foil = request.answer, request.foil
    if choice.is_demo and request.clean is None and typed_answer is None and typed_foil is None:
        typed_answer, typed_foil = PATCHING_PAIR.answer, PATCHING_PAIR.foil
        if request.metric is not MetricName.logit_difference:
            typed_foil = None
    answer = _token(bridge, typed_answer, "--answer", "clean", logits["clean"][0])
    if request.metric is not MetricName.logit_difference:
        _refuse_token(typed_foil, "--foil", request.metric)
        metric = LogProbability(answer) if request.metric is MetricName.log_probability else Probability(answer)
        return metric, {"answer": _named(bridge, answer)}
    foil = _token(bridge, typed_foil, "--foil", "corrupted", logits["corrupted"][0])
    if answer == foil:
        raise InputError(f"--answer and --foil are the same token, {token_label(bridge.tokenizer, answer)}.")
    return LogitDifference(answer, foil), {"answer": _named(bridge, answer), "foil": _named(bridge, foil)}


def _named(bridge: TransformerBridge, token: int) -> dict[str, Json]:
    return {"id": token, "token": token_label(bridge.tokenizer, token)}


def _token(bridge: TransformerBridge, typed: str | None, option: str, prompt: str, logits: Tensor) -> int:
    if typed is None:
        raise InputError(
            f"{option} is missing: the token that is right after the {prompt} prompt. {expected(bridge.tokenizer, logits)}"
        )
    return read_token(bridge.tokenizer, typed, option, logits)


def _refuse_token(typed: str | None, option: str, metric: MetricName) -> None:
    if typed is not None:
        raise InputError(f"{option} has no meaning for --metric {metric.value}: leave it out.")


def _show_plan(experiment: ActivationPatching, format: Format) -> None:
    plan = experiment.plan()
    if format is Format.json:
        numbers: dict[str, Json] = {key: value for key, value in asdict(plan).items() if isinstance(value, int | str)}
        write_json(numbers | {"n_batches": len(plan.batches)})
    else:
        results(format).print(Text(str(plan)))


# -- files -------------------------------------------------------------------------------------------------------------


def _document(found: Found, request: PatchRequest) -> dict[str, Json]:
    return {
        **found.about,
        "clean": asdict(found.clean),
        "corrupted": asdict(found.corrupted),
        "complete": found.whole,
        "strongest": found.strongest(request.top_k),
        "result": to_document(found.result),
    }


def _write(found: Found, document: dict[str, Json], request: PatchRequest) -> list[Path]:
    """Write what is asked for; the files that were written."""
    written = []
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        write_json_file(request.out / JSON_FILE, document)
        result = found.result
        places = {str(dim): result.coords[dim].values.tolist() for dim in result.dims}
        tokens = {
            dim: (name, [found.labels(place) for place in places[dim]])
            for dim, name in (("pos", "token"), ("key_pos", "key_token"))
            if dim in places
        }
        write_cells(request.out / CSV_FILE, places, tokens, {"value": result.values})
        written += [request.out / JSON_FILE, request.out / CSV_FILE]
    if request.picture is not None:
        from pellucid.plots import save_picture

        if not bool(np.isnan(found.result.values).all()):  # else interrupted before there was anything to draw
            save_picture(draw(found), request.picture, overwrite=request.force)
            written.append(request.picture)
    return written


def draw(found: Found) -> Figure:
    """A heat map of two axes, one for each place of the first of three, bars of one."""
    from pellucid.plots import bars, heat_map

    result, attrs = found.result, found.result.attrs
    title = f"Patching {attrs['site']}, {attrs['direction']}: {attrs['metric']}"
    subtitle = f"clean: {attrs['clean'][0]}\ncorrupted: {attrs['corrupted'][0]}"
    unit = "0 corrupted, 1 clean" if attrs["value"] == "normalized" else f"{attrs['metric']} ({attrs['units']})"
    labels = {
        str(dim): [found.labels(column) for column in result.coords[dim].values.tolist()]
        for dim in result.dims
        if dim in ("pos", "key_pos")
    }
    if result.ndim == 1:
        return bars(result, title=title, unit=unit, subtitle=subtitle, labels=labels)
    facet = str(result.dims[0]) if result.ndim == 3 else None
    return heat_map(result, title=title, unit=unit, subtitle=subtitle, facet=facet, labels=labels, centre=found.normal)


# -- the terminal ------------------------------------------------------------------------------------------------------


def _print(found: Found, request: PatchRequest, written: Sequence[Path], format: Format) -> None:
    console, attrs = results(format), found.result.attrs
    for name, side, other in (
        ("clean", found.clean, found.corrupted),
        ("corrupted", found.corrupted, found.clean),
    ):
        console.print(_prompt(name, side, other, attrs["metric"]))
    console.print()
    into = f"{attrs['direction']}: the {'clean' if attrs['base_run'] == 'corrupted' else 'corrupted'} run's {attrs['site']}"
    scale = "0 is corrupted, 1 is clean" if attrs["value"] == "normalized" else f"unpatched {_three(found.normal)}"
    console.print(
        Text.assemble((f"{into} put into the {attrs['base_run']} run. ", "bold"), f"{attrs['metric']}; {scale}.")
    )
    if not found.whole:
        console.print(
            Text(
                f"Interrupted: {attrs['done']} of {attrs['cells']} cells are done; the same command does all.",
                "bold red",
            )
        )
    grid = _grid(found)
    if grid is not None:
        console.print()
        console.print(grid)
    console.print()
    console.print(_strongest(found, request.top_k))
    console.print()
    if written:
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
    else:
        console.print("Next: --out FOLDER for the numbers, --picture FILE.html for a heat map, --site z for heads")


def _prompt(name: str, side: Side, other: Side, metric: str) -> Text:
    made = Text(f"{name:<10} ", "bold")
    for column, token in enumerate(side.tokens):
        made.append(token, "bold yellow" if token != other.tokens[column] else "")
        made.append(" ")
    best = "  ".join(f"{token.token} {token.probability:.0%}" for token in side.next_tokens)
    made.append(f"\n{'':<11}{metric} {_three(side.metric)}; next: {best}", "dim")
    return made


def _grid(found: Found) -> Table | None:
    """A table of two axes, positions down; ``None`` for other results and for one that is too wide."""
    result = found.result
    if result.ndim != 2:
        return None
    down, along = (str(dim) for dim in result.dims)
    if along == "pos":
        down, along = along, down
    numbers = result.transpose(down, along)
    if numbers.sizes[along] > WIDEST_GRID:
        return None
    columns = [_place(found, along, place) for place in numbers.coords[along].values.tolist()]
    keys = [f"{column} " if columns.count(column) > 1 else column for column in columns]
    made = table(down, *keys, numbers=keys)
    farthest = float(np.nanmax(np.abs(numbers.values - found.normal), initial=0.0))
    for place, row in zip(numbers.coords[down].values.tolist(), numbers.values.tolist(), strict=True):
        made.add_row(_place(found, down, place), *(_cell(value, found.normal, farthest) for value in row))
    return made


def _cell(value: float, normal: float, farthest: float) -> Text:
    if math.isnan(value):
        return Text("-", "dim")
    moved = abs(value - normal)
    return Text(_two(value), "bold" if moved >= 0.5 * farthest > 0 else "dim" if moved < 0.1 * farthest else "")


def _place(found: Found, dim: str, place: Any) -> str:
    short = {"layer": "L", "head": "H", "neuron": "N"}
    if dim in ("pos", "key_pos"):
        return f"{place} {found.labels(place)}"
    return f"{short[dim]}{place}" if dim in short else str(place)


def _strongest(found: Found, count: int) -> Table:
    dims = [str(dim) for dim in found.result.dims]
    made = table(*dims, "value", "change", title="Strongest", numbers=("value", "change"))
    for cell in found.strongest(count):
        value = float(str(cell["value"]))
        places = [_place(found, dim, cell[dim]) for dim in dims]
        made.add_row(*places, _three(value), f"{round(value - found.normal, 3) + 0.0:+.3f}")
    return made


def _two(value: float) -> str:
    """Two decimals, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _three(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"
