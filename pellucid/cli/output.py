"""Results on standard output: tables for people, JSON for programs.

Styles are given beside the text, never in it: see :mod:`pellucid.cli.terminal`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from rich.table import Table

from pellucid.tables import CONTROL

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"


def table(*columns: str, title: str | None = None, numbers: Sequence[str] = ()) -> Table:
    """An empty table; the columns in ``numbers`` are aligned right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(
            column, justify="right" if column in numbers else "left", no_wrap=column in numbers, overflow="fold"
        )
    return made


def write_json(value: Json) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(to_json(value, ascii_only="utf" not in (sys.stdout.encoding or "").lower()) + "\n")
    sys.stdout.flush()


def to_json(value: Json, ascii_only: bool = False) -> str:
    """JSON that every reader takes: a number that is not finite is ``null``; control characters are escapes."""
    written = json.dumps(_finite(value), indent=1, ensure_ascii=ascii_only, allow_nan=False)
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


def _finite(value: Json) -> Json:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [_finite(entry) for entry in value]
    return value
