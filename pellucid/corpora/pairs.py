"""Pairs of prompts: in each row a clean prompt, its corrupted counterpart, and the tokens between which the model decides.

A table, no model: texts (or token ids) and words. What tokens they are, and whether the two prompts of a row have as many,
is found out where a model reads them.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from pellucid.arguments import check_kind, check_list, check_path
from pellucid.errors import InputError
from pellucid.storage.json_text import to_line
from pellucid.tables import BriefFields

Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids."""

Word: TypeAlias = str | int
"""A token by its text or its id."""


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs(BriefFields):
    """Pairs of prompts.

    Attributes:
        clean: prompts on which the model does what is studied.
        corrupted: their counterparts.
        answer: of each row, the token that is right after the clean prompt; ``None`` where the metric needs none.
        foil: of each row, the token that it is compared with.
        name: what the pairs are called in results.
        labels: further columns, ``{name: one value a row}``: template, subject, ...

    Raises:
        InputError: no rows, or columns of different lengths.
    """

    clean: Sequence[Prompt]
    corrupted: Sequence[Prompt]
    answer: Sequence[Word] | None = None
    foil: Sequence[Word] | None = None
    name: str = "pairs"
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in self.columns().items():
            check_list(name, column, "one for each row")
            if len(column) != len(self.clean):
                raise InputError(f"PromptPairs: clean has {len(self.clean)} rows and {name} {len(column)}.")
        for name in ("clean", "corrupted"):
            for row, prompt in enumerate(self.columns()[name]):
                if not isinstance(prompt, str) and not all(type(token) is int for token in prompt):
                    raise InputError(f"PromptPairs: row {row} of {name} is text or token ids; found {prompt!r}.")
        if self.foil is not None and self.answer is None:
            raise InputError("PromptPairs: foil needs answer, with which it is compared.")

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: slice | Sequence[int]) -> PromptPairs:
        """Some rows, in the order asked for."""
        chosen = range(len(self))[rows] if isinstance(rows, slice) else [range(len(self))[row] for row in rows]
        own = {name: [column[row] for row in chosen] for name, column in self.columns().items()}
        labels = {name: own.pop(name) for name in self.labels}
        return PromptPairs(**own, name=self.name, labels=labels)

    def columns(self) -> dict[str, Sequence[Any]]:
        """Every column that there is, by name."""
        own = {name: self._column(name) for name in ("clean", "corrupted", "answer", "foil")}
        return {name: column for name, column in own.items() if column is not None} | dict(self.labels)

    def _column(self, name: str) -> Sequence[Any] | None:
        return {"clean": self.clean, "corrupted": self.corrupted, "answer": self.answer, "foil": self.foil}[name]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each row by column."""
        columns = self.columns()
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))

    @property
    def content_hash(self) -> str:
        """SHA-256 of prompts, answers and foils."""
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(to_line({key: value for key, value in row.items() if key not in self.labels}).encode())
        return digest.hexdigest()

    # -- tables --------------------------------------------------------------------------------------------------------

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], name: str = "pairs") -> PromptPairs:
        """Rows ``{"clean": ..., "corrupted": ..., "answer": ..., "foil": ...}``; other columns are labels.

        Raises:
            InputError: no rows, or one without a column that the first has.
        """
        table = [dict(check_kind("a row", row, Mapping, "a mapping of columns")) for row in rows]
        if not table:
            raise InputError("PromptPairs: there are no rows.")
        for place, row in enumerate(table):
            lacking = [key for key in {**table[0], "clean": 0, "corrupted": 0} if key not in row]
            if lacking:
                raise InputError(
                    f"PromptPairs: row {place} has no {lacking[0]!r}; it has {', '.join(row) or 'nothing'}."
                )
        own = {each.name for each in fields(cls)} - {"name", "labels"}
        columns = {key: [row[key] for row in table] for key in table[0]}
        labels = {key: column for key, column in columns.items() if key not in own}
        return cls(**{key: column for key, column in columns.items() if key in own}, name=name, labels=labels)

    @classmethod
    def from_csv(cls, path: str | Path) -> PromptPairs:
        """A CSV file with a line of column names: ``clean, corrupted, answer, foil``; other columns are labels.

        Raises:
            InputError: not such a file.
        """
        file = check_path("path", path)
        try:
            with open(file, newline="", encoding="utf-8") as text:
                return cls.from_rows(csv.DictReader(text), name=file.stem)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{file} cannot be read as a table of pairs: {error}") from None
