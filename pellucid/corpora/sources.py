"""Where documents come from: files of text, JSON lines or Parquet, data sets, and lists in memory.

A source gives its documents in order, each with a *cursor*: a short list of integers (file, byte, line, ...) from which the
documents after it can be read again without reading what came before. Whatever cannot be read is refused with the file and
the place in it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import CorpusError, InputError, MissingExtraError
from pellucid.names import nearest
from pellucid.tables import brief

Document: TypeAlias = str | np.ndarray[Any, np.dtype[np.int64]]
"""The text of a document, or its token ids ``[pos]``."""

Cursor: TypeAlias = list[int]

DocumentRule = Literal["line", "paragraph", "file"]
"""What a document of a text file is: a line that is not blank, lines up to a blank one, or the whole file."""

LONGEST_DOCUMENT = 4 * 2**20
"""Default of the largest document in bytes of UTF-8: a tokenizer needs some hundred bytes for each of its bytes."""


class Source(ABC):
    """The documents of one label, in order."""

    start: Cursor
    """The cursor of the first document."""

    @abstractmethod
    def read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """Documents from ``cursor`` on, each with the cursor of the one after it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What kind of source it is and its settings, for people; its content is hashed, not described."""

    def __repr__(self) -> str:
        return brief(type(self).__name__, self.describe())

    def stamp(self) -> list[list[int]]:
        """Size and time of change (nanoseconds) of each file; empty where there are none."""
        return []


# -- files -------------------------------------------------------------------------------------------------------------


def as_paths(label: str, given: Any) -> list[Path]:
    """One path or several as files that exist.

    Raises:
        CorpusError: a file that is not there, or is empty.
        InputError: something that is no path.
    """
    entries = [given] if isinstance(given, str | Path) else list(given) if isinstance(given, Sequence) else [given]
    if not entries:
        raise InputError(f"The label {label!r} has no files: give a path or a list of paths.")
    paths = []
    for entry in entries:
        if not isinstance(entry, str | Path):
            raise InputError(f"The files of {label!r} are paths; found {type(entry).__name__}.")
        path = Path(entry)
        if not path.is_file():
            siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            near = nearest(path.name, siblings)
            hint = f" Nearest names there: {', '.join(near)}." if near else ""
            what = "is a folder" if path.is_dir() else "does not exist"
            raise CorpusError(f"The file {path} of {label!r} {what}.{hint} Text itself goes to Corpus.from_documents.")
        if path.stat().st_size == 0:
            raise CorpusError(f"The file {path} of {label!r} is empty: leave it out, or write it anew.")
        paths.append(path)
    return paths


def _stamps(paths: Sequence[Path]) -> list[list[int]]:
    return [[path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


class _Lines:
    """Lines of one file, with their place; a line is never read further than ``longest`` bytes."""

    def __init__(self, path: Path, file: BinaryIO, byte: int, line: int, longest: int) -> None:
        self.path, self.byte, self.line, self._file, self._longest = path, byte, line, file, longest
        file.seek(byte)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """``(text without line end, byte of its first character, line number from 1)``."""
        while True:
            data = self._file.readline(self._longest + 3)  # a mark of two bytes and a limit that was kept
            if not data:
                return
            begin = self.byte
            self.byte += len(data)
            self.line += 1
            if len(data.rstrip(b"\r\n")) > self._longest:
                raise CorpusError(
                    f"{self.path}, line {self.line} (byte {begin}) is longer than {self._longest:,} bytes. Split it, or "
                    "allow longer ones with longest_document=; a tokenizer needs some hundred bytes of memory for each."
                )
            yield self._decode(data, begin), begin, self.line

    def _decode(self, data: bytes, begin: int) -> str:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{self.path}, line {self.line}: byte {begin + error.start} (0x{data[error.start]:02X}) is not UTF-8 "
                f"({error.reason}). Convert the file to UTF-8; nothing is replaced or left out."
            ) from None
        if begin == 0:
            text = text.removeprefix("\ufeff")  # a byte order mark is no text
        return text.removesuffix("\n").removesuffix("\r")


class TextFiles(Source):
    """Files of plain text.

    Args:
        paths: read in this order.
        document: see :data:`DocumentRule`.
        longest: most bytes of a document.
    """

    def __init__(self, paths: Sequence[Path], document: DocumentRule, longest: int) -> None:
        self.paths, self.document, self.longest = list(paths), document, longest
        self.start = [0, 0, 0]

    def stamp(self) -> list[list[int]]:
        """See :meth:`Source.stamp`."""
        return _stamps(self.paths)

    def describe(self) -> dict[str, Any]:
        """Names of the files, not their folders."""
        return {"kind": "text", "document": self.document, "files": [path.name for path in self.paths]}

    def read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """Cursor: file, byte, lines before it."""
        first, byte, line = cursor
        for index in range(first, len(self.paths)):
            with self.paths[index].open("rb") as file:
                lines = _Lines(self.paths[index], file, byte, line, self.longest)
                for document in self._documents(lines):
                    yield document, [index, lines.byte, lines.line]
            byte = line = 0

    def _documents(self, lines: _Lines) -> Iterator[str]:
        if self.document == "line":
            yield from (text for text, _, _ in lines if text.strip())
            return
        held: list[str] = []
        size = first = 0
        for text, _, number in lines:
            if self.document == "paragraph" and not text.strip():
                if held:
                    yield "\n".join(held)
                held, size = [], 0
                continue
            first = number if not held else first
            held.append(text)
            size += len(text.encode()) + 1
            if size > self.longest + 1:
                what = "paragraph" if self.document == "paragraph" else "file"
                raise CorpusError(
                    f"{lines.path}: the {what} that begins at line {first} is longer than {self.longest:,} bytes. Take "
                    'document="line", or allow longer ones with longest_document=; a tokenizer needs some hundred bytes '
                    "of memory for each."
                )
        if any(text.strip() for text in held):
            yield "\n".join(held)


class JsonLines(Source):
    """Files with one JSON object a line; ``field`` holds the text."""

    def __init__(self, paths: Sequence[Path], field: str, longest: int) -> None:
        self.paths, self.field, self.longest = list(paths), field, longest
        self.start = [0, 0, 0]

    def stamp(self) -> list[list[int]]:
        """See :meth:`Source.stamp`."""
        return _stamps(self.paths)

    def describe(self) -> dict[str, Any]:
        """Names of the files, not their folders."""
        return {"kind": "json lines", "field": self.field, "files": [path.name for path in self.paths]}

    def read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """Cursor: file, byte, lines before it."""
        first, byte, line = cursor
        for index in range(first, len(self.paths)):
            with self.paths[index].open("rb") as file:
                lines = _Lines(self.paths[index], file, byte, line, self.longest)
                for text, begin, number in lines:
                    if text.strip():
                        yield self._text(text, lines.path, number, begin), [index, lines.byte, lines.line]
            byte = line = 0

    def _text(self, line: str, path: Path, number: int, begin: int) -> str:
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CorpusError(f"{path}, line {number} (byte {begin}) is not JSON: {error}.") from None
        if not isinstance(entry, dict) or self.field not in entry:
            found = f"fields {', '.join(map(repr, entry))}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
            near = nearest(self.field, entry, 1) if isinstance(entry, dict) else []
            hint = f" Did you mean field={near[0]!r}?" if near else ""
            raise CorpusError(f"{path}, line {number} has no field {self.field!r}; found {found}.{hint}")
        return checked_text(entry[self.field], f"{path}, line {number}, field {self.field!r}", self.longest)


class ParquetFiles(Source):
    """Parquet files; ``column`` holds the text. Needs pyarrow (extra ``datasets``)."""

    def __init__(self, paths: Sequence[Path], column: str, longest: int) -> None:
        self.paths, self.column, self.longest = list(paths), column, longest
        self.start = [0, 0]
        self._parquet = _pyarrow_parquet()
        for path in self.paths:
            self._open(path)

    def stamp(self) -> list[list[int]]:
        """See :meth:`Source.stamp`."""
        return _stamps(self.paths)

    def describe(self) -> dict[str, Any]:
        """Names of the files, not their folders."""
        return {"kind": "parquet", "column": self.column, "files": [path.name for path in self.paths]}

    def _open(self, path: Path) -> Any:
        try:
            file = self._parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise CorpusError(f"{path} cannot be read as Parquet: {error}") from None
        schema = file.schema_arrow
        if self.column not in schema.names:
            raise CorpusError(missing_column(str(path), self.column, schema.names))
        kind = str(schema.field(self.column).type)
        if kind not in ("string", "large_string", "string_view"):
            raise CorpusError(f"{path}: the column {self.column!r} holds {kind}; a corpus is made of strings.")
        return file

    def read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """Cursor: file, row."""
        first, row = cursor
        for index in range(first, len(self.paths)):
            path = self.paths[index]
            file = self._open(path)
            begin = 0
            for group in range(file.num_row_groups):
                length = file.metadata.row_group(group).num_rows
                if begin + length > row:
                    at = begin
                    for batch in file.iter_batches(256, row_groups=[group], columns=[self.column]):
                        if at + batch.num_rows > row:
                            for value in batch.column(0)[max(0, row - at) :].to_pylist():
                                place = f"{path}, row {row}, column {self.column!r}"
                                row += 1
                                yield checked_text(value, place, self.longest), [index, row]
                        at += batch.num_rows
                begin += length
            row = 0


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("Parquet files need pyarrow: pip install 'pellucid[datasets]'.") from None
    return pyarrow.parquet


# -- data sets and lists -----------------------------------------------------------------------------------------------


class DatasetRows(Source):
    """A Hugging Face ``Dataset`` or ``IterableDataset`` (streamed); ``column`` holds the text."""

    READ_AT_ONCE = 256

    def __init__(self, label: str, dataset: Any, column: str, longest: int) -> None:
        self.dataset, self.column, self.longest, self._label = dataset, column, longest, label
        self.start = [0]
        if not hasattr(dataset, "column_names"):
            raise InputError(
                f"datasets[{label!r}] is a Hugging Face data set; found {type(dataset).__name__}. Strings in memory go to "
                "Corpus.from_documents."
            )
        names = dataset.column_names  # None where a streamed data set does not know before it is read
        if isinstance(names, Mapping):
            raise InputError(
                f"The data set of {label!r} is a dictionary of splits ({', '.join(map(repr, names))}): give one of them."
            )
        if names is not None and column not in names:
            raise CorpusError(missing_column(f"The data set of {label!r}", column, names))

    def describe(self) -> dict[str, Any]:
        """The column; a data set's content is hashed as it is read."""
        return {"kind": "dataset", "column": self.column}

    def read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """Cursor: row."""
        row = cursor[0]
        for value in self._values(row):
            place = f"the data set of {self._label!r}, row {row}, column {self.column!r}"
            row += 1
            yield checked_text(value, place, self.longest), [row]

    def _values(self, row: int) -> Iterator[Any]:
        if isinstance(self.dataset, Sequence) or hasattr(self.dataset, "__len__"):
            for begin in range(row, len(self.dataset), self.READ_AT_ONCE):
                yield from self.dataset[begin : begin + self.READ_AT_ONCE][self.column]
            return
        for entry in self.dataset.skip(row) if row else self.dataset:
            if self.column not in entry:
                raise CorpusError(missing_column(f"The data set of {self._label!r}", self.column, list(entry)))
            yield entry[self.column]


