"""Results on standard output: tables for people, JSON for programs.

Nothing that is printed is read as markup: tokens such as ``[bold]`` or ``:smile:`` are text, whoever typed them. Styles
are given beside the text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pellucid.cli.options import Format
from pellucid.storage.json_text import Json, finite, to_json

PIPE_WIDTH = 240
"""Columns where nobody's window says how many: wide enough that no row is broken."""


class ResultConsole(Console):
    """A console whose reader may go away: that is raised, not turned into exit code 1, which says a check failed."""

    def on_broken_pipe(self) -> None:
        """Nobody reads on."""
        raise BrokenPipeError


def results(format: Format) -> ResultConsole:
    """Where tables go."""
    watched = sys.stdout.isatty() or "COLUMNS" in os.environ
    return ResultConsole(
        markup=False,
        emoji=False,
        highlight=False,
        force_terminal=True if format is Format.human else None,
        width=None if watched else PIPE_WIDTH,
    )


def table(*columns: str, title: str | None = None, numbers: Sequence[str] = ()) -> Table:
    """An empty table; the columns in ``numbers`` are aligned right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(
            column, justify="right" if column in numbers else "left", no_wrap=column in numbers, overflow="fold"
        )
    return made


def write_json(value: Json) -> None:
    """One JSON document on standard output; a number that is not finite is ``null``."""
    sys.stdout.write(to_json(finite(value), ascii_only="utf" not in (sys.stdout.encoding or "").lower()))
    sys.stdout.flush()
