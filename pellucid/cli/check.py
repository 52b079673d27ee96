"""``pellucid check``: the self-check as a table. What does not hold is shown line by line; what holds, kind by kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pellucid.cli.models import open_bridge, read_hook_index, source_of
from pellucid.cli.options import Format, ModelChoice
from pellucid.cli.output import table, write_json
from pellucid.cli.terminal import results
from pellucid.errors import InputError
from pellucid.model_bridge.verification.check_report import MOVES, CheckReport, CheckResult
from pellucid.storage.json_text import Json, write_json_file
from pellucid.tables import ranges

_LAYER = re.compile(r"\b(blocks\.|layer )(\d+)")


def check_model(choice: ModelChoice, layers: list[int] | None, format: Format, verbose: bool, out: Path | None) -> bool:
    """Check a model and print the report.

    Returns:
        Whether everything holds.

    Raises:
        InputError: a layer that does not exist.
        PellucidError: the model cannot be opened.
    """
    n_layers = read_hook_index(choice).n_layers
    wrong = [layer for layer in layers or () if not 0 <= layer < n_layers]
    if wrong:
        raise InputError(f"{choice.name} has layers 0 to {n_layers - 1}; --layers asks for {wrong[0]}.")
    report = open_bridge(choice).verify(layers=layers)
    document = _document(choice, report)
    if out is not None:
        write_json_file(out, document)
    if format is Format.json:
        write_json(document)
    else:
        _print(choice, report, format, verbose)
    return report.ok


def _document(choice: ModelChoice, report: CheckReport) -> Json:
    return {
        **source_of(choice),
        "dtype": report.dtype,
        "attn_implementation": choice.attention.value,
        "ok": report.ok,
        "checks": len(report.results),
        "failed": len(report.failed),
        "results": [asdict(result) for result in report.results],
    }


def _print(choice: ModelChoice, report: CheckReport, format: Format, verbose: bool) -> None:
    console = results(format)
    if verbose:
        console.print(_every_line(report.results))
    else:
        held = [result for result in report.results if result.held]
        console.print(
            _kinds(
                "Numbers: largest difference from what they should be",
                [kind for kind in summarise(held) if not kind.is_hook],
            )
        )
        console.print()
        console.print(
            _kinds(
                "Hooks: largest difference from Hugging Face, smallest effect of an edit",
                [kind for kind in summarise(held) if kind.is_hook],
            )
        )
    console.print()
    total, failed = len(report.results), report.failed
    if failed:
        console.print(_every_line(failed, title="What does not hold"))
        console.print()
        console.print(Text(f"{len(failed)} of {total} checks do not hold for {choice.name}.", "bold red"))
    else:
        console.print(Text(f"All {total} checks hold for {choice.name} ({report.dtype}).", "bold green"))


def _every_line(lines: Sequence[CheckResult], title: str | None = None) -> Table:
    made = table("", "check", "measured", "bound", "detail", title=title, numbers=("measured", "bound"))
    for result in lines:
        mark = Text("ok", "green") if result.held else Text("FAIL", "bold red")
        bound = f"> {result.bound:.3g}" if result.aspect == MOVES else f"{result.bound:.3g}"
        made.add_row(mark, result.name, f"{result.measured:.3g}", bound, "" if result.held else result.detail)
    return made


@dataclass
class Kind:
    """Checks that differ only in layer and, for a hook, in what is tried on it."""

    name: str
    is_hook: bool
    layers: set[int] = field(default_factory=set)
    count: int = 0
    difference: float = 0.0
    bound: float = 0.0
    moved: float | None = None

    def add(self, result: CheckResult, layer: int | None, aspect: str) -> None:
        """Count one check in: the largest difference from what it should be, the smallest effect of an edit."""
        self.count += 1
        if layer is not None:
            self.layers.add(layer)
        if aspect == MOVES:
            self.moved = result.measured if self.moved is None else min(self.moved, result.measured)
        else:
            self.difference, self.bound = max(self.difference, result.measured), max(self.bound, result.bound)


def summarise(lines: Sequence[CheckResult]) -> list[Kind]:
    """Gather checks by kind, in the order in which kinds first occur."""
    kinds: dict[tuple[str, bool], Kind] = {}
    for result in lines:
        subject, is_hook = result.hook or result.name, bool(result.hook)
        layer = _LAYER.search(subject)
        name = _LAYER.sub(r"\1*", subject).removeprefix("layer *: ")
        kind = kinds.setdefault((name, is_hook), Kind(name, is_hook))
        kind.add(result, int(layer[2]) if layer else None, result.aspect)
    return list(kinds.values())


def _kinds(title: str, kinds: Sequence[Kind]) -> Table:
    numbers = ("layers", "checks", "difference", "bound", "effect")
    columns = numbers if any(kind.moved is not None for kind in kinds) else numbers[:-1]
    made = table("that hold", *columns, title=title, numbers=numbers)
    for kind in kinds:
        cells = [kind.name, ranges(kind.layers), str(kind.count), f"{kind.difference:.2g}", f"{kind.bound:.2g}"]
        made.add_row(*cells, *([f"{kind.moved:.2g}"] if kind.moved is not None else []))
    return made