class Documents(Source):
    """Strings in memory."""

    def __init__(self, label: str, texts: Sequence[str], longest: int) -> None:
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise InputError(
                f"The documents of {label!r} are a list of strings; found {type(texts).__name__}. One text alone is "
                "[text]; files go to Corpus.from_text."
            )
        self.texts, self.longest, self._label = list(texts), longest, label
        self.start = [0]
        for index, text in enumerate(self.texts):
            checked_text(text, f"document {index} of {label!r}", longest)

    def describe(self) -> dict[str, Any]:
        """Their number."""
        return {"kind": "documents"}

    def read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """Cursor: document."""
        for index in range(cursor[0], len(self.texts)):
            yield self.texts[index], [index + 1]


class TokenRows(Source):
    """Token ids in memory, or in a memory-mapped array: a long row, rows, or a list of rows of any length."""

    def __init__(self, label: str, tokens: Any) -> None:
        self.start = [0]
        self._label = label
        self._rows = self._as_rows(tokens)
        if not self._rows:
            raise CorpusError(f"The label {label!r} has no tokens.")

    def describe(self) -> dict[str, Any]:
        """Nothing beside its kind."""
        return {"kind": "token ids"}

    def _as_rows(self, tokens: Any) -> list[Any]:
        if isinstance(tokens, Tensor):
            tokens = tokens.detach().cpu().numpy()
        if isinstance(tokens, np.ndarray):
            if tokens.ndim not in (1, 2):
                raise InputError(f"tokens[{self._label!r}] is [pos] or [document, pos]; found shape {tokens.shape}.")
            rows: list[Any] = [tokens] if tokens.ndim == 1 else list(tokens)
        elif isinstance(tokens, Sequence) and not isinstance(tokens, str):
            rows = [tokens] if tokens and all(isinstance(entry, int) for entry in tokens) else list(tokens)
        else:
            raise InputError(f"tokens[{self._label!r}] is a tensor, an array or a list; found {type(tokens).__name__}.")
        return [self._as_row(row, index) for index, row in enumerate(rows)]

    def _as_row(self, row: Any, index: int) -> Any:
        array = row.detach().cpu().numpy() if isinstance(row, Tensor) else np.asarray(row)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InputError(
                f"tokens[{self._label!r}] are integers, one row a document; document {index} has dtype "
                f"{array.dtype} and shape {array.shape}."
            )
        return array

    def read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """Cursor: row."""
        for index in range(cursor[0], len(self._rows)):
            row = self._rows[index].astype(np.int64)
            if row.size and int(row.min()) < 0:
                raise CorpusError(
                    f"Document {index} of {self._label!r} has the token id {int(row.min())}: ids are 0 or more. Padding is "
                    "left out; rows may have different lengths."
                )
            yield row, [index + 1]


# -- checks ------------------------------------------------------------------------------------------------------------


def checked_text(value: Any, place: str, longest: int) -> str:
    """``value`` if it is a string that can be tokenised.

    Raises:
        CorpusError: no string, too long, or a character that UTF-8 does not have.
    """
    if not isinstance(value, str):
        raise CorpusError(f"{place} holds {type(value).__name__}, not text: leave such rows out.")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{place}: character {error.start} (U+{ord(value[error.start]):04X}) is half of a pair and no text."
        ) from None
    if size > longest:
        raise CorpusError(
            f"{place} is {size:,} bytes long, over {longest:,}. Split it, or allow longer ones with longest_document=; a "
            "tokenizer needs some hundred bytes of memory for each."
        )
    return value


def missing_column(place: str, column: str, names: Sequence[str]) -> str:
    """What to say where a column is missing."""
    near = nearest(column, names, 1)
    hint = f" Did you mean column={near[0]!r}?" if near else ""
    return f"{place} has no column {column!r}; its columns are {', '.join(map(repr, names))}.{hint}"


def as_tensor(array: Any) -> Tensor:
    """An array of integers as an int64 tensor of its own."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
