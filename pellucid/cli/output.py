"""Results on standard output: tables for people, JSON for programs.

Styles are given beside the text, never in it: see :mod:`pellucid.cli.terminal`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.table import Table

from pellucid.storage.json_text import Json, finite, to_json
from pellucid.tables import CONTROL


def table(*columns: str, title: str | None = None, numbers: Sequence[str] = ()) -> Table:
    """An empty table; the columns in ``numbers`` are aligned right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(
            column, justify="right" if column in numbers else "left", no_wrap=column in numbers, overflow="fold"
        )
    return made


def write_json(value: Json) -> None:
    """One JSON document on standard output; a number that is not finite is ``null``, a control character an escape."""
    written = to_json(finite(value), ascii_only="utf" not in (sys.stdout.encoding or "").lower())
    sys.stdout.write(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", written))
    sys.stdout.flush()
