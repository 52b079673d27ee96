"""How an object looks in a REPL and in a notebook: a heading with a short table, or one line; never pages of numbers.

Text from outside is in it (labels, names of files, tokens): no character of that reaches a terminal which would obey it.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from html import escape
from typing import Any, ClassVar

MOST_ROWS = 40
"""Rows of a table that are shown; the rest is counted."""

WIDEST_CELL = 64
"""Characters of a cell that are shown."""

_LAYER = re.compile(r"\bblocks\.(\d+)\.")

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Terminal sequences begin with these (C0, DEL, C1); the last two ranges turn the direction of what follows."""


def visible(text: str) -> str:
    """Control characters as their escapes (``\\x1b``), line breaks and tabs apart."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True)
class Table:
    """A heading and rows of short texts under named columns."""

    heading: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def _shown(self) -> tuple[list[list[str]], str]:
        """The rows that are shown, and a line that counts the others."""
        shown = [[_cut(cell) for cell in row] for row in self.rows[:MOST_ROWS]]
        left = len(self.rows) - len(shown)
        return shown, f"... and {left} more" if left else ""

    def __str__(self) -> str:
        rows, more = self._shown()
        if not rows:
            return visible(self.heading)
        widths = [max(map(len, cells)) for cells in zip(self.columns, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [list(self.columns), *rows]
        ]
        return "\n".join([visible(self.heading), *(f"  {line}" for line in [*lines, *([more] if more else [])])])

    def html(self) -> str:
        """The same for a notebook, every text escaped."""
        rows, more = self._shown()
        heading = f"<div>{escape(self.heading)}</div>"
        if not rows:
            return heading
        head = "".join(f'<th style="text-align:left">{escape(column)}</th>' for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in row) + "</tr>"
            for row in rows
        )
        return f"{heading}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><div>{more}</div>"


def _cut(cell: str) -> str:
    cell = visible(cell)
    return cell if len(cell) <= WIDEST_CELL else cell[: WIDEST_CELL - 3] + "..."


def merge_layers(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows that begin with a hook name and differ in its layer alone become one, with the layers in a second column."""
    merged: dict[tuple[str, ...], set[int]] = {}
    for name, *rest in rows:
        layers = merged.setdefault((_LAYER.sub("blocks.*.", name), *rest), set())
        layers.update(int(layer) for layer in _LAYER.findall(name))
    return [(name, ranges(layers), *rest) for (name, *rest), layers in merged.items()]


def ranges(numbers: set[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    starts = [number for number in sorted(numbers) if number - 1 not in numbers]
    ends = [number for number in sorted(numbers) if number + 1 not in numbers]
    return ", ".join(f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


class NamesView(KeysView[str]):
    """The keys of a mapping from hook names, shown as a table of names."""

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        super().__init__(mapping)
        self._names = mapping

    def _table(self) -> Table:
        rows = merge_layers((name,) for name in self._names)
        return Table(f"{len(self._names)} names; list(...) gives them all", ("name", "layers"), rows)

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()


class _Brief(reprlib.Repr):
    """Tensors and arrays by dtype and shape, long sequences and texts by their beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = WIDEST_CELL

    def repr_Tensor(self, tensor: Any, level: int) -> str:
        return f"{tensor.dtype}{list(tensor.shape)}".removeprefix("torch.") if tensor.dim() else str(tensor.item())

    repr_Parameter = repr_Tensor  # noqa: N815 (reprlib asks by the type's name)

    def repr_ndarray(self, array: Any, level: int) -> str:
        return f"{array.dtype}{list(array.shape)}"

    def repr_instance(self, x: Any, level: int) -> str:
        """The first line of what an object says of itself: some of ours are tables."""
        first, _, rest = repr(x).partition("\n")
        return _cut(first + ("..." if rest else ""))


_brief = _Brief()


def brief(name: str, values: Mapping[str, Any]) -> str:
    """``Name(tokens=int64[2, 9], rows=[0, 1, 2, ...])``."""
    return f"{name}({', '.join(f'{key}={_brief.repr(value)}' for key, value in values.items())})"


class BriefFields:
    """Base of a dataclass that is shown in one line, its fields in short; declare it with ``repr=False``."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __repr__(self) -> str:
        return brief(
            type(self).__name__, {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
        )
