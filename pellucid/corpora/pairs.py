"""Pairs of prompts: in each row a clean prompt, its corrupted counterpart, and the tokens between which the model decides.

A table, no model: texts (or token ids) and words. What tokens they are, and whether the two prompts of a row have as many,
is found out where a model reads them.

As CSV a column of texts is written as it is. A column of anything else (token ids, sets of words, numbers) is written as
JSON, and its name ends in ``:json``, so that a file says what it holds.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pellucid.arguments import check_kind, check_list, check_path, check_text
from pellucid.errors import InputError
from pellucid.storage.json_text import to_line
from pellucid.storage.whole_files import whole_file
from pellucid.tables import BriefFields

if TYPE_CHECKING:
    import pandas as pd

Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids."""

Word: TypeAlias = str | int
"""A token by its text or its id."""

Words: TypeAlias = Word | Sequence[Word]
"""A token, or a set of tokens."""

OWN = ("clean", "corrupted", "answer", "foil")
"""The columns that are no labels."""

AS_JSON = ":json"
"""The end of a CSV column's name whose cells are JSON."""


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs(BriefFields):
    """Pairs of prompts.

    Attributes:
        clean: prompts on which the model does what is studied.
        corrupted: their counterparts.
        answer: of each row, the token that is right after the clean prompt, or the set of tokens that are; ``None`` where
            the metric needs none.
        foil: of each row, the token, or the set of tokens, that it is compared with.
        name: what the pairs are called in results.
        labels: further columns, ``{name: one value a row}``: template, subject, ...

    Raises:
        InputError: no rows, or columns of different lengths; a prompt or a word that is none; a label by the name of another
            column.
    """

    clean: Sequence[Prompt]
    corrupted: Sequence[Prompt]
    answer: Sequence[Words] | None = None
    foil: Sequence[Words] | None = None
    name: str = "pairs"
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_text("PromptPairs: name", self.name)
        for label in check_kind("PromptPairs: labels", self.labels, Mapping, "a mapping from names to columns"):
            if check_text("a name of labels", label) in OWN or label.endswith(AS_JSON):
                raise InputError(f"PromptPairs: a label cannot be called {label!r}.")
        for name, column in self.columns().items():
            check_list(name, column, "one for each row")
            if not isinstance(column, Sequence):
                raise InputError(f"PromptPairs: {name} is a list; found {type(column).__name__}. Give list(...) of it.")
            if len(column) != len(self.clean):
                raise InputError(f"PromptPairs: clean has {len(self.clean)} rows and {name} {len(column)}.")
        for name in ("clean", "corrupted"):
            for row, prompt in enumerate(self.columns()[name]):
                if not isinstance(prompt, str) and not _are(prompt, int):
                    raise InputError(f"PromptPairs: row {row} of {name} is text or token ids; found {prompt!r}.")
        if self.foil is not None and self.answer is None:
            raise InputError("PromptPairs: foil needs answer, with which it is compared.")
        for name, words in (("answer", self.answer), ("foil", self.foil)):
            for row, word in enumerate(words or ()):
                if not _are([word] if type(word) in (str, int) else word, str, int):
                    raise InputError(
                        f"PromptPairs: row {row} of {name} is a token, by its text or its id, or a list of tokens; found "
                        f"{word!r}."
                    )

    @property
    def has_sets(self) -> bool:
        """Whether any answer or foil is a set of tokens."""
        return any(type(word) not in (str, int) for words in (self.answer, self.foil) for word in words or ())

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
        own = dict(zip(OWN, (self.clean, self.corrupted, self.answer, self.foil), strict=True))
        return {name: column for name, column in own.items() if column is not None} | dict(self.labels)

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
        listed = check_list("rows", rows, "mappings of columns", empty=True)
        table = [dict(check_kind("a row", row, Mapping, "a mapping of columns")) for row in listed]
        if not table:
            raise InputError("PromptPairs: there are no rows.")
        for place, row in enumerate(table):
            lacking = [key for key in {**table[0], "clean": 0, "corrupted": 0} if key not in row]
            if lacking:
                raise InputError(
                    f"PromptPairs: row {place} has no {lacking[0]!r}; it has {', '.join(row) or 'nothing'}."
                )
        columns = {key: [row[key] for row in table] for key in table[0]}
        labels = {key: column for key, column in columns.items() if key not in OWN}
        return cls(**{key: column for key, column in columns.items() if key in OWN}, name=name, labels=labels)

    @classmethod
    def from_csv(cls, path: str | Path) -> PromptPairs:
        """A CSV file with a line of column names: ``clean, corrupted, answer, foil``; other columns are labels.

        A column whose name ends in ``:json`` holds JSON (see :meth:`to_csv`); all others are text as it stands.

        Raises:
            InputError: not such a file; a line with more or fewer cells than there are columns.
        """
        file = check_path("path", path)
        try:
            with open(file, newline="", encoding="utf-8") as text:
                lines = list(csv.reader(text, strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{file} cannot be read as a table of pairs: {error}") from None
        names, cells = (lines[0] if lines else []), [line for line in lines[1:] if line]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{file} has two columns {twice!r}.")
        rows = []
        for place, line in enumerate(cells):
            if len(line) != len(names):
                raise InputError(f"{file}: row {place} has {len(line)} cells, and there are {len(names)} columns.")
            try:
                rows.append(
                    {
                        name.removesuffix(AS_JSON): json.loads(cell) if name.endswith(AS_JSON) else cell
                        for name, cell in zip(names, line, strict=True)
                    }
                )
            except ValueError as error:
                raise InputError(f"{file}: row {place} has a cell that is no JSON: {error}") from None
        return cls.from_rows(rows, name=file.stem)

    def to_csv(self, path: str | Path) -> None:
        """Write a CSV file that :meth:`from_csv` reads as equal rows; the file is whole, or as it was before.

        Lists come back as lists. The name of the set is not in the file: it is the file's.

        Raises:
            InputError: a label that is no JSON.
            StorageFullError: no space is left.
        """
        file = check_path("path", path)
        names, columns = [], []
        for name, column in self.columns().items():
            texts = all(isinstance(value, str) for value in column)
            names.append(name if texts else name + AS_JSON)
            try:
                columns.append(list(column) if texts else [to_line(value) for value in column])
            except (TypeError, ValueError) as error:
                raise InputError(f"The label {name!r} cannot be written as JSON: {error}") from None
        with whole_file(file) as draft, open(draft, "w", encoding="utf-8", newline="") as text:
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(names)
            writer.writerows(zip(*columns, strict=True))

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas table with a line a row, which :meth:`from_dataframe` reads as equal rows."""
        import pandas

        return pandas.DataFrame(
            {name: pandas.Series(list(column), dtype=object) for name, column in self.columns().items()}
        )

    @classmethod
    def from_dataframe(cls, table: pd.DataFrame, name: str = "pairs") -> PromptPairs:
        """A pandas table with the columns of :meth:`from_rows`.

        Raises:
            InputError: no such table.
        """
        if not hasattr(table, "to_dict") or not hasattr(table, "columns"):
            raise InputError(f"table is a pandas DataFrame; found {type(table).__name__}.")
        return cls.from_rows(table.to_dict("records"), name)


def _are(values: Any, *kinds: type) -> bool:
    """Whether something is a list, with entries, of values of these very kinds."""
    return isinstance(values, list | tuple) and len(values) > 0 and all(type(value) in kinds for value in values)
