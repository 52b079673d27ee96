"""What ``pellucid neurons`` leaves behind: tables (CSV, JSON), counts (safetensors), pictures (HTML), tables to read."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import xarray as xr
from rich.table import Table
from rich.text import Text

import pellucid
from pellucid.analysis.expert_neurons import ExpertNeurons
from pellucid.analysis.language_neurons import LanguageNeurons
from pellucid.analysis.perplexity import own_and_others
from pellucid.analysis.stopping import Look
from pellucid.cli.files import STUDY_FILES, STUDY_PICTURES
from pellucid.cli.mistakes import note
from pellucid.cli.options import Format
from pellucid.cli.output import table, write_json
from pellucid.cli.relevance_output import (
    Criteria,
    criteria_table,
    lines,
    looks_document,
    looks_line,
)
from pellucid.cli.terminal import results
from pellucid.errors import MissingExtraError
from pellucid.storage.json_text import Json, write_json_file
from pellucid.storage.whole_files import whole_file

Examples: TypeAlias = dict[tuple[str, int, int], list[tuple[float, str, str, str]]]
"""By language, layer and neuron: activation, text before, token, text after; largest first."""

(
    JSON_FILE,
    NEURONS_FILE,
    COUNTS_FILE,
    CHANGE_FILE,
    OVERLAP_FILE,
    LAYERS_FILE,
    EXAMPLES_FILE,
    EXPERTS_FILE,
    WRITTEN_FILE,
    RELEVANCE_FILE,
    CRITERIA_FILE,
) = STUDY_FILES[: -len(STUDY_PICTURES)]


@dataclass(frozen=True)
class Study:
    """Everything that was found."""

    model: str
    dtype: str
    context: int
    counted: Mapping[str, int]
    measured_on: str
    seed: int
    match: str
    found: LanguageNeurons
    change: xr.Dataset | None
    examples: Examples
    active_where: str
    looks: Sequence[Look]
    criteria: Criteria | None
    effects: xr.Dataset | None
    experts: ExpertNeurons | None
    experts_shown: int
    written: xr.DataArray | None

    def document(self) -> dict[str, Json]:
        """What was done and found, for JSON."""
        about: dict[str, Json] = {
            "pellucid": pellucid.__version__,
            "model": self.model,
            "dtype": self.dtype,
            "context": self.context,
            "tokens_counted": dict(self.counted),
            "measured_on": self.measured_on,
            "seed": self.seed,
            "match": self.match,
            **self.found.document(),
            "active_where": self.active_where,
            "interval": "Wilson, 95 %, tokens taken as independent",
            "overlap": self.found.overlap().values.tolist(),
            "by_layer": self.found.by_layer().values.tolist(),
        }
        if self.change is not None:
            about["change"] = {
                "unit": str(self.change.attrs["unit"]),
                "silenced": self.change.coords["silenced"].values.tolist(),
                "language": self.change.coords["language"].values.tolist(),
                "before": self.change["before"].values.tolist(),
                "tokens": self.change["tokens"].values.tolist(),
                "own": self.change["change"].values.tolist(),
                "random": self.change["random"].values.tolist(),
            }
            about["summary"] = [dict(line) for line in summary(self.change)]
        if self.looks:
            about["looks"] = looks_document(self.looks)
        if self.criteria is not None:
            about["criteria"] = self.criteria.document(self.effects)
        return about


def summary(change: xr.Dataset) -> list[dict[str, Json]]:
    """A line for each silenced language: what it does to its own text, to the others, and what random sets do to its own."""
    own = own_and_others(change["change"])
    control = own_and_others(change["random"])["own"] if change.sizes["set"] else None
    lines: list[dict[str, Json]] = []
    for language in change.coords["silenced"].values.tolist():
        line = own.sel(silenced=language)
        drawn = None if control is None else control.sel(silenced=language)
        lines.append(
            {
                "silenced": language,
                "neurons": int(change["size"].sel(silenced=language)),
                "before": float(change["before"].sel(language=language)),
                "own": float(line["own"]),
                "others": float(line["others"]),
                "largest_other": float(line["largest_other"]),
                "random": None if drawn is None else float(drawn.mean()),
                "largest_random": None if drawn is None else float(drawn.max()),
            }
        )
    return lines


# -- files -------------------------------------------------------------------------------------------------------------


def write_study(study: Study, out: Path) -> list[str]:
    """Write every table, and pictures where Plotly is installed. What an earlier run left and this one has not is removed.

    Returns:
        names of the pictures.
    """
    for name in STUDY_FILES:
        (out / name).unlink(missing_ok=True)
    study.found.save(out / COUNTS_FILE)
    _write_table(out / NEURONS_FILE, study.found.rows())
    _write_table(out / OVERLAP_FILE, _long(study.found.overlap(), "neurons"))
    _write_table(out / LAYERS_FILE, _long(study.found.by_layer(), "neurons"))
    if study.change is not None:
        _write_table(out / CHANGE_FILE, _changes(study.change))
    if study.examples:
        _write_table(out / EXAMPLES_FILE, _examples(study.examples))
    if study.experts is not None:
        _write_table(out / EXPERTS_FILE, _experts(study.experts, study.experts_shown))
    if study.criteria is not None:
        _write_table(out / RELEVANCE_FILE, study.criteria.rows(study.found))
        _write_table(out / CRITERIA_FILE, lines(study.criteria.table))
    if study.written is not None:
        _write_table(out / WRITTEN_FILE, _long(study.written, "text"))
    pictures = _draw(study, out)
    write_json_file(out / JSON_FILE, study.document())  # last: where it is, all is
    return pictures


def _draw(study: Study, out: Path) -> list[str]:
    from pellucid.plots import save_picture
    from pellucid.plots.extra import need
    from pellucid.plots.neurons import (
        change_picture,
        criteria_picture,
        layers_picture,
        neuron_examples_page,
        overlap_picture,
    )

    try:
        need("plotly")
    except MissingExtraError as error:
        note(f"no pictures: {error}")
        return []
    layers, overlap, change, examples, criteria = STUDY_PICTURES
    about = f"{study.model}; top_rate {study.found.top_rate:g}; {sum(study.counted.values()):,} tokens counted"
    made: dict[str, Any] = {
        layers: layers_picture(study.found.by_layer(), about),
        overlap: overlap_picture(study.found.overlap(), about),
    }
    if study.change is not None:
        tokens = int(study.change["tokens"].sum())
        made[change] = change_picture(study.change, f"{about}; {tokens:,} tokens measured: {study.measured_on}")
    if study.effects is not None:
        made[criteria] = criteria_picture(study.effects, f"{about}; {study.measured_on}")
    if study.examples:
        headings = {
            f"{language}: layer {layer}, neuron {neuron}": listed
            for (language, layer, neuron), listed in study.examples.items()
        }
        made[examples] = neuron_examples_page(headings, about)
    for name, picture in made.items():
        save_picture(picture, out / name, overwrite=True)
    return list(made)


def _write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    listed = list(rows)
    with whole_file(path) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
        if listed:
            writer = csv.DictWriter(file, fieldnames=list(listed[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(listed)


def _long(array: xr.DataArray, name: str) -> list[dict[str, Any]]:
    """A row for each number of a matrix."""
    first, second = (str(dim) for dim in array.dims)
    return [
        {
            first: one,
            second: other,
            name: array.values[row, column].item() if name != "text" else array.values[row, column],
        }
        for row, one in enumerate(array.coords[first].values.tolist())
        for column, other in enumerate(array.coords[second].values.tolist())
    ]


def _changes(change: xr.Dataset) -> list[dict[str, Any]]:
    rows = []
    kinds: list[tuple[str, int | None, xr.DataArray]] = [("language", None, change["change"])]
    kinds += [("random", int(number), change["random"].sel(set=number)) for number in change.coords["set"].values]
    for kind, number, matrix in kinds:
        for silenced in change.coords["silenced"].values.tolist():
            for language in change.coords["language"].values.tolist():
                rows.append(
                    {
                        "neurons": kind,
                        "set": "" if number is None else number,
                        "silenced": silenced,
                        "size": int(change["size"].sel(silenced=silenced)),
                        "language": language,
                        "tokens": int(change["tokens"].sel(language=language)),
                        "log_perplexity_before": float(change["before"].sel(language=language)),
                        "change": float(matrix.sel(silenced=silenced, language=language)),
                    }
                )
    return rows


def _examples(examples: Examples) -> list[dict[str, Any]]:
    return [
        {
            "language": language,
            "layer": layer,
            "neuron": neuron,
            "rank": rank,
            "activation": value,
            "before": before,
            "token": token,
            "after": after,
        }
        for (language, layer, neuron), listed in examples.items()
        for rank, (value, before, token, after) in enumerate(listed)
    ]


def _experts(experts: ExpertNeurons, shown: int) -> list[dict[str, Any]]:
    rows = []
    for label in experts.labels:
        columns = {(row["place"], row["layer"], row["index"]): row for row in experts.rows(label)}
        for unit in experts.best(label, shown, "both"):
            rows.append({"language": label, **columns[unit.place, unit.layer, unit.index]})
    return rows


# -- the terminal ------------------------------------------------------------------------------------------------------


def present(study: Study, format: Format, out: Path | None, pictures: Sequence[str]) -> None:
    """Print what was found."""
    if format is Format.json:
        write_json({**study.document(), "folder": None if out is None else str(out), "pictures": list(pictures)})
        return
    console = results(format)
    found = study.found
    console.print(
        Text(
            f"{len(found.selected)} of {found.n_layers} × {found.d_mlp} neurons selected (top rate {found.top_rate:g}), "
            f"{len(found.unassigned)} of no language, {len(found.dead)} of all never active.",
            "bold",
        )
    )
    console.print()
    console.print(_neurons(study))
    if study.change is not None:
        console.print()
        console.print(_silencing(study.change))
        tokens = int(study.change["tokens"].sum())
        console.print(
            f"Rise of the mean negative log-probability of a token, in nats; {tokens:,} tokens measured: "
            f"{study.measured_on}."
        )
    if study.criteria is not None:
        console.print()
        console.print(criteria_table(study.criteria, study.effects))
    if study.looks:
        console.print()
        console.print(looks_line(study.looks))
    if study.written is not None:
        console.print()
        console.print(_continuations(study.written))
    if out is not None:
        console.print()
        names = [name for name in STUDY_FILES if (out / name).exists()]
        console.print(Text(f"Written to {out}: {', '.join(names)}", "bold"))


def _neurons(study: Study) -> Table:
    numbers = ("neurons", "tokens counted")
    made = table("language", *numbers, "neurons in layers", numbers=numbers)
    layers = study.found.by_layer()
    for language, neurons in study.found.neurons.items():
        counts = layers.sel(language=language).values.tolist()
        where = ", ".join(f"{layer}: {count}" for layer, count in enumerate(counts) if count)
        made.add_row(str(language), str(len(neurons)), f"{study.counted[str(language)]:,}", where)
    return made


def _silencing(change: xr.Dataset) -> Table:
    languages = [str(language) for language in change.coords["language"].values.tolist()]
    numbers = (*languages, "own : others", "own : random")
    made = table("silenced", *numbers, title="Silencing the neurons of a language", numbers=numbers)
    for line in summary(change):
        row = change["change"].sel(silenced=line["silenced"]).values.tolist()
        shown = [f"{value:.3f}" for value in row]
        made.add_row(
            str(line["silenced"]), *shown, ratio(line["own"], line["others"]), ratio(line["own"], line["random"])
        )
    if change.sizes["set"]:
        mean = change["random"].mean("set")
        for language in change.coords["silenced"].values.tolist():
            shown = [f"{value:.3f}" for value in mean.sel(silenced=language).values.tolist()]
            made.add_row(f"random, as many as {language}", *shown, "", "", style="dim")
    return made


def ratio(one: Json, other: Json) -> str:
    """``own : others`` as a number; ``-`` where what it is divided by is not above 0."""
    if not isinstance(one, float) or not isinstance(other, float) or other <= 0:
        return "-"
    return f"{one / other:.1f}"


def _continuations(written: xr.DataArray) -> Table:
    made = table("silenced", "prompt", "continuation", title="What the model writes")
    for prompt in written.coords["prompt"].values.tolist():
        for silenced in written.coords["silenced"].values.tolist():
            text = str(written.sel(silenced=silenced, prompt=prompt).item())
            made.add_row(silenced, prompt, text.replace("\n", "⏎"))
    return made
